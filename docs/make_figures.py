"""Make every figure and every number of the lesson again, from the weights that ship.

    python docs/make_figures.py                      all of it (about an hour on two CPU cores)
    python docs/make_figures.py --only facts forward some parts; --help lists them
    python docs/make_figures.py --check              says what is missing or out of date

Starts the exercises as a reader would, keeps what they print, shrinks what they draw to
docs/images/, builds the strips behind the sliders, and notes in docs/images/figures.json from
which files each figure was made, so that the build refuses one that is out of date.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from PIL import Image, ImageOps
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from notebook import notebook_of  # noqa: E402

from ddpm_basics import figures, hardware, sampling  # noqa: E402
from ddpm_basics.console import UserError, duration, new_parser, run_command  # noqa: E402
from ddpm_basics.fabrics.folder import draw_fabrics  # noqa: E402
from ddpm_basics.files import read_json, write_atomically, write_json  # noqa: E402
from ddpm_basics.images import decode, find_images, from_picture, tile  # noqa: E402
from ddpm_basics.model import build_diffusion, label_vectors  # noqa: E402
from ddpm_basics.weight_files import load_weights  # noqa: E402

IMAGES = ROOT / "docs" / "images"
REFERENCE = ROOT / "training_results" / "reference"
QUICK = REFERENCE / "quick"  # what exercise 3 leaves after --train --quick
MANIFEST = IMAGES / "figures.json"
WEIGHTS = ROOT / "models" / "ddpm_african_fabrics.pt"
DATA = ROOT / "african_fabric_processed"
FROM_SCRATCH = ROOT / "docs" / "ddpm_from_scratch.py"
MAIN = ("index", "1_noise", "2_denoising", "3_training")  # pages
MACHINE = hardware.describe(hardware.pick_device("auto"))

MAX_WIDTH = 1050  # pixels: figures are shown 700 wide, many screens have 1.5 to 2 pixels per point
GAP = 4  # white pixels between the images of a frame
SEED = 42  # of the first fabric in the sliders
PRECISION = "fp32"  # that they are drawn in, whatever is fastest here
GUIDANCE = 2.0  # how much of its label each of them gets, as in the exercises


# ---- Bookkeeping ---------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the checksum that figures.json holds."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def note(path: Path, made_from: list[Path]) -> None:
    """Enter a figure in the list: its own checksum and those of what it was made from."""
    record = read_json(MANIFEST) or {}
    record[path.relative_to(ROOT).as_posix()] = {
        "sha256": sha256(path),
        "made_from": {f.relative_to(ROOT).as_posix(): sha256(f) for f in made_from},
    }
    write_json(MANIFEST, dict(sorted(record.items())))
    print(f"  wrote {path.relative_to(ROOT)} ({path.stat().st_size / 1000:.0f} kB)")


def publish(source: Path | Image.Image, name: str, made_from: list[Path], quality: int) -> None:
    """Keep a picture as docs/images/NAME, shrunk to the lesson's width unless it is a strip."""
    picture = decode(source) if isinstance(source, Path) else source
    if picture.width > MAX_WIDTH and not name.startswith("slider"):
        height = round(picture.height * MAX_WIDTH / picture.width)
        picture = picture.resize((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    with write_atomically(IMAGES / name) as temporary:
        picture.save(temporary, quality=quality, method=6)
    note(IMAGES / name, made_from)


def keep(name: str, content: Any) -> Path:
    """Write training_results/reference/NAME."""
    write_json(REFERENCE / name, content)
    print(f"  wrote training_results/reference/{name}")
    return REFERENCE / name


def keep_transcript(key: str, **record: Any) -> None:
    """Add what a command printed to transcripts.json."""
    transcripts = read_json(REFERENCE / "transcripts.json") or {}
    keep("transcripts.json", dict(sorted({**transcripts, key: record}.items())))


@contextmanager
def workspace() -> Iterator[Path]:
    """Give a folder that looks like a fresh clone after --verify: weights and data by link."""
    with tempfile.TemporaryDirectory() as name:
        for original in (WEIGHTS.parent, DATA):
            (Path(name) / original.name).symlink_to(original)
        yield Path(name)


def run(command: str, folder: Path, key: str = "") -> float:
    """Run a command in a folder, return its seconds; under a key, keep what a reader sees of it."""
    print(f"  $ {command}")
    _, name, *options = shlex.split(command)
    if name != "-m":
        name = str(FROM_SCRATCH if name == FROM_SCRATCH.name else ROOT / name)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, name, *options], cwd=folder, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    seconds = round(time.perf_counter() - started, 2)
    if done.returncode:
        raise UserError(f"'{command}' ended with {done.returncode}: {done.stderr[-2000:]}")
    if key:
        printed = done.stdout.rstrip() + "\n"
        keep_transcript(key, command=command, output=printed, seconds=seconds, hardware=MACHINE)
    return seconds


# ---- Sliders: loops over the package's step rules ------------------------------------------------


@cache
def load_network() -> tuple[GaussianDiffusion, torch.device, str]:
    """Load the shipped weights; return them, their device and precision."""
    device = hardware.pick_device("auto")
    diffusion, _ = load_weights(WEIGHTS)
    hardware.prepare_to_sample(diffusion, device, PRECISION)
    return diffusion, device, PRECISION


@torch.inference_mode()
def walk(sampler: str, x_T: Tensor, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk from the noise x_T to images of the labels in turn; yield t, x_t, the guess of x_0."""
    diffusion, device, precision = load_network()
    levels = sampling.noise_levels(diffusion)
    labels = label_vectors(diffusion, diffusion.label_names, range(len(x_T)))
    spread = sampling.log_snr_times if sampler == "dpmpp" else sampling.even_times
    x_t, past = x_T.to(device), []
    for t, s in pairwise(spread(levels, steps)):
        with hardware.autocast(device, precision):
            x_0 = sampling.predict_x_0(diffusion, levels, x_t, t, labels, GUIDANCE)
        yield t, x_t.cpu(), x_0.cpu()
        if sampler == "ddim":
            x_t = sampling.ddim_step(levels, x_t, x_0, t, s)
        else:
            x_t = sampling.dpmpp_step(levels, x_t, x_0, t, s, past)
            past = [(x_0, t), *past[:1]]


def draw(sampler: str, x_T: Tensor, steps: int) -> Tensor:
    """Draw the fabrics [n, 3, h, w] in [0, 1] that grow out of x_T."""
    *_, (_, _, x_0) = walk(sampler, x_T, steps)
    return (x_0 + 1) / 2


def noise_of(count: int) -> Tensor:
    """Draw the noise x_T [count, 3, 64, 64] that the exercises draw from SEED on."""
    return sampling.starting_noise(range(SEED, SEED + count), (3, 64, 64))[0]


def publish_strip(
    name: str, frames: list[Tensor], numbers: dict[str, Any], made_from: list[Path], quality: int
) -> None:
    """Lay frames [rows, columns, 3, h, w] in [0, 1] side by side; keep their numbers."""
    sheets = [tile(frame.flatten(0, 1), frame.shape[1], gap=GAP) for frame in frames]
    strip = tile([ImageOps.crop(sheet, GAP) for sheet in sheets], len(sheets), gap=0)
    path = keep(f"slider_{name}.json", numbers)
    publish(strip, f"slider_{name}.webp", [path, *made_from], quality)


def make_forward() -> None:
    """The forward slider: one fabric and one noise, mixed for each t."""
    diffusion = build_diffusion(dim=8, dim_mults=(1, 2))  # only its schedule is used
    x_0 = torch.from_numpy(from_picture(decode(find_images(DATA)[0][5])))[None] * 2 - 1
    times = np.linspace(0, 999, 41).round().astype(int).tolist()
    frames = [(diffusion.q_sample(x_0, torch.tensor([t]), noise_of(1)) + 1) / 2 for t in times]
    rows = figures.levels_at(diffusion, times)
    publish_strip("forward", [frame[None] for frame in frames], {"frames": rows}, [], 45)


def make_bound() -> None:
    """What an error weighs at each t: in the bound, and as an error of x_0."""
    schedules = {
        name: build_diffusion(8, (1,), beta_schedule=name) for name in ("linear", "sigmoid")
    }
    with workspace() as scratch:
        plot_bound(scratch / "bound.png", schedules)
        publish(scratch / "bound.png", "bound_weights.webp", [], quality=90)


def make_reverse() -> None:
    """The reverse slider: x_t above the predicted x_0, by 200 DDIM steps from three noises."""
    steps = list(walk("ddim", noise_of(3), 200))
    shown = [*steps[:-1:8], steps[-1]]
    frames = [(torch.stack((x_t, x_0)) + 1) / 2 for _, x_t, x_0 in shown]
    rows = figures.levels_at(load_network()[0], [t for t, _, _ in shown])
    publish_strip("reverse", frames, {"steps": len(steps), "frames": rows}, [WEIGHTS], 48)


def make_sweep() -> None:
    """The sweep slider: DDIM above DPM-Solver++ above the 1000-step result, from one x_T."""
    x_T, frames, rows = noise_of(2), [], []
    target = draw("ddim", x_T, 1000)
    for steps in (5, 10, 20, 50, 100):
        ddim, dpmpp = draw("ddim", x_T, steps), draw("dpmpp", x_T, steps)
        frames.append(torch.stack((ddim, dpmpp, target)))
        rows.append({"steps": steps, "ddim_rmse": figures.distance(ddim, target),
                     "dpmpp_rmse": figures.distance(dpmpp, target)})  # fmt: skip
    publish_strip("sweep", frames, {"hardware": MACHINE, "frames": rows}, [WEIGHTS], 86)


# ---- What the exercises write --------------------------------------------------------------------


def make_data() -> None:
    """Exercise 3's first look: --verify, its nine images, its output."""
    with workspace() as folder:
        run("python exercise3_train.py --verify", folder, "verify")
        publish(folder / "training_samples_grid.png", "training_samples_grid.webp", [], 40)


def make_exercise1() -> None:
    """Exercise 1 as a reader runs it."""
    with workspace() as folder:
        run("python exercise1_generate.py", folder, "exercise1")
        publish(folder / "exercise1_output.png", "exercise1_output.webp", [WEIGHTS], 58)


def make_exercise2() -> None:
    """Exercise 2 as a reader runs it: all parts, their figures, their measurements, the morph."""
    with workspace() as folder:
        run("python exercise2_explore.py", folder, "exercise2")
        keep_exercise2(folder)
        keep_film(folder / "ddpm_fabric_morph.mp4")


def keep_exercise2(folder: Path) -> None:
    """Keep the measurements that exercise 2 left, and the figures beside them."""
    for path in sorted(folder.glob("*.json")):
        shutil.copy(path, REFERENCE)
        if path.with_suffix(".png").exists():
            undrawn = path.stem in ("forward_diffusion_demo", "noise_schedule_comparison")
            made_from = [] if undrawn else [WEIGHTS]
            publish(path.with_suffix(".png"), f"{path.stem}.webp", made_from, quality=20)


def keep_film(film: Path) -> None:
    """Keep the morph, small enough for a page, and its first frame."""
    frames, kept = imageio.mimread(film, memtest=False), IMAGES / "ddpm_fabric_morph.mp4"
    with write_atomically(kept) as temporary:
        imageio.mimwrite(temporary, frames, fps=1000 / 60, codec="libx264", quality=6,
                         pixelformat="yuv420p", macro_block_size=2)  # fmt: skip
    note(kept, [WEIGHTS])
    publish(Image.fromarray(frames[0]), "ddpm_fabric_morph_still.webp", [WEIGHTS], 58)


def make_commands() -> None:
    """Every command that the main pages show unfolded, once: its time, and the quick run."""
    text = "".join((ROOT / "docs" / f"{page}.rst").read_text(encoding="utf-8") for page in MAIN)
    blocks = re.findall(r"^\.\. code-block:: console\n((?: {3}.*\n|\n)+)", text, re.M)
    shown = [line for block in blocks if "no-test" not in block
             for line in re.findall(r"^ {3}\$ (.+)", block, re.M)]  # fmt: skip
    with workspace() as folder:
        timed = {command: run(command, folder) for command in shown}
        made = folder / "training_results" / "quick"
        for path in (made / "run.json", made / "losses.csv", [*samples(made).values()][-1]):
            shutil.copy(path, QUICK)
    keep("commands.json", {"hardware": MACHINE, "seconds": timed})


def make_quick() -> None:
    """The last samples of exercise 3's short run."""
    last = [*samples(QUICK).values()][-1]
    publish(last, "quick.webp", [last], 58)


def make_digits() -> None:
    """What exercise 1 draws after exercise 3's --train --quick --data digits."""
    drawn = REFERENCE / "digits" / "exercise1_output.png"
    publish(drawn, "digits.webp", [drawn], 58)


def samples(folder: Path) -> dict[int, Path]:
    """Return {step: sample-STEP.png} of a run, in order."""
    return dict(sorted((int(path.stem.split("-")[1]), path) for path in folder.glob("sample-*")))


def make_comparison() -> None:
    """Training images beside generated ones of the same tradition, 16 each."""
    with workspace() as folder:
        run("python exercise1_generate.py --seed 100 --samples-dir samples", folder)
        drawn = [decode(path) for path in find_images(folder / "samples")[0]]
    names = load_network()[0].label_names
    labels = [names[i % len(names)] for i in range(len(drawn))]
    real = [decode(find_images(DATA / label)[0][i]) for i, label in enumerate(labels)]
    sheets = [tile(pictures, 4, cell=122, gap=GAP, title=title, captions=labels)
              for title, pictures in (("training images", real), ("generated", drawn))]  # fmt: skip
    publish(tile(sheets, 2), "training_vs_generated.webp", [WEIGHTS], quality=45)


# ---- Numbers, and pictures that are there already ------------------------------------------------


def make_facts() -> None:
    """What the text states about the network: tests/benchmarks/measure_network.py counts it."""
    run("python tests/benchmarks/measure_network.py", ROOT)


def make_weights() -> None:
    """Name the shipped weights: size, checksum, step; and what the page's snippet prints."""
    digest, size = sha256(WEIGHTS), WEIGHTS.stat().st_size / 1e6
    step = torch.load(WEIGHTS, map_location="cpu", weights_only=True, mmap=True)["step"]
    note(keep("weights.json", {"mb": size, "sha256": digest, "step": step}), [WEIGHTS])
    keep_transcript("checksum", command="", output=f"{size:.1f} MB, sha256 {digest[:16]}...\n")


def make_neighbours() -> None:
    """The figure that stands beside evaluation.json."""
    made_from = [REFERENCE / "evaluation.json"]
    publish(REFERENCE / "evaluation_neighbours.png", "nearest_neighbours.webp", made_from, 15)


def make_training() -> None:
    """What the lesson quotes of the reference run, and its curve."""
    record = json.loads((REFERENCE / "run.json").read_text(encoding="utf-8"))
    logs = [REFERENCE / "losses.csv", REFERENCE / "heldout.csv"]
    losses, heldout = map(read_rows, logs)
    quoted = (
        "hardware", "seconds", "steps_done", "effective_batch", "num_images", "images_shown", "lr",
        "warmup", "label_dropout", "average", "precision", "heldout_images",
    )  # fmt: skip
    last = heldout[-1]
    keep("training.json", {
        **{key: record[key] for key in quoted},
        "passes": record["images_shown"] / record["num_images"],
        "first_loss": losses[0]["loss"], "last_loss": losses[-1]["loss"],
        "heldout": {"labels": last["labelled"], "plain": last["plain"]},
        "quarters": [{"t": f"{250 * i} to {250 * i + 249}", "labels": last[f"l{i}"],
                      "plain": last[f"p{i}"]} for i in range(4)],
    })  # fmt: skip
    with workspace() as scratch:
        plot_losses(scratch / "curve.png", losses, heldout)
        publish(scratch / "curve.png", "loss_curve.webp", logs, quality=90)


def publish_plot(plot: Callable[[Path, Any], None], measured: str, name: str) -> None:
    """Draw a measurement file, and keep the figure as docs/images/NAME."""
    path = REFERENCE / measured
    with workspace() as scratch:
        plot(scratch / "plot.png", json.loads(path.read_text(encoding="utf-8")))
        publish(scratch / "plot.png", name, [path], quality=90)


def make_labels() -> None:
    """How often the fabrics are what was asked for, and how varied, at each strength."""
    publish_plot(plot_labels, "labels.json", "labels.webp")


def make_ideal() -> None:
    """The error of the perfect memory and of the network, on fabrics it knows and on others."""
    publish_plot(plot_ideal, "ideal_denoiser.json", "ideal_denoiser_loss.webp")


def make_more_fabrics() -> None:
    """The same short training on few fabrics and on many: its losses."""
    publish_plot(plot_more_fabrics, "more_fabrics.json", "more_fabrics.webp")


def read_rows(path: Path) -> list[dict[str, float]]:
    """Read a table of numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def plot_losses(path: Path, losses: list[Any], heldout: list[Any]) -> None:
    """Draw the loss while training, and the averaged weights' loss on held-out fabrics."""
    with figures.new_figure(path, 3.6, "The loss of the run behind the weights") as figure:
        axes = figure.subplots()
        axes.plot(*figures.curve(losses, "loss"), color="0.6", label="training")
        for name, how in (("plain", "without labels"), ("labelled", "with labels")):
            steps, values = figures.curve(heldout, name)
            axes.plot(steps, values, "o-", ms=4, lw=1.2, label=f"held-out fabrics, {how}")
        axes.set(xlabel="step", ylabel="weighted squared error of v", yscale="log")
        axes.set_yticks([0.1, 0.15, 0.2, 0.3, 0.4], ["0.1", "0.15", "0.2", "0.3", "0.4"])
        axes.minorticks_off()
        axes.legend()


def plot_bound(path: Path, schedules: dict[str, GaussianDiffusion]) -> None:
    """Draw the bound's weight of each noise level, and sigma / alpha, both against t."""
    with figures.new_figure(path, 3.0, "What an error weighs") as figure:
        left, right = figure.subplots(1, 2)
        for name, process in schedules.items():
            beta, bar = process.betas.double(), process.alphas_cumprod.double()
            # Ho 2020, equation 12, with sigma^2 = beta-tilde; index 0 has no variance.
            variance = beta * (1 - process.alphas_cumprod_prev.double()) / (1 - bar)
            factor = beta**2 / (2 * variance * (1 - beta) * (1 - bar))
            left.plot(range(1, len(beta)), factor[1:], label=name)
            right.plot(((1 - bar) / bar).sqrt(), label=name)
        left.set(title="factor in the bound", xlabel="t", yscale="log")
        right.set(title="error of $x_0$ for an error of 1 in the noise", xlabel="t", yscale="log")
        left.legend()


def plot_labels(path: Path, measured: dict[str, Any]) -> None:
    """Draw the share that a classifier recognises, and the spread, against the strength."""
    rows, real = measured["rows"], measured["heldout"]["recognised"]
    with figures.new_figure(path, 2.8, "More guidance: clearer, and more alike") as figure:
        left, right = figure.subplots(1, 2)
        strengths = [row["w"] for row in rows]
        shares = np.array([row["recognised"] for row in rows])
        ends = np.array([row["wilson_95"] for row in rows])
        left.errorbar(strengths, 100 * shares, 100 * np.abs(ends.T - shares), fmt="o-", capsize=3)
        left.axhline(100 * real, color="0.4", ls="--")
        left.set_title("recognised as what was asked for, %")
        right.plot(strengths, [row["diversity"] for row in rows], "o-", color="#c2410c")
        right.axhline(1, color="0.4", ls="--", label="held-out fabrics")
        right.set(title="spread within a tradition", ylim=(0.5, 1.1))
        right.legend(loc="lower left")
        for axes in (left, right):
            axes.set(xlabel="guidance w", xticks=strengths)


def plot_ideal(path: Path, measured: dict[str, Any]) -> None:
    """Draw the squared error against t, a panel for known fabrics and one for others."""
    rows = measured["rows"]
    with figures.new_figure(path, 3.2, "Who guesses better?") as figure:
        panels = {"train": "the 1,059 training fabrics", "heldout": "held-out fabrics"}
        for axes, (split, title) in zip(
            figure.subplots(1, 2, sharey=True), panels.items(), strict=True
        ):
            for name, label in (("memory", "perfect memory"), ("network", "network")):
                errors = [row[name][split] for row in rows]
                axes.plot([row["t"] for row in rows], errors, "o-", label=label)
            axes.set(title=title, xlabel="t")
        figure.axes[0].set(ylabel="mean squared error of $x_0$")
        figure.axes[0].legend()


def plot_more_fabrics(path: Path, measured: dict[str, Any]) -> None:
    """Draw the losses on fabrics that were trained on and on others, a panel for each set."""
    rows = measured["rows"]
    with figures.new_figure(path, 2.9, "The same training on more fabrics") as figure:
        for axes, row in zip(figure.subplots(1, len(rows), sharey=True), rows, strict=True):
            curve = row["curve"]
            for name, label in (("train", "trained on"), ("heldout", "held out")):
                axes.plot(*figures.curve(curve, name), label=label)
            copies = f"{100 * row['samples']['share']:.0f} % copies"
            axes.set(title=f"{row['count']:,} fabrics\n{copies}", xlabel="step", yscale="log")
            axes.minorticks_off()
        figure.axes[0].set(ylabel="weighted squared error of v")
        figure.axes[0].set_yticks([0.16, 0.18, 0.2, 0.22], ["0.16", "0.18", "0.20", "0.22"])
        figure.axes[0].legend()


def make_from_scratch() -> None:
    """Train docs/ddpm_from_scratch.py as a reader would, and keep its curve and its fabrics."""
    with workspace() as folder:
        run(f"python {FROM_SCRATCH.name}", folder, "from_scratch")
        facts = json.loads((folder / "from_scratch.json").read_text(encoding="utf-8"))
        means = np.reshape(facts.pop("losses"), (-1, 25)).mean(1).tolist()
        curve = [{"step": 25 * i, "loss": loss} for i, loss in enumerate(means, 1)]
        numbers = keep("from_scratch.json", {**facts, "curve": curve, "hardware": MACHINE})
        publish(folder / "from_scratch.png", "from_scratch.webp", [], 58)
        with figures.new_figure(folder / "curve.png", 3.4, "Loss, means of 25 steps") as figure:
            axes = figure.subplots()
            axes.plot(*figures.curve(curve, "loss"), color="#0b6e75")
            axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
        publish(folder / "curve.png", "from_scratch_loss.webp", [numbers], quality=92)


def make_notebooks() -> None:
    """Notebooks of docs/ddpm_from_scratch.py, and of each lab with gaps and with solutions."""
    made = {FROM_SCRATCH.with_suffix(".ipynb"): notebook_of(FROM_SCRATCH.read_text("utf-8"))}
    for lab in sorted((ROOT / "docs" / "labs").glob("*.py")):
        source = lab.read_text(encoding="utf-8")
        made[lab.with_suffix(".ipynb")] = notebook_of(source, solved=False)
        made[lab.with_name(f"{lab.stem}_solved.ipynb")] = notebook_of(source)
    for path, notebook in made.items():
        path.write_text(notebook, encoding="utf-8")
        print(f"  wrote {path}")


# ---- The command ---------------------------------------------------------------------------------

PARTS = {name[5:]: part for name, part in list(globals().items()) if name.startswith("make_")}


def check() -> int:
    """Say which made files are missing or older than what they were made from."""
    from measured import figure_faults  # which stands on Sphinx

    wanted = set(read_json(MANIFEST) or {})
    for page in sorted((ROOT / "docs").glob("*.rst")):
        wanted |= {f"docs/{p}" for p in re.findall(r"images/\S+\.(?:webp|mp4)", page.read_text())}
    faults = [fault for name in sorted(wanted) for fault in figure_faults(name)]
    print("\n".join(faults) or "Every figure is there and up to date.")
    return 1 if faults else 0


def main(argv: list[str] | None = None) -> int:
    """Make the parts that were asked for, or only look at what is there."""
    about = "; ".join(f"{name}: {part.__doc__}" for name, part in PARTS.items())
    parser = new_parser(__doc__.split("\n\n")[0], epilog=f"Parts: {about}")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--check", action="store_true", help="make nothing, say what is amiss")
    options = parser.parse_args(argv)

    def make() -> None:
        started = time.perf_counter()
        draw_fabrics(DATA)
        for name in options.only:
            print(f"{name}: {PARTS[name].__doc__}")
            PARTS[name]()
        print(f"Made {len(options.only)} parts in {duration(time.perf_counter() - started)}.")

    if options.check:
        return check()
    return run_command(make, "The parts before this one are made.", "go on with --only PART.")


if __name__ == "__main__":
    sys.exit(main())
