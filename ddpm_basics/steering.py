"""Steering: half-noised starts, kept regions, pulls on the way, cloth without seams; and memory.

The loops stand in exercise 2: at every step they ask for a guess of x_0, and changing the guess
steers the walk. Images are [n, c, h, w] in [-1, 1]; masks are bool [1, 1, h, w], True where
a picture is kept.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from PIL import Image, ImageOps
from torch import Tensor

from ddpm_basics import data
from ddpm_basics.console import UserError
from ddpm_basics.evaluation.copies import find_neighbours, is_copy
from ddpm_basics.evaluation.features import Classifier, train_classifier
from ddpm_basics.evaluation.folders import Fabrics
from ddpm_basics.fabrics.drawing import TRADITIONS
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.files import write_atomically
from ddpm_basics.images import decode, from_picture, read_folder
from ddpm_basics.sampling import Levels, fresh_noise
from ddpm_basics.weight_files import UNREADABLE, read_checkpoint

Ask = Callable[[Tensor, int], Tensor]  # x_t and t to a guess of x_0

CPU = torch.device("cpu")
CLASSIFIER_FABRICS = 1200  # that each classifier learns from


def check_input(options: argparse.Namespace, diffusion: GaussianDiffusion) -> None:
    """Read what the parts of exercise 2 are going to need, before any of them takes its minutes.

    Raises UserError for a picture, a mask or a data folder that will not do.
    """
    side = diffusion.image_size[0]
    if options.picture:
        decode(options.picture, side)
    if options.mask:
        read_masks(side, options.mask)
    if {"g", "ideal_denoiser_demo"} & {*options.part}:
        data.provide(options.data)
        data.read_images(options.data, side, diffusion.channels)


# ---- A half-noised picture, a kept region --------------------------------------------------------


def noised(levels: Levels, x_0: Tensor, t: int, noise: Tensor) -> Tensor:
    """Mix images and noise to x_t (Ho 2020, equation 4).

    The last entry of the levels is that of clean images, so t = -1 leaves them as they are.
    """
    return levels.alpha[t] * x_0 + levels.sigma[t] * noise


def keep_region(
    levels: Levels,
    x_s: Tensor,
    picture: Tensor,
    mask: Tensor,
    s: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Put the picture, as noisy as x_s is, where the mask keeps it; at s = -1 bit for bit.

    On its own this is the replacement method (Song 2021, appendix I.2): the new part cannot
    adapt to the kept one, whose noise changes at every step.
    """
    noise = fresh_noise(generators, picture.shape[1:]).to(x_s)
    return torch.where(mask, noised(levels, picture, s, noise), x_s)


def noise_again(
    levels: Levels, x_s: Tensor, s: int, t: int, generators: Sequence[torch.Generator]
) -> Tensor:
    """Go back from x_s to x_t, so that both regions are drawn once more, together.

    A sample of q(x_t | x_s) (RePaint, Lugmayr 2022, algorithm 1).
    """
    left = levels.alpha[t] / levels.alpha[s]
    return left * x_s + math.sqrt(1 - left**2) * fresh_noise(generators, x_s.shape[1:]).to(x_s)


def read_masks(side: int, path: Path | None) -> dict[str, Tensor]:
    """Return masks by name: that of a picture, white where it keeps, or the left half and a frame.

    Of the picture the central square counts, as of those that are drawn into. Raises UserError for
    one that keeps all or nothing.
    """
    if path:
        whole = decode(path).convert("L")
        square = ImageOps.fit(whole, (side, side), Image.Resampling.NEAREST)
        own = torch.from_numpy(from_picture(square))[None] >= 0.5
        if own.all() or not own.any():
            raise UserError(f"{path} keeps {'all' if own.all() else 'nothing'}: paint white what "
                            "is to be kept, and black what is to be drawn anew.")  # fmt: skip
        return {path.name: own}
    half, frame = torch.zeros(2, 1, 1, side, side, dtype=torch.bool)
    half[..., : side // 2] = True
    frame[:] = True
    frame[..., side // 4 : -(side // 4), side // 4 : -(side // 4)] = False
    return {"half": half, "frame": frame}


def border_contrast(images: Tensor, mask: Tensor) -> float | None:
    """Return how much neighbours differ across a mask's border, over how much they do elsewhere.

    None where there is no border, or no difference elsewhere.
    """
    across, elsewhere = [], []
    for axis in (-2, -1):
        steps = images.diff(dim=axis).abs().mean((0, 1), keepdim=True)
        border = mask.int().diff(dim=axis) != 0
        across.append(steps[border])
        elsewhere.append(steps[~border])
    contrast = float(torch.cat(across).mean() / torch.cat(elsewhere).mean())
    return contrast if math.isfinite(contrast) else None


# ---- Pulls ---------------------------------------------------------------------------------------


def pull(
    ask: Ask,
    log_p: Callable[[Tensor, Tensor], Tensor],
    weight: float,
    levels: Levels,
    x_t: Tensor,
    t: int,
) -> Tensor:
    """Return the guess of x_0, moved to where log p(wanted | x_t) rises.

    log_p(x_t, x_0) gives a number per image (n,). By Bayes' rule its gradient adds to that of
    log p(x_t). The guess is x_0 = (x_t + sigma^2 grad log p(x_t)) / alpha, so it moves by
    sigma^2 / alpha times as much (Dhariwal & Nichol 2021, algorithm 2, written for x_0). Where
    log_p looks at x_0, the gradient runs through the network.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        x_0 = ask(x_t, t)
        (gradient,) = torch.autograd.grad(log_p(x_t, x_0).sum(), x_t)
    strength = weight * levels.sigma[t] ** 2 / levels.alpha[t]
    return (x_0.detach() + strength * gradient).clamp(-1, 1)


def colour_log_p(colour: Tensor, x_t: Tensor, x_0: Tensor) -> Tensor:
    """Return less, the further the mean colour of each guess is from one [c] in [-1, 1]: (n,)."""
    return -(x_0.mean((2, 3)) - colour).square().sum(1)


def label_log_p(classifier: Classifier, wanted: Tensor, x_t: Tensor, x_0: Tensor) -> Tensor:
    """Return log p(label | x_t) (n,) of the labels (n,), numbers, that the images should have."""
    scores: Tensor = classifier((x_t + 1) / 2).log_softmax(1)
    return scores.gather(1, wanted.to(scores.device)[:, None])[:, 0]


def tradition_classifiers(
    cache: Path, levels: Levels, side: int, device: torch.device
) -> tuple[Classifier, Classifier]:
    """Return a classifier of noised fabrics, and one that judges: of other fabrics, without noise.

    Their fabrics are drawn and both are trained once, in about a minute; `cache` keeps them, the
    first for each schedule. One that cannot be read is trained anew.
    """
    generator = torch.Generator().manual_seed(0)
    spoil = partial(noised_at_random, levels, generator)
    schedule = f"{zlib.crc32(repr(levels).encode()):08x}"
    noised = tradition_classifier(cache, f"noised_{schedule}", "train", 0, side, device, spoil)
    return noised, tradition_classifier(cache, "judge", "heldout", 1, side, device)


def tradition_classifier(
    cache: Path,
    name: str,
    split: str,
    seed: int,
    side: int,
    device: torch.device,
    spoil: Callable[[Tensor], Tensor] | None = None,
) -> Classifier:
    """Return a classifier from the cache, or draw its fabrics, train it and put it there."""
    path, folder = cache / f"{name}_{side}.pt", cache / f"{split}_{side}"
    with suppress(UserError, *UNREADABLE):
        kept = Classifier(sorted(TRADITIONS))
        kept.load_state_dict(read_checkpoint(path))
        return kept.to(device).eval()
    draw_fabrics(folder, split=split, count=CLASSIFIER_FABRICS, seed=seed, size=side)
    drawn = read_folder(folder)
    fabrics = Fabrics(folder, drawn.labels, torch.from_numpy(drawn.pixels))
    classifier = train_classifier(fabrics, seed, device, spoil)
    with write_atomically(path) as temporary:
        torch.save(classifier.state_dict(), temporary)
    return classifier


def noised_at_random(levels: Levels, generator: torch.Generator, images: Tensor) -> Tensor:
    """Noise images [n, c, h, w] in [0, 1] to an x_t each, t at random; scaled as they were."""
    t = torch.randint(len(levels.alpha) - 1, (len(images), 1, 1, 1), generator=generator)
    alpha, sigma = (torch.tensor(level)[t].to(images) for level in levels)
    noise = torch.randn(images.shape, generator=generator).to(images)
    return (alpha * (2 * images - 1) + sigma * noise + 1) / 2


# ---- Cloth without seams -------------------------------------------------------------------------


def rolled(ask: Ask, generator: torch.Generator, x_t: Tensor, t: int) -> Tensor:
    """Ask with x_t rolled by a random offset: no edge stays at its place, so none can be seen.

    x_t and the guess wrap around in both directions, like a torus.
    """
    height, width = x_t.shape[2:]
    down = int(torch.randint(height, (1,), generator=generator))
    right = int(torch.randint(width, (1,), generator=generator))
    return ask(x_t.roll((down, right), (2, 3)), t).roll((-down, -right), (2, 3))


def seam_contrast(images: Tensor) -> float | None:
    """Return how much neighbours differ across the seams of a tiling, over elsewhere; or None."""
    height, width = images.shape[2:]
    lower = torch.arange(height) >= height // 2
    right = torch.arange(width) >= width // 2
    # Rolled by half, the picture has its seams in the middle: a cross, the border of the squares
    # of a chessboard of two by two.
    middle = images.roll((height // 2, width // 2), (2, 3)).cpu()
    return border_contrast(middle, (lower[:, None] ^ right)[None, None])


# ---- The perfect memory --------------------------------------------------------------------------


def ideal_x_0(images: Tensor, levels: Levels, x_t: Tensor, t: int) -> Tensor:
    """Return the best guess of x_0 where exactly these images [N, c, h, w] can be meant.

    Their average, weighted by how well each of them explains x_t: the posterior mean, of which no
    other guess has a smaller squared error (Karras 2022, appendix B.3).
    """
    alpha, sigma = levels.alpha[t], levels.sigma[t]
    known, seen = images.flatten(1), x_t.flatten(1)
    # |x_t - alpha x|^2 / 2 sigma^2, less what all x share
    explained = alpha * (seen @ known.T) - alpha**2 / 2 * known.square().sum(1)
    weights = (explained / sigma**2).softmax(1)
    return (weights @ known).view_as(x_t)


def nearest(samples: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training image nearest to each sample, and whether the sample is a copy of it.

    It is mirrored where its mirror image is nearer. samples (n, c, h, w) in [0, 1], images
    (N, c, h, w) uint8, all on the CPU.
    """
    own = (samples * 255).round().to(torch.uint8)
    known = Fabrics(Path("training images"), [""] * len(images), images)
    found = find_neighbours(Fabrics(Path("samples"), [""] * len(own), own), known, CPU)
    shown, mirrored = images[found.index[:, 0]] / 255, found.mirrored[:, 0, None, None, None]
    return torch.where(mirrored, shown.flip(-1), shown), torch.from_numpy(is_copy(found)[0])
