"""The U-Net and the diffusion process around it; weight files read and written."""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from denoising_diffusion_pytorch.version import __version__ as LIBRARY_VERSION

from ddpm_basics.console import UserError
from ddpm_basics.files import unused_name
from ddpm_basics.runs import Run, save_durably

NETWORK_OUTPUT = {"pred_noise": "the noise", "pred_x0": "x_0", "pred_v": "v"}


def build_diffusion(
    dim=64,
    dim_mults=(1, 2, 4, 8),
    channels=3,
    image_size=64,
    timesteps=1000,
    objective="pred_noise",
    beta_schedule="sigmoid",
    weights_on="cpu",
):
    """Build the U-Net and the diffusion process around it, untrained.

    Every choice is passed on by name because the library's own defaults differ from ours
    (its objective is pred_v), and a wrong one gives garbage without an error. weights_on="meta"
    leaves out the random weights: half a second less, where a file replaces them anyway.
    """
    with torch.device(weights_on):
        unet = Unet(dim=dim, dim_mults=tuple(dim_mults), channels=channels, flash_attn=False)
    return GaussianDiffusion(
        unet,
        image_size=image_size,
        timesteps=timesteps,
        objective=objective,
        beta_schedule=beta_schedule,
    )


def read_checkpoint(path):
    """Read a file of torch.save as data only: nothing in it is ever executed."""
    if not path.exists():
        raise UserError(
            f"The weight file {path} does not exist: fetch the whole bundle, name another file "
            "with --weights, or make one with 'python exercise3_train.py --train'."
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a weight file (.pt) with --weights.")
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


def unwrap_checkpoint(checkpoint, path):
    """Return (kind, state of the GaussianDiffusion or of the Unet alone) of a checkpoint."""
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
    if not isinstance(state.get("model.init_conv.weight"), torch.Tensor):
        raise UserError(f"{path} holds no U-Net of denoising-diffusion-pytorch 2.x.")
    return kind, state


def network_shape(state):
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


def schedule_name(betas):
    """Name the library's schedule that has these betas [T], or 'custom'."""
    for name in ("sigmoid", "cosine", "linear"):
        expected = getattr(library, f"{name}_beta_schedule")(len(betas))
        if torch.allclose(betas.double(), expected, rtol=1e-3, atol=1e-7):
            return name
    return "custom"


def objective_name(loss_weight, alphas_cumprod):
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
    raise ValueError("its loss weight fits no objective, and it has no config that names one")


def load_weights(path, image_size=64):
    """Load any of the four kinds of weight file into a network that fits it.

    Takes checkpoints of the library's Trainer (their EMA weights), the bundled file, and the
    state dict of a GaussianDiffusion or of a Unet alone. A Unet alone does not say its objective
    and schedule: pred_noise and sigmoid are assumed. image_size counts where the file has none.

    Returns (diffusion in eval mode on the CPU, facts: a dict of what was found).
    Raises UserError for everything that is no such file.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    kind, state = unwrap_checkpoint(checkpoint, path)
    process = (checkpoint.get("config") or {}).get("process", {})
    facts = {"kind": kind, "step": checkpoint.get("step"), "version": checkpoint.get("version")}
    try:
        facts |= network_shape(state)
        if "betas" in state:
            facts["timesteps"] = len(state["betas"])
            facts["beta_schedule"] = schedule_name(state["betas"])
            facts["objective"] = process.get("objective") or objective_name(
                state["loss_weight"], state["alphas_cumprod"])  # fmt: skip
        else:
            facts |= {"timesteps": 1000, "beta_schedule": "sigmoid", "objective": "pred_noise"}
        facts["image_size"] = process.get("image_size", image_size)
        diffusion = build_diffusion(
            facts["dim"], facts["dim_mults"], facts["channels"], facts["image_size"],
            facts["timesteps"], facts["objective"],
            "sigmoid" if facts["beta_schedule"] == "custom" else facts["beta_schedule"],
            weights_on="meta",
        )  # fmt: skip
        # A custom schedule comes in with the file's buffers, which replace those just built.
        state = {key: value.to(torch.float32, copy=True) for key, value in state.items()}
        (diffusion if "betas" in state else diffusion.model).load_state_dict(
            state if "betas" in state else {k.removeprefix("model."): v for k, v in state.items()},
            assign=True,
        )
    except (KeyError, IndexError, ValueError, RuntimeError, AssertionError, TypeError,
            AttributeError) as error:  # fmt: skip
        detail = re.sub(r"\s+", " ", str(error))[:160]
        raise UserError(
            f"The weights in {path} belong to another architecture, or to version 1 of the "
            f"library ({type(error).__name__}: {detail}...)."
        ) from error
    if not all(weight.isfinite().all() for weight in diffusion.parameters()):
        raise UserError(f"The weights in {path} are not all finite numbers: its training diverged.")
    facts["parameters"] = sum(weight.numel() for weight in diffusion.model.parameters())
    return diffusion.eval(), facts


def describe(facts, path):
    """Say in one line what a weight file turned out to hold."""
    step = "" if facts["step"] is None else f", step {facts['step']:,}"
    version = f", library {facts['version']}" if facts["version"] else ""
    multipliers = "-".join(map(str, facts["dim_mults"]))
    return (
        f"{path}: {facts['kind']}{step}{version}; {facts['parameters']:,} parameters "
        f"(width {facts['dim']} x {multipliers}, {facts['channels']} channels); predicts "
        f"{NETWORK_OUTPUT[facts['objective']]} ({facts['objective']}), {facts['beta_schedule']} "
        f"schedule, {facts['timesteps']} timesteps, {facts['image_size']} pixels"
    )


def load_initial_weights(diffusion: GaussianDiffusion, path: Path) -> None:
    """Start from the EMA weights of an earlier run; the noise schedule stays this run's own.

    The network has no layer that depends on the image size, so weights trained at 32x32 are a
    good start for 64x64. Raises UserError for a file that does not fit.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["ema"]
        prefix = "ema_model.model."
        state = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        diffusion.model.load_state_dict(state)
    except FileNotFoundError:
        raise UserError(f"--init-weights {path} does not exist.") from None
    except Exception as error:  # many kinds, from a damaged archive to another architecture
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--init-weights {path} does not hold EMA weights of this network ({first_line})."
        ) from None


def exported_step(path: Path, config: dict) -> int | None:
    """The step of the bundled weights at `path`, if they are of this run's data and seed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        same = all(
            state["config"]["training"][key] == config["training"][key]
            for key in ("seed", "effective_batch")
        )
        same = same and state["config"]["data"] == config["data"]
        return state["step"] if same else None
    except Exception:  # absent, damaged or somebody else's: all the same here
        return None


def export_weights(run: Run, out: Path) -> Path | None:
    """Write the bundled format: EMA parameters in fp16, buffers in fp32, step and settings.

    fp16 halves the file and rounds a weight by at most 1 part in 2,000. A file already there is
    kept under another name, which is returned.
    """
    model = run.ema.ema_model
    parameters = {name for name, _ in model.named_parameters()}
    ema = {
        f"ema_model.{name}": tensor.half().contiguous() if name in parameters else tensor
        for name, tensor in model.state_dict().items()
    }
    state = {
        "step": run.step,
        "version": LIBRARY_VERSION,
        "ema": {name: tensor.cpu() for name, tensor in ema.items()},
        "config": run.config,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    previous = None
    if out.exists():
        previous = unused_name(out.with_name(f"{out.stem}.previous{out.suffix}"))
        shutil.copy2(out, previous)
    save_durably(state, out)
    return previous
