# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "matplotlib>=3.8",
#     "imageio>=2.34",
#     "imageio-ffmpeg>=0.5.1",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 2: take the diffusion process apart and look at every piece.

    python exercise2_explore.py                     all five parts, some ten minutes on two cores
    python exercise2_explore.py --part c d          some of them; these two take seconds
    python exercise2_explore.py --part b --seed 7   another fabric

    a  the same noise, drawn in more and more steps     exercise2_sampling_comparison.png
    b  reverse denoising: from noise to a fabric        reverse_diffusion_demo.png, .gif
    c  forward diffusion: from a fabric to noise        forward_diffusion_demo.png, .gif
    d  three noise schedules beside each other          noise_schedule_comparison.png
    e  a morph through five fabrics, in a loop          ddpm_fabric_morph.gif, .mp4

Beside each figure stands a .json of the same name with the numbers in it. Parts c and d take a
fabric from the data folder; where there is none, one that the network has drawn.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

RANDOM_SEED = 42  # decides the noise that fabrics grow out of, and which training fabric is shown
SAMPLING_STEPS = {"dpmpp": 20, "ddim": 250}  # where a part names no others
MIN_SIGNAL = 0.03  # alpha_t below which x_t is taken for pure noise, and the network is not asked

# Part a
STEP_COUNTS = (50, 100, 250, 500, 1000)  # DDIM steps
FAST_STEP_COUNTS = (5, 10, 15, 20, 50)  # DPM-Solver++ steps
NUM_SAMPLES = 1  # fabrics drawn at each number of steps

# Part b
CAPTURE_TIMESTEPS = (999, 800, 600, 400, 200, 100, 0)  # t; the nearest one visited is shown

# Parts c and d
FORWARD_TIMESTEPS = (0, 100, 250, 500, 750, 999)  # t
SCHEDULE = "sigmoid"  # of part c, the module's own; part d compares it with the other two

# Part e
MORPH_FABRICS = 5
MORPH_STEPS = 15  # DPM-Solver++ steps for each frame
MORPH_FRAMES = (60, 120)  # to begin with, and at most
MORPH_CHANGE = 0.08  # aim: largest change from frame to frame (root mean square, pixels 0 to 1)
MORPH_BYTES = 6_000_000  # largest size of the .gif

WEIGHTS = "models/ddpm_african_fabrics.pt"
DATA = "african_fabric_processed"
BATCH_SIZE = {"cpu": 4, "mps": 16, "cuda": 64}  # images the network sees at once
COLORS = {"sigmoid": "#c2410c", "cosine": "#0f766e", "linear": "#4338ca"}  # of the schedules
LINES = {"sigmoid": "-", "cosine": "--", "linear": "-"}
SAMPLER_COLORS = {"ddim": "#4338ca", "dpmpp": "#c2410c"}
STYLE = {  # of every figure: 7 inches are 700 points on the page, so that text stays readable
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
FIGURE_WIDTH = 7  # inches


# Copied from exercise1_generate.py
class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what is wrong and how."""


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
def whole_number(minimum, maximum=2**31):
    """Return an argparse type for integers from minimum to maximum."""

    def convert(text):
        if not re.fullmatch(r"-?\d+", text) or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a whole number from {minimum} to {maximum}"
            )
        return int(text)

    return convert


def parse_options(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="a: step sweep, b: reverse denoising, c: forward diffusion, d: noise schedules, "
        "e: morph. The constants at the top of the script are made for changing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=list("abcde"), default=list("abcde"), help="parts to run")
    add("--weights", type=Path, default=WEIGHTS, help="weight file (.pt)")
    add("--data", type=Path, default=DATA, help="folder of fabrics, for parts c and d")
    add("--output-dir", type=Path, default=".", help="where figures and measurements go")
    add("--seed", type=whole_number(0), default=RANDOM_SEED, help="of the noise")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the network; auto takes bf16 where the hardware has it")  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_options()  # the imports below take seconds; --help and wrong usage answer at once

try:
    if sys.version_info < (3, 10):  # noqa: UP036 - an older Python has to get this far
        raise ImportError("Python is too old")
    import imageio.v2 as imageio
    import imageio_ffmpeg  # noqa: F401 - imageio looks for it only when it writes a film
    import matplotlib
    import numpy as np
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from tqdm.auto import tqdm
except (ImportError, RuntimeError, OSError, KeyboardInterrupt) as import_error:
    if __name__ != "__main__":
        raise
    print(library_hint(import_error), file=sys.stderr)
    sys.exit(130 if isinstance(import_error, KeyboardInterrupt) else 1)


# ---- From exercise 1: the network, its weights, the samplers -------------------------------------


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
def schedule_name(betas):
    """Name the library's schedule that has these betas [T], or 'custom'."""
    for name in ("sigmoid", "cosine", "linear"):
        expected = getattr(library, f"{name}_beta_schedule")(len(betas))
        if torch.allclose(betas.double(), expected, rtol=1e-3, atol=1e-7):
            return name
    return "custom"


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
def fresh_noise(generators, shape):
    """Draw Gaussian noise [n, *shape] on the CPU, image i from generators[i]."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


# Copied from exercise1_generate.py
def starting_noise(seeds, shape):
    """Draw the noise x_T that the images grow out of, each from its own seed.

    shape is that of one image, (channels, height, width). Returns (x_T [n, *shape] on the CPU,
    the n generators, which go on to give each image its noise in ancestral sampling). The CPU's
    generator gives the same numbers whatever the device, the batch and the number of processes.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return fresh_noise(generators, shape), generators


# Copied from exercise1_generate.py
def noise_levels(diffusion):
    """Return alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t noise, as lists of T + 1 floats.

    alpha_t^2 is alphas_cumprod, and alpha_t^2 + sigma_t^2 = 1. One more entry at the end, which
    t = -1 reaches, is the clean image: alpha 1, sigma 0.
    """
    alpha = diffusion.sqrt_alphas_cumprod.tolist()
    sigma = diffusion.sqrt_one_minus_alphas_cumprod.tolist()
    return [*alpha, 1.0], [*sigma, 0.0]


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
def check_steps(timesteps, steps):
    """Raise UserError if a model of so many timesteps cannot be sampled in so many steps."""
    if steps > timesteps:
        raise UserError(f"{steps} steps are too many: the model has {timesteps} timesteps.")


# Copied from exercise1_generate.py
def even_times(levels, steps):
    """Choose `steps` times from T - 1 down, evenly; the last entry, -1, is the clean image.

    levels: what noise_levels returns. These are the times of the library's ddim_sample: with 50
    of 1000 steps 999, 979, ..., 19, -1.
    """
    timesteps = len(levels[0]) - 1
    return torch.linspace(-1, timesteps - 1, steps + 1).int().tolist()[::-1]


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
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


# Copied from exercise1_generate.py
def to_picture(image):
    """Turn an image [c, h, w] in [0, 1] into a PIL picture, 8 bits per channel."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels.squeeze())


# Copied from exercise1_generate.py
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


SAMPLERS = {"ddim": sample_ddim, "dpmpp": sample_dpmpp}


# ---- What the parts share ------------------------------------------------------------------------


class Laboratory:
    """The network and a fabric, each made ready when a part first asks for it."""

    def __init__(self, options):
        self.options = options
        self.device = pick_device(options.device)
        self.precision = pick_precision(options.precision, self.device)

    @cached_property
    def diffusion(self):
        """The network of the weight file, on its device."""
        diffusion, facts = load_weights(self.options.weights)
        print(f"{self.options.weights}: {facts['kind']}, {facts['parameters']:,} parameters, "
              f"{facts['objective']}, {facts['beta_schedule']} schedule; on {self.device} in "
              f"{str(self.precision).removeprefix('torch.')}")  # fmt: skip
        prepare_network(diffusion, self.device, self.precision, compiled=False)
        return diffusion

    def noise(self, count):
        """Draw x_T for `count` fabrics."""
        seeds = range(self.options.seed, self.options.seed + count)
        x_T, _ = starting_noise(seeds, (self.diffusion.channels, *self.diffusion.image_size))
        return x_T

    def draw(self, sampler, x_T, steps, callback=None):
        """Draw fabrics [n, c, h, w] in [0, 1] from x_T; the callback is the samplers'."""
        return SAMPLERS[sampler](
            self.diffusion, x_T.to(self.device), steps, callback,
            precision=self.precision, min_signal=MIN_SIGNAL,
        ).cpu()  # fmt: skip

    @cached_property
    def fabric(self):
        """One fabric [c, h, w] in [0, 1] and where it is from: the data, or else the network."""
        suffixes = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
        folder = self.options.data
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
        if paths:
            path = random.Random(self.options.seed).choice(paths)
            return read_fabric(path), str(path)
        print(f"There are no fabrics in {folder} ('python prepare_fabrics.py' renders them); "
              "this one is drawn by the network.")  # fmt: skip
        drawn = self.draw("dpmpp", self.noise(1), SAMPLING_STEPS["dpmpp"])
        return drawn[0], f"drawn by the network from seed {self.options.seed}"


def read_fabric(path, size=64):
    """Read an image file as RGB [3, size, size] in [0, 1], cropped to its middle square."""
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is no image that can be read: remove it from --data.") from error
    square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255


def pixels(x_t):
    """Turn what lies in [-1, 1], or with its noise beyond, into an image in [0, 1]."""
    return (x_t.float().cpu().clamp(-1, 1) + 1) / 2


def distance(images, others):
    """Root mean square difference of images [n, c, h, w] in [0, 1]."""
    return (images - others).square().mean().sqrt().item()


def number(value):
    """Write a number with the digits that count: 3e-7, 0.0123, 4.56, 3,333."""
    if value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4f}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def show(axes, image, caption="", title=""):
    """Show one image [c, h, w] in [0, 1] with a line of text below and one above."""
    axes.imshow(np.asarray(to_picture(image)), cmap="gray", interpolation="nearest")
    axes.set_xlabel(caption)
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(False)


def mosaic(images):
    """Put n images [n, c, h, w] into one that is about square."""
    columns = math.ceil(math.sqrt(len(images)))
    blank = torch.ones_like(images[:1]).expand(-len(images) % columns, -1, -1, -1)
    rows = torch.cat([images, blank]).split(columns)
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def save_figure(figure, path):
    """Write a figure."""
    with write_atomically(path) as temporary:
        figure.savefig(temporary)


def save_numbers(lab, path, numbers):
    """Write what was measured, and on what."""
    machine = torch.cuda.get_device_name() if lab.device.type == "cuda" else platform.machine()
    record = {
        "seed": lab.options.seed,
        "device": f"{lab.device.type}: {machine}, {torch.get_num_threads()} threads",
        "precision": str(lab.precision).removeprefix("torch."),
        **numbers,
    }
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def save_gif(pictures, path, milliseconds):
    """Write pictures as an animation that repeats; each gets 256 colours of its own."""
    frames = [picture.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
              for picture in pictures]  # fmt: skip
    if isinstance(milliseconds, int):
        milliseconds = [milliseconds] * len(frames)
    with write_atomically(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], loop=0,
                       duration=milliseconds)  # fmt: skip


def panel(images, captions, cell=192):
    """Draw images [c, h, w] in [0, 1] side by side, each with a caption: a frame of a GIF."""
    gap, foot = 8, 28
    size = (gap + len(images) * (cell + gap), cell + gap + foot)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = gap + i * (cell + gap)
        sheet.paste(to_picture(image).resize((cell, cell), Image.Resampling.NEAREST), (x, gap))
        center = (x + cell / 2, gap + cell + foot / 2)
        draw.text(center, caption, "black", ImageFont.load_default(16), "mm")
    return sheet


# ---- a: the same noise in more and more steps ----------------------------------------------------


def sweep(lab):
    """Draw the same x_T with both samplers at all step counts; measure time and distance.

    Returns {"ddim": [row, ...], "dpmpp": ...}; a row has steps, seconds per fabric, distance to
    the result of all DDIM steps, and the images.
    """
    x_T = lab.noise(NUM_SAMPLES)
    all_steps = lab.diffusion.num_timesteps
    plan = [("ddim", steps) for steps in STEP_COUNTS]
    plan += [("dpmpp", steps) for steps in FAST_STEP_COUNTS]
    for _, steps in plan:
        check_steps(all_steps, steps)
    lab.draw("ddim", x_T, 1)  # the first call is slow; this one is not counted
    plan = dict.fromkeys([("ddim", all_steps), *plan])  # the reference first, and only once
    with tqdm(total=sum(steps for _, steps in plan), unit="step", desc="a") as bar:
        for sampler, steps in plan:
            started = time.perf_counter()
            images = lab.draw(sampler, x_T, steps, lambda *_: bar.update())
            seconds = (time.perf_counter() - started) / NUM_SAMPLES
            plan[sampler, steps] = {"steps": steps, "seconds": seconds, "images": images}
    reference = plan["ddim", all_steps]["images"]
    for row in plan.values():
        row["distance"] = distance(row["images"], reference)
    return {
        "ddim": [plan["ddim", steps] for steps in STEP_COUNTS],
        "dpmpp": [plan["dpmpp", steps] for steps in FAST_STEP_COUNTS],
    }


def plot_sweep(rows):
    """Draw the pictures of both samplers in two rows, and the distances below them."""
    names = {"ddim": "DDIM", "dpmpp": "DPM-Solver++"}
    columns = max(len(row) for row in rows.values())
    figure = Figure((FIGURE_WIDTH, 7), layout="constrained")
    figure.suptitle("One noise, one pattern: more steps only sharpen it", x=0.01, ha="left")
    grid = figure.add_gridspec(3, columns, height_ratios=(1, 1, 1))
    for i, (sampler, results) in enumerate(rows.items()):
        for j, row in enumerate(results):
            axes = figure.add_subplot(grid[i, j])
            title = f"{names[sampler]}\n" if j == 0 else "\n"
            apart = f"distance {row['distance']:.3f}" if row["distance"] else "the reference"
            caption = f"{row['seconds']:.1f} s\n{apart}"
            show(axes, mosaic(row["images"]), caption, f"{title}{row['steps']} steps")
    axes = figure.add_subplot(grid[2, :])
    for sampler, results in rows.items():
        apart = [row for row in results if row["distance"] > 0]  # all but the reference itself
        axes.loglog([row["steps"] for row in apart], [row["distance"] for row in apart], "o-",
                    color=SAMPLER_COLORS[sampler], label=names[sampler])  # fmt: skip
    axes.set(xlabel="steps", ylabel="distance")
    axes.set_title("Distance to the DDIM result of all steps (pixels from 0 to 1)")
    steps = sorted({row["steps"] for results in rows.values() for row in results})
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.legend()
    return figure


def part_a(lab):
    """Compare step counts."""
    rows = sweep(lab)
    path = lab.options.output_dir / "exercise2_sampling_comparison.png"
    save_figure(plot_sweep(rows), path)
    numbers = {sampler: [{key: row[key] for key in ("steps", "distance", "seconds")}
                         for row in results] for sampler, results in rows.items()}  # fmt: skip
    save_numbers(lab, path.with_suffix(".json"), {"fabrics": NUM_SAMPLES, **numbers})
    return [path]


# ---- b: from noise to a fabric -------------------------------------------------------------------


def record_reverse(lab):
    """Draw one fabric with DDIM and keep (t, x_t, predicted x_0) of every step."""
    frames = []
    steps = min(SAMPLING_STEPS["ddim"], lab.diffusion.num_timesteps)
    with tqdm(total=steps, unit="step", desc="b") as bar:

        def keep(t, x_t, x_0):
            frames.append((t, x_t[0].cpu(), x_0[0].cpu()))
            bar.update()

        lab.draw("ddim", lab.noise(1), steps, keep)
    return frames


def plot_reverse(frames):
    """Draw x_t in the first row and what the network takes for x_0 in the second."""
    figure = Figure((FIGURE_WIDTH, 0.6 + 2 * FIGURE_WIDTH / len(frames)), layout="constrained")
    figure.suptitle("Out of noise: the guess comes first, the details last", x=0.01, ha="left")
    axes = figure.subplots(2, len(frames), squeeze=False)
    for column, (t, x_t, x_0) in enumerate(frames):
        show(axes[0, column], pixels(x_t), title=f"t = {t}")
        show(axes[1, column], pixels(x_0))
    axes[0, 0].set_ylabel("$x_t$")
    axes[1, 0].set_ylabel("predicted $x_0$")
    return figure


def part_b(lab):
    """Watch a fabric come out of noise."""
    frames = record_reverse(lab)
    nearest = {min(frames, key=lambda frame: abs(frame[0] - t))[0] for t in CAPTURE_TIMESTEPS}
    captured = [frame for frame in frames if frame[0] in nearest]
    path = lab.options.output_dir / "reverse_diffusion_demo.png"
    save_figure(plot_reverse(captured), path)

    film = frames[:: max(1, len(frames) // 50)]
    film = film if film[-1] is frames[-1] else [*film, frames[-1]]
    pictures = [panel([pixels(x_t), pixels(x_0)], [f"x_t, t = {t}", "predicted x_0"])
                for t, x_t, x_0 in film]  # fmt: skip
    gif = path.with_suffix(".gif")
    save_gif(pictures, gif, [80] * (len(pictures) - 1) + [2500])

    result = pixels(frames[-1][2])
    numbers = [{"t": t, "distance_of_x_0": distance(pixels(x_0), result),
                "spread_of_x_t": x_t.std().item()} for t, x_t, x_0 in captured]  # fmt: skip
    save_numbers(lab, path.with_suffix(".json"), {"steps": len(frames), "captured": numbers})
    return [path, gif]


# ---- c: from a fabric to noise -------------------------------------------------------------------


def make_process(schedule):
    """Build the diffusion process of a schedule; its network is a small one that stays unused."""
    return build_diffusion(dim=8, dim_mults=(1,), beta_schedule=schedule)


def add_noise(process, fabric, t, noise):
    """Return x_t [c, h, w] of a fabric in [0, 1] by the library's q_sample (Ho 2020, eq. 4)."""
    return process.q_sample(fabric[None] * 2 - 1, torch.tensor([t]), noise[None])[0]


def snr(process, t):
    """Return the signal-to-noise ratio alpha-bar / (1 - alpha-bar) at t."""
    alpha_bar = process.alphas_cumprod[t].item()
    return alpha_bar / (1 - alpha_bar)


def plot_forward(process, fabric, noise):
    """Draw a fabric at FORWARD_TIMESTEPS, with alpha-bar and SNR below."""
    count = len(FORWARD_TIMESTEPS)
    figure = Figure((FIGURE_WIDTH, 0.85 + FIGURE_WIDTH / count), layout="constrained")
    figure.suptitle("A fabric sinks into noise", x=0.01, ha="left")
    for axes, t in zip(figure.subplots(1, count, squeeze=False)[0], FORWARD_TIMESTEPS, strict=True):
        alpha_bar = process.alphas_cumprod[t].item()
        caption = f"$\\bar\\alpha$ = {number(alpha_bar)}\nSNR = {number(snr(process, t))}"
        show(axes, pixels(add_noise(process, fabric, t, noise)), caption, f"t = {t}")
    return figure


def part_c(lab):
    """Watch a fabric drown in noise."""
    fabric, source = lab.fabric
    process = make_process(SCHEDULE)
    noise, _ = starting_noise([lab.options.seed], fabric.shape)
    path = lab.options.output_dir / "forward_diffusion_demo.png"
    save_figure(plot_forward(process, fabric, noise[0]), path)

    times = range(0, process.num_timesteps, 20)
    pictures = [panel([pixels(add_noise(process, fabric, t, noise[0]))],
                      [f"t = {t}, alpha-bar = {number(process.alphas_cumprod[t].item())}"], 256)
                for t in [*times, process.num_timesteps - 1]]  # fmt: skip
    gif = path.with_suffix(".gif")
    save_gif(pictures, gif, [1500] + [80] * (len(pictures) - 2) + [1500])

    numbers = [{"t": t, "alpha_bar": process.alphas_cumprod[t].item(), "snr": snr(process, t)}
               for t in FORWARD_TIMESTEPS]  # fmt: skip
    save_numbers(lab, path.with_suffix(".json"),
                 {"schedule": SCHEDULE, "fabric": source, "captured": numbers})  # fmt: skip
    return [path, gif]


# ---- d: three schedules --------------------------------------------------------------------------


def plot_schedules(processes, fabric, noise):
    """Draw three curves of each schedule, and below them one fabric at equal times."""
    count = len(FORWARD_TIMESTEPS)
    figure = Figure((FIGURE_WIDTH, 2.9 + 3 * FIGURE_WIDTH / (count + 1)), layout="constrained")
    figure.suptitle("Three schedules: how fast the signal goes", x=0.01, ha="left")
    above, below = figure.subfigures(2, 1, height_ratios=(2.4, 0.5 + 3 * FIGURE_WIDTH / count))
    curves = above.subplots(1, 3)
    for name, process in processes.items():
        style = {"color": COLORS[name], "label": name, "linestyle": LINES[name]}
        alpha_bar = process.alphas_cumprod.double()
        curves[0].plot(alpha_bar, **style)
        curves[1].semilogy(process.betas, **style)
        curves[2].plot((alpha_bar / (1 - alpha_bar)).log(), **style)
    for axes, title in zip(curves, ("alpha-bar: signal left", "beta: noise added", "log SNR"),
                           strict=True):  # fmt: skip
        axes.set(title=title, xlabel="t", xticks=(0, 500, 1000))
    above.legend(*curves[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    tiles = below.subplots(len(processes), count, squeeze=False)
    for i, (name, process) in enumerate(processes.items()):
        for axes, t in zip(tiles[i], FORWARD_TIMESTEPS, strict=True):
            title = f"t = {t}" if i == 0 else ""
            show(axes, pixels(add_noise(process, fabric, t, noise)), title=title)
        tiles[i, 0].set_ylabel(name, color=COLORS[name])
    return figure


def part_d(lab):
    """Compare noise schedules."""
    fabric, source = lab.fabric
    noise, _ = starting_noise([lab.options.seed], fabric.shape)
    processes = {name: make_process(name) for name in COLORS}
    path = lab.options.output_dir / "noise_schedule_comparison.png"
    save_figure(plot_schedules(processes, fabric, noise[0]), path)
    numbers = {
        name: [{"t": t, "alpha_bar": process.alphas_cumprod[t].item(),
                "beta": process.betas[t].item(), "snr": snr(process, t)}
               for t in sorted({*FORWARD_TIMESTEPS, 499})]
        for name, process in processes.items()
    }  # fmt: skip
    save_numbers(lab, path.with_suffix(".json"), {"fabric": source, **numbers})
    return [path]


# ---- e: a morph ----------------------------------------------------------------------------------


def slerp(start, end, fraction):
    """Walk the great circle from one noise [c, h, w] to another (Shoemake 1985).

    Noise in d dimensions has a length near sqrt(d). A straight line between two of them passes
    through shorter vectors, which are unlike any noise the network has seen.
    """
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = cosine.clamp(-1, 1).acos()
    return (((1 - fraction) * angle).sin() * start + (fraction * angle).sin() * end) / angle.sin()


def draw_places(lab, places, bar):
    """Draw the fabrics at these places of the loop; 1.25 is a quarter of the way from 1 to 2."""
    anchors = lab.noise(MORPH_FABRICS)
    x_T = torch.stack([
        slerp(anchors[int(place)], anchors[(int(place) + 1) % len(anchors)], place % 1)
        for place in places
    ])  # fmt: skip
    images = []
    for batch in x_T.split(BATCH_SIZE[lab.device.type]):
        drawn = len(batch)
        images += lab.draw("dpmpp", batch, MORPH_STEPS, lambda *_: bar.update(drawn))  # noqa: B023
    return images


def changes(images):
    """Return the distance of each image of a loop to the next one, the last one's to the first."""
    return [distance(image, images[(i + 1) % len(images)]) for i, image in enumerate(images)]


def draw_loop(lab):
    """Draw the frames of the loop: evenly first, then more of them where the fabric changes fast.

    Returns the images in order, no two neighbours further apart than MORPH_CHANGE, unless that
    takes more frames than MORPH_FRAMES allows.
    """
    first, most = MORPH_FRAMES
    places = [MORPH_FABRICS * i / first for i in range(first)]
    with tqdm(total=first * MORPH_STEPS, unit="evaluation", desc="e") as bar:
        frames = dict(zip(places, draw_places(lab, places, bar), strict=True))
        while len(frames) < most:
            places = sorted(frames)
            gaps = zip(changes([frames[place] for place in places]), places,
                       [*places[1:], MORPH_FABRICS], strict=True)  # fmt: skip
            wide = sorted((gap for gap in gaps if gap[0] > MORPH_CHANGE), reverse=True)
            if not wide:
                break
            middles = [(start + end) / 2 for _, start, end in wide[: most - len(frames)]]
            bar.total += len(middles) * MORPH_STEPS
            frames |= zip(middles, draw_places(lab, middles, bar), strict=True)
    return [frames[place] for place in sorted(frames)]


def save_film(pictures, path, milliseconds):
    """Write pictures as an .mp4 that every browser plays."""
    with write_atomically(path) as temporary:
        imageio.mimwrite(temporary, [np.asarray(picture.convert("RGB")) for picture in pictures],
                         fps=1000 / milliseconds, codec="libx264", pixelformat="yuv420p",
                         quality=8, macro_block_size=2)  # fmt: skip


def part_e(lab):
    """Draw a loop through five fabrics."""
    started = time.perf_counter()
    images = draw_loop(lab)
    gif = lab.options.output_dir / "ddpm_fabric_morph.gif"
    for side in (256, 192, 128, 64):
        pictures = [to_picture(image).resize((side, side), Image.Resampling.BICUBIC)
                    for image in images]  # fmt: skip
        save_gif(pictures, gif, 60)
        if gif.stat().st_size <= MORPH_BYTES:
            break
    film = gif.with_suffix(".mp4")
    save_film([to_picture(image).resize((256, 256), Image.Resampling.BICUBIC)
               for image in images], film, 60)  # fmt: skip
    steps = changes(images)
    save_numbers(lab, gif.with_suffix(".json"), {
        "fabrics": MORPH_FABRICS,
        "frames": len(images),
        "steps_per_frame": MORPH_STEPS,
        "largest_change": max(steps),
        "mean_change": sum(steps) / len(steps),
        "gif_bytes": gif.stat().st_size,
        "seconds": time.perf_counter() - started,
    })  # fmt: skip
    print(f"The morph has {len(images)} frames; none differs from the next by more than "
          f"{max(steps):.3f} (root mean square, pixels from 0 to 1).")  # fmt: skip
    return [gif, film]


# ---- The exercise --------------------------------------------------------------------------------

PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e}


def explore(options):
    """Run the parts that were asked for."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    lab = Laboratory(options)
    started = time.perf_counter()
    with matplotlib.rc_context(STYLE):
        for part in sorted(set(options.part)):
            begun = time.perf_counter()
            written = PARTS[part](lab)
            files = ", ".join(map(str, [*written, written[0].with_suffix(".json")]))
            print(f"Part {part}: wrote {files} in {time.perf_counter() - begun:.1f} s.")
    print(f"Done in {time.perf_counter() - started:.1f} s.")


def main(argv=None):
    """Run the exercise."""
    options = parse_options(argv)
    return run_and_explain(
        lambda: explore(options), f"The parts that were finished are in {options.output_dir}."
    )


if __name__ == "__main__":
    sys.exit(main())
