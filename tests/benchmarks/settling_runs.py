"""Short runs for what the module leaves open: loss weighting, learning rate, average of weights.

    python tests/benchmarks/settling_runs.py                  the real network at 32x32
    python tests/benchmarks/settling_runs.py --steps 1000     longer, surer

Every run sees the same images, timesteps and noise in the same order from the same initial weights
(one of them from another seed: what differs by chance), and differs from the plain one in a single
thing. Averages of the weights are kept side by side within one run. Each result is judged by

- the error of the noise on held-out fabrics, the same ones with the same noise for all, in ten bins
  of t, and the mean difference to the plain run with its standard error over the images;
- samples, held against held-out fabrics by evaluate_fabrics.py;
- the eye: settling.png has the first samples of all of them, grown from the same noise.

Interrupted, the same command goes on with the runs that are missing. Writes settling.json and
settling.png into training_results/reference/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from ema_pytorch import EMA
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from reference_run import ROOT, exercise3, run_script

from ddpm_basics.hardware import device_name, pick_device
from ddpm_basics.images import load_images
from ddpm_basics.model import export_weights
from ddpm_basics.training import BINS, fixed_errors

RUNS = {  # name: what is added to the command of the plain run
    "plain": [],
    "other seed": ["--seed", "43"],
    "min-SNR": ["--min-snr"],
    "min-SNR x (1 + 1/SNR)": ["--min-snr", "--snr-plus-one"],
    "warm-up": ["--warmup-steps", "100"],
    "decay": ["--lr-final", "2e-5"],
}
OURS = "ours"  # the average that exercise3_train.py keeps
AVERAGES = {  # further ones, kept beside it in the runs of AVERAGED: arguments of ema_pytorch.EMA
    "power 3/4": {"beta": exercise3.EMA_DECAY, "update_every": 1, "power": 3 / 4},
    "the library's": {"beta": 0.995, "update_every": 10},
}
NONE = "none"  # the weights themselves
AVERAGED = ("plain", "decay")
SHOWN = 8  # samples of each result in settling.png


def parse_options(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=500, help="of each run")
    add("--batch-size", type=int, default=16)
    add("--image-size", type=int, default=32)
    add("--heldout", type=int, default=4000, help="held-out fabrics that samples are held against")
    add("--errors", type=int, default=500, help="how many of them for the error of the noise")
    add("--samples", type=int, default=256, help="drawn from each result")
    add("--folder", type=Path, default=ROOT / "training_results" / "settling",
        help="where fabrics, weights and samples go")  # fmt: skip
    add("--reference", type=Path, default=ROOT / "training_results" / "reference")
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    add("training", nargs="*", help="options for every training, after --")
    return parser.parse_args(argv)


def render(options, split, *words):
    """A folder of fabrics in the size that is trained; rendered once."""
    folder = options.folder / split
    run_script("prepare_fabrics.py", "--split", split, "--size", options.image_size,
               "--output", folder, *words)  # fmt: skip
    return folder


def train(options, name):
    """Train one run; returns (its Run, {name of an average: network that has it})."""
    args = exercise3.parse_options(
        ["--train", "--data", str(options.folder / "train"), "--image-size",
         str(options.image_size), "--heldout", str(options.folder / "heldout"), "--batch-size",
         str(options.batch_size), "--steps", str(options.steps), *options.training, *RUNS[name]]
    )  # fmt: skip
    run = exercise3.start_run(args)
    averages = {}
    if name in AVERAGED:
        averages = {key: EMA(run.diffusion, use_foreach=True, **how)
                    for key, how in AVERAGES.items()}  # fmt: skip
    for step in tqdm(range(1, options.steps + 1), desc=name, unit="step"):
        run.step = step
        exercise3.train_step(run, step)
        for average in averages.values():
            average.update()
    models = {OURS: run.ema.ema_model} | {key: ema.ema_model for key, ema in averages.items()}
    return run, models | ({NONE: run.diffusion} if name in AVERAGED else {})


def judge(options, run, model, name):
    """Held-out errors of one network, and evaluate_fabrics.py's report on its samples."""
    stem = options.folder / "".join(c if c.isalnum() else "_" for c in name)
    unseen, _ = load_images(options.folder / "heldout", options.image_size)
    # The noise is the same for all, also where training had another seed.
    same_noise = argparse.Namespace(**vars(run.args) | {"seed": exercise3.RANDOM_SEED})
    fixed = dataclasses.replace(run, args=same_noise)
    order = np.random.default_rng(0).permutation(len(unseen))  # every tradition in every bin
    chosen = unseen[order[: options.errors]].to(run.device)
    errors = fixed_errors(fixed, model, chosen)
    weights, samples = stem.with_suffix(".pt"), stem.with_suffix(".samples")
    export_weights(dataclasses.replace(run, ema=SimpleNamespace(ema_model=model)), weights)
    # Asked in nearly pure noise as well, where the settings differ most.
    run_script("exercise1_generate.py", "--weights", weights, "--samples-dir", samples,
               "--num-samples", options.samples, "--seed", 5000, "--min-signal", 0,
               "--output", f"{stem}.grid.png")  # fmt: skip
    run_script("evaluate_fabrics.py", samples, "--train", options.folder / "train",
               "--heldout", options.folder / "heldout", "--output", f"{stem}.evaluation.json",
               "--figure", f"{stem}.neighbours.png")  # fmt: skip
    weights.unlink()
    report = json.loads(Path(f"{stem}.evaluation.json").read_text())
    return {"errors": errors, "samples": str(samples), "headline": report["headline"]}


def result_of(options, name):
    """What one run came to, from its file where it has been done before."""
    path = options.folder / f"result_{list(RUNS).index(name)}.json"
    if not path.exists():
        run, models = train(options, name)
        result = {"run": name, "averages": {}}
        for average, model in models.items():
            result["averages"][average] = judge(options, run, model, f"{name} {average}")
        path.write_text(json.dumps(result))
    return json.loads(path.read_text())


def row_of(result, average, plain):
    """One line of the table: a result beside that of the plain run."""
    judged = result["averages"][average]
    errors = np.asarray(judged["errors"])
    difference = errors - np.asarray(plain)
    return {
        "run": result["run"],
        "options": RUNS[result["run"]],
        "average": average,
        "heldout_error": errors.mean(),
        "difference_to_plain": difference.mean(),
        "standard_error_of_difference": difference.std(ddof=1) / len(difference) ** 0.5,
        "heldout_bins": [errors[b::BINS].mean() for b in range(BINS)],
        **judged["headline"],
    }


def draw(results, path):
    """The first samples of every result, a row each."""
    rows = [(result["run"], average, Path(judged["samples"]))
            for result in results for average, judged in result["averages"].items()]  # fmt: skip
    figure, axes = plt.subplots(
        len(rows), SHOWN, figsize=(SHOWN + 2.4, len(rows)), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for line, (name, average, folder) in zip(axes, rows, strict=True):
        for axis, file in zip(line, sorted(folder.glob("*.png")), strict=False):
            axis.imshow(np.asarray(Image.open(file)), interpolation="bicubic")
        for axis in line:
            axis.set_axis_off()
        text = name if average == OURS else f"{name},\naverage: {average}"
        line[0].text(-0.1, 0.5, text, transform=line[0].transAxes, ha="right", va="center",
                     fontsize=12)  # fmt: skip
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main(argv=None):
    options = parse_options(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    options.reference.mkdir(parents=True, exist_ok=True)
    render(options, "train")
    render(options, "heldout", "--count", options.heldout)
    results = [result_of(options, name) for name in options.runs]
    plain = result_of(options, "plain")["averages"][OURS]["errors"]
    rows = [row_of(result, average, plain) for result in results for average in result["averages"]]
    record = {
        "hardware": device_name(pick_device("auto")),
        "torch": str(torch.__version__),
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "heldout_images_for_errors": len(plain),
        "samples": options.samples,
        "rows": rows,
    }
    (options.reference / "settling.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(results, options.reference / "settling.png")
    print(f"\n{'run':<24}{'average':<16}{'held-out error':>16}{'to plain':>20}{'distance':>10}")
    for row in rows:
        apart = f"{row['difference_to_plain']:+.4f} +- {row['standard_error_of_difference']:.4f}"
        print(f"{row['run']:<24}{row['average']:<16}{row['heldout_error']:>16.4f}{apart:>20}"
              f"{row['median_ratio']:>10.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
