"""How close few steps come to the 1000-step result, with the shipped weights.

    python tests/benchmarks/measure_samplers.py              64 images; hours on two CPU cores
    python tests/benchmarks/measure_samplers.py --images 8   a first impression; 64 continue it

For each image the same noise x_T is followed by DDIM with all 1000 steps, by DDIM with fewer, and
by DPM-Solver++. The distance is the root of the mean squared difference to the 1000-step image,
in units of the pixel range 0 to 1. Writes training_results/reference/samplers.json after every
batch: interrupted, the same command goes on. Its "enough_steps" is the smallest number of
DPM-Solver++ steps that is on average as close as DDIM with 250; exercise 1's default has to be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from bench_sampling import hardware  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

import exercise1_generate as exercise1  # noqa: E402
from ddpm_basics.console import share  # noqa: E402
from ddpm_basics.files import file_digest, write_atomically  # noqa: E402
from ddpm_basics.hardware import pick_device, pick_precision, prepare_network  # noqa: E402
from ddpm_basics.model import load_weights  # noqa: E402
from ddpm_basics.sampling import SAMPLERS, starting_noise  # noqa: E402

REFERENCE = ("ddim", 1000)
RUNS = [("ddim", steps) for steps in (20, 50, 250)]
RUNS += [("dpmpp", steps) for steps in (5, 10, 15, 20, 25)]


def parse_options(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", type=Path, default=ROOT / exercise1.WEIGHTS)
    add("--images", type=int, default=64)
    add("--batch-size", type=int, default=16)
    add("--min-signal", type=share, default=exercise1.MIN_SIGNAL,
        help="alpha_t below which the network is not asked")  # fmt: skip
    add("--seed", type=int, default=1000, help="of the first image")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    add("--keep", type=Path, default=None,
        help="folder for the results of DDIM, which another solver can use again")  # fmt: skip
    add("--compile", action="store_true", help="takes a minute, saves a little of the time")
    add("--output", type=Path, default=ROOT / "training_results" / "reference" / "samplers.json")
    return parser.parse_args(argv)


def distances(diffusion, seeds, draw_from):
    """Draw these seeds with every sampler; return {"dpmpp 20": [distance of each image], ...}."""
    shape = (diffusion.channels, *diffusion.image_size)
    x_T, _ = starting_noise(seeds, shape)

    def draw(sampler, steps):
        return draw_from(seeds, x_T, sampler, steps)

    reference = draw(*REFERENCE)
    return {
        f"{sampler} {steps}": (draw(sampler, steps) - reference)
        .square().mean((1, 2, 3)).sqrt().tolist()
        for sampler, steps in RUNS
    }  # fmt: skip


def make_draw(diffusion, device, precision, options, key, bar):
    """Return draw(seeds, x_T, sampler, steps), which keeps DDIM's results in files if asked to."""

    def draw(seeds, x_T, sampler, steps):
        name = f"{key}_{sampler}{steps}_{seeds[0]}to{seeds[-1]}.pt"
        path = options.keep / name if options.keep and sampler == "ddim" else None
        if path and path.exists():
            bar.update(len(seeds) * steps)
            return torch.load(path, weights_only=True).to(device)
        images = SAMPLERS[sampler](
            diffusion, x_T.to(device, memory_format=torch.channels_last), steps,
            lambda *_: bar.update(len(seeds)), None, precision, options.min_signal,
        )  # fmt: skip
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as temporary:
                torch.save(images.cpu(), temporary)
        return images

    return draw


def summary(record):
    """Add means, their standard errors, and what steps they support to a record; return it."""
    images = list(record["distances"].values())
    rows = []
    for sampler, steps in RUNS:
        found = [image[f"{sampler} {steps}"] for image in images]
        nearer = [mine <= image["ddim 250"] for mine, image in zip(found, images, strict=True)]
        rows.append({
            "sampler": exercise1.SAMPLER_NAMES[sampler],
            "steps": steps,
            "distance": statistics.mean(found),
            "standard_error": statistics.stdev(found) / len(found) ** 0.5 if found[1:] else None,
            "as_near_as_ddim_250": sum(nearer) / len(nearer),
        })  # fmt: skip
    bound = next(row["distance"] for row, run in zip(rows, RUNS, strict=True)
                 if run == ("ddim", 250))  # fmt: skip
    enough = [row["steps"] for row, (sampler, _) in zip(rows, RUNS, strict=True)
              if sampler == "dpmpp" and row["distance"] <= bound]  # fmt: skip
    return record | {
        "images": len(images), "rows": rows, "enough_steps": min(enough, default=None)}  # fmt: skip


def main(argv=None):
    options = parse_options(argv)
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    diffusion, facts = load_weights(options.weights)
    prepare_network(diffusion, device, precision, compiled=options.compile)
    record = {
        "weights": file_digest(options.weights),
        "step": facts["step"],
        "image_size": facts["image_size"],
        "precision": str(precision).removeprefix("torch."),
        "min_signal": options.min_signal,
        "distances": {},
    }
    if options.output.exists():
        earlier = json.loads(options.output.read_text())
        if all(earlier.get(key) == record[key] for key in record if key != "distances"):
            record["distances"] = earlier["distances"]
    machine = hardware(device)
    record["hardware"] = {key: machine[key] for key in ("cpu", "threads", "gpu", "torch")}
    seeds = range(options.seed, options.seed + options.images)
    missing = [seed for seed in seeds if str(seed) not in record["distances"]]
    per_image = REFERENCE[1] + sum(steps for _, steps in RUNS)
    started = time.perf_counter()
    key = f"{record['weights'][:8]}_{record['precision']}_{options.min_signal}"
    with tqdm(total=per_image * len(missing), unit="step") as bar:
        draw = make_draw(diffusion, device, precision, options, key, bar)
        for first in range(0, len(missing), options.batch_size):
            batch = missing[first : first + options.batch_size]
            found = distances(diffusion, batch, draw)
            for position, seed in enumerate(batch):
                record["distances"][str(seed)] = {k: v[position] for k, v in found.items()}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(options.output) as temporary:
                temporary.write_text(json.dumps(summary(record), indent=1) + "\n")
    record = summary(record)
    for row in record["rows"]:
        print(f"{row['sampler']:14}{row['steps']:4}  {row['distance']:.5f}")
    print(f"{record['images']} images; enough steps of DPM-Solver++: {record['enough_steps']}; "
          f"wrote {options.output} in {time.perf_counter() - started:.0f} s.")  # fmt: skip


if __name__ == "__main__":
    main()
