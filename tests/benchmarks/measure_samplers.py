"""How close few steps come to the 1000-step result, with the shipped weights.

    python tests/benchmarks/measure_samplers.py              64 images; hours on two CPU cores
    python tests/benchmarks/measure_samplers.py --images 8   a first impression; 64 continue it
    python tests/benchmarks/measure_samplers.py --guided     16 images, labels in turn, guided

For each image the same noise x_T is followed by DDIM with all 1000 steps, by DDIM with fewer, and
by DPM-Solver++. The distance is the root of the mean squared difference to the 1000-step image,
in units of the pixel range 0 to 1. Writes training_results/reference/samplers.json, or
samplers_guided.json, after every batch: interrupted, the same command goes on. "enough_steps" is
the smallest number of steps of DPM-Solver++ that is on average as close as DDIM with 250; exercise
1's default has to be.
"""

import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tqdm.auto import tqdm  # noqa: E402

import exercise1_generate as exercise1  # noqa: E402
from ddpm_basics import hardware  # noqa: E402
from ddpm_basics.console import duration, new_parser  # noqa: E402
from ddpm_basics.files import file_digest, read_json, write_json  # noqa: E402
from ddpm_basics.model import label_vectors  # noqa: E402
from ddpm_basics.options import DEVICES, PRECISIONS, default_weights  # noqa: E402
from ddpm_basics.weight_files import load_weights  # noqa: E402

REFERENCE = ("ddim", 1000)
COURSE = ("ddim", 250)  # what the course itself draws with
RUNS = [("ddim", steps) for steps in (20, 50, 250)]
RUNS += [("dpmpp", steps) for steps in (5, 10, 15, 20, 22, 25)]


def parse_options(argv=None):
    """Read the command line."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, default=default_weights(), help="weight file")
    add("--guided", action="store_true", help="draw the labels in turn, with exercise 1's guidance")
    add("--images", type=int, help="how many to compare (default: 64, or 16 with --guided)")
    add("--batch-size", type=int, default=16, help="images at once")
    add("--seed", type=int, default=1000, help="of the first image")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--precision", choices=PRECISIONS, default="auto", help="of the network")
    add(
        "--output", type=Path, help="file to write (default: samplers.json or samplers_guided.json)"
    )
    options = parser.parse_args(argv)
    options.images = options.images or (16 if options.guided else 64)
    name = "samplers_guided.json" if options.guided else "samplers.json"
    options.output = options.output or ROOT / "training_results" / "reference" / name
    return options


def distances(diffusion, seeds, guidance, precision, bar):
    """Draw these seeds with every sampler; return {"dpmpp 20": [distance of each image], ...}."""
    labels = label_vectors(diffusion, diffusion.label_names, seeds) if guidance else None

    def draw(sampler, steps):
        how = Namespace(sampler=sampler, steps=steps, guidance=guidance or 1.0)
        with hardware.autocast(diffusion.betas.device, precision):
            return exercise1.draw(diffusion, seeds, labels, how, bar)

    reference = draw(*REFERENCE)
    return {
        f"{sampler} {steps}": (draw(sampler, steps) - reference)
        .square().mean((1, 2, 3)).sqrt().tolist()
        for sampler, steps in RUNS
    }  # fmt: skip


def summary(record):
    """Add means, their standard errors, and what steps they support to a record; return it."""
    images = list(record["distances"].values())
    rows = []
    for sampler, steps in RUNS:
        found = [image[f"{sampler} {steps}"] for image in images]
        nearer = [mine <= image["{} {}".format(*COURSE)]
                  for mine, image in zip(found, images, strict=True)]  # fmt: skip
        rows.append({
            "sampler": exercise1.SAMPLER_NAMES[sampler], "steps": steps,
            "distance": statistics.mean(found),
            "standard_error": statistics.stdev(found) / len(found) ** 0.5 if found[1:] else None,
            "as_near_as_ddim_250": sum(nearer) / len(nearer),
        })  # fmt: skip
    bound = rows[RUNS.index(COURSE)]["distance"]
    enough = [row["steps"] for row, (sampler, _) in zip(rows, RUNS, strict=True)
              if sampler == "dpmpp" and row["distance"] <= bound]  # fmt: skip
    found = {"images": len(images), "rows": rows, "enough_steps": min(enough, default=None)}
    return record | found


def main(argv=None):
    """Measure what is missing, write after every batch, print the table."""
    options = parse_options(argv)
    started = time.perf_counter()
    device = hardware.pick_device(options.device)
    diffusion, facts = load_weights(options.weights)
    precision = hardware.pick_precision(options.precision, device, diffusion)
    hardware.prepare_to_sample(diffusion, device, precision)
    guidance = exercise1.GUIDANCE if options.guided else None
    record = {"weights": file_digest(options.weights), "step": facts.step, "guidance": guidance,
              "image_size": facts.image_size, "precision": precision}  # fmt: skip
    earlier = read_json(options.output) or {}
    same = all(earlier.get(key) == value for key, value in record.items())
    record["distances"] = earlier["distances"] if same else {}
    record["hardware"] = hardware.describe(device)
    seeds = range(options.seed, options.seed + options.images)
    missing = [seed for seed in seeds if str(seed) not in record["distances"]]
    batches = [
        missing[i : i + options.batch_size] for i in range(0, len(missing), options.batch_size)
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    per_batch = REFERENCE[1] + sum(steps for _, steps in RUNS)
    with tqdm(total=per_batch * len(batches), unit="step") as bar:
        for batch in batches:
            found = distances(diffusion, batch, guidance, precision, bar)
            for position, seed in enumerate(batch):
                record["distances"][str(seed)] = {k: v[position] for k, v in found.items()}
            write_json(options.output, summary(record))
    record = summary(record)
    for row in record["rows"]:
        print(f"{row['sampler']:14}{row['steps']:4}  {row['distance']:.5f}")
    print(f"{record['images']} images; enough steps of DPM-Solver++: {record['enough_steps']}; "
          f"wrote {options.output} in {duration(time.perf_counter() - started)}.")  # fmt: skip


if __name__ == "__main__":
    main()
