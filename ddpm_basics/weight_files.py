"""Weight files read and written: what they must contain, and what they turn out to hold.

A weight file is one of four, all of them opened as data only: a checkpoint of the library's
Trainer (its EMA weights count), the bundled file (the same `ema` entry, parameters in fp16, a flat
`config` and the table of `labels`), the state dict of a GaussianDiffusion, or that of a Unet alone.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from denoising_diffusion_pytorch.version import __version__ as LIBRARY_VERSION
from torch import Tensor

from ddpm_basics.console import UserError
from ddpm_basics.files import unused_name, write_atomically
from ddpm_basics.model import build_diffusion
from ddpm_basics.sampling import SCHEDULES

NETWORK_OUTPUT = {"pred_noise": "the noise", "pred_x0": "x_0", "pred_v": "v"}


# ---- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a weight file turned out to hold."""

    kind: str
    step: int | None
    version: str | None  # of the library that wrote it
    dim: int
    dim_mults: tuple[int, ...]
    channels: int
    image_size: int
    timesteps: int
    objective: str
    beta_schedule: str
    labels: tuple[str, ...]  # what the network can be told to draw
    assumed: tuple[str, ...]  # what the file does not say
    parameters: int

    def describe(self, path: Path) -> str:
        """Say all of it in one line."""
        step = "" if self.step is None else f", step {self.step:,}"
        version = f", library {self.version}" if self.version else ""
        assumed = f" (assumed: {', '.join(self.assumed)})" if self.assumed else ""
        labels = f", {len(self.labels)} labels" if self.labels else ""
        return (
            f"{path}: {self.kind}{step}{version}; {self.parameters:,} parameters "
            f"(width {self.dim} x {'-'.join(map(str, self.dim_mults))}, {self.channels} channels); "
            f"predicts {NETWORK_OUTPUT[self.objective]} ({self.objective}), {self.beta_schedule} "
            f"schedule, {self.timesteps} timesteps, {self.image_size} pixels{labels}{assumed}"
        )


def load_weights(path: Path, image_size: int = 64) -> tuple[GaussianDiffusion, Facts]:
    """Load any of the four kinds of weight file into a network that fits it.

    A Unet alone does not say its objective and schedule: pred_v and sigmoid are assumed.
    image_size counts where the file has none. Returns the diffusion in eval mode on the CPU, in
    fp32, and what was found. Raises UserError for everything that is no such file.
    """
    checkpoint = read_checkpoint(path)
    kind, state = unwrap_checkpoint(checkpoint, path)
    config = checkpoint.get("config") or {}
    try:
        shape = guess_shape(state)
        process, assumed = find_process(state)
        if "image_size" not in config:
            assumed = (*assumed, "the image size")
        process["image_size"] = config.get("image_size", image_size)
        table = checkpoint.get("labels") or {"names": ()}
        labels = tuple(map(str, table["names"]))
        if labels:
            state["label_table"] = table["embedding"]
        diffusion = fill_diffusion(shape, process, state, labels)
    except (KeyError, IndexError, ValueError, RuntimeError, AssertionError, TypeError,
            AttributeError) as error:  # fmt: skip
        detail = re.sub(r"\s+", " ", str(error))[:160]
        raise UserError(
            f"The weights in {path} belong to another architecture, or to version 1 of the "
            f"library ({type(error).__name__}: {detail}...)."
        ) from error
    halvings = len(shape["dim_mults"]) - 1
    if process["image_size"] % 2**halvings:
        raise UserError(f"The image size must be a multiple of {2**halvings}: the U-Net in {path} "
                        f"halves it {halvings} times.")  # fmt: skip
    if not all(weight.isfinite().all() for weight in diffusion.parameters()):
        raise UserError(f"The weights in {path} are not all finite numbers: its training diverged.")
    facts = Facts(
        kind=kind,
        step=step if isinstance(step := checkpoint.get("step"), int) else None,
        version=checkpoint.get("version"),
        labels=labels,
        assumed=assumed,
        parameters=sum(weight.numel() for weight in diffusion.model.parameters()),
        **shape,
        **process,
    )
    return diffusion.eval(), facts


def read_checkpoint(path: Path) -> Any:
    """Read a file of torch.save as data only: nothing in it is ever executed. Raises UserError."""
    if not path.exists():
        raise UserError(
            f"The weight file {path} does not exist: fetch the whole bundle, name another file, "
            "or make one with 'python exercise3_train.py --train'."
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a weight file (.pt).")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError(f"The weight file {path} is empty: fetch or train it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is only a Git LFS pointer: run 'git lfs pull' to get the weights.")
    is_zip = zipfile.is_zipfile(path)
    if start.startswith(b"PK") and not is_zip:
        raise UserError(f"The weight file {path} is cut off: fetch or copy it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError:
        raise
    except Exception as error:  # torch.load has no error of its own, it raises a dozen kinds
        forbidden = re.search(r"(?:GLOBAL|Unsupported (?:global|class)\W*)\s*([\w.]+)", str(error))
        if forbidden and isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path} wants to run code ({forbidden.group(1)}) when it is opened, so it was "
                "refused: use a file that holds tensors only."
            ) from error
        raise UserError(
            f"{path} is damaged or no PyTorch weight file (one that holds nothing but tensors): "
            "fetch it again, or name another one."
        ) from error


def unwrap_checkpoint(checkpoint: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return (kind, state of the GaussianDiffusion or of the Unet in it) of a checkpoint."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds no weights but a {type(checkpoint).__name__}.")
    version = str(checkpoint.get("version", ""))
    if version.startswith(("0.", "1.")):
        raise UserError(
            f"{path} was written by denoising-diffusion-pytorch {version}, whose network differs: "
            "train again with version 2, or draw with the old one."
        )
    kind, state = "bare weights", checkpoint
    if isinstance(checkpoint.get("ema"), dict):
        kind = "EMA weights of a training checkpoint" if "model" in checkpoint else "EMA weights"
        state = {
            key.removeprefix("ema_model."): value
            for key, value in checkpoint["ema"].items()
            if key.startswith("ema_model.")
        }
    # torch.compile and DistributedDataParallel leave their names in the keys.
    state = {str(key).replace("_orig_mod.", "").replace("module.", ""): value
             for key, value in state.items()}  # fmt: skip
    if "init_conv.weight" in state:  # a Unet alone
        kind = "bare U-Net weights"
        state = {f"model.{key}": value for key, value in state.items()}
    if not isinstance(state.get("model.init_conv.weight"), Tensor):
        raise UserError(f"{path} holds no U-Net of denoising-diffusion-pytorch 2.x.")
    return kind, state


def guess_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read width, multipliers and channels of the Unet from the shapes of its weights."""
    dim = state["model.time_mlp.1.weight"].shape[1]
    stages = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("model.downs."))
    # The last layer of each stage sets its width; only the last stage does not halve the image.
    last = [f"model.downs.{i}.3.1.weight" for i in range(stages - 1)]
    last.append(f"model.downs.{stages - 1}.3.weight")
    return {
        "dim": dim,
        "dim_mults": tuple(state[key].shape[0] // dim for key in last),
        "channels": state["model.final_conv.weight"].shape[0],
    }


def find_process(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read T, schedule and objective from the buffers, which compute, and say what is assumed."""
    if "betas" not in state:
        process = {"timesteps": 1000, "beta_schedule": "sigmoid", "objective": "pred_v"}
        return process, ("objective", "schedule")
    return {
        "timesteps": len(state["betas"]),
        "beta_schedule": schedule_name(state["betas"]),
        "objective": objective_name(state["loss_weight"], state["alphas_cumprod"]),
    }, ()


def schedule_name(betas: Tensor) -> str:
    """Name the library's schedule that has these betas [T], or 'custom'."""
    for name in SCHEDULES:
        expected = getattr(library, f"{name}_beta_schedule")(len(betas))
        if torch.allclose(betas.double(), expected, rtol=1e-3, atol=1e-7):
            return name
    return "custom"


def objective_name(loss_weight: Tensor, alphas_cumprod: Tensor) -> str:
    """Tell what the network predicts from the loss weight [T], the only trace the file has of it.

    The weight is 1 for the noise, SNR for x_0 and SNR / (SNR + 1) for v. Min-SNR weighting
    (Hang 2023) clamps the SNR at 5 or so; the noisy half, where it is below 1, stays as it is.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    expected = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}
    noisy = snr < 1
    for name, weight in expected.items():
        if torch.allclose(loss_weight[noisy], weight[noisy], rtol=1e-2):
            return name
    raise ValueError("its loss weight fits no objective")


def fill_diffusion(
    shape: Mapping[str, Any],
    process: Mapping[str, Any],
    state: Mapping[str, Tensor],
    labels: tuple[str, ...],
) -> GaussianDiffusion:
    """Build a diffusion of this shape and process, and put the weights into it."""
    # A custom schedule comes in with the file's buffers, which replace those just built.
    known = process["beta_schedule"] if process["beta_schedule"] in SCHEDULES else "sigmoid"
    diffusion = build_diffusion(
        **shape, **{**process, "beta_schedule": known}, labels=labels, weights_on="meta"
    )
    copied = {key: value.to(torch.float32, copy=True) for key, value in state.items()}
    if "betas" in state:
        diffusion.load_state_dict(copied, assign=True)
    else:
        unet = {key.removeprefix("model."): value for key, value in copied.items()}
        diffusion.model.load_state_dict(unet, assign=True)
    return diffusion


# ---- Writing -------------------------------------------------------------------------------------


def export_weights(
    ema_model: GaussianDiffusion, path: Path, step: int, config: Mapping[str, Any]
) -> Path | None:
    """Write the bundled format: EMA parameters in fp16, buffers in fp32, labels, step, settings.

    fp16 halves the file and rounds a weight by at most 1 part in 2,000. A file already there is
    kept under another name, which is returned.
    """
    parameters = {name for name, _ in ema_model.named_parameters()}
    ema = {
        f"ema_model.{name}": (tensor.half() if name in parameters else tensor).contiguous().cpu()
        for name, tensor in ema_model.state_dict().items()
        if name != "label_table"
    }
    state = {"step": step, "version": LIBRARY_VERSION, "ema": ema, "config": dict(config)}
    if ema_model.label_names:
        table = ema_model.label_table.detach().float().cpu()
        state["labels"] = {"names": list(ema_model.label_names), "embedding": table}
    path.parent.mkdir(parents=True, exist_ok=True)
    previous = None
    if path.exists():
        previous = unused_name(path.with_name(f"{path.stem}.previous{path.suffix}"))
        shutil.copy2(path, previous)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    return previous
