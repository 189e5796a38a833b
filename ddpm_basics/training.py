"""One training step: random numbers, loss weights, learning rate, average, norms; fixed losses."""

from __future__ import annotations

import argparse
import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from ema_pytorch import EMA
from torch import Tensor

from ddpm_basics.hardware import autocast
from ddpm_basics.sampling import starting_noise

MIN_SNR_GAMMA = 5  # Hang et al. 2023, used by --min-snr
MAX_NOISY_WEIGHT = 50  # upper bound of 1 + 1/SNR, used by --snr-plus-one
FIXED_IMAGES = 100  # images behind each fixed loss: ten for each of ten bins of t
BINS = 10  # of t, for the fixed losses


# ---- Random numbers ------------------------------------------------------------------------------


class StepNumbers(NamedTuple):
    """Everything random about the effective batch of one step, an entry for each position."""

    picked: Tensor  # (n,) which image
    flip: Tensor  # (n,) whether it is mirrored
    t: Tensor  # (n,) timestep, 0 to T - 1
    noise: Tensor  # (n, 3, H, W)


def draw_numbers(
    seed: int, step: int, count: int, data: torch.Size, timesteps: int, device: torch.device
) -> StepNumbers:
    """Draw the random numbers of `step` (from 1) for a data set of shape `data`, (N, 3, H, W).

    They follow from (seed, step) alone, so it does not matter where a run was interrupted; and all
    are drawn for the whole effective batch of `count` images, so it does not matter how many
    processes and passes it is then cut into. Another kind of device draws other numbers.
    """
    generator = seeded(f"{seed} step {step}", device)
    return StepNumbers(
        picked=image_order(seed, (step - 1) * count, count, data[0], device),
        flip=torch.rand(count, generator=generator, device=device) < 0.5,
        t=torch.randint(timesteps, (count,), generator=generator, device=device),
        noise=torch.randn(count, *data[1:], generator=generator, device=device),
    )


def image_order(seed: int, first: int, count: int, images: int, device: torch.device) -> Tensor:
    """Return which images (count,) come from place `first` on; each pass visits each image once."""
    passes = range(first // images, (first + count - 1) // images + 1)
    orders = [
        torch.randperm(images, generator=seeded(f"{seed} pass {number}", device), device=device)
        for number in passes
    ]
    start = first - passes[0] * images
    return torch.cat(orders)[start : start + count]


def seeded(words: str, device: torch.device) -> torch.Generator:
    """Return a generator whose stream follows from some words."""
    digest = hashlib.sha256(words.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


# ---- Loss weights and learning rate --------------------------------------------------------------


def loss_weights(diffusion: GaussianDiffusion, min_snr: bool, snr_plus_one: bool) -> Tensor:
    """Return the weight [T] of the loss at each timestep.

    The library's own weight makes the loss of every objective the squared error of the noise (Ho
    2020, equation 14). min_snr multiplies it by min(SNR, 5) / SNR (Hang et al. 2023, section 3.4):
    nearly clean images are easy to denoise, and without it they take most of the gradient.
    snr_plus_one multiplies it by 1 + 1/SNR, at most MAX_NOISY_WEIGHT, which makes it the squared
    error of v (Salimans & Ho 2022, section 4): in nearly pure noise a small error of the noise is
    a large one of the image, and there the colours and the layout are decided.
    """
    weight: Tensor = diffusion.loss_weight.clone()
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    if min_snr:
        weight *= snr.clamp(max=MIN_SNR_GAMMA) / snr
    if snr_plus_one:
        weight *= (1 + 1 / snr).clamp(max=MAX_NOISY_WEIGHT)
    return weight


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Learning rate of a step (from 1): linear warm-up, then constant or cosine to --lr-final."""
    rate, warmup = float(options.lr), int(options.warmup_steps)
    if step <= warmup:
        return rate * step / warmup
    if options.lr_final is None:
        return rate
    progress = (step - warmup) / max(1, options.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return float(options.lr_final + (rate - options.lr_final) * cosine)


# ---- The average of the weights ------------------------------------------------------------------


def weight_average(diffusion: GaussianDiffusion, decay: float) -> EMA:
    """Return the exponential moving average of a network's weights, which samples are drawn with.

    average = d average + (1 - d) weights at each update. d warms up as 1 - step^(-2/3), from a
    plain copy during the first 100 steps, so that early averages do not lag; `decay` bounds it.
    """
    # The wrapper's two counters stay on the CPU, so that updating never waits for a GPU.
    return EMA(diffusion, beta=decay, update_every=1, use_foreach=True)


# ---- Norms that save memory ----------------------------------------------------------------------


class ThriftyRMSNorm(library.RMSNorm):  # type: ignore[misc]  # the library has no types
    """The library's norm, whose result keeps the precision of what goes in.

    The library multiplies by the gain, an fp32 parameter, and by the scale, one after the other.
    Under autocast that makes the result fp32, and everything up to the next convolution, all of
    it kept for the backward pass: a quarter of the memory of a bf16 step. In fp32 nothing changes
    but the order of two products.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (n, c, h, w) to length gain * sqrt(c) over its channels (Zhang 2019)."""
        gain: Tensor = self.g * self.scale
        return F.normalize(x, dim=1).to(x.dtype) * gain.to(x.dtype)


def thrifty_norms(unet: torch.nn.Module) -> None:
    """Replace the behaviour of a network's norms; parameters and their names stay."""
    for module in unet.modules():
        if type(module) is library.RMSNorm:
            module.__class__ = ThriftyRMSNorm


# ---- Fixed losses: is it learning the fabrics, or these 1,059 images? ----------------------------


def spread(images: Tensor) -> Tensor:
    """Return FIXED_IMAGES of a sorted data set, evenly spread: every subfolder has its share."""
    places = torch.linspace(0, len(images) - 1, min(FIXED_IMAGES, len(images)))
    return images[places.round().long().to(images.device)]


@torch.inference_mode()
def fixed_losses(
    model: GaussianDiffusion, images: Tensor, seed: int, batch_size: int, precision: str
) -> list[float]:
    """Return a network's unweighted noise error on uint8 images (n, 3, H, W), mean per bin of t.

    Images, timesteps and noise are the same at every call, so that two steps of a run, or
    training images and held-out ones, can be compared without the noise of the draw.
    """
    model.eval()
    device = images.device
    t = fixed_timesteps(len(images), int(model.num_timesteps)).to(device)
    noise = starting_noise(range(seed, seed + len(images)), images.shape[1:])[0].to(device)
    errors = []
    for first in range(0, len(images), batch_size):
        chosen, times, epsilon = (x[first : first + batch_size] for x in (images, t, noise))
        x_t = model.q_sample(chosen.float() / 127.5 - 1, times, epsilon)
        with autocast(device, precision):
            output = model.model(x_t, times)
        guess = as_noise(model, x_t, times, output.float())
        errors.append((guess - epsilon).square().mean(dim=(1, 2, 3)))
    return [float(torch.cat(errors)[b::BINS].mean()) for b in range(BINS)]


def fixed_timesteps(count: int, timesteps: int) -> Tensor:
    """Return timesteps (count,): place i in bin i modulo BINS, each round in another part of it."""
    place = torch.arange(count)
    golden = 0.6180339887498949  # its multiples fill an interval evenly
    within = (place // BINS * golden + 0.5) % 1
    return ((place % BINS + within) * timesteps / BINS).long()


def as_noise(model: GaussianDiffusion, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
    """Turn a network's output into its guess of the noise in x_t, whatever its objective is."""
    if model.objective == "pred_noise":
        return output
    if model.objective == "pred_v":
        output = model.predict_start_from_v(x_t, t, output)
    noise: Tensor = model.predict_noise_from_start(x_t, t, output)
    return noise
