"""One training step: random numbers, loss weights, learning rate, average, norms; fixed numbers."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from ema_pytorch import EMA
from torch import Tensor

LABEL_DROPOUT = 0.2  # so that the network learns to draw without one, too (Ho & Salimans 2022)
SAME_GRADIENTS = 0.01  # largest relative error of the compiled gradients, all together,
SAME_GRADIENT = 0.1  # and of each: bf16 rounds a small one by a few percent
CLEAN = 5  # SNR beyond which an image is nearly clean, and its loss weighs less
FIXED_IMAGES = 120  # behind each fixed loss: ten of each tradition


# ---- Random numbers ------------------------------------------------------------------------------


class StepNumbers(NamedTuple):
    """Everything random about the effective batch of one step, an entry for each position."""

    picked: Tensor  # (n,) which image
    corner: Tensor  # (n, 2) row and column of the square's upper left corner in it
    flip: Tensor  # (n,) whether it is mirrored
    drop: Tensor  # (n,) whether its label is kept from the network
    t: Tensor  # (n,) timestep, 0 to T - 1, evenly spread
    noise: Tensor  # (n, c, side, side)


def draw_numbers(
    seed: int, step: int, count: int, images: Tensor, diffusion: GaussianDiffusion
) -> StepNumbers:
    """Draw the random numbers of `step` (from 1) for squares of images (N, c, H, W).

    They follow from (seed, step) alone, so it does not matter where a run was interrupted; and all
    are drawn for the whole effective batch of `count` images, so it does not matter how many
    processes and passes it is then cut into. Another kind of device draws other numbers.

    t is stratified: each is uniform, but together they are evenly spaced, so that the gradient
    does not depend on the luck of the draw (Kingma et al. 2021, appendix I.1).
    """
    device, side = images.device, int(diffusion.image_size[0])
    generator = seeded(f"{seed} step {step}", device)
    shift = torch.rand(1, generator=generator, device=device)
    place = torch.randperm(count, generator=generator, device=device) / count
    return StepNumbers(
        picked=image_order(seed, (step - 1) * count, count, len(images), device),
        corner=corners(count, images, side, generator),
        flip=torch.rand(count, generator=generator, device=device) < 0.5,
        drop=torch.rand(count, generator=generator, device=device) < LABEL_DROPOUT,
        t=((place + shift) % 1 * diffusion.num_timesteps).long(),
        noise=torch.randn(count, images.shape[1], side, side, generator=generator, device=device),
    )


def corners(count: int, images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Draw the upper left corners (n, 2) of squares in images (N, c, H, W)."""
    room = torch.tensor(images.shape[2:], device=generator.device) - side + 1
    places = torch.rand(count, 2, generator=generator, device=generator.device)
    return (places * room).long()


def cut_squares(images: Tensor, picked: Tensor, corner: Tensor, side: int) -> Tensor:
    """Cut one square (n, c, side, side) out of each picked image of (N, c, H, W)."""
    along = torch.arange(side, device=images.device)
    rows, columns = (corner[:, :1] + along)[:, :, None], (corner[:, 1:] + along)[:, None, :]
    return images.permute(0, 2, 3, 1)[picked[:, None, None], rows, columns].permute(0, 3, 1, 2)


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


def loss_weights(diffusion: GaussianDiffusion, name: str) -> Tensor:
    """Return the weight [T] of the squared error of what the network predicts, at each timestep.

    "simple" is the library's own: whatever the objective, the loss is then the squared error of
    the noise (Ho 2020, equation 14), of which v's is 1 + 1/SNR times as much. "min5", for v, is
    min(1, 5/SNR): the error of v, but of nearly clean images, which are easy to denoise and would
    take most of the gradient, only as much as min-SNR weighting leaves them (Hang et al. 2023).
    """
    snr: Tensor = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    weight: Tensor = diffusion.loss_weight
    return weight.clone() if name == "simple" else (CLEAN / snr).clamp(max=1)


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Learning rate of a step (from 1): linear warm-up, then constant or cosine to --lr-final."""
    rate, warmup = float(options.lr), int(options.warmup)
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


# ---- The compiler --------------------------------------------------------------------------------


def compile_checked(
    network: torch.nn.Module, loss: Callable[[], Tensor], say: Callable[[str], None]
) -> bool:
    """Compile a network's `unet` in place, or leave it as it was and say why; return which.

    The compiled gradients of some loss have to equal the eager ones. Since torch 2.10 the compiler
    may reorder reductions so that gradients of norms have another shape (pytorch issue 178080) or
    those of biases are silently wrong (190796): that is turned off.
    """
    unet = network.get_submodule("unet")
    options: dict[str, Any] = {"triton.mix_order_reduction": False}
    if next(unet.parameters()).is_cuda:
        options["triton.cudagraphs"] = True  # 600 small kernels are then started by one call
    known = torch._inductor.list_options()
    torch._dynamo.config.suppress_errors = False  # whatever the environment says
    eager = take_gradients(network, loss)
    try:
        if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise RuntimeError("the environment turns it off")
        unet.compile(options={name: value for name, value in options.items() if name in known})
        together, worst = gradients_apart(take_gradients(network, loss), eager)
        if together < SAME_GRADIENTS and worst < SAME_GRADIENT:
            return True
        problem = f"its gradients are {together:.1%} off, one of them {worst:.0%}"
    except Exception as error:  # a compiler fails in many ways
        problem = f"it fails ({(str(error) or type(error).__name__).splitlines()[0][:120]})"
    unet._compiled_call_impl = None
    network.zero_grad(set_to_none=True)
    say(f"Training goes on without torch.compile: {problem}.")
    return False


def take_gradients(network: torch.nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Return the gradients of all weights, and leave none behind."""
    loss().backward()  # type: ignore[no-untyped-call]
    found = [weight.grad.clone() for weight in network.parameters() if weight.grad is not None]
    network.zero_grad(set_to_none=True)
    return found


def gradients_apart(some: list[Tensor], others: list[Tensor]) -> tuple[float, float]:
    """Return how far gradients are from others, relative to their length: all together, and worst.

    One that is next to nothing beside the rest does not count on its own.
    """
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(some, others)))
    length = torch.stack(torch._foreach_norm(others))
    whole = length.norm()
    return float(apart.norm() / whole), float((apart / length.clamp(min=1e-3 * whole)).max())


# ---- Fixed losses: is it learning the fabrics, or these 1,059 images? ----------------------------


def fixed_numbers(seed: int, images: Tensor, diffusion: GaussianDiffusion) -> StepNumbers:
    """Return the numbers behind a fixed loss on squares of images (N, c, H, W).

    FIXED_IMAGES, or all: evenly spread over the sorted data set, so that every subfolder has its
    share, in a fixed random order; none mirrored, all with their labels; t evenly spaced and
    rising; noise. All are the same at every call, so that two steps of a run, or training images
    and held-out ones, can be compared without the luck of the draw.
    """
    count, side = min(FIXED_IMAGES, len(images)), int(diffusion.image_size[0])
    generator = torch.Generator().manual_seed(seed)
    places = torch.linspace(0, len(images) - 1, count).round().long()
    numbers = StepNumbers(
        picked=places[torch.randperm(count, generator=generator)],
        corner=corners(count, images, side, generator),
        flip=torch.zeros(count, dtype=torch.bool),
        drop=torch.zeros(count, dtype=torch.bool),
        t=((torch.arange(count) + 0.5) * diffusion.num_timesteps / count).long(),
        noise=torch.randn(count, images.shape[1], side, side, generator=generator),
    )
    return StepNumbers(*(column.to(images.device) for column in numbers))
