"""The reference run, from the first step to the files that stand in the repository.

    python tests/benchmarks/reference_run.py                        on a GPU: everything, in full
    python tests/benchmarks/reference_run.py --every 10000          evaluate less often
    python tests/benchmarks/reference_run.py --skip-measurements    without the speed benchmarks
    python tests/benchmarks/reference_run.py -- --min-snr           more options for the training

1. exercise3_train.py trains and keeps a checkpoint at every evaluated step.
2. For each of them, exercise1_generate.py draws samples and ddpm_basics.evaluation holds them
   against held-out fabrics.
3. The checkpoint whose samples lie nearest to held-out fabrics (median of the distance ratios) is
   exported to models/, and its record replaces that of earlier runs in training_results/reference/.
4. The benchmarks of training and sampling, and the distances between the samplers, are measured.

Interrupted anywhere, the same command goes on. What is left to do by hand is named at the end.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ddpm_basics.console import new_parser  # noqa: E402
from ddpm_basics.files import write_json  # noqa: E402
from ddpm_basics.options import DEVICES  # noqa: E402
from ddpm_basics.weight_files import export_weights, load_weights, read_checkpoint  # noqa: E402

SAMPLE_SEED = 5000  # of the first sample of each evaluation


def parse_options(argv=None):
    """Read the command line."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=100_000, help="of the training")
    add("--every", type=int, default=5000, help="steps from one evaluation to the next")
    add("--samples", type=int, default=2000, help="drawn for each evaluation")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--data", type=Path, default=ROOT / "african_fabric_processed", help="training images")
    add("--heldout", type=Path, help="for the evaluation; rendered unless given")
    add("--folder", type=Path, default=ROOT / "training_results" / "full",
        help="where checkpoints, samples and evaluations go (0.6 GB for each)")  # fmt: skip
    add("--weights-out", type=Path, default=ROOT / "models" / "ddpm_african_fabrics.pt",
        help="the best weights")  # fmt: skip
    add("--reference", type=Path, default=ROOT / "training_results" / "reference",
        help="where their record goes")  # fmt: skip
    add("--skip-measurements", action="store_true", help="leave out step 4")
    add("training", nargs="*", help="options for exercise3_train.py, after --")
    return parser.parse_args(argv)


def run(*words):
    """Run a script or a module of the bundle in its folder; stop where it fails."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def train(options):
    """Train, or go on, or find that all is done."""
    resumed = any(options.folder.glob("model-*.pt"))
    run("exercise3_train.py", "--train", *(["--resume"] if resumed else []),
        "--steps", options.steps, "--save-every", options.every, "--data", options.data,
        "--keep", options.steps // options.every + 2, "--results-dir", options.folder,
        "--weights-out", options.folder / "last.pt", "--device", options.device,
        *options.training)  # fmt: skip


def evaluate(options, step):
    """Draw samples from a checkpoint and judge them; returns the report."""
    report = options.folder / f"evaluation-{step}.json"
    if not report.exists():
        samples = options.folder / f"samples-{step}"
        run("exercise1_generate.py", "--weights", options.folder / f"model-{step}.pt",
            "--num-samples", options.samples, "--seed", SAMPLE_SEED,
            "--samples-dir", samples, "--device", options.device,
            "--output", options.folder / f"grid-{step}.png")  # fmt: skip
        heldout = ["--heldout", options.heldout] if options.heldout else []
        run("-m", "ddpm_basics.evaluation", samples, "--train", options.data, *heldout,
            "--output", report, "--figure", options.folder / f"neighbours-{step}.png",
            "--device", options.device)  # fmt: skip
    return json.loads(report.read_text())


def export(checkpoint, out):
    """Write a checkpoint's EMA weights in the bundled format; an earlier file is kept beside it."""
    state = read_checkpoint(checkpoint)
    config = state["config"]  # from before this checkpoint's own step was noted in it
    config["training"] |= {"steps_done": state["step"], "seconds": round(state["seconds"], 1)}
    export_weights(load_weights(checkpoint)[0], out, state["step"], config)


def keep_record(options, best, reports):
    """Put the run's record, and the evaluations of all its checkpoints, into the reference folder.

    What an earlier run has left there goes away first; measurements of speed stay.
    """
    reference = options.reference
    reference.mkdir(parents=True, exist_ok=True)
    for earlier in (*reference.glob("stage*_*"), *reference.glob("sample-*.png")):
        shutil.rmtree(earlier) if earlier.is_dir() else earlier.unlink()
    names = ("losses.csv", "loss_curve.png", "run.json")
    for path in (*options.folder.glob("sample-*.png"), *(options.folder / n for n in names)):
        shutil.copy(path, reference)
    shutil.copy(options.folder / f"evaluation-{best}.json", reference / "evaluation.json")
    figure = reference / "evaluation_neighbours.png"
    shutil.copy(options.folder / f"neighbours-{best}.png", figure)
    rows = [{"step": step, "shipped": step == best, **report["headline"]}
            for step, report in sorted(reports.items())]  # fmt: skip
    write_json(reference / "checkpoints.json", rows)
    return rows


def main(argv=None):
    """Do all that the docstring says."""
    options = parse_options(argv)
    if options.steps % options.every:
        sys.exit(f"Error: --steps {options.steps} is no multiple of --every {options.every}.")
    train(options)
    steps = range(options.every, options.steps + 1, options.every)
    reports = {step: evaluate(options, step) for step in steps}
    best = min(reports, key=lambda step: reports[step]["headline"]["median_ratio"])
    export(options.folder / f"model-{best}.pt", options.weights_out)
    print(f"\n{'step':>8}  distance over floor, median")
    for row in keep_record(options, best, reports):
        mark = "  <- shipped" if row["shipped"] else ""
        print(f"{row['step']:>8}  {row['median_ratio']:.2f}{mark}")
    if not options.skip_measurements:
        for name, output, *more in (
            ("bench_training", "bench_training", "--compile", "--data", options.data),
            ("bench_sampling", "bench_sampling", "--weights", options.weights_out),
            ("measure_samplers", "samplers", "--weights", options.weights_out),
        ):
            run(f"tests/benchmarks/{name}.py", *more, "--device", options.device,
                "--output", options.reference / f"{output}.json")  # fmt: skip
    print(
        f"Wrote {options.weights_out} (step {best}) and its record in {options.reference}. Now "
        "rewrite models/README.md, then run docs/make_figures.py and "
        "tests/benchmarks/readme_figures.py."
    )


if __name__ == "__main__":
    main()
