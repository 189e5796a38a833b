"""From noise to images: noise levels, lists of times, the guess of x_0, three step rules.

The loop stands in the exercises:

    for t, s in pairwise(times):
        x_0 = predict_x_0(diffusion, levels, x_t, t, labels, guidance)
        x_t = ddim_step(levels, x_t, x_0, t, s)

Images x_t and x_0 are [n, c, h, w] in [-1, 1], x_t beyond it by the noise; t and s are timesteps
from T - 1 down to 0, then -1 for the clean image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor

from ddpm_basics.console import UserError

SCHEDULES = ("sigmoid", "cosine", "linear")  # of noise, that the library has
NOISIEST, CLEANEST = -4, 3  # lambda: the signal is 1/55 of the noise, the noise 1/20 of the signal


class Levels(NamedTuple):
    """alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t noise, T + 1 floats each.

    alpha_t^2 is alphas_cumprod, and alpha_t^2 + sigma_t^2 = 1. The last entry, which t = -1
    reaches, is the clean image: alpha 1, sigma 0.
    """

    alpha: list[float]
    sigma: list[float]

    def log_snr(self, t: int) -> float:
        """Return lambda_t = log(alpha_t / sigma_t), half the logarithm of the SNR."""
        # Some schedules end in pure noise (Lin 2023), others begin without any.
        snr = self.alpha[t] / self.sigma[t] if self.sigma[t] else math.inf
        return math.log(snr) if snr else -math.inf


# ---- Noise ---------------------------------------------------------------------------------------


def noise_levels(diffusion: GaussianDiffusion) -> Levels:
    """Read the noise levels of a diffusion process."""
    alpha = diffusion.sqrt_alphas_cumprod.tolist()
    sigma = diffusion.sqrt_one_minus_alphas_cumprod.tolist()
    return Levels([*alpha, 1.0], [*sigma, 0.0])


def starting_noise(
    seeds: Iterable[int], shape: Sequence[int]
) -> tuple[Tensor, list[torch.Generator]]:
    """Draw the noise x_T that images grow out of, each from its own seed.

    shape is that of one image, (channels, height, width). Returns (x_T [n, *shape] on the CPU,
    the n generators, which go on to give each image its noise in ancestral sampling). The CPU's
    generator gives the same numbers whatever the device, the batch and the number of processes.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return fresh_noise(generators, shape), generators


def fresh_noise(generators: Iterable[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Draw Gaussian noise [n, *shape] on the CPU, image i from generators[i]."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Walk the great circle from one noise [c, h, w] to another (Shoemake 1985).

    Noise in d dimensions has a length near sqrt(d). A straight line between two of them passes
    through shorter vectors, which are unlike any noise the network has seen.
    """
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle: Tensor = cosine.clamp(-1, 1).acos()
    return (((1 - fraction) * angle).sin() * start + (fraction * angle).sin() * end) / angle.sin()


# ---- Lists of times ------------------------------------------------------------------------------


def check_steps(timesteps: int, steps: int) -> None:
    """Raise UserError if a model of so many timesteps cannot be sampled in so many steps."""
    if steps > timesteps:
        raise UserError(f"{steps} steps are too many: the model has {timesteps} timesteps.")


def even_times(levels: Levels, steps: int, start: int | None = None) -> list[int]:
    """Choose `steps` times from `start` down, evenly; the last entry, -1, is the clean image.

    start: T - 1 unless given. These are the times of the library's ddim_sample: with 50 of 1000
    steps 999, 979, ..., 19, -1.
    """
    start = len(levels.alpha) - 2 if start is None else start
    check_steps(start + 1, steps)
    times: list[int] = torch.linspace(-1, start, steps + 1).int().tolist()
    return times[::-1]


def log_snr_times(levels: Levels, steps: int, start: int | None = None) -> list[int]:
    """Choose `steps` times from `start` down, evenly in lambda = log(alpha / sigma); then -1.

    start: T - 1 unless given; -1, for no steps, is the clean image. These are the times that
    DPM-Solver was made for (Lu 2022a, section 3.4). Evenly in t would leave most of the way in
    lambda to a few steps: with the sigmoid schedule lambda runs from -7.5 to 4, but from -0.9 to
    0.9 during half of all t. One step crosses what is noisier than NOISIEST, where x_t shows
    nothing yet, and the last guess is made at CLEANEST, where almost no noise is left. Raises
    UserError.
    """
    start = len(levels.alpha) - 2 if start is None else start
    check_steps(start + 1, steps)
    if start < 0:
        return [-1]
    place = [levels.log_snr(t) for t in range(start + 1)]
    ends = max(place[-1], NOISIEST), min(place[0], CLEANEST)
    wanted = torch.linspace(*ends, steps)
    nearest = (torch.tensor(place)[:, None] - wanted).abs().argmin(0).tolist()
    times = [start]
    for left, t in zip(range(steps - 2, -1, -1), nearest[1:], strict=True):
        # Each time once, also where steps are many, and enough of them left for the rest.
        times.append(max(min(t, times[-1] - 1), left))
    return [*times, -1]


# ---- The guess of x_0 ----------------------------------------------------------------------------


def predict_x_0(
    diffusion: GaussianDiffusion,
    levels: Levels,
    x_t: Tensor,
    t: int,
    labels: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Ask the network what the images x_t at timestep t looked like without noise.

    labels: the vectors [n, 4 dim] of what to draw, see model.label_vectors; None for anything.
    guidance: 1 takes what the network answers to them, more exaggerates the difference that they
    make. The result is clipped to [-1, 1]. Under autocast the network computes in another
    precision; all else stays in x_t's own. Raises UserError where the network's answer is not
    finite: clipped, it would end as a black picture.
    """
    output = guided_output(diffusion, x_t, t, labels, guidance)
    if not output.isfinite().all():
        raise UserError(f"The network's answer at t = {t} is not finite, so its weights are no "
                        "good, or too large for this precision: try --precision fp32.")  # fmt: skip
    alpha, sigma = levels.alpha[t], levels.sigma[t]
    x_0 = output
    if diffusion.objective == "pred_v":  # v = alpha noise - sigma x_0 (Salimans & Ho 2022)
        x_0 = alpha * x_t - sigma * output
    elif diffusion.objective == "pred_noise":
        x_0 = (x_t - sigma * output) / alpha
    return x_0.clamp(-1, 1)


def guided_output(
    diffusion: GaussianDiffusion, x_t: Tensor, t: int, labels: Tensor | None, guidance: float
) -> Tensor:
    """Return the network's output, guided without a classifier (Ho & Salimans 2022, equation 6).

    Without label + guidance x (with label - without label): the same for v and for the noise, as
    given x_t each is a linear function of the other. Both are asked in one pass.
    """
    # One row for all images, which the network broadcasts: matrix products of the time embedding
    # are rounded differently for one row and for several, so an image would depend on its batch.
    time = torch.full((1,), t, device=x_t.device)
    output: Tensor
    if labels is None or guidance == 0:
        output = diffusion.model(x_t, time).to(x_t.dtype)
    elif guidance == 1:
        output = diffusion.model(x_t, (time, labels)).to(x_t.dtype)
    else:
        both = torch.cat((torch.zeros_like(labels), labels))
        output = diffusion.model(torch.cat((x_t, x_t)), (time, both)).to(x_t.dtype)
        without, told = output.chunk(2)
        output = without + guidance * (told - without)
    return output


# ---- Three step rules ----------------------------------------------------------------------------


def ancestral_step(
    levels: Levels,
    x_t: Tensor,
    x_0: Tensor,
    t: int,
    s: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draw x_s from the posterior q(x_s | x_t, x_0) (Ho 2020, algorithm 2 and equation 7).

    Takes fresh noise from each image's generator. With fewer than all the steps, s is not t - 1
    but the next time on the list, and the formulas stay the same.
    """
    if s < 0:
        return x_0
    alpha, sigma = levels
    beta = 1 - (alpha[t] / alpha[s]) ** 2  # the noise that came in between s and t
    mean = (alpha[s] * beta * x_0 + alpha[t] / alpha[s] * sigma[s] ** 2 * x_t) / sigma[t] ** 2
    std = sigma[s] / sigma[t] * math.sqrt(beta)  # the square is beta-tilde
    return mean + std * fresh_noise(generators, x_t.shape[1:]).to(x_t)


def ddim_step(levels: Levels, x_t: Tensor, x_0: Tensor, t: int, s: int) -> Tensor:
    """Go from x_t to x_s without fresh noise: DDIM (Song 2020, equation 12 with sigma = 0).

    x_T alone decides the image, at any number of steps from 1 to all of them.
    """
    noise = (x_t - levels.alpha[t] * x_0) / levels.sigma[t]  # of the clipped x_0: both agree
    return levels.alpha[s] * x_0 + levels.sigma[s] * noise


def dpmpp_step(
    levels: Levels,
    x_t: Tensor,
    x_0: Tensor,
    t: int,
    s: int,
    past: Sequence[tuple[Tensor, int]],
) -> Tensor:
    """Go from x_t to x_s by DPM-Solver++ (3M) (Lu 2022b, section 4.2).

    DDIM takes x_0 as constant during a step; this solver, as cheap, lays a parabola through the
    last three guesses of x_0, over lambda = log(alpha / sigma), and so needs far fewer of them. It
    solves the integral of the parabola exactly (their equation 9), where implementations often
    take half of its bend.
    past: the two guesses before this one and their times, the latest first, or fewer at the start.
    """
    if s < 0:
        return x_0
    alpha, sigma = levels
    now, h = levels.log_snr(t), levels.log_snr(s) - levels.log_snr(t)
    x_s = sigma[s] / sigma[t] * x_t - alpha[s] * math.expm1(-h) * x_0
    if not past:
        return x_s
    (x_1, t_1), *earlier = past
    h_1 = now - levels.log_snr(t_1)
    slope, bend = (x_0 - x_1) / h_1, torch.zeros_like(x_0)
    for x_2, t_2 in earlier:
        h_2 = levels.log_snr(t_1) - levels.log_snr(t_2)
        bend = (slope - (x_1 - x_2) / h_2) / (h_1 + h_2)
        slope = slope + h_1 * bend
    phi_2 = math.expm1(-h) / h + 1
    phi_3 = 2 * phi_2 / h - 1
    return x_s + alpha[s] * h * (phi_2 * slope - phi_3 * h * bend)
