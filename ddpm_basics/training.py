"""One training step's random numbers, loss weights, norms, and the fixed losses."""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library

if TYPE_CHECKING:
    from ddpm_basics.runs import Run

TIMESTEPS = 1000  # T, length of the diffusion process
MIN_SNR_GAMMA = 5  # Hang et al. 2023, used by --min-snr
MAX_NOISY_WEIGHT = 50  # upper bound of 1 + 1/SNR, used by --snr-plus-one
FIXED_IMAGES = 100  # images behind each fixed loss: ten for each of ten bins of t
BINS = 10  # of t, for the fixed losses


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


def autocast(run: Run):
    """Context in which the network computes in the run's precision; fp32 is left alone."""
    enabled = run.precision != torch.float32
    return torch.autocast(run.device.type, dtype=run.precision, enabled=enabled)


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
