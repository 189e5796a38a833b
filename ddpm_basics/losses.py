"""The losses of a run: shown while it trains, kept in losses.csv, drawn as a curve."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_basics.checkpoints import not_finite_message
from ddpm_basics.console import UserError
from ddpm_basics.figures import plot_losses
from ddpm_basics.files import unused_name, write_atomically
from ddpm_basics.runs import Run
from ddpm_basics.training import learning_rate

QUARTERS = 4  # of all t, from nearly clean to nearly noise

CSV_COLUMNS = [
    "step",
    "loss",
    "learning_rate",
    "images_per_second",
    "train_fixed",
    "heldout_fixed",
    *(f"train_quarter{i}" for i in range(QUARTERS)),
    *(f"heldout_quarter{i}" for i in range(QUARTERS)),
]
HEAD = ",".join(CSV_COLUMNS) + "\n"


class Meter:
    """Reads the losses, shows them and the pace in a bar, and writes the rows of losses.csv.

    Rows of later steps than the run's, which a resumed run will write again, are removed first.
    Rows that could not be written go into another file at the end of the block.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path: Path = run.options.results_dir / "losses.csv"
        if run.accelerator.is_main_process:
            trim_losses(self.path, run.step)
        self.unwritten: list[Mapping[str, float]] = []  # rows
        self.bar = tqdm(
            initial=run.step,
            total=run.options.steps,
            unit="step",
            desc="Training",
            disable=not run.accelerator.is_main_process,
        )
        self.step, self.started = run.step, time.perf_counter()
        self.looked = self.started

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.unwritten:
            path = unused_name(self.path)
            with suppress(OSError):
                write_rows(path, self.unwritten)
                self.run.say(f"The last {len(self.unwritten)} rows of {self.path} are in {path}.")

    def add(self, loss: Tensor, read: bool) -> None:
        """Count a step and its loss; `read` the losses so far from the device.

        Reading makes a GPU wait, so it is done when a row is due; a CPU does not mind. Raises
        UserError that names the first step whose loss is not finite.
        """
        run = self.run
        run.pending.append(loss)
        self.bar.update()
        now = time.perf_counter()
        run.seconds, self.looked = run.seconds + now - self.looked, now
        if not read and run.device.type != "cpu":
            return
        losses = torch.stack([torch.as_tensor(x, device=run.device) for x in run.pending])
        values = run.accelerator.reduce(losses.float(), "mean").tolist()
        run.pending = values
        for age, value in enumerate(reversed(values)):
            if not math.isfinite(value):
                raise UserError(not_finite_message(run, f"The loss of step {run.step - age} is"))
        recent = values[-run.options.log_every :]
        text = f"loss {sum(recent) / len(recent):.4f}, {self.rate():.1f} images/s"
        self.bar.set_postfix_str(text, refresh=False)

    def rate(self) -> float:
        """Return the images per second since the last row."""
        steps = self.run.step - self.step
        return steps * self.run.effective_batch / (time.perf_counter() - self.started)

    def write_row(self, fixed: Mapping[str, Tensor]) -> None:
        """Append a row to losses.csv: what came since the last one, and the fixed losses.

        fixed: {name: losses (n,), sorted by t}, of which the mean and the quarters are kept. A row
        that cannot be written waits for the next one: training is worth more than its log.
        """
        run = self.run
        row = {
            "step": run.step,
            "loss": math.fsum(run.pending) / len(run.pending),
            "learning_rate": learning_rate(run.step, run.options),
            "images_per_second": self.rate(),
        }
        run.pending = []
        for name, losses in fixed.items():
            row[f"{name}_fixed"] = losses.mean().item()
            quarters = losses.tensor_split(QUARTERS)
            row |= {f"{name}_quarter{i}": part.mean().item() for i, part in enumerate(quarters)}
        log_row(run, row)
        if run.accelerator.is_main_process:
            self.unwritten.append(row)
            try:
                append_losses(self.path, self.unwritten)
                self.unwritten = []
            except OSError as error:
                self.bar.write(f"Not written yet: {len(self.unwritten)} rows of {self.path} "
                               f"({error.strerror or error}).")  # fmt: skip

    def restart(self) -> None:
        """Begin a new row: samples and checkpoints do not count as training for the pace."""
        self.step, self.started = self.run.step, time.perf_counter()


def log_row(run: Run, row: Mapping[str, float]) -> None:
    """Tell a row to the tracker, if there is one: once for each step."""
    values = {key: value for key, value in row.items() if key != "step" and value == value}
    run.accelerator.log(values, step=int(row["step"]))


def append_losses(path: Path, rows: Iterable[Mapping[str, float]]) -> None:
    """Add rows and push them to the disk, so that they survive whatever comes next."""
    with open(path, "a") as file:
        file.write("".join(map(format_row, rows)))
        file.flush()
        os.fsync(file.fileno())


def format_row(row: Mapping[str, float]) -> str:
    """Write a row: the step as a whole number, all else with six significant digits."""
    cells = [
        "" if math.isnan(row.get(key, math.nan)) else f"{row[key]:.6g}" for key in CSV_COLUMNS[1:]
    ]
    return ",".join([f"{row['step']:.0f}", *cells]) + "\n"


def read_losses(path: Path) -> list[dict[str, float]]:
    """Return the complete rows of losses.csv; empty cells are NaN, a torn last row is left out."""
    rows: list[dict[str, float]] = []
    names, *lines = whole_lines(path).splitlines() or [""]
    for line in lines:
        cells = dict(zip(names.split(","), line.split(","), strict=False))
        try:
            values = {key: float(cells[key] or "nan") for key in CSV_COLUMNS}
        except (KeyError, ValueError):
            continue
        if not rows or values["step"] > rows[-1]["step"]:
            rows.append(values)
    return rows


def whole_lines(path: Path) -> str:
    """Return the lines of the table, but a torn last one, whatever a spreadsheet has made of it."""
    text = path.read_text("utf-8-sig", errors="replace") if path.exists() else ""
    *whole, last = text.split("\n")
    torn = whole and last.count(",") < len(CSV_COLUMNS) - 1
    return "".join(f"{line}\n" for line in (whole if torn else [*whole, last]) if line)


def trim_losses(path: Path, step: int) -> None:
    """Keep the whole rows up to `step`: later ones will be written again by the resumed run.

    A file with anything else in it than rows of ours is kept beside it.
    """
    rows = read_losses(path)
    if whole_lines(path) not in ("", HEAD + "".join(map(format_row, rows))):
        aside = unused_name(path.with_name("losses.previous.csv"))
        path.rename(aside)
        print(f"{path} was changed by another program; it is {aside} now, and {len(rows)} rows "
              "of it could be read.", flush=True)  # fmt: skip
    write_rows(path, [row for row in rows if row["step"] <= step])


def write_rows(path: Path, rows: Iterable[Mapping[str, float]]) -> None:
    """Write a table anew."""
    with write_atomically(path) as temporary:
        temporary.write_text(HEAD + "".join(map(format_row, rows)))


def draw_curve(run: Run) -> None:
    """Write loss_curve.png from losses.csv; where that cannot be done, say so and go on."""
    folder = run.options.results_dir
    try:
        plot_losses(folder / "loss_curve.png", read_losses(folder / "losses.csv"))
    except Exception as error:  # of matplotlib's settings, its fonts, the disk
        run.say(f"{folder / 'loss_curve.png'} cannot be drawn ({error}).")
