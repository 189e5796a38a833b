"""A training run on disk: its settings, checkpoints, resume, the weights at its end."""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch.version import __version__ as LIBRARY_VERSION
from ema_pytorch import EMA
from torch import Tensor

from ddpm_basics.console import UserError, duration
from ddpm_basics.data import Pictures
from ddpm_basics.fabrics.manifest import read_manifest
from ddpm_basics.files import (
    check_folder,
    remove_leftovers,
    unused_name,
    write_atomically,
    write_json,
)
from ddpm_basics.hardware import describe
from ddpm_basics.training import StepNumbers, draw_numbers, fixed_numbers
from ddpm_basics.weight_files import export_weights, load_weights

FREE_SETTINGS = ("lr", "lr_final", "warmup", "steps", "initial_weights")  # on --resume


@dataclass
class Run:
    """Everything that a training run holds, in one place."""

    options: argparse.Namespace
    accelerator: Accelerator
    device: torch.device
    precision: str
    diffusion: GaussianDiffusion  # the process, and the network that is trained
    loss_weights: Tensor  # (T,)
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the precision is fp16
    ema: EMA
    data: Pictures
    heldout: Pictures | None
    digests: dict[str, str]  # {file: checksum of its pixels}
    config: dict[str, Any]
    step: int = 0
    seconds: float = 0.0  # of training so far, interruptions not counted
    pending: list[float | Tensor] = field(default_factory=list)  # losses since the last csv row

    @property
    def side(self) -> int:
        """Pixels per side of what the network sees."""
        return int(self.diffusion.image_size[0])

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step."""
        return int(self.options.batch_size * self.options.gradient_accumulate)

    def numbers(self, step: int) -> StepNumbers:
        """Draw everything random about the effective batch of a step."""
        return draw_numbers(
            self.options.seed, step, self.effective_batch, self.data.images.shape, self.side,
            int(self.diffusion.num_timesteps), self.device,
        )  # fmt: skip

    def fixed_numbers(self, pictures: Pictures, told: bool) -> StepNumbers:
        """Return the numbers behind a fixed loss on some pictures, with their labels or without."""
        numbers = fixed_numbers(
            self.options.seed, pictures.images.shape, self.side,
            int(self.diffusion.num_timesteps), self.device,
        )  # fmt: skip
        return numbers._replace(drop=torch.full_like(numbers.drop, not told))

    def say(self, text: str) -> None:
        """Print from the main process only."""
        if self.accelerator.is_main_process:
            print(text, flush=True)


def describe_run(
    options: argparse.Namespace, digests: Mapping[str, str], timesteps: int
) -> dict[str, Any]:
    """Return what a checkpoint says about its run: plain numbers and strings only."""
    manifest = read_manifest(options.data)
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return {
        "objective": options.objective,
        "schedule": options.schedule,
        "timesteps": timesteps,
        "image_size": options.crop or options.image_size,
        "cropped_from": options.image_size if options.crop else None,
        "channels": 3,
        "dim": options.dim,
        "dim_mults": list(options.dim_mults),
        "data_version": manifest and manifest.version,
        "data_seed": manifest and manifest.seed,
        "num_images": len(digests),
        "data_checksum": hashlib.sha256(lines.encode()).hexdigest()[:16],
        "loss_weight": options.loss_weight,
        "effective_batch": options.batch_size * options.gradient_accumulate,
        "seed": options.seed,
        "lr": options.lr,
        "lr_final": options.lr_final,
        "warmup": options.warmup,
        "steps": options.steps,
        "initial_weights": options.init_weights and options.init_weights.name,
    }


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse before the first step what would only fail, or destroy something, after hours."""
    folder, out = options.results_dir, options.weights_out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--results-dir {folder} is a file; name a folder.")
    if out.is_dir():
        raise UserError(f"--weights-out {out} is a folder; name a .pt file.")
    names = ("run.json", "loss_curve.png", "losses.csv")
    kept = [*folder.glob("sample-*.png"), *(folder / n for n in names if (folder / n).exists())]
    kept += list_checkpoints(folder)
    if kept and not options.resume:
        raise UserError(
            f"{folder} holds another run ({kept[-1].name}): go on with it with --resume, or name "
            "another folder with --results-dir."
        )
    check_folder(folder)
    check_folder(out.parent)


def memory_advice(options: argparse.Namespace) -> str:
    """Return what to type where the memory is too small: the same run, cut into more passes."""
    batch, passes = options.batch_size, options.gradient_accumulate
    if batch == 1:
        return "not even one image fits, so use a smaller --dim or --image-size, or --quick."
    parts = next(n for n in range(2, batch + 1) if batch % n == 0)
    return (
        f"use --batch-size {batch // parts} --gradient-accumulate {passes * parts}, which is the "
        "same run (with --resume, if checkpoints were written)."
    )


def start_records(run: Run, compiled: bool) -> None:
    """Clean up behind a killed process, write run.json and print the banner."""
    run.config |= {
        "precision": run.precision,
        "compiled": compiled,
        "processes": run.accelerator.num_processes,
        "hardware": describe(run.device),
        "torch": str(torch.__version__),
        "library": LIBRARY_VERSION,
    }
    if run.accelerator.is_main_process:
        remove_leftovers(run.options.results_dir)
        note_progress(run)
        write_run_file(run)
        print_banner(run)


def print_banner(run: Run) -> None:
    """Print everything one would regret not having seen before an overnight run."""
    options, config = run.options, run.config
    parameters = sum(p.numel() for p in run.diffusion.model.parameters())
    passes = options.steps * run.effective_batch / len(run.data.images)
    pixels = f"squares of {options.image_size}x{options.image_size}" if options.crop else "images"
    names = run.diffusion.label_names
    labels = f" with {len(names)} labels" if names else ""
    heldout = "" if run.heldout is None else f", {len(run.heldout.images)} held-out ones"
    lines = {
        "Device": f"{config['hardware']} x {config['processes']}",
        "Precision": f"{run.precision}, compiled: {'yes' if config['compiled'] else 'no'}",
        "Network": f"{parameters:,} parameters, {run.side}x{run.side} {pixels}, "
        f"{options.objective}, {options.schedule} schedule",
        "Data": f"{len(run.data.images):,} images from {options.data}{labels}{heldout}",
        "Batch": f"{options.batch_size} x {options.gradient_accumulate} (accumulation) = "
        f"{run.effective_batch}",
        "Steps": f"{run.step:,} to {options.steps:,}: {passes:,.0f} passes over the data in all",
        "Writes": f"{options.results_dir}/ every {options.save_every:,} steps, then "
        f"{options.weights_out}",
        "Stop": "Ctrl-C saves and leaves",
        "Go on": resume_command(),
    }
    for name, text in lines.items():
        print(f"{name:<12}{text}")
    sys.stdout.flush()


def resume_command() -> str:
    """Return the command line of this run, with --resume."""
    words = ["python", *sys.argv]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def note_progress(run: Run) -> None:
    """Note in the settings how far the run has come, and in which time."""
    run.config |= {"steps_done": run.step, "seconds": round(run.seconds, 1)}


def write_run_file(run: Run) -> None:
    """Write run.json: the settings of the run and what it took so far, for people."""
    command = {"command": shlex.join(["python", *sys.argv])}
    write_json(run.options.results_dir / "run.json", command | run.config)


def finish(run: Run, first: int) -> None:
    """Export the EMA weights and say what was made.

    first: the step that this command began at. Where it had nothing to do and the file has exactly
    these weights already, it is left alone.
    """
    if not run.accelerator.is_main_process:
        return
    out = run.options.weights_out
    if first == run.step and exported_step(out, run.config) == run.step:
        print(f"This run is finished: {run.step:,} steps are done and {out} is written. Use a "
              "larger --steps to train on.")  # fmt: skip
        return
    previous = export_weights(run.ema.ema_model, out, run.step, run.config)
    if previous:
        print(f"The weights that were at {out} are now {previous}")
    print(
        f"Wrote {out} (EMA weights of step {run.step:,}), samples, losses.csv and loss_curve.png "
        f"in {run.options.results_dir}; training took {duration(run.seconds)}. Draw new fabrics "
        f"with: python exercise1_generate.py --weights {out}"
    )


def exported_step(path: Path, config: Mapping[str, Any]) -> int | None:
    """Return the step of the bundled weights at `path`, if they are of this run's data and seed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        keys = ("data_checksum", "seed", "effective_batch")
        same = all(state["config"][key] == config[key] for key in keys)
        return int(state["step"]) if same else None
    except Exception:  # absent, damaged or somebody else's: all the same here
        return None


# ---- Checkpoints: a whole file or none -----------------------------------------------------------


def save_checkpoint(run: Run) -> Path:
    """Write model-STEP.pt in the format of the library's Trainer, then drop the oldest ones.

    Raises UserError when the weights are not finite: the last good checkpoint stays the newest.
    """
    norms = torch._foreach_norm([p.detach() for p in run.diffusion.model.parameters()])
    if not torch.isfinite(torch.stack(norms)).all():
        raise UserError(not_finite_message(run, f"The weights after step {run.step} are"))
    note_progress(run)
    state = {
        "step": run.step,
        **split_labels(run),
        "scaler": run.scaler.state_dict() if run.scaler.is_enabled() else None,
        "version": LIBRARY_VERSION,
        # From here on for --resume alone; Trainer.load passes it over.
        "config": run.config,
        "images": run.digests,
        "seconds": run.seconds,
        "pending": [float(loss) for loss in run.pending],
    }
    path: Path = run.options.results_dir / f"model-{run.step}.pt"
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    write_run_file(run)
    for old in list_checkpoints(run.options.results_dir)[run.options.keep :]:
        old.unlink()  # only now that the new one is safe
    return path


def split_labels(run: Run) -> dict[str, Any]:
    """Return model, opt and ema of the plain network, as the library knows it, and the labels."""
    model, ema = run.diffusion.state_dict(), run.ema.state_dict()
    optimizer = run.optimizer.state_dict()
    found = {"model": model, "opt": optimizer, "ema": ema}
    if run.diffusion.label_names:
        last = optimizer["param_groups"][0]["params"].pop()
        ema.pop("online_model.label_table", None)
        found["labels"] = {
            "names": list(run.diffusion.label_names),
            "embedding": ema.pop("ema_model.label_table"),
            "parameter": model.pop("label_table"),
            **optimizer["state"].pop(last),
        }
    return found


def join_labels(run: Run, state: dict[str, Any]) -> None:
    """Put the labels of a checkpoint back into its model, opt and ema: zeros where it has none.

    Raises UserError where they are other ones than this run's.
    """
    now = run.diffusion.label_names
    labels = state.get("labels")
    then = tuple(labels["names"]) if labels else now
    if then != now:
        raise UserError(
            f"The checkpoint's labels are {', '.join(then)}, the data's are "
            f"{', '.join(now) or 'none'}: go on with the same folders of images."
        )
    if not now:
        return
    zeros = torch.zeros_like(run.diffusion.label_table)
    table = labels["parameter"] if labels else zeros
    average = labels["embedding"] if labels else zeros
    state["model"]["label_table"] = table
    state["ema"]["ema_model.label_table"] = average
    if "online_model.betas" in state["ema"]:
        state["ema"]["online_model.label_table"] = table
    places = state["opt"]["param_groups"][0]["params"]
    places.append(len(places))
    if labels:
        moments = {key: labels[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        state["opt"]["state"][places[-1]] = moments


def list_checkpoints(folder: Path) -> list[Path]:
    """Return all model-NUMBER.pt of a folder, the newest (highest step) first."""
    found = [p for p in folder.glob("model-*.pt") if re.fullmatch(r"model-[0-9]+", p.stem)]
    return sorted(found, key=lambda p: int(p.stem.split("-")[1]), reverse=True)


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that can be read whole; set damaged ones aside by name.

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
            "--results-dir for a new run."
        )
    return None


def recorded_precision(state: Mapping[str, Any]) -> str:
    """Return the precision that a checkpoint's run computed in; auto where it does not say."""
    return str(state.get("config", {}).get("precision", "auto"))


def restore(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Take up a run where a checkpoint has left it.

    Raises UserError when the run was started with other settings or other data.
    """
    compare_settings(run, path, state)
    join_labels(run, state)
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
    run.pending = list(state.get("pending", []))
    run.say(f"Resuming {path} at step {run.step:,}.")


def copy_weights(options: argparse.Namespace, diffusion: GaussianDiffusion) -> None:
    """Start from the EMA weights of an earlier run; the noise schedule stays this run's own.

    The network has no layer that depends on the image size, so weights trained at 32x32 are a good
    start for 64x64. Labels are matched by name, new ones start at zero. Raises UserError for a file
    that does not fit.
    """
    loaded, facts = load_weights(options.init_weights)
    then = f"{facts.dim} x {facts.dim_mults} with {facts.channels} channels"
    now = f"{options.dim} x {tuple(options.dim_mults)} with 3 channels"
    if then != now:
        raise UserError(f"--init-weights {options.init_weights} holds a network of width {then}, "
                        f"this run's is {now}: name another file, or type --dim and "
                        "--dim-mults.")  # fmt: skip
    diffusion.model.load_state_dict(loaded.model.state_dict())
    for place, name in enumerate(diffusion.label_names):
        if name in facts.labels:
            vector = loaded.label_table[facts.labels.index(name)]
            diffusion.label_table.data[place] = vector.detach()


def compare_settings(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse to go on with another network, process, batch or data set than the run's own."""
    old, new = state.get("config", {}), run.config
    if not new.keys() <= old.keys():
        run.say(f"{path} does not say its settings, so they cannot be compared.")
        return
    changed = [key for key in new if old[key] != new[key]]
    differences = [
        f"{key.replace('_', ' ')}: {old[key]} then, {new[key]} now"
        for key in changed
        if key not in FREE_SETTINGS and not key.startswith(("data", "num"))
    ]
    if "data_checksum" in changed:
        differences.append("data: " + compare_data(state.get("images", {}), run.digests))
    if differences:
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(differences)}). Use the same "
            "ones to resume it, or another --results-dir for a new run."
        )
    new["initial_weights"] = old["initial_weights"]
    for key in ("lr", "lr_final", "warmup"):
        if key in changed:
            run.say(f"Note: {key} was {old[key]}, now {new[key]}.")


def compare_data(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say in a few words which images were added, removed or replaced."""
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


def not_finite_message(run: Run, what: str) -> str:
    """Return one sentence for numbers that ran away, with the way back."""
    checkpoints = list_checkpoints(run.options.results_dir)
    last = f"the last good checkpoint is {checkpoints[0]}" if checkpoints else "none was saved yet"
    return (
        f"{what} not finite, so training stopped; {last}. Try a smaller --lr (now "
        f"{run.options.lr:g}), some --warmup or --precision fp32, and go on with --resume."
    )
