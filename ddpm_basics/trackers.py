"""TensorBoard and Weights & Biases get the rows of losses.csv and the samples, by --log-with.

losses.csv stays the record. A resumed run sends its tracker the rows that it lacks, so that after a
crash, too, each row is there once.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ddpm_basics.console import UserError, import_extra, one_line
from ddpm_basics.files import read_json, write_json
from ddpm_basics.losses import log_row, read_losses
from ddpm_basics.runs import Run

PROJECT = "ddpm_basics"  # at W&B; below the results folder for TensorBoard
READER = "tensorboard.backend.event_processing.event_accumulator"
NOTE = "wandb.json"  # under which name W&B knows the run


def check_tracker(kind: str | None) -> None:
    """Raise UserError where --log-with names a tracker that cannot be had."""
    if kind == "tensorboard":
        import_extra(READER, "tensorboard")
    if kind == "wandb" and not is_offline(wandb := import_extra("wandb", "wandb")):
        try:
            wandb.login()
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases cannot be reached ({one_line(error)}): give it your key with "
                "'wandb login', or set WANDB_MODE=offline to log into a folder."
            ) from None


def is_offline(wandb: Any) -> bool:
    """Tell whether W&B logs into a folder only."""
    return wandb.setup().settings.mode in ("offline", "dryrun")


@contextmanager
def tracking(run: Run) -> Iterator[None]:
    """Start the tracker of --log-with, if any, for a block; tell it the past. Raises UserError."""
    team, kind = run.accelerator, run.options.log_with
    if kind is None:
        yield
        return
    start = {"tensorboard": start_tensorboard, "wandb": start_wandb}[kind]
    # Of the settings TensorBoard takes only numbers and words.
    settings = {
        key: value if isinstance(value, (int, float)) else str(value)
        for key, value in (vars(run.options) | run.config).items()
        if key != "typed"
    }
    known = start(run, settings)
    try:
        if team.is_main_process:
            for row in read_losses(run.options.results_dir / "losses.csv"):
                if row["step"] > known:
                    log_row(run, row)
                    show_samples(run, int(row["step"]))
        yield
    finally:
        for tracker in team.trackers:
            tracker.finish()


def start_tensorboard(run: Run, settings: dict[str, Any]) -> int:
    """Start TensorBoard; return the last step that it knows.

    Of later steps it forgets what a killed process has told it. Each row is on the disk before the
    checkpoint of its step.
    """
    folder, told = run.options.results_dir / PROJECT, 0
    reader = import_extra(READER, "tensorboard")
    if folder.is_dir():
        past = reader.EventAccumulator(str(folder), {"images": 1}).Reload()
        told = past.Scalars("loss")[-1].step if "loss" in past.Tags()["scalars"] else 0
    more = {"tensorboard": {"purge_step": run.step + 1}}
    run.accelerator.init_trackers(PROJECT, settings, more)
    return min(told, run.step)


def start_wandb(run: Run, settings: dict[str, Any]) -> int:
    """Start W&B; return the last step that it knows.

    Its server knows the steps of a run of this name. Without it, a killed process leaves next to
    nothing in its file, so each start begins a new one with the whole past, and the same name:
    uploaded, it replaces what was there.
    """
    wandb = import_extra("wandb", "wandb")
    team, folder = run.accelerator, run.options.results_dir
    if not team.is_main_process:
        team.init_trackers(PROJECT)
        return 0
    note = read_json(folder / NOTE) if run.step else None
    name = (note or {}).get("id") or secrets.token_hex(4)
    write_json(folder / NOTE, {"id": name})
    more = {"id": name, "dir": str(folder), "resume": None if is_offline(wandb) else "allow"}
    team.init_trackers(PROJECT, settings, {"wandb": more})
    return int(wandb.run.step) - 1 if wandb.run.resumed else 0


def show_samples(run: Run, step: int) -> None:
    """Tell the tracker, if there is one, the samples that were drawn at a step."""
    path = run.options.results_dir / f"sample-{step}.png"
    if run.options.log_with is None or not path.exists():
        return
    with Image.open(path) as picture:
        grid = np.asarray(picture.convert("RGB"))[None]
    layout = {"dataformats": "NHWC"} if run.options.log_with == "tensorboard" else {}
    for tracker in run.accelerator.trackers:
        tracker.log_images({"samples": grid}, step=step, **layout)
        if layout:
            tracker.writer.flush()  # as its rows are
