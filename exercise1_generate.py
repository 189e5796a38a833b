# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "accelerate>=1.0",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 1: draw new fabrics from noise with a trained diffusion model.

    python exercise1_generate.py                                 16 fabrics, 20 steps each
    python exercise1_generate.py --seed 7 --num-samples 36       others, and more of them
    python exercise1_generate.py --sampler ddim --steps 250      the classic way, slower
    python exercise1_generate.py --min-signal 0                  ask the network even in pure noise
    accelerate launch exercise1_generate.py --num-samples 10000  share the work, e.g. on 4 GPUs

Writes exercise1_output.png (the grid) and generated_samples/fabric_0000.png, ... (one file per
image). Image i depends on seed + i alone, so image 3 of seed 42 is image 0 of seed 45; batch
size, number of images and number of processes change nothing but the last bits.

The samples folder holds the images of one setting (weights, sampler, steps, seed, ...), which
stands in its generation.json. Run again with the same setting, and only missing images are
drawn; with another one, the folder is first renamed to generated_samples.1, .2, ...: nothing is
lost and nothing gets mixed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import sys
import tempfile
import time
import warnings
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

RANDOM_SEED = 42  # image i is drawn from the noise of RANDOM_SEED + i
NUM_SAMPLES = 16  # images
SAMPLING_STEPS = {"dpmpp": 20, "ddim": 250, "ddpm": 1000}
MIN_SIGNAL = 0.03  # alpha_t below which x_t is taken for pure noise, and the network is not asked
BATCH_SIZE = {"cpu": 8, "mps": 16, "cuda": 64}  # images the network sees at once
GRID_LIMIT = 64  # images in the grid; the folder holds all of them
WEIGHTS = "models/ddpm_african_fabrics.pt"
OUTPUT = "exercise1_output.png"
SAMPLES_DIR = "generated_samples"

SAMPLER_NAMES = {"dpmpp": "DPM-Solver++", "ddim": "DDIM", "ddpm": "ancestral sampling"}
NETWORK_OUTPUT = {"pred_noise": "the noise", "pred_x0": "x_0", "pred_v": "v"}
STARTED = time.perf_counter()


class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what is wrong and how."""


def library_hint(error):
    """Turn a failed import into one sentence with the command that mends it."""
    pip = f"{sys.executable} -m pip install"
    if sys.version_info < (3, 10):  # noqa: UP036 - this line is for those who have an older one
        version = ".".join(map(str, sys.version_info[:2]))
        return (
            f"Error: this is Python {version}, but Python 3.10 or newer is needed: install one, "
            "then 'python3.12 -m venv .venv' and '.venv/bin/pip install -r requirements.txt'."
        )
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted while the libraries were loading; nothing was written."
    if "torchvision::nms" in str(error):
        return (
            "Error: torch and torchvision come from different builds (one for CPU, one for CUDA, "
            f"or two versions); mend it with: {pip} --upgrade --force-reinstall torch torchvision"
        )
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or str(error)).split(".")[0].replace("_", "-")
        package = {"PIL": "pillow"}.get(package, package)
        return f"Error: the Python package {package} is missing; install it with: {pip} {package}"
    return (
        f"Error: a library could not be loaded ({type(error).__name__}: {error}); mend it with: "
        f"{pip} --upgrade --force-reinstall denoising-diffusion-pytorch"
    )


def whole_number(minimum, maximum=2**31):
    """Return an argparse type for integers from minimum to maximum."""

    def convert(text):
        if not re.fullmatch(r"-?\d+", text) or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a whole number from {minimum} to {maximum}"
            )
        return int(text)

    return convert


def share(text):
    """Read a number from 0 up to, but not including, 1: a type for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to below 1")
    return number


def parse_options(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Image i depends on seed + i alone. Run the same command again to draw only what "
        "is missing in the samples folder; images of other settings are kept beside it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", type=Path, default=WEIGHTS, help="weight file (.pt)")
    add("--num-samples", type=whole_number(1), default=NUM_SAMPLES, help="images to draw")
    add("--sampler", choices=SAMPLING_STEPS, default="dpmpp", help="how to walk from noise to x_0")
    defaults = ", ".join(f"{steps} for {name}" for name, steps in SAMPLING_STEPS.items())
    add("--steps", type=whole_number(1), default=argparse.SUPPRESS,
        help=f"steps from noise to image (default: {defaults})")  # fmt: skip
    add("--min-signal", type=share, default=MIN_SIGNAL,
        help="alpha_t below which x_t counts as noise and the network is not asked")  # fmt: skip
    add("--seed", type=whole_number(0), default=RANDOM_SEED, help="seed of image 0")
    add("--output", type=Path, default=OUTPUT, help="the grid of images (.png)")
    add("--samples-dir", type=Path, default=SAMPLES_DIR, help="folder of single images")
    add("--image-size", type=whole_number(1), default=64,
        help="pixels per side, for weight files that do not say it themselves")  # fmt: skip
    batches = ", ".join(f"{count} on {device}" for device, count in BATCH_SIZE.items())
    add("--batch-size", type=whole_number(1), default=argparse.SUPPRESS,
        help=f"images at once; changes speed and memory only (default: {batches})")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the network; auto takes bf16 where the hardware has it")  # fmt: skip
    add("--compile", choices=["on", "off"], default="off",
        help="torch.compile the network: minutes that thousands of images earn back")  # fmt: skip
    options = parser.parse_args(argv)
    options.steps = getattr(options, "steps", SAMPLING_STEPS[options.sampler])
    return options


if __name__ == "__main__":
    parse_options()  # the imports below take seconds; --help and wrong usage answer at once

gc.disable()  # searching for garbage, where there is none yet, is a fifth of those seconds
try:
    if sys.version_info < (3, 10):  # noqa: UP036 - an older Python has to get this far
        raise ImportError("Python is too old")
    import numpy as np
    import torch
    from accelerate import PartialState
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
    from PIL import Image, ImageDraw, ImageFont
    from tqdm.auto import tqdm
except (ImportError, RuntimeError, OSError, KeyboardInterrupt) as import_error:
    if __name__ != "__main__":
        raise
    print(library_hint(import_error), file=sys.stderr)
    sys.exit(130 if isinstance(import_error, KeyboardInterrupt) else 1)
gc.freeze()  # what was imported stays to the end: no need to search it, either
gc.enable()


# ---- The network and its weights -----------------------------------------------------------------


def pick_device(name):
    """Return the torch.device for auto, cpu, cuda or mps; auto takes a GPU where there is one."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"This machine or this build of torch has no {name}: use --device auto.")
    return torch.device(name)


def pick_precision(name, device):
    """Return the dtype the network computes in: auto takes bf16 where the hardware has it.

    Everything outside the network stays in fp32. Without bf16 units a CPU would only emulate it,
    which is slower than fp32, so auto looks for them in the CPU's flags.
    """
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    elif name == "auto":
        flags = Path("/proc/cpuinfo")  # Linux only; elsewhere fp32 is always right
        has_bf16 = device.type == "cpu" and flags.exists() and re.search(
            r"\b(avx512_bf16|amx_bf16|bf16)\b", flags.read_text())  # fmt: skip
        name = "bf16" if has_bf16 else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU: use --precision auto on a CPU.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


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


# ---- From noise to images ------------------------------------------------------------------------


def fresh_noise(generators, shape):
    """Draw Gaussian noise [n, *shape] on the CPU, image i from generators[i]."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def starting_noise(seeds, shape):
    """Draw the noise x_T that the images grow out of, each from its own seed.

    shape is that of one image, (channels, height, width). Returns (x_T [n, *shape] on the CPU,
    the n generators, which go on to give each image its noise in ancestral sampling). The CPU's
    generator gives the same numbers whatever the device, the batch and the number of processes.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return fresh_noise(generators, shape), generators


def noise_levels(diffusion):
    """Return alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t noise, as lists of T + 1 floats.

    alpha_t^2 is alphas_cumprod, and alpha_t^2 + sigma_t^2 = 1. One more entry at the end, which
    t = -1 reaches, is the clean image: alpha 1, sigma 0.
    """
    alpha = diffusion.sqrt_alphas_cumprod.tolist()
    sigma = diffusion.sqrt_one_minus_alphas_cumprod.tolist()
    return [*alpha, 1.0], [*sigma, 0.0]


def predict_x_0(diffusion, x_t, t, precision=torch.float32):
    """Ask the network what the images x_t [n, c, h, w] at timestep t looked like without noise.

    The network computes in `precision`, everything else in x_t's own. The result is clipped to
    [-1, 1]: at t = 999 alpha_t is about 0.0005, so the division below turns a small error into
    an enormous one.
    """
    # One row for all images, which the network broadcasts: matrix products of the time embedding
    # are rounded differently for one row and for several, so an image would depend on its batch.
    times = torch.full((1,), t, device=x_t.device)
    reduced = precision != torch.float32
    with torch.autocast(x_t.device.type, dtype=precision if reduced else None, enabled=reduced):
        output = diffusion.model(x_t, times)
    output = output.to(x_t.dtype)
    alpha, sigma = diffusion.sqrt_alphas_cumprod[t], diffusion.sqrt_one_minus_alphas_cumprod[t]
    if diffusion.objective == "pred_noise":
        x_0 = (x_t - sigma * output) / alpha
    elif diffusion.objective == "pred_v":  # v = alpha noise - sigma x_0 (Salimans & Ho 2022)
        x_0 = alpha * x_t - sigma * output
    else:
        x_0 = output
    return x_0.clamp(-1, 1)


def check_steps(timesteps, steps):
    """Raise UserError if a model of so many timesteps cannot be sampled in so many steps."""
    if steps > timesteps:
        raise UserError(f"{steps} steps are too many: the model has {timesteps} timesteps.")


def even_times(levels, steps):
    """Choose `steps` times from T - 1 down, evenly; the last entry, -1, is the clean image.

    levels: what noise_levels returns. These are the times of the library's ddim_sample: with 50
    of 1000 steps 999, 979, ..., 19, -1.
    """
    timesteps = len(levels[0]) - 1
    return torch.linspace(-1, timesteps - 1, steps + 1).int().tolist()[::-1]


def asked_timesteps(diffusion, min_signal):
    """Return n: the network is asked for x_0 at the timesteps t < n; beyond, 0 is taken.

    x_0 = (x_t - sigma noise) / alpha: where alpha_t is tiny, the smallest error in the predicted
    noise becomes a loud, wrong x_0, and sampling follows it. Below min_signal there is next to
    nothing to be seen in x_t anyhow. Networks that predict x_0 or v divide by nothing and are
    always asked.
    """
    if diffusion.objective != "pred_noise":
        return diffusion.num_timesteps
    alpha, _ = noise_levels(diffusion)
    return max(1, sum(level >= min_signal for level in alpha[:-1]))


def choose_times(levels, steps, asked, spread):
    """Choose `steps` times from T - 1 down, then -1; spread (even_times, ...) those below `asked`.

    One step is enough for the times at which the network is not asked, unless there are more
    steps than times at which it is. A single step goes to the network.
    """
    timesteps = len(levels[0]) - 1
    check_steps(timesteps, steps)
    unasked = max(steps - asked, 1 if asked < timesteps else 0)
    unasked = min(unasked, steps - 1)
    below = [level[:asked] + level[-1:] for level in levels]
    return [*range(timesteps - 1, timesteps - 1 - unasked, -1), *spread(below, steps - unasked)]


@torch.inference_mode()
def sample_ddpm(
    diffusion, x_T, steps, callback=None, generators=None, precision=torch.float32, min_signal=0.0
):
    """Walk from the noise x_T [n, c, h, w] to images by ancestral sampling (Ho 2020, algorithm 2).

    Each step draws x_s from the posterior q(x_s | x_t, x_0) with the network's guess of x_0,
    taking fresh noise from each image's generator. With fewer than all the steps, s is not t - 1
    but the next time on the list, and the formulas stay the same. Where alpha_t is below
    min_signal, x_0 is 0 (see asked_timesteps).

    callback(t, x_t, x_0), if there is one, is called at every step with tensors in [-1, 1] (x_t:
    beyond it, by the noise). Returns images [n, c, h, w] in [0, 1]. All samplers share this
    signature; they work in x_T's dtype and on its device.
    """
    alpha, sigma = levels = noise_levels(diffusion)
    asked = asked_timesteps(diffusion, min_signal)
    times = choose_times(levels, steps, asked, even_times)
    x_t = x_T
    for t, s in itertools.pairwise(times):
        x_0 = predict_x_0(diffusion, x_t, t, precision) if t < asked else torch.zeros_like(x_t)
        if callback:
            callback(t, x_t, x_0)
        if s < 0:
            break
        beta = 1 - (alpha[t] / alpha[s]) ** 2  # the noise that came in between s and t
        mean = (alpha[s] * beta * x_0 + alpha[t] / alpha[s] * sigma[s] ** 2 * x_t) / sigma[t] ** 2
        std = sigma[s] / sigma[t] * math.sqrt(beta)  # the square is beta-tilde, Ho 2020, eq. 7
        x_t = mean + std * fresh_noise(generators, x_t.shape[1:]).to(x_t)
    return (x_0 + 1) / 2


@torch.inference_mode()
def sample_ddim(
    diffusion, x_T, steps, callback=None, generators=None, precision=torch.float32, min_signal=0.0,
    eta=0.0,
):  # fmt: skip
    """Walk from the noise x_T to images by DDIM (Song 2020, eq. 12).

    With eta = 0 no noise comes in: x_T alone decides the image, at any number of steps from 1 to
    all of them. With eta = 1 it is ancestral sampling. For the rest see sample_ddpm.
    """
    alpha, sigma = levels = noise_levels(diffusion)
    asked = asked_timesteps(diffusion, min_signal)
    times = choose_times(levels, steps, asked, even_times)
    x_t = x_T
    for t, s in itertools.pairwise(times):
        x_0 = predict_x_0(diffusion, x_t, t, precision) if t < asked else torch.zeros_like(x_t)
        if callback:
            callback(t, x_t, x_0)
        if s < 0:
            break
        noise = (x_t - alpha[t] * x_0) / sigma[t]  # from the clipped x_0, so that both agree
        std = eta * sigma[s] / sigma[t] * math.sqrt(1 - (alpha[t] / alpha[s]) ** 2)
        x_t = alpha[s] * x_0 + math.sqrt(sigma[s] ** 2 - std**2) * noise
        if std > 0:
            x_t = x_t + std * fresh_noise(generators, x_t.shape[1:]).to(x_t)
    return (x_0 + 1) / 2


def asinh_times(levels, steps):
    """Choose `steps` times from T - 1 down, evenly in asinh((lambda + 1.7) / 1.8); then -1.

    levels: what noise_levels returns; lambda = log(alpha / sigma). On lambda's clock the times lie
    closest together at -1.7 and ever farther apart on both sides; the last is one interval before
    t = 0. Evenly in t would leave most of the way in lambda to a few steps: with the sigmoid
    schedule lambda runs from -7.5 to 4, but from -0.9 to 0.9 during half of all t.
    Evenly in lambda would spend a quarter of 20 steps on t below 30, where x_0 hardly changes any
    more. The two numbers were found by trial, on eight fabrics of the bundled weights (the idea to
    fit the times to a network is that of Sabour 2024). Beyond lambda = -5 there is nothing to be
    seen in x_t, so one step crosses whatever lies there, and with it the interval on its border.
    """
    place = [
        math.asinh((math.log(a / s) + 1.7) / 1.8) for a, s in zip(*levels, strict=True) if s > 0
    ]
    least = math.asinh((-5 + 1.7) / 1.8)
    crossed = 1 if place[-1] < least and steps > 1 else 0  # intervals
    wanted = torch.linspace(max(place[-1 - crossed], least), place[0], steps - crossed + 1)[:-1]
    nearest = (torch.tensor(place)[:, None] - wanted).abs().argmin(0).tolist()
    times = [len(place) - 1]
    for left, t in zip(range(steps - 2, -1, -1), nearest[1 - crossed :], strict=True):
        # Each time once, also where steps are many, and enough of them left for the rest.
        times.append(max(min(t, times[-1] - 1), left))
    return [*times, -1]


@torch.inference_mode()
def sample_dpmpp(
    diffusion, x_T, steps, callback=None, generators=None, precision=torch.float32, min_signal=0.0
):
    """Walk from the noise x_T to images by DPM-Solver++ (2M) (Lu 2022b, algorithm 2).

    DDIM takes x_0 as constant during a step; this solver, as cheap, extends the line through the
    last two predictions of x_0, over the log-SNR lambda = log(alpha / sigma), and so needs far
    fewer of them. Deterministic; for the rest see sample_ddpm.
    """
    alpha, sigma = levels = noise_levels(diffusion)
    asked = asked_timesteps(diffusion, min_signal)
    times = choose_times(levels, steps, asked, asinh_times)
    x_t, last_x_0, last_h = x_T, None, None
    for t, s in itertools.pairwise(times):
        x_0 = predict_x_0(diffusion, x_t, t, precision) if t < asked else torch.zeros_like(x_t)
        if callback:
            callback(t, x_t, x_0)
        if s < 0:
            break
        h = math.log(alpha[s] / sigma[s]) - math.log(alpha[t] / sigma[t])
        slope = 0 if last_x_0 is None else (x_0 - last_x_0) * (h / (2 * last_h))
        x_t = sigma[s] / sigma[t] * x_t - alpha[s] * math.expm1(-h) * (x_0 + slope)
        if t < asked:  # no line through an x_0 that the network has not seen
            last_x_0, last_h = x_0, h
    return (x_0 + 1) / 2


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpmpp": sample_dpmpp}


# ---- Files ---------------------------------------------------------------------------------------


@contextmanager
def write_atomically(path):
    """Give a temporary name beside path, and rename it to path once all is written.

    Whoever looks, and whenever the power fails: there is a whole file under that name or none.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_picture(image):
    """Turn an image [c, h, w] in [0, 1] into a PIL picture, 8 bits per channel."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels.squeeze())


def save_grid(images, path, title, columns=None, cell=160, captions=()):
    """Save images [n, c, h, w] in [0, 1] as one picture: a title above a grid of cells.

    columns: as many as make the grid square, unless given. cell: pixels per side that each image
    is enlarged to. captions: a line of text below each image.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    gap, top, foot = 8, 44, 24 if captions else 0
    font, small = ImageFont.load_default(20), ImageFont.load_default(14)
    grid_width = columns * (cell + gap) - gap
    width = math.ceil(max(grid_width, font.getlength(title))) + 2 * gap
    sheet = Image.new("RGB", (width, top + rows * (cell + foot + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((width / 2, top / 2), title, "black", font, anchor="mm")
    for i, image in enumerate(images):
        x = (width - grid_width) // 2 + i % columns * (cell + gap)
        y = top + i // columns * (cell + foot + gap)
        sheet.paste(to_picture(image).resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        if captions:
            draw.text((x + cell / 2, y + cell + foot / 2), captions[i], "black", small, "mm")
    with write_atomically(path) as temporary:
        sheet.save(temporary)


def check_output(path):
    """Refuse a path that cannot or must not become the grid, before any work is done."""
    if path.suffix.lower() != ".png":
        raise UserError(f"The grid is a PNG: give --output a name that ends in .png, not {path}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give --output the name of a file.")
    if path.exists() and path != Path(OUTPUT):  # the default is this script's own to replace
        raise UserError(f"{path} exists already: delete it or give --output another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass  # whether the folder can be written


def file_digest(path):
    """Return the first half of the SHA-256 of a file, enough to tell one from another."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


def claim_folder(folder, settings):
    """Make the samples folder ready for images of these settings.

    A folder of other settings is renamed to folder.1, folder.2, ... as a whole. Raises UserError
    where there are fabrics that this script has not written.
    """
    record = folder / "generation.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder with --samples-dir.")
    try:
        found = json.loads(record.read_text()) if record.exists() else None
    except ValueError:
        found = {}
    if found is None and any(folder.glob("fabric_*.png")):
        raise UserError(
            f"{folder} holds fabrics without a generation.json, so it is not known how they were "
            "made: name another folder with --samples-dir."
        )
    if found is not None and found != settings:
        found = found if isinstance(found, dict) else {}
        numbers = itertools.count(1)
        kept = next(p for n in numbers if not (p := Path(f"{folder}.{n}")).exists())
        folder.rename(kept)
        changed = ", ".join(key for key in settings if found.get(key) != settings[key])
        print(f"{folder} held images of another setting ({changed}); they are now in {kept}.")
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(record) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def image_path(folder, index):
    """Return where image `index` is kept."""
    return folder / f"fabric_{index:04d}.png"


def missing_images(folder, indices):
    """Return those of the indices that have no image yet."""
    return [index for index in indices if not image_path(folder, index).exists()]


# ---- The exercise --------------------------------------------------------------------------------


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


def keep_freed_memory():
    """Have the C library keep freed memory for the next tensor (glibc, that is, most Linux).

    By default it returns every block above 32 MB to the kernel and asks for a new one, which the
    kernel fills with zeros page by page: a third of a training step with 32 images. Elsewhere
    this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    no_mapped_blocks, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    mallopt(no_mapped_blocks, 0)
    mallopt(trim_threshold, -1)


def prepare_network(diffusion, device, precision, compiled):
    """Move the network to its device in the memory layout and precision it computes fastest in.

    Autocast alone would convert the weights of the convolutions at every step again, and leave
    the gains of the norms in fp32: their products would be fp32, too, and with them every
    activation up to the next convolution, twice the memory to read and write.
    """
    keep_freed_memory()
    diffusion.to(device, memory_format=torch.channels_last)
    diffusion.model.to(precision)
    if compiled:
        diffusion.model.compile(dynamic=False)


def draw_fabrics(diffusion, indices, options, precision, show_bar):
    """Draw the images of these indices, batch by batch, and save each under its number."""
    shape, device = (diffusion.channels, *diffusion.image_size), diffusion.betas.device
    batch_size = getattr(options, "batch_size", BATCH_SIZE[device.type])
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    bar = tqdm(total=options.steps * len(batches), unit="step", disable=not show_bar)
    with bar:
        for batch in batches:
            seeds = [options.seed + index for index in batch]
            if options.compile == "on":  # a batch of another size would be compiled anew
                seeds += seeds[-1:] * (min(batch_size, len(indices)) - len(batch))
            x_T, generators = starting_noise(seeds, shape)
            images = SAMPLERS[options.sampler](
                diffusion,
                x_T.to(device),
                options.steps,
                callback=lambda t, x_t, x_0: bar.update(),
                generators=generators,
                precision=precision,
                min_signal=options.min_signal,
            )
            for index, image in zip(batch, images.cpu(), strict=False):
                with write_atomically(image_path(options.samples_dir, index)) as temporary:
                    to_picture(image).save(temporary)


def read_image(path):
    """Read a picture as a tensor [c, h, w] in [0, 1]."""
    with Image.open(path) as picture:
        levels = np.atleast_3d(np.array(picture))
    return torch.from_numpy(levels).permute(2, 0, 1) / 255


def write_grid(options, count):
    """Write the grid of the first `count` images, read from their files whoever drew them."""
    name = SAMPLER_NAMES[options.sampler]
    title = f"{count} new fabrics: {name}, {options.steps} steps, seed {options.seed}"
    paths = [image_path(options.samples_dir, index) for index in range(count)]
    save_grid(torch.stack([read_image(path) for path in paths]), options.output, title)


def generate(options):
    """Do the exercise: load the weights, draw the images that are missing, write the grid."""
    device = pick_device(options.device)
    # This process, and as many others beside it as 'accelerate launch' has started.
    team = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
    if team.num_processes > 1:
        device = team.device
    precision = pick_precision(options.precision, device)
    precision_name = str(precision).removeprefix("torch.")
    diffusion, facts = load_weights(options.weights, options.image_size)
    check_steps(diffusion.num_timesteps, options.steps)

    wanted = range(options.num_samples)
    if team.is_main_process:
        print(describe(facts, options.weights))
        print(f"{SAMPLER_NAMES[options.sampler]}, {options.steps} steps, on {device} in "
              f"{precision_name} (the classic way: --sampler ddim --steps 250)")  # fmt: skip
        check_output(options.output)
        claim_folder(options.samples_dir, {
            "weights": file_digest(options.weights),
            "sampler": options.sampler,
            "steps": options.steps,
            "min_signal": options.min_signal,
            "seed": options.seed,
            "image_size": facts["image_size"],
            "precision": precision_name,
        })  # fmt: skip
    to_draw = len(missing_images(options.samples_dir, wanted))
    team.wait_for_everyone()

    started = time.perf_counter()
    mine = missing_images(options.samples_dir, wanted[team.process_index :: team.num_processes])
    if mine:
        prepare_network(diffusion, device, precision, options.compile == "on")
        draw_fabrics(diffusion, mine, options, precision, team.is_main_process)
    team.wait_for_everyone()
    if team.is_main_process:
        write_grid(options, min(options.num_samples, GRID_LIMIT))
        report(options, to_draw, time.perf_counter() - started)


def report(options, drawn, seconds):
    """Say what was written and how long it took."""
    there = options.num_samples - drawn
    if there:
        print(f"{there} of the images were there already, drawn by an earlier run.")
    each = f" ({seconds / drawn:.2f} s per image)" if drawn else ""
    print(
        f"Wrote {options.output} and {drawn} images in {options.samples_dir}{each}; "
        f"{time.perf_counter() - STARTED:.1f} s in all."
    )


def run_and_explain(work, after_interrupt):
    """Call work() and return the exit code; say in one sentence on stderr what went wrong.

    after_interrupt says what Ctrl-C has left behind.
    """
    try:
        work()
    except UserError as error:
        problem = str(error)
    except torch.cuda.OutOfMemoryError:
        problem = "The memory of the GPU is too small: draw fewer images at once."
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        problem = f"{error.strerror or error}{place}: make room there or name another place."
    except KeyboardInterrupt:
        print(f"\nInterrupted. {after_interrupt}", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"Error: {problem}", file=sys.stderr)
    return 1


def main(argv=None):
    """Run the exercise."""
    options = parse_options(argv)
    return run_and_explain(
        lambda: generate(options),
        f"The images finished so far are in {options.samples_dir}; "
        "the same command draws the others.",
    )


def leave(code):
    """End the process at once: to take torch apart first costs a second, with all files written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
