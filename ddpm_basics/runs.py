"""A training run on disk: checkpoints, losses.csv, stop signals, resume."""

from __future__ import annotations

import argparse
import csv
import errno
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch.version import __version__ as LIBRARY_VERSION
from ema_pytorch import EMA
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, duration
from ddpm_basics.files import unused_name, write_atomically
from ddpm_basics.hardware import device_name
from ddpm_basics.training import BINS, Drawer, fixed_losses, learning_rate, spread

CSV_COLUMNS = [
    "step",
    "loss",
    "learning_rate",
    "images_per_second",
    "train_fixed",
    "heldout_fixed",
    *(f"train_bin{i}" for i in range(BINS)),
    *(f"heldout_bin{i}" for i in range(BINS)),
]


@dataclass
class Run:
    """Everything that a training run holds, in one place."""

    args: argparse.Namespace
    accelerator: Accelerator
    device: torch.device
    precision: torch.dtype
    diffusion: GaussianDiffusion  # the process, and the network that is trained
    network: torch.nn.Module  # diffusion.model, wrapped when several processes share the work
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    ema: EMA
    images: torch.Tensor  # uint8, (N, 3, H, W), on the device
    drawer: Drawer
    digests: dict[str, str]
    heldout: torch.Tensor | None  # uint8, (FIXED_IMAGES, 3, H, W)
    config: dict
    step: int = 0
    seconds: float = 0.0  # of training so far, interruptions not counted
    pending: list = field(default_factory=list)  # losses since the last row of losses.csv
    compiled: bool = False


def save_checkpoint(run: Run) -> Path:
    """Write model-STEP.pt in the format of the library's Trainer, then drop the oldest ones.

    Raises UserError when the weights are not finite (the last good checkpoint must stay the
    newest) or the disk is full.
    """
    if not weights_are_finite(run.diffusion.model):
        raise UserError(not_finite_message(run, f"The weights after step {run.step} are"))
    state = {
        "step": run.step,
        "model": run.diffusion.state_dict(),
        "opt": run.optimizer.state_dict(),
        "ema": run.ema.state_dict(),
        "scaler": run.scaler.state_dict() if run.scaler.is_enabled() else None,
        "version": LIBRARY_VERSION,
        # From here on for --resume alone; Trainer.load passes it over.
        "config": run.config,
        "images": run.digests,
        "seconds": run.seconds,
        "pending": [float(loss) for loss in run.pending],
    }
    path = run.args.results_dir / f"model-{run.step}.pt"
    save_durably(state, path)
    for old in list_checkpoints(run.args.results_dir)[run.args.keep :]:
        old.unlink()  # only now that the new one is safe
    return path


def save_durably(state: dict, path: Path) -> None:
    """torch.save to a temporary name, flushed to the disk, then renamed: whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # A write that fails inside torch.save surfaces as RuntimeError, with the OSError before it.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, (OSError, RuntimeError)) and out_of_space(cause, path.parent):
            raise UserError(
                f"No space left to write {path.name} in {path.parent}: nothing half-written was "
                "left there, and checkpoints written before are intact. Free some space and go on "
                "with --resume."
            ) from None
        raise


def out_of_space(error: BaseException | None, folder: Path) -> bool:
    """Whether an error while writing means that the disk, the quota or the file limit is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return shutil.disk_usage(folder).free < 2**20


def flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut; only POSIX systems can and need to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def weights_are_finite(network: torch.nn.Module) -> bool:
    """True if no parameter holds NaN or infinity; one number is fetched from the device."""
    norms = torch._foreach_norm([p.detach() for p in network.parameters()])
    return bool(torch.isfinite(torch.stack(norms)).all())


def list_checkpoints(folder: Path) -> list[Path]:
    """All model-NUMBER.pt of a folder, the newest (highest step) first."""
    found = [p for p in folder.glob("model-*.pt") if p.stem.split("-")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.stem.split("-")[1]), reverse=True)


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read whole; damaged ones are named and set aside.

    Raises UserError when there are checkpoints, but not a single good one.
    """
    damaged = []
    for path in list_checkpoints(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
                if archive.testzip():
                    raise ValueError("wrong checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            missing = {"step", "model", "opt", "ema"} - set(state)
            if missing:
                raise ValueError(f"no entry {sorted(missing)[0]!r}")
            return path, state
        except (OSError, MemoryError):  # the machine is in trouble, the file may be good
            raise
        except Exception as error:  # a damaged archive raises many kinds
            aside = unused_name(path.with_name(path.name + ".damaged"))
            path.rename(aside)
            damaged.append(aside.name)
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            print(f"{path} is damaged ({reason}); set aside as {aside.name}.", flush=True)
    if damaged:
        raise UserError(
            f"No checkpoint in {folder} can be read ({', '.join(damaged)}); choose another "
            "--results-dir, or start over without --resume."
        )
    return None


def resume(run: Run) -> None:
    """Take up the newest good checkpoint of the results folder, if there is one.

    Raises UserError when the run was started with other settings or other data.
    """
    with run.accelerator.main_process_first():
        found = newest_good_checkpoint(run.args.results_dir)
    if found is None:
        say(run, f"Nothing to resume in {run.args.results_dir}: starting at step 0.")
        return
    path, state = found
    compare_settings(run, path, state)
    try:
        run.diffusion.load_state_dict(state["model"])
        # The library's own Trainer leaves `fused` unset; without it Adam's counters would be
        # put where this run's kernels do not look for them.
        groups = zip(state["opt"]["param_groups"], run.optimizer.param_groups, strict=True)
        state["opt"]["param_groups"] = [dict(old, fused=new["fused"]) for old, new in groups]
        run.optimizer.load_state_dict(state["opt"])
        run.ema.load_state_dict(state["ema"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not belong to this network ({reason}).") from None
    if state.get("scaler") and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    run.seconds = state.get("seconds", 0.0)
    run.pending = [torch.tensor(x, device=run.device) for x in state.get("pending", [])]
    say(run, f"Resuming {path} at step {run.step:,}.")


def compare_settings(run: Run, path: Path, state: dict) -> None:
    """Refuse to go on with another network, process, batch or data set than the run's own."""
    if "config" not in state:
        say(run, f"{path} is the library's own checkpoint: its settings cannot be compared.")
        return
    old, new = state["config"], run.config
    free = {"lr", "lr_final", "warmup_steps", "steps", "initial_weights"}  # may change half-way
    differences = [
        f"{section}.{key}: {old[section].get(key)} then, {new[section].get(key)} now"
        for section in ("network", "process", "training")
        for key in new[section]
        if key not in free and old[section].get(key, new[section][key]) != new[section][key]
    ]
    if old["data"]["checksum"] != new["data"]["checksum"]:
        differences.append("data: " + compare_data(state.get("images", {}), run.digests))
    if differences:
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(differences)}). Use the same "
            "ones to resume it, or another --results-dir for a new run."
        )
    run.config["training"]["initial_weights"] = old["training"].get("initial_weights")
    for key in ("lr", "lr_final", "warmup_steps"):
        if old["training"].get(key) != new["training"][key]:
            say(run, f"Note: {key} was {old['training'].get(key)}, now {new['training'][key]}.")


def compare_data(then: dict[str, str], now: dict[str, str]) -> str:
    """Which images were added, removed or replaced, in a few words."""
    changes = {
        "added": sorted(set(now) - set(then)),
        "removed": sorted(set(then) - set(now)),
        "replaced": sorted(name for name in set(then) & set(now) if then[name] != now[name]),
    }
    return ", ".join(
        f"{len(names)} {verb} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for verb, names in changes.items()
        if names
    )


def trim_losses(path: Path, step: int) -> None:
    """Keep the whole rows up to `step`: later ones will be written again by the resumed run."""
    rows = [row for row in read_losses(path) if row["step"] <= step]
    with write_atomically(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: "" if math.isnan(v) else format_value(k, v) for k, v in row.items()}
            )


def format_value(column: str, value: float) -> str:
    """Steps as whole numbers, everything else with six significant digits."""
    return str(int(value)) if column == "step" else f"{value:.6g}"


def read_losses(path: Path) -> list[dict[str, float]]:
    """The complete rows of losses.csv; empty cells are NaN, a torn last row is left out."""
    if not path.exists():
        return []
    rows = []
    with open(path, newline="") as file:
        text = file.read()
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        try:
            values = {key: float(row[key] or "nan") for key in CSV_COLUMNS}
        except (KeyError, TypeError, ValueError):
            continue
        if not rows or values["step"] > rows[-1]["step"]:
            rows.append(values)
    return rows


def append_losses(path: Path, row: dict[str, float]) -> None:
    """Add one row and push it to the disk, so that it survives whatever comes next."""
    cells = [format_value(key, row[key]) if key in row else "" for key in CSV_COLUMNS]
    with open(path, "a") as file:
        file.write(",".join(cells) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Clock:
    """Time spent training: all of it for the record, and per image since the last row."""

    def __init__(self, run: Run):
        self.run, self.step, self.busy = run, run.step, 0.0
        self.total_started = self.started = time.perf_counter()

    def pause(self) -> None:
        """Stop counting for the images per second: samples and checkpoints are not training."""
        self.busy += time.perf_counter() - self.started

    def resume(self) -> None:
        """Go on counting, and add everything so far to the run's own record."""
        self.started = time.perf_counter()
        self.run.seconds += self.started - self.total_started
        self.total_started = self.started

    def rate(self) -> float:
        """Images per second since the last call of `restart`."""
        steps = self.run.step - self.step
        batch = self.run.config["training"]["effective_batch"]
        return steps * batch / (self.busy + time.perf_counter() - self.started)

    def restart(self) -> None:
        """Begin a new row."""
        self.step, self.busy, self.started = self.run.step, 0.0, time.perf_counter()


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second Ctrl-C leaves at once."""

    def __init__(self, shared: bool):
        # A launcher passes the signal on to processes that have had it from the terminal already,
        # so that with several processes a second signal means nothing.
        self.shared, self.signal = shared, None

    def install(self) -> None:
        """Take over both signals for the rest of the program."""
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number: int, frame: object) -> None:
        """Note the signal; the loop looks after every step."""
        if self.signal is not None and not self.shared:
            os._exit(128 + number)
        if self.signal is None:
            os.write(2, b"\nStopping: finishing this step and saving. Ctrl-C again: leave now.\n")
        self.signal = number


def stop_agreed(run: Run, stop: StopRequest, logging: bool) -> bool:
    """Whether to stop now. Several processes must agree, or one would wait for the others."""
    if run.accelerator.num_processes == 1:
        return stop.signal is not None
    if not logging and run.device.type != "cpu":
        return False  # asking the others would make the GPU wait
    flag = torch.tensor(float(stop.signal or 0), device=run.device)
    agreed = run.accelerator.gather(flag.reshape(1)).max().item()
    stop.signal = int(agreed) or None
    return stop.signal is not None


def save_and_leave(run: Run, stop: StopRequest, bar: tqdm) -> None:
    """Write the checkpoint that the message promises, and exit as a signal would."""
    bar.close()
    if run.accelerator.is_main_process:
        path = run.args.results_dir / f"model-{run.step}.pt"
        if not path.exists():
            save_checkpoint(run)
        write_run_file(run)
        print(f"Stopped after step {run.step:,}; saved {path}. Go on with: {resume_command()}")
    run.accelerator.wait_for_everyone()
    sys.exit(128 + stop.signal)


def look_at_losses(run: Run, bar: tqdm, clock: Clock) -> None:
    """Read the losses from the device, stop if one is not finite, and show them in the bar.

    Raises UserError naming the first bad step.
    """
    if isinstance(run.pending[-1], torch.Tensor):
        tensors = torch.stack([torch.as_tensor(x, device=run.device) for x in run.pending])
        run.pending = run.accelerator.reduce(tensors.float(), "mean").tolist()
    for age, loss in enumerate(reversed(run.pending)):
        if not math.isfinite(loss):
            raise UserError(not_finite_message(run, f"The loss of step {run.step - age} is"))
    recent = run.pending[-run.args.log_every :]
    bar.set_postfix_str(f"loss {np.mean(recent):.4f}, {clock.rate():.1f} images/s", refresh=False)


def not_finite_message(run: Run, what: str) -> str:
    """One sentence for numbers that ran away, with the way back."""
    checkpoints = list_checkpoints(run.args.results_dir)
    last = f"the last good checkpoint is {checkpoints[0]}" if checkpoints else "none was saved yet"
    return (
        f"{what} not finite, so training stopped; {last}. Try a smaller --lr "
        f"(now {run.args.lr:g}), some --warmup-steps or --precision fp32, and go on with --resume."
    )


def make_row(run: Run, clock: Clock) -> dict[str, float]:
    """A row of losses.csv from what came since the last one."""
    row = {
        "step": run.step,
        "loss": float(np.mean(run.pending)),
        "learning_rate": learning_rate(run.step, run.args),
        "images_per_second": clock.rate(),
    }
    run.pending = []
    clock.restart()
    return row


def add_fixed_losses(run: Run, row: dict[str, float]) -> dict[str, float]:
    """Add the fixed losses on training and held-out images, their means and their bins of t."""
    if run.accelerator.is_main_process:
        chosen = {"train": spread(run.images), "heldout": run.heldout}
        for name, images in chosen.items():
            if images is not None:
                bins = fixed_losses(run, images)
                row[f"{name}_fixed"] = float(np.mean(bins))
                row |= {f"{name}_bin{i}": value for i, value in enumerate(bins)}
    return row


def print_banner(run: Run, remaining: float, compiled: str) -> None:
    """Everything one would regret not having seen before an overnight run."""
    args, batch = run.args, run.config["training"]["effective_batch"]
    parameters = sum(p.numel() for p in run.diffusion.model.parameters())
    passes = args.steps * batch / len(run.images)
    shared = run.accelerator.num_processes
    lines = {
        "Device": f"{device_name(run.device)}" + (f" x {shared}" if shared > 1 else ""),
        "Precision": f"{str(run.precision).removeprefix('torch.')}, compiled: {compiled}",
        "Network": f"{parameters:,} parameters, {args.image_size}x{args.image_size} images, "
        f"{args.objective}, {args.schedule} schedule",
        "Data": f"{len(run.images):,} images from {args.data}"
        + ("" if run.heldout is None else f", {len(run.heldout)} held-out ones"),
        "Batch": f"{args.batch_size} x {args.gradient_accumulate} (accumulation) = {batch}",
        "Steps": f"{run.step:,} to {args.steps:,}: {passes:,.0f} passes over the data in all",
        "Estimated time": duration(remaining) + ", samples and checkpoints not counted",
        "Writes": f"{args.results_dir}/ every {args.save_every:,} steps, then {args.weights_out}",
        "Stop": "Ctrl-C saves and leaves",
        "Go on": resume_command(),
    }
    for name, text in lines.items():
        print(f"{name:<15}{text}")
    sys.stdout.flush()


def resume_command() -> str:
    """The command line of this run, with --resume."""
    words = ["python", *sys.argv]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def write_run_file(run: Run) -> None:
    """run.json: the settings of the run and what it took so far, for people and for the lesson."""
    training = run.config["training"] | {
        "steps_done": run.step,
        "seconds": round(run.seconds, 1),
        "precision": str(run.precision).removeprefix("torch."),
        "compiled": run.compiled,
        "processes": run.accelerator.num_processes,
        "hardware": device_name(run.device),
        "torch": str(torch.__version__),
        "library": LIBRARY_VERSION,
    }
    run.config["training"] = training
    text = json.dumps({"command": shlex.join(["python", *sys.argv]), **run.config}, indent=2)
    with write_atomically(run.args.results_dir / "run.json") as temporary:
        temporary.write_text(text + "\n")


def say(run: Run, text: str) -> None:
    """Print from the main process only."""
    if run.accelerator.is_main_process:
        print(text, flush=True)
