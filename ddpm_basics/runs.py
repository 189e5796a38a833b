"""A training run: its state, the settings it leaves on the disk, the weights at its end."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
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

from ddpm_basics.console import duration
from ddpm_basics.data import Pictures
from ddpm_basics.datasets import describe_data, find_data_set
from ddpm_basics.fabrics.manifest import read_manifest
from ddpm_basics.files import remove_leftovers, write_json
from ddpm_basics.hardware import describe
from ddpm_basics.training import StepNumbers, draw_numbers, fixed_numbers
from ddpm_basics.weight_files import config_of, export_weights, peek


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
    def share(self) -> int:
        """Images that the network sees at once in this process: its part of a pass."""
        return int(self.options.batch_size // self.accelerator.num_processes)

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step."""
        return int(self.options.batch_size * self.options.gradient_accumulate)

    def numbers(self, step: int) -> StepNumbers:
        """Draw everything random about the effective batch of a step."""
        numbers = draw_numbers(
            self.options.seed, step, self.effective_batch, self.data.images, self.diffusion
        )
        mirrored = self.options.flip == "on"
        return numbers if mirrored else numbers._replace(flip=torch.zeros_like(numbers.flip))

    def fixed_numbers(self, pictures: Pictures, told: bool) -> StepNumbers:
        """Return the numbers behind a fixed loss on some pictures, with their labels or without."""
        numbers = fixed_numbers(self.options.seed, pictures.images, self.diffusion)
        return numbers._replace(drop=torch.full_like(numbers.drop, not told))

    def say(self, text: str) -> None:
        """Print from the main process only."""
        if self.accelerator.is_main_process:
            print(text, flush=True)


def describe_run(options: argparse.Namespace, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return what a checkpoint says about its run: plain numbers and strings only."""
    manifest = read_manifest(options.data)
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return {
        "objective": options.objective,
        "schedule": options.schedule,
        "timesteps": options.timesteps,
        "image_size": options.crop or options.image_size,
        "cropped_from": options.image_size if options.crop else None,
        "channels": options.channels,
        "dim": options.dim,
        "dim_mults": list(options.dim_mults),
        "data_version": manifest and manifest.version,
        "data_seed": manifest and manifest.seed,
        "num_images": len(digests),
        "data_checksum": hashlib.sha256(lines.encode(errors="backslashreplace")).hexdigest()[:16],
        "data_set": str(options.data) if find_data_set(options.data) else None,
        "flip": options.flip,
        "loss": options.loss,
        "loss_weight": options.loss_weight,
        "effective_batch": options.batch_size * options.gradient_accumulate,
        "seed": options.seed,
        "lr": options.lr,
        "lr_final": options.lr_final,
        "warmup": options.warmup,
        "steps": options.steps,
        "initial_weights": options.init_weights and options.init_weights.name,
    }


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
    digits = 0 if passes >= 10 else 1
    side = run.diffusion.image_size[0]
    pixels = f"squares of {options.image_size}x{options.image_size}" if options.crop else "images"
    names = run.diffusion.label_names
    labels = f" with {len(names)} labels" if names else ""
    heldout = "" if run.heldout is None else f", {len(run.heldout.images)} held-out ones"
    lines = {
        "Device": f"{config['hardware']} x {config['processes']}",
        "Precision": f"{run.precision}, compiled: {'yes' if config['compiled'] else 'no'}",
        "Network": f"{parameters:,} parameters, {side}x{side} {pixels}, "
        f"{options.objective}, {options.schedule} schedule",
        "Data": f"{len(run.data.images):,} images from "
        f"{describe_data(options.data, options.image_size)}{labels}{heldout}",
        "Mirrored": "half of them, at random" if options.flip == "on" else "none (--flip off)",
        "Batch": f"{options.batch_size} x {options.gradient_accumulate} (accumulation) = "
        f"{run.effective_batch}",
        "Labels": ", ".join((*names[:24], "...") if len(names) > 24 else names) or "none",
        "Steps": f"{run.step:,} to {options.steps:,}: {passes:,.{digits}f} passes over the data "
        "in all",
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
    folder = run.options.results_dir
    there = [name for name in ("losses.csv", "loss_curve.png") if (folder / name).is_file()]
    print(
        f"Wrote {out} (EMA weights of step {run.step:,}), {', '.join(['samples', *there])} "
        f"in {folder}; training took {duration(run.seconds)}. Draw more "
        f"with: python exercise1_generate.py --weights {out}"
    )


def exported_step(path: Path, config: Mapping[str, Any]) -> int | None:
    """Return the step of the bundled weights at `path`, if they are of this run's data and seed."""
    state = peek(path)
    then = config_of(state)
    same = all(then.get(key) == config[key] for key in ("data_checksum", "seed", "effective_batch"))
    return state.get("step") if same else None
