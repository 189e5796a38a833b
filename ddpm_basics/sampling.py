"""From noise to images: noise levels, lists of times, the guess of x_0, three samplers."""

from __future__ import annotations

import itertools
import math

import torch

from ddpm_basics.console import UserError


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
