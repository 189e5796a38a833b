"""The recipe of the bundled weights: as many steps as a time allows, on fabrics drawn afresh.

    python tests/benchmarks/reference_run.py --minutes 9.5      a GPU; for a night on two CPU cores:
    python tests/benchmarks/reference_run.py --minutes 600 -- --batch-size 32 --lr 3e-4

Instead of the same 1,059 fabrics again and again, --count of them are drawn first, and the network
sees each of them a few times. The step is exercise 3's, with its stratified timesteps, dropped
labels and loss, but the learning rate follows the clock, a cosine that ends with the time, and the
average of the weights is a power function (Karras et al. 2024, arXiv 2312.02696, gamma 16), whose
width grows with the run. After -- come options for exercise 3.

Writes to --folder: losses.csv, heldout.csv (loss on held-out fabrics with and without labels, and
by quarter of the timesteps), samples on the way, run.json, and weights.pt. Interrupted, the same
command goes on; the minutes are those of training, pauses not counted.
"""

import csv
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from ema_pytorch import KarrasEMA  # noqa: E402

import exercise3_train as exercise3  # noqa: E402
from ddpm_basics import checkpoints, runs, training  # noqa: E402
from ddpm_basics.console import UserError, new_parser  # noqa: E402
from ddpm_basics.fabrics.folder import draw_fabrics  # noqa: E402
from ddpm_basics.hardware import pick_device  # noqa: E402
from ddpm_basics.model import LabelledUnet  # noqa: E402
from ddpm_basics.weight_files import export_weights  # noqa: E402

RECIPE = ["--batch-size", "128", "--lr", "7e-4", "--warmup", "300", "--compile", "on"]
GAMMA = 16  # of the average
MOMENTS = (0.005, 0.015, 0.04, 0.1, 0.25, 0.5, 0.75, 1.0)  # of samples, in parts of the time
QUARTERS = [f"{kind}{i}" for kind in ("labelled", "plain") for i in range(4)]
COLUMNS = {
    "losses.csv": ["step", "loss", "lr", "seconds", "fabrics"],
    "heldout.csv": ["step", "seconds", "labelled", "plain", *QUARTERS],
}


def parse_options(argv=None):
    """Read the command line."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=9.5, help="of training")
    add("--count", type=int, default=31_010, help="fabrics to draw")
    add("--every", type=float, default=30, help="seconds between rows of heldout.csv and saves")
    add("--folder", type=Path, default=Path("training_results/recipe"), help="where all of it goes")
    add("training", nargs="*", help="options for exercise3_train.py, after --")
    return parser.parse_args(argv)


def add_row(run, name, *values):
    """Append a row to a table of the run, which is begun with the names of its columns."""
    path = run.options.results_dir / name
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([COLUMNS[name]] * is_new)
        writer.writerow([f"{value:.6g}" for value in values])


def drop_later_rows(run):
    """Take out of the tables what a resumed run is going to write again."""
    for name in COLUMNS:
        path = run.options.results_dir / name
        if path.exists():
            head, *rows = path.read_text().splitlines(keepends=True)
            kept = [row for row in rows if int(float(row.split(",")[0])) <= run.step]
            path.write_text("".join([head, *kept]))


def start(options):
    """Begin a run, or take it up where its newest checkpoint has left it."""
    team = Accelerator(cpu=pick_device(options.device).type == "cpu")
    found = checkpoints.newest_good_checkpoint(options.results_dir)
    if options.precision == "auto" and found:
        options.precision = checkpoints.recorded_precision(found[1])
    run = exercise3.start(options, team)
    run.ema = KarrasEMA(run.diffusion, gamma=GAMMA, update_every=1)
    if found:
        checkpoints.restore(run, *found)
    drop_later_rows(run)
    return run


def train(options, ours):
    """Take steps until the time is over; save, measure and draw on the way."""
    options.results_dir.mkdir(parents=True, exist_ok=True)
    run = start(options)
    network = LabelledUnet(run.diffusion)
    rows = slice(0, options.batch_size)
    compiled = options.compile == "on" and training.compile_checked(
        network, lambda: exercise3.loss_of_rows(run, network, run.numbers(1), rows), run.say
    )
    runs.start_records(run, compiled)
    budget, peak, done = 60 * ours.minutes, options.lr, run.seconds
    moments = [part * budget for part in MOMENTS if part * budget > done]
    began, losses, saved = time.monotonic() - done, [], done
    while run.seconds < budget:
        options.lr = peak * 0.5 * (1 + math.cos(math.pi * run.seconds / budget))
        run.step += 1
        losses.append(exercise3.train_step(run, network, run.step))
        run.seconds = time.monotonic() - began
        last = run.seconds >= budget
        if run.step % options.log_every == 0 or last:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                raise UserError(
                    checkpoints.not_finite_message(run, f"The loss of step {run.step} is")
                )
            losses = []
            rate = training.learning_rate(run.step, options)
            seen = min(ours.count, run.step * run.effective_batch)
            add_row(run, "losses.csv", run.step, mean, rate, run.seconds, seen)
            run.say(f"{run.seconds:8.0f} s  step {run.step:6,}  loss {mean:.4f}  rate {rate:.2e}")
        if run.seconds - saved >= ours.every or last:
            measure(run)
            saved = run.seconds
        if moments and run.seconds >= moments[0]:
            moments = [moment for moment in moments if moment > run.seconds]
            exercise3.draw_samples(run)
    export_weights(run.ema.ema_model, options.weights_out, run.step, run.config)
    run.say(f"Wrote {options.weights_out}, and its record in {options.results_dir}.")


def measure(run):
    """Add a row to heldout.csv, and save."""
    told, plain = (exercise3.fixed_losses(run, run.heldout, told) for told in (True, False))
    quarters = [part.mean().item() for losses in (told, plain) for part in losses.tensor_split(4)]
    means = told.mean().item(), plain.mean().item()
    add_row(run, "heldout.csv", run.step, run.seconds, *means, *quarters)
    run.say(f"held-out loss {means[0]:.4f} with labels, {means[1]:.4f} without")
    checkpoints.save_checkpoint(run)


def main(argv=None):
    """Draw the fabrics, then run exercise 3's command line with another way to train."""
    ours = parse_options(argv)
    fabrics = ours.folder / "fabrics"
    draw_fabrics(fabrics, count=ours.count)
    exercise3.train = lambda options: train(options, ours)
    return exercise3.main([
        "--train", *RECIPE, "--data", str(fabrics), "--results-dir", str(ours.folder),
        "--weights-out", str(ours.folder / "weights.pt"), *ours.training,
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
