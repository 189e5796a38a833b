# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "ema-pytorch>=0.7",
#     "accelerate>=1.0",
#     "matplotlib>=3.8",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 3 (create): train a denoising diffusion model on African fabrics from scratch.

    python exercise3_train.py --verify            look at the data before you train on it
    python exercise3_train.py --train --quick     coffee break: a small network, two CPU cores
    python exercise3_train.py --train             the real one: 35.7M parameters, 100,000 steps
    python exercise3_train.py --train --resume    go on after Ctrl-C, a crash or a power cut
    accelerate launch exercise3_train.py --train  the same run, shared by several GPUs

One training step is Algorithm 1 of Ho et al. (2020, arXiv 2006.11239): take clean images x_0,
draw a timestep t and noise epsilon for each, mix them to x_t, and let the U-Net guess epsilon.
Everything random about step k follows from (seed, k, position in the batch) alone, so a run that
was interrupted and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import errno
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

# ---------------------------------------------------------------------------------------------
# Settings. Each is the default of the command-line option of the same name.
# ---------------------------------------------------------------------------------------------
DATA = "african_fabric_processed"  # folder of training images, subfolders included
RESULTS_DIR = "training_results"  # checkpoints, samples, losses.csv
WEIGHTS_OUT = "models/ddpm_african_fabrics.pt"  # EMA weights at the end of the run
RANDOM_SEED = 42  # decides initial weights, data order, t and noise
IMAGE_SIZE = 64  # pixels, both sides
BATCH_SIZE = 32  # images per forward and backward pass, all processes together
GRADIENT_ACCUMULATE = 1  # passes per optimizer step; effective batch = BATCH_SIZE x this
LEARNING_RATE = 2e-4  # Adam's step size
TRAIN_STEPS = 100_000  # optimizer steps
SAVE_EVERY = 1000  # steps between checkpoints, sample grids and held-out losses
LOG_EVERY = 50  # steps between rows of losses.csv and looks at the loss
SAMPLING_STEPS = 15  # of DPM-Solver++, for the progress samples
MIN_SIGNAL = 0.03  # alpha_t below which they are drawn without asking the network

# What the module keeps fixed; --quick and the tests use smaller networks.
DIM = 64  # channels at full resolution
DIM_MULTS = (1, 2, 4, 8)  # channel multipliers, one per resolution
TIMESTEPS = 1000  # T, length of the diffusion process
ADAM_BETAS = (0.9, 0.99)  # the library's choice: a shorter memory for the second moment
MAX_GRADIENT_NORM = 1.0  # gradients are scaled down to this L2 norm
EMA_DECAY = 0.9999  # upper bound; the average warms up as 1 - step^(-2/3)
MIN_SNR_GAMMA = 5  # Hang et al. 2023, used by --min-snr
MAX_NOISY_WEIGHT = 50  # upper bound of 1 + 1/SNR, used by --snr-plus-one
NUM_SAMPLES = 16  # images in a progress grid
FIXED_IMAGES = 100  # images behind each fixed loss: ten for each of ten bins of t
MIN_IMAGES = 100  # fewer cannot teach a network of this kind anything but themselves

# --quick: these settings instead, and output paths of its own. Many small steps of a narrow network
# that predicts v (Salimans & Ho 2022). Side by side, in the same time, multipliers of 1-2-4-8 got
# fewer steps done and made murkier fabrics.
QUICK = {
    "dim": 32,
    "dim_mults": (1, 2, 2, 4),
    "image_size": 32,
    "batch_size": 8,
    "objective": "pred_v",
    "min_snr": True,
    "snr_plus_one": True,
    "lr": 1e-3,
    "lr_final": 5e-5,
    "warmup_steps": 50,
    "steps": 3000,
    "compile": "off",  # it would take longer than it saves
    "save_every": 500,
    "results_dir": "training_results/quick",
    "weights_out": "training_results/quick/ddpm_quick.pt",
}

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
BINS = 10  # of t, for the fixed losses
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

# Compiling pays only in long runs: `--compile auto` compares the seconds it takes with the share of
# the time that it saves. tests/benchmarks/bench_training.py measured two CPU cores (bf16, 4 %); the
# figures of GPUs are estimates.
COMPILE_SECONDS = {"cpu": 120, "cuda": 120}
COMPILE_GAIN = {"cpu": 0.04, "cuda": 0.15}


def number(kind, minimum, text_of_range):
    """An argparse type: a number of a kind, not below a minimum."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"'{text}' is not {text_of_range}")
        return value

    return convert


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; --quick changes the defaults, not what was typed."""
    count, positive = number(int, 1, "a whole number from 1"), number(float, 1e-12, "above zero")
    parser = argparse.ArgumentParser(
        description="Train a denoising diffusion model on African fabrics.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--verify", action="store_true", help="check the data, draw nine images")
    what.add_argument("--train", action="store_true", help="train the network")
    add("--data", type=Path, default=DATA, help="folder of images, subfolders included")
    add("--heldout", type=Path, default=None,
        help="folder of images that are never trained on, for the held-out loss "
        "(rendered fabrics bring their own)")  # fmt: skip
    add("--results-dir", type=Path, default=RESULTS_DIR, help="checkpoints, samples, losses.csv")
    add("--steps", type=count, default=TRAIN_STEPS, help="optimizer steps in all")
    add("--batch-size", type=count, default=BATCH_SIZE, help="images per pass, all processes")
    add("--gradient-accumulate", type=count, default=GRADIENT_ACCUMULATE, help="passes per step")
    add("--lr", type=positive, default=LEARNING_RATE, help="learning rate of Adam")
    add("--lr-final", type=positive, default=None, help="cosine decay to this; constant if none")
    add("--warmup-steps", type=number(int, 0, "a whole number from 0"), default=0,
        help="steps in which the learning rate rises")  # fmt: skip
    add("--schedule", choices=["sigmoid", "linear", "cosine"], default="sigmoid", help="of noise")
    add("--objective", choices=["pred_noise", "pred_v", "pred_x0"], default="pred_noise",
        help="what the network predicts")  # fmt: skip
    add("--min-snr", action="store_true", help="weight the loss by min(SNR, 5) / SNR")
    add(
        "--snr-plus-one",
        action="store_true",
        help="weight the loss by 1 + 1/SNR: layout and colour settle sooner in short runs",
    )
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the network; auto takes bf16 where the hardware has it")  # fmt: skip
    add("--compile", choices=["auto", "on", "off"], default="auto",
        help="torch.compile; auto: only when the run is long enough to earn it back")  # fmt: skip
    add("--save-every", type=count, default=SAVE_EVERY, help="steps between checkpoints")
    add("--log-every", type=count, default=LOG_EVERY, help="steps between rows of losses.csv")
    add("--keep", type=number(int, 2, "a whole number from 2 (the newest may be half-written)"),
        default=2, help="checkpoints to keep, 0.57 GB each")  # fmt: skip
    add("--resume", action="store_true", help="go on from the newest good checkpoint")
    add("--init-weights", type=Path, default=None, help="start from the EMA weights in this file")
    add("--weights-out", type=Path, default=WEIGHTS_OUT, help="EMA weights at the end")
    add("--quick", action="store_true", help="a small network at 32x32, minutes on two CPU cores")
    add("--image-size", type=count, default=IMAGE_SIZE, help="pixels, both sides")
    add("--dim", type=count, default=DIM, help="channels of the U-Net at full resolution")
    add("--dim-mults", type=count, nargs="+", default=DIM_MULTS, help="its channel multipliers")
    add("--seed", type=number(int, 0, "a whole number from 0"), default=RANDOM_SEED,
        help="of weights, data order and noise")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="to compute on")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    args.results_dir, args.weights_out = Path(args.results_dir), Path(args.weights_out)
    args.data = Path(args.data)
    factor = 2 ** (len(args.dim_mults) - 1)
    if args.image_size % factor:
        parser.error(f"--image-size must be a multiple of {factor}: the U-Net halves it "
                     f"{len(args.dim_mults) - 1} times")  # fmt: skip
    if args.dim % 4:
        parser.error("--dim must be a multiple of 4")
    return args


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


if __name__ == "__main__":
    parse_options()  # the imports below take seconds; --help and wrong usage answer at once

try:
    if sys.version_info < (3, 10):  # noqa: UP036 - an older Python has to get this far
        raise ImportError("Python is too old")
    import numpy as np
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
    from denoising_diffusion_pytorch.version import __version__ as LIBRARY_VERSION
    from ema_pytorch import EMA
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from tqdm.auto import tqdm
except (ImportError, RuntimeError, OSError, KeyboardInterrupt) as import_error:
    if __name__ != "__main__":
        raise
    print(library_hint(import_error), file=sys.stderr)
    sys.exit(130 if isinstance(import_error, KeyboardInterrupt) else 1)


# Copied from exercise1_generate.py
class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what is wrong and how."""


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


# ---------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------
def find_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """All image files below `folder`, sorted, and the files that were passed over.

    Raises UserError when the folder is missing or cannot be read.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"The data folder {folder} {what}; name a folder of images with --data.")

    def unreadable(error: OSError) -> None:
        raise UserError(f"The data folder {error.filename} cannot be read ({error.strerror}).")

    images, ignored = [], []
    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            hidden = name.startswith(".")
            wanted = path.suffix.lower() in IMAGE_SUFFIXES and not hidden
            (images if wanted else ignored).append(path)
    return sorted(images), sorted(ignored)


def decode_image(path: Path, size: int | None = None) -> Image.Image:
    """An RGB image: upright, on white where it is transparent, 16 bits scaled to 8.

    With `size` it is cropped to its central square and reduced to size x size pixels. The crop
    comes first, because stretching would change the patterns that the network is to learn.
    """
    with Image.open(path) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.uint8(np.clip(grey / 257, 0, 255)))
    if image.mode in ("P", "LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return image


def load_images(
    folder: Path, size: int, at_least: int = MIN_IMAGES
) -> tuple[torch.Tensor, dict[str, str]]:
    """All images of a folder as one tensor, and the digest of each.

    Returns (uint8 tensor of shape (N, 3, size, size), {path inside the folder: digest}). 1,059
    images of 64x64 are 13 MB, so they stay in memory (on a GPU: in its memory) for the whole run.
    Raises UserError for a broken file or too few images.
    """
    paths, _ = find_images(folder)
    if len(paths) < at_least:
        raise UserError(
            f"{folder} holds {len(paths)} images, and at least {at_least} are needed; add some, "
            "or name another folder."
        )
    pixels, digests = [], {}
    for path in tqdm(paths, desc="Reading images", unit="image", leave=False, delay=2):
        try:
            array = np.asarray(decode_image(path, size))
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise UserError(
                f"{path} cannot be read as an image ({error}); "
                "remove it, or see all that is wrong with --verify."
            ) from None
        pixels.append(array)
        digests[path.relative_to(folder).as_posix()] = hashlib.sha256(array.tobytes()).hexdigest()[
            :16
        ]
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return stacked, digests


def data_checksum(digests: dict[str, str]) -> str:
    """One checksum over the names and pixels of a whole data set."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def run_prepare_fabrics(*options: str) -> None:
    """Start prepare_fabrics.py, which stands beside this script.

    Raises UserError when it is not there or fails.
    """
    script = Path(__file__).resolve().parent / "prepare_fabrics.py"
    if not script.exists():
        raise UserError(
            f"The images are missing, and so is {script.name}, which renders them: put it beside "
            "this script, or name a folder of your own images with --data."
        )
    if subprocess.run([sys.executable, str(script), *options]).returncode != 0:
        raise UserError(f"{script.name} could not render the fabrics; its message stands above.")


def provide_data(folder: Path) -> None:
    """Render the training fabrics if the default folder is asked for and is not complete."""
    if folder != Path(DATA):
        return
    if not folder.exists():
        print(f"{folder} does not exist yet: rendering the fabrics first.", flush=True)
    elif read_manifest(folder, ["sha256"]) != {"sha256": None}:
        return  # complete, or images of the user's own
    else:
        print(f"{folder} is only half rendered: rendering the rest first.", flush=True)
    run_prepare_fabrics("--output", str(folder))


def read_manifest(folder: Path, keys=("version", "seed", "split")) -> dict:
    """What prepare_fabrics.py noted about a folder; empty for anybody else's images."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return {key: manifest[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def provide_heldout(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """The folder of held-out images: the user's, or freshly rendered, or None.

    Only the rendered fabrics have an endless supply of images that the network never sees; for
    photographs the user has to name some with --heldout, or the held-out columns stay empty.
    """
    if args.heldout:
        return args.heldout
    script = Path(__file__).resolve().parent / "prepare_fabrics.py"
    if read_manifest(args.data).get("split") != "train" or not script.exists():
        return None
    folder = args.results_dir / "heldout_fabrics"
    if accelerator.is_main_process:
        options = ["--split", "heldout", "--count", str(FIXED_IMAGES), "--output", str(folder)]
        run_prepare_fabrics(*options)
    accelerator.wait_for_everyone()
    return folder


# ---------------------------------------------------------------------------------------------
# --verify
# ---------------------------------------------------------------------------------------------
def verify(args: argparse.Namespace) -> None:
    """Decode every image, report what is there, and write a grid of nine.

    Raises UserError when files are broken or too few images are left.
    """
    started = time.perf_counter()
    provide_data(args.data)
    paths, ignored = find_images(args.data)
    sizes, modes, folders, tiny, broken = {}, {}, {}, [], []
    for path in tqdm(paths, desc="Decoding", unit="image", delay=1):
        try:
            with Image.open(path) as opened:
                size, mode = opened.size, opened.mode
            decode_image(path)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            broken.append((path, "empty file" if path.stat().st_size == 0 else str(error)))
            continue
        sizes[size] = sizes.get(size, 0) + 1
        modes[mode] = modes.get(mode, 0) + 1
        label = path.relative_to(args.data).parent.as_posix()
        folders[label] = folders.get(label, 0) + 1
        if min(size) < args.image_size:
            tiny.append((path, f"only {size[0]}x{size[1]}"))

    print(f"Data folder   {args.data}")
    print("Sizes         " + ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(sizes.items())))
    print("Modes         " + ", ".join(f"{mode}: {n}" for mode, n in sorted(modes.items())))
    for label, number in sorted(folders.items()):
        print(f"  {label:<24}{number:>6}")
    foreign = [path for path in ignored if path != args.data / "manifest.json"]
    report_files("Ignored, not an image", [(path, "") for path in foreign])
    report_files("Smaller than the network's images", tiny)
    report_files("BROKEN", broken)

    good = len(paths) - len(broken)
    if good < MIN_IMAGES:
        raise UserError(
            f"{args.data} holds {good} readable images, and training needs at least {MIN_IMAGES}."
        )
    bad = {path for path, _ in broken}
    write_training_grid([path for path in paths if path not in bad], args)
    print(f"Wrote training_samples_grid.png in {time.perf_counter() - started:.1f} s")
    if broken:
        raise UserError(
            f"{len(broken)} of {len(paths)} image files are broken, named above; "
            "remove or replace them before training."
        )
    print(f"Found {good} images in dataset")


def report_files(heading: str, rows: list[tuple[Path, str]]) -> None:
    """Print file names with a remark each; says nothing when there are none."""
    if rows:
        print(f"{heading}: {len(rows)}")
    for path, remark in rows[:20]:
        print(f"  {path}" + (f" ({remark})" if remark else ""))
    if len(rows) > 20:
        print(f"  ... and {len(rows) - 20} more")


def write_training_grid(paths: list[Path], args: argparse.Namespace) -> None:
    """Nine images, evenly spread over the sorted folder so that every tradition has a chance."""
    # Stepping by a little more than a ninth visits different folders and different numbers.
    chosen = [paths[int((i + 0.5) * len(paths) / 9)] for i in range(9)]
    arrays = np.stack([np.asarray(decode_image(path, args.image_size)) for path in chosen])
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    save_grid(images, Path("training_samples_grid.png"), f"9 of {len(paths)} training images")


# ---------------------------------------------------------------------------------------------
# One training step
# ---------------------------------------------------------------------------------------------
def image_order(seed: int, pass_number: int, num_images: int) -> np.ndarray:
    """The order in which one pass over the data visits the images; each comes exactly once."""
    return np.random.Generator(
        np.random.Philox(key=seed, counter=[0, 1, 0, pass_number])
    ).permutation(num_images)


def draw_example(seed: int, step: int, position: int, timesteps: int, shape: tuple[int, ...]):
    """Everything random about one place in one batch: (flip, t, noise of `shape`).

    Philox (Salmon et al. 2011) is a random generator without a state to save: its stream is a
    function of a key and a counter, and the counter here is (step, position). So it matters
    neither where a run was interrupted nor how many processes share a batch.
    """
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, step]))
    return rng.random() < 0.5, rng.integers(timesteps), rng.standard_normal(shape, np.float32)


def draw_numbers(seed: int, step: int, positions: range, batch: int, T: int, shape):
    """Everything random about `positions` of the effective batch of `step` (counted from 1).

    `shape` is that of the data set, (N, 3, H, W). Returns arrays with an entry for each position:
    which image, whether to flip it, t in 0..T-1, noise (n, 3, H, W).
    """
    numbers = [(step - 1) * batch + position for position in positions]
    orders = {n // shape[0]: None for n in numbers}
    orders = {number: image_order(seed, number, shape[0]) for number in orders}
    index = [orders[n // shape[0]][n % shape[0]] for n in numbers]
    examples = [draw_example(seed, step, p, T, tuple(shape[1:])) for p in positions]
    flip, t, noise = (np.stack(column) for column in zip(*examples, strict=True))
    return np.asarray(index), flip, t, noise


def make_batch(images: torch.Tensor, numbers: tuple[np.ndarray, ...]):
    """The examples that `numbers` (of draw_numbers) stand for.

    `images` is the uint8 data set (N, 3, H, W) on the training device. Returns x_0 in [-1, 1]
    (n, 3, H, W), t in 0..T-1 (n,), noise (n, 3, H, W), all on the same device. Nothing here
    waits for the device: a GPU may still work on the batch before.
    """

    def to_device(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if images.is_cuda:
            return tensor.pin_memory().to(images.device, non_blocking=True)
        return tensor.to(images.device)

    index, flip, t, noise = map(to_device, numbers)
    chosen = images[index]
    chosen = torch.where(flip[:, None, None, None], chosen.flip(-1), chosen)
    x_0 = chosen.float() / 127.5 - 1
    return (
        x_0.contiguous(memory_format=torch.channels_last),
        t,
        noise.contiguous(memory_format=torch.channels_last),
    )


class Drawer:
    """Draws the numbers of one micro-batch while the one before is being worked on.

    32 images take 5 ms of a processor, half of what a whole step should take on a fast GPU, and
    the thread that starts the GPU's work has no time to spare. NumPy lets go of Python's lock while
    it draws, so that a thread of its own costs the other next to nothing.
    """

    def __init__(self, args: argparse.Namespace, shape: torch.Size, process: int, processes: int):
        self.args, self.shape = args, shape
        self.share = args.batch_size // processes
        self.first = process * self.share
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}  # at most one: {(step, micro-batch): Future}

    def draw(self, step: int, micro: int) -> tuple[np.ndarray, ...]:
        """What draw_numbers gives for this process' share of a micro-batch."""
        args = self.args
        first = micro * args.batch_size + self.first
        return draw_numbers(
            args.seed,
            step,
            range(first, first + self.share),
            args.batch_size * args.gradient_accumulate,
            TIMESTEPS,
            self.shape,
        )

    def take(self, step: int, micro: int) -> tuple[np.ndarray, ...]:
        """The same, drawn ahead if it was foreseen; what comes next is begun at once."""
        future = self.ahead.pop((step, micro), None)
        last = micro == self.args.gradient_accumulate - 1
        following = (step + 1, 0) if last else (step, micro + 1)
        self.ahead = {following: self.thread.submit(self.draw, *following)}
        return future.result() if future else self.draw(step, micro)


def denoising_loss(
    diffusion: GaussianDiffusion,
    network: torch.nn.Module,
    x_0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The simple loss of Ho et al. (2020), equation 14, one value per image, shape (n,).

    `network` is diffusion.model, possibly wrapped for several processes. Equal to the library's
    `GaussianDiffusion.p_losses`, with the weights of its objective and of min-SNR applied.
    """
    x_t = diffusion.q_sample(x_0, t, noise)  # equation 4: any t in one step
    predicted = network(x_t, t)
    if diffusion.objective == "pred_noise":
        target = noise
    elif diffusion.objective == "pred_x0":
        target = x_0
    else:  # pred_v, Salimans & Ho 2022
        target = diffusion.predict_v(x_0, t, noise)
    squared_error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    weight = diffusion.loss_weight[t]
    if hasattr(diffusion, "noisy_weight"):
        weight = weight * diffusion.noisy_weight[t]
    return squared_error * weight


class ThriftyRMSNorm(library.RMSNorm):
    """The library's norm, whose result keeps the precision of what goes in.

    The library multiplies by the gain, an fp32 parameter, and by the scale, one after the other.
    Under autocast that makes the result fp32, and everything up to the next convolution, all of
    it kept for the backward pass: a quarter of the memory of a bf16 step. In fp32 nothing changes
    but the order of two products.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale x (n, c, h, w) to length gain * sqrt(c) over its channels (Zhang 2019)."""
        return F.normalize(x, dim=1).to(x.dtype) * (self.g * self.scale).to(x.dtype)


def thrifty_norms(unet: torch.nn.Module) -> None:
    """Replace the behaviour of a network's norms; parameters and their names stay."""
    for module in unet.modules():
        if type(module) is library.RMSNorm:
            module.__class__ = ThriftyRMSNorm


def weight_by_min_snr(diffusion: GaussianDiffusion) -> None:
    """Multiply the loss weight by min(SNR, 5) / SNR (Hang et al. 2023, section 3.4).

    Nearly clean images are easy to denoise, and without it they take most of the gradient.
    """
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    diffusion.loss_weight *= snr.clamp(max=MIN_SNR_GAMMA) / snr


def weight_by_snr_plus_one(diffusion: GaussianDiffusion) -> None:
    """Weight the loss by 1 + 1/SNR, at most MAX_NOISY_WEIGHT (Salimans & Ho 2022, section 4).

    The library weights every objective so that its loss is the squared error of the noise: that of
    x_0 by SNR, that of v by SNR / (SNR + 1). This makes it the squared error of v instead. In
    nearly pure noise a small error of the noise is a large one of the image (its square is divided
    by the SNR), and there the colours and the layout are decided. The weights stand beside the
    library's own, which are saved with the network and tell its objective.
    """
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    weight = (1 + 1 / snr).clamp(max=MAX_NOISY_WEIGHT)
    diffusion.register_buffer("noisy_weight", weight, persistent=False)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate of a step (from 1): linear warm-up, then constant or cosine to --lr-final."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    if args.lr_final is None:
        return args.lr
    progress = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return args.lr_final + (args.lr - args.lr_final) * cosine


def train_step(run: Run, step: int) -> torch.Tensor:
    """One optimizer step; returns this process' mean loss, still on the device.

    Each process works on its own positions of each micro-batch, and the sum of all gradients is
    divided by the effective batch: neither the split over processes nor the accumulation shows.
    """
    args, accelerator = run.args, run.accelerator
    effective = args.batch_size * args.gradient_accumulate
    total = torch.zeros((), device=run.device)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    for micro in range(args.gradient_accumulate):
        x_0, t, noise = make_batch(run.images, run.drawer.take(step, micro))
        is_last = micro == args.gradient_accumulate - 1
        # Gradients of several processes are averaged once per step, not once per micro-batch.
        with nullcontext() if is_last else accelerator.no_sync(run.network):
            with autocast(run):
                losses = denoising_loss(run.diffusion, run.network, x_0, t, noise)
            loss = losses.sum() * accelerator.num_processes / effective
            run.scaler.scale(loss).backward()
        total += loss.detach()
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.diffusion.model.parameters(), MAX_GRADIENT_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update()
    return total


def autocast(run: Run):
    """Context in which the network computes in the run's precision; fp32 is left alone."""
    enabled = run.precision != torch.float32
    return torch.autocast(run.device.type, dtype=run.precision, enabled=enabled)


# ---------------------------------------------------------------------------------------------
# What a run consists of
# ---------------------------------------------------------------------------------------------
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


def start_run(args: argparse.Namespace) -> Run:
    """Read the data, build network, optimizer and EMA, on the device that was asked for."""
    device = pick_device(args.device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    check_split(args, accelerator.num_processes)
    with accelerator.main_process_first():
        provide_data(args.data)
        images, digests = load_images(args.data, args.image_size)
    heldout_folder = provide_heldout(args, accelerator)
    heldout = None
    if heldout_folder is not None:
        images_unseen, _ = load_images(heldout_folder, args.image_size, at_least=BINS)
        heldout = spread(images_unseen).to(accelerator.device)

    torch.manual_seed(args.seed)  # the initial weights
    diffusion = build_diffusion(
        dim=args.dim,
        dim_mults=tuple(args.dim_mults),
        image_size=args.image_size,
        timesteps=TIMESTEPS,
        objective=args.objective,
        beta_schedule=args.schedule,
    )
    if args.min_snr:
        weight_by_min_snr(diffusion)
    if args.snr_plus_one:
        weight_by_snr_plus_one(diffusion)
    if args.init_weights:
        load_initial_weights(diffusion, args.init_weights)
    thrifty_norms(diffusion.model)
    keep_freed_memory()
    diffusion.to(accelerator.device, memory_format=torch.channels_last)
    precision = pick_precision(args.precision, accelerator.device)
    optimizer = torch.optim.Adam(
        diffusion.model.parameters(),
        lr=args.lr,
        betas=ADAM_BETAS,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    # The wrapper's two counters stay on the CPU, so that updating never waits for a GPU.
    ema = EMA(diffusion, beta=EMA_DECAY, update_every=1, use_foreach=True)
    return Run(
        args=args,
        accelerator=accelerator,
        device=accelerator.device,
        precision=precision,
        diffusion=diffusion,
        network=diffusion.model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=precision == torch.float16),
        ema=ema,
        images=images.to(accelerator.device),
        drawer=Drawer(args, images.shape, accelerator.process_index, accelerator.num_processes),
        digests=digests,
        heldout=heldout,
        config=describe_run(args, digests),
    )


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


def check_split(args: argparse.Namespace, num_processes: int) -> None:
    """Refuse a batch that the processes cannot share equally."""
    if args.batch_size % num_processes:
        raise UserError(
            f"--batch-size {args.batch_size} cannot be shared equally by {num_processes} "
            "processes; choose a multiple."
        )


def describe_run(args: argparse.Namespace, digests: dict[str, str]) -> dict:
    """What a checkpoint says about the run it belongs to: plain numbers and strings only."""
    return {
        "network": {"dim": args.dim, "dim_mults": list(args.dim_mults), "channels": 3},
        "process": {
            "image_size": args.image_size,
            "timesteps": TIMESTEPS,
            "objective": args.objective,
            "beta_schedule": args.schedule,
        },
        "data": {
            "images": len(digests),
            "checksum": data_checksum(digests),
            **{f"fabrics_{key}": value for key, value in read_manifest(args.data).items()},
        },
        "training": {
            "effective_batch": args.batch_size * args.gradient_accumulate,
            "min_snr": args.min_snr,
            "snr_plus_one": args.snr_plus_one,
            "seed": args.seed,
            "lr": args.lr,
            "lr_final": args.lr_final,
            "warmup_steps": args.warmup_steps,
            "steps": args.steps,
            "initial_weights": str(args.init_weights.name) if args.init_weights else None,
        },
    }


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


# ---------------------------------------------------------------------------------------------
# Fixed losses: is it learning the fabrics, or these 1,059 images?
# ---------------------------------------------------------------------------------------------
def fixed_losses(run: Run, images: torch.Tensor) -> list[float]:
    """EMA network's unweighted noise error on given images, mean per bin of t (BINS values).

    Images, timesteps and noise are the same at every call, so that two steps of a run, or
    training images and held-out ones, can be compared without the noise of the draw.
    """
    errors = fixed_errors(run, run.ema.ema_model, images)
    return [float(np.mean(errors[b::BINS])) for b in range(BINS)]


@torch.inference_mode()
def fixed_errors(run: Run, model: GaussianDiffusion, images: torch.Tensor) -> list[float]:
    """Noise error of each of `images`, uint8 (n, 3, H, W), place i at a t of the bin i mod BINS."""
    model = model.eval()
    errors = []
    for first in range(0, len(images), run.args.batch_size):
        chosen = images[first : first + run.args.batch_size]
        places = range(first, first + len(chosen))
        # Place i has the middle of the (i mod BINS)-th bin, shifted so that bins are filled.
        t = torch.tensor([fixed_timestep(i, run.diffusion.num_timesteps) for i in places])
        noise = np.stack([fixed_noise(run.args.seed, i, chosen.shape[1:]) for i in places])
        t, noise = t.to(run.device), torch.from_numpy(noise).to(run.device)
        x_0 = chosen.float() / 127.5 - 1
        with autocast(run):
            x_t = model.q_sample(x_0, t, noise)
            predicted = predict_noise(model, x_t, t)
        errors += (predicted - noise).square().mean(dim=(1, 2, 3)).tolist()
    return errors


def fixed_timestep(place: int, T: int) -> int:
    """A timestep inside bin `place mod BINS`; successive rounds visit different parts of it."""
    golden = 0.6180339887498949  # its multiples fill an interval evenly
    within = (place // BINS * golden + 0.5) % 1
    return int((place % BINS + within) * T / BINS)


def fixed_noise(seed: int, place: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise that belongs to a place of the fixed losses."""
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 2, place, 0]))
    return rng.standard_normal(tuple(shape), np.float32)


def predict_noise(model: GaussianDiffusion, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network's guess of the noise in x_t, whatever its objective is."""
    output = model.model(x_t, t).float()
    if model.objective == "pred_noise":
        return output
    if model.objective == "pred_v":
        output = model.predict_start_from_v(x_t, t, output)
    return model.predict_noise_from_start(x_t, t, output)


def spread(images: torch.Tensor) -> torch.Tensor:
    """FIXED_IMAGES of a sorted data set, evenly spread, so that every subfolder has its share."""
    places = np.linspace(0, len(images) - 1, min(FIXED_IMAGES, len(images)))
    return images[torch.from_numpy(places.round().astype(np.int64)).to(images.device)]


# ---------------------------------------------------------------------------------------------
# Checkpoints: a whole file or none
# ---------------------------------------------------------------------------------------------
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


def unused_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist yet."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate


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


# ---------------------------------------------------------------------------------------------
# losses.csv and the curve
# ---------------------------------------------------------------------------------------------
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


def plot_losses(csv_path: Path, figure_path: Path) -> None:
    """loss_curve.png: the training loss, and the fixed losses on training and held-out images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_losses(csv_path)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*columns(rows, "loss"), color="0.6", linewidth=0.8, label="training loss")
    axes.plot(*columns(rows, "train_fixed"), "o-", ms=3, label="EMA's error, training images")
    axes.plot(*columns(rows, "heldout_fixed"), "s-", ms=3, label="EMA's error, held-out images")
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axes.set_title("Loss while training, and the plain error of the noise")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")
    with write_atomically(figure_path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def columns(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have a value in a column."""
    pairs = [(row["step"], row[name]) for row in rows if not math.isnan(row[name])]
    return [p[0] for p in pairs], [p[1] for p in pairs]


# ---------------------------------------------------------------------------------------------
# --train
# ---------------------------------------------------------------------------------------------
def train(args: argparse.Namespace) -> None:
    """Train, log, sample and save until the last step, a signal, or trouble."""
    check_outputs(args)
    run = start_run(args)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    if args.resume:
        resume(run)
    if run.step >= args.steps:
        finish(run, already=True)
        return
    if run.accelerator.is_main_process:
        for stale in args.results_dir.glob(".*.tmp"):  # left by a process that was killed
            stale.unlink()
        trim_losses(args.results_dir / "losses.csv", run.step)
        write_run_file(run)
    stop = StopRequest(shared=run.accelerator.num_processes > 1)
    prepare_network(run)
    stop.install()
    training_loop(run, stop)
    finish(run)


def training_loop(run: Run, stop: StopRequest) -> None:
    """Steps from run.step + 1 to args.steps; between them whatever is due."""
    args = run.args
    bar = tqdm(
        initial=run.step,
        total=args.steps,
        unit="step",
        desc="Training",
        disable=not run.accelerator.is_main_process,
    )
    clock = Clock(run)
    with bar:
        while run.step < args.steps:
            run.pending.append(train_step(run, run.step + 1))
            run.step += 1
            bar.update()
            saving = run.step % args.save_every == 0 or run.step == args.steps
            logging = run.step % args.log_every == 0 or saving
            if logging or run.device.type == "cpu":
                look_at_losses(run, bar, clock)  # the only place that waits for a GPU
            stopping = stop_agreed(run, stop, logging)
            row = make_row(run, clock) if logging else None
            if saving:
                row = add_fixed_losses(run, row)
            if row and run.accelerator.is_main_process:
                append_losses(args.results_dir / "losses.csv", row)
            clock.pause()
            if saving:
                save_progress(run)
            if stopping:
                save_and_leave(run, stop, bar)
            clock.resume()


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


def save_progress(run: Run) -> None:
    """Checkpoint, sample grid, loss curve: by the main process, while the others wait."""
    if run.accelerator.is_main_process:
        save_checkpoint(run)
        write_run_file(run)
        save_samples(run)
        folder = run.args.results_dir
        plot_losses(folder / "losses.csv", folder / "loss_curve.png")
        gc.collect()  # closed figures refer to themselves in circles and would pile up for long
    run.accelerator.wait_for_everyone()


def save_samples(run: Run) -> None:
    """sample-STEP.png: what the EMA network makes of the same noise at every save."""
    size = run.args.image_size
    model = run.ema.ema_model.eval()
    x_T, _ = starting_noise(range(run.args.seed, run.args.seed + NUM_SAMPLES), (3, size, size))
    x_T = x_T.to(run.device, memory_format=torch.channels_last)
    images = sample_dpmpp(
        model, x_T, SAMPLING_STEPS, precision=run.precision, min_signal=MIN_SIGNAL
    )
    path = run.args.results_dir / f"sample-{run.step}.png"
    save_grid(images.cpu(), path, f"Step {run.step:,}")


def prepare_network(run: Run) -> None:
    """Time the network, decide on compilation, share it between processes, print the banner."""
    per_image = time_per_image(run)
    effective = run.config["training"]["effective_batch"]
    per_step = per_image * effective / run.accelerator.num_processes
    remaining = per_step * (run.args.steps - run.step)
    kind, why = run.device.type, ""
    gain = COMPILE_GAIN.get(kind, 0)
    run.compiled = run.args.compile == "on"
    if run.args.compile == "auto":
        cost = COMPILE_SECONDS.get(kind, math.inf)
        has_compiler = kind == "cuda" or any(map(shutil.which, ("g++", "c++", "clang++")))
        run.compiled = has_compiler and remaining * gain > 2 * cost
        why = " (auto: the run is long enough)" if run.compiled else " (auto: would not pay here)"
    if run.compiled:
        # On a GPU with CUDA graphs: 600 small kernels are then started by one call.
        run.diffusion.model.compile(mode="reduce-overhead" if kind == "cuda" else "default")
        remaining *= 1 - gain
    run.network = run.accelerator.prepare_model(run.diffusion.model)
    if run.accelerator.is_main_process:
        print_banner(run, remaining, ("on" if run.compiled else "off") + why)


def time_per_image(run: Run) -> float:
    """Seconds of one forward and backward pass per image, measured on a small batch."""
    count = min(4 if run.device.type == "cpu" else 32, run.args.batch_size)
    numbers = draw_numbers(run.args.seed, 1, range(count), count, TIMESTEPS, run.images.shape)
    batch = make_batch(run.images, numbers)
    for _ in range(2):  # the first time is slower: memory is taken, kernels are chosen
        started = time.perf_counter()
        with autocast(run):
            loss = denoising_loss(run.diffusion, run.diffusion.model, *batch).mean()
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - started
    run.optimizer.zero_grad(set_to_none=True)
    return seconds / count


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


def device_name(device: torch.device) -> str:
    """A name that a person recognises: the GPU's, or the processor's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU ({name}, {torch.get_num_threads()} threads)"


def duration(seconds: float) -> str:
    """Seconds in the largest unit that gives a handy number."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


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


def finish(run: Run, already: bool = False) -> None:
    """Export the EMA weights, unless exactly these stand there already, and say what was made."""
    if not run.accelerator.is_main_process:
        return
    out = run.args.weights_out
    if already and exported_step(out, run.config) == run.step:
        print(f"This run is finished: {run.step:,} steps are done and {out} is written. Use a "
              "larger --steps to train on.")  # fmt: skip
        return
    previous = export_weights(run, out)
    if previous:
        print(f"The weights that were at {out} are now {previous}")
    print(
        f"Wrote {out} (EMA weights of step {run.step:,}), samples, losses.csv and loss_curve.png "
        f"in {run.args.results_dir}; training took {duration(run.seconds)}. Draw new fabrics "
        f"with: python exercise1_generate.py --weights {out}"
    )


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


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse before the first step what would only fail, or destroy something, after hours."""
    if args.results_dir.exists() and not args.results_dir.is_dir():
        raise UserError(f"--results-dir {args.results_dir} is a file; name a folder.")
    if args.weights_out.is_dir():
        raise UserError(f"--weights-out {args.weights_out} is a folder; name a .pt file.")
    kept = [p for p in (args.results_dir / "losses.csv", *list_checkpoints(args.results_dir))
            if p.exists()]  # fmt: skip
    if kept and not args.resume:
        raise UserError(
            f"{args.results_dir} holds another run ({kept[-1].name}): go on with it with --resume, "
            "or name another folder with --results-dir."
        )
    for folder in (args.results_dir, args.weights_out.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".write-test.{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"Cannot write into {folder} ({error.strerror}).") from None


def say(run: Run, text: str) -> None:
    """Print from the main process only."""
    if run.accelerator.is_main_process:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------
# Samples on the way: how noise becomes an image is the subject of exercise 1
# ---------------------------------------------------------------------------------------------
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
def to_picture(image):
    """Turn an image [c, h, w] in [0, 1] into a PIL picture, 8 bits per channel."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels.squeeze())


# Copied from exercise1_generate.py
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


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------
def out_of_memory_message(args: argparse.Namespace) -> str:
    """What to type instead: half the batch, twice the accumulation, and the same run."""
    if args.batch_size == 1:
        return "Out of memory with a single image per pass; use --image-size 32, or --quick."
    half = args.batch_size // 2
    twice = args.gradient_accumulate * args.batch_size // half
    return (
        f"Out of memory; use --batch-size {half} --gradient-accumulate {twice} instead of "
        f"--batch-size {args.batch_size} --gradient-accumulate {args.gradient_accumulate} "
        "(with --resume, if checkpoints were written)."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise the errors of CUDA, of the CPU's allocator and of Python itself."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def main() -> int:
    """Run one command; turn every foreseeable trouble into a sentence and an exit code."""
    args = parse_options()
    try:
        verify(args) if args.verify else train(args)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; everything saved before is intact.", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"Error: {where}{error.strerror or error}.", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"Error: {out_of_memory_message(args)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
