"""Copies: how many samples lie far nearer to one training image than to any other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_basics.evaluation.folders import BATCH, Fabrics
from ddpm_basics.evaluation.intervals import BOOTSTRAPS, interval, wilson

BANK = 2048  # training images that stand in memory, as floats, at a time
KEEP = 4  # nearest training images that are measured exactly
COPY_RATIO = 1 / 3  # a copy is nearer than this times the distance to the second nearest
COPY_NEIGHBOURS = 50  # training images around a sample, for the second definition of a copy
COPY_FACTOR = 0.5  # a copy, by the second definition: nearer than this times their mean distance
QUANTILES = [0.01, 0.05, 0.5, 0.95]


@dataclass(frozen=True)
class Neighbours:
    """Nearest training images: index (N, k), mirrored (N, k) bool, distance (N, k) rising with k.

    A distance is the root mean square over pixels and channels, in units of the range 0 to 1.
    `crowd` (N,) is the mean distance of the COPY_NEIGHBOURS nearest.
    """

    index: Tensor
    mirrored: Tensor
    distance: Tensor
    crowd: Tensor

    @property
    def ratio(self) -> Tensor:
        """d1/d2 (N,): 0 for an exact copy, also of an image that stands twice in the folder."""
        nearest, second = self.distance[:, 0], self.distance[:, 1]
        return torch.where(nearest == 0, nearest, nearest / second)


@torch.no_grad()
def find_neighbours(queries: Fabrics, train: Fabrics, device: torch.device) -> Neighbours:
    """Find for every query the training images nearest in pixel distance, mirrored ones included.

    An image and its mirror image count as one, at the smaller distance. Candidates come from one
    matrix product for BATCH queries and up to BANK training images; the nearest are then measured
    again by subtraction, because |a|² + |b|² - 2ab cancels badly for the near copies that matter
    here.
    """
    near, crowd = ((len(queries), min(k, len(train))) for k in (KEEP, COPY_NEIGHBOURS))
    # Whole from the start, see folders.collect.
    found = [torch.zeros(near, dtype=torch.long), torch.zeros(near, dtype=torch.bool),
             torch.full(near, math.inf), torch.full(crowd, math.inf)]  # fmt: skip
    steps = -(-len(train) // BANK) * -(-len(queries) // BATCH)
    with tqdm(total=steps, desc=f"Neighbours of {queries.folder.name}") as bar:
        for first, bank in zip(range(0, len(train), BANK), train.in_parts(BANK), strict=True):
            plain, flipped = (as_vectors(own, device) for own in (bank, bank.flip(-1)))
            for batch, pixels in enumerate(queries.in_parts(BATCH)):
                rows = [own[batch * BATCH :][: len(pixels)] for own in found]
                nearest = nearest_in(as_vectors(pixels, device), plain, flipped)
                nearest[0] += first
                for own, best in zip(rows, nearest_of_both(rows, nearest), strict=True):
                    own.copy_(best)
                bar.update()
    index, mirrored, distance, squares = found
    return Neighbours(index, mirrored, distance, squares.sqrt().mean(1))


def nearest_in(x: Tensor, plain: Tensor, flipped: Tensor) -> list[Tensor]:
    """Find the nearest of a bank, given plain and mirrored, for vectors x, as on the CPU.

    Returns index, mirrored and distance (n, KEEP), and the squares of the COPY_NEIGHBOURS smallest
    distances, each by matrix product.
    """
    squares = plain.square().sum(1)
    both = torch.stack([squares - 2 * (x @ bank.T) for bank in (plain, flipped)])
    squared, mirrored = both.min(0)  # (n, bank), less |x|²
    squared = (squared + x.square().sum(1, keepdim=True)).clamp(min=0) / x.shape[1]
    crowd, index = squared.topk(min(COPY_NEIGHBOURS, len(plain)), largest=False)
    index = index[:, :KEEP]
    mirrored = mirrored.gather(1, index).bool()
    images = torch.where(mirrored[..., None], flipped[index], plain[index])
    distance, order = (images - x[:, None]).square().mean(-1).sqrt().sort(stable=True)
    found = (index.gather(1, order), mirrored.gather(1, order), distance, crowd)
    return [part.cpu() for part in found]


def nearest_of_both(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """Merge two findings into one as wide as the first."""
    *near, squares = (torch.cat(pair, 1) for pair in zip(one, other, strict=True))
    order = near[2].argsort(stable=True)[:, : one[2].shape[1]]
    return [*(own.gather(1, order) for own in near), squares.sort().values[:, : one[3].shape[1]]]


def as_vectors(pixels: Tensor, device: torch.device) -> Tensor:
    """Return images (N, 3, H, W) uint8 as vectors (N, 3HW) in [-0.5, 0.5]."""
    return pixels.flatten(1).to(device).float() / 255 - 0.5


def is_copy(found: Neighbours) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images are copies, by two definitions of the literature, each (N,) bool.

    d1/d2 < 1/3: the nearest training image is at under a third of the second nearest's distance
    (Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize").
    d1 < 0.5 x mean of the 50 nearest (after Carlini et al. 2023, "Extracting training data from
    diffusion models", section 5.1), which two training images that are alike cannot hide from.
    """
    nearest = found.distance[:, 0]
    by_crowd = (nearest < COPY_FACTOR * found.crowd) | (nearest == 0)
    return (found.ratio < COPY_RATIO).numpy(), by_crowd.numpy()


def copy_report(samples: Neighbours, heldout: Neighbours, rng: Generator) -> dict[str, Any]:
    """Shares of copies among samples and held-out images, with intervals, and how near they lie."""
    rules = zip(is_copy(samples), is_copy(heldout), strict=True)
    second, crowd = (compare_shares(own, floor, rng) for own, floor in rules)
    return {
        "ratio_to_second_nearest": second,
        "ratio_to_mean_of_nearest": crowd,
        "nearest_distance": nearness(samples, heldout),
    }


def compare_shares(
    samples: NDArray[np.bool_], heldout: NDArray[np.bool_], rng: Generator
) -> dict[str, Any]:
    """Shares of hits in two sets of flags, and the interval of their difference.

    A bootstrap of a share draws N times from N images, so the hits are binomial.
    """
    shares: dict[str, Any] = {}
    resampled = []
    for key, flags in (("samples", samples), ("heldout", heldout)):
        hits, total = int(flags.sum()), len(flags)
        resampled.append(rng.binomial(total, flags.mean(), BOOTSTRAPS) / total)
        shares[key] = {
            "copies": hits,
            "of": total,
            "share": hits / total,
            "bootstrap_95": interval(resampled[-1]),
            "wilson_95": wilson(hits, total),
        }
    return shares | {"difference_bootstrap_95": interval(resampled[0] - resampled[1])}


def nearness(samples: Neighbours, heldout: Neighbours) -> dict[str, Any]:
    """Quantiles of d1 and d1/d2, and how often a sample lies nearer than a held-out image does.

    The latter is 0.5 where samples are as near to the training images as held-out ones are; more
    means nearer, by copying, but also by being blurred.
    """
    table: dict[str, Any] = {"quantiles": QUANTILES}
    for key, found in (("samples", samples), ("heldout", heldout)):
        table[key] = {
            "d1": np.quantile(found.distance[:, 0].numpy(), QUANTILES).tolist(),
            "d1_over_d2": np.quantile(found.ratio.numpy(), QUANTILES).tolist(),
        }
    own, floor = samples.distance[:, 0].numpy(), np.sort(heldout.distance[:, 0].numpy())
    nearer = sum(np.searchsorted(floor, own, side).mean() for side in ("left", "right"))
    return table | {"sample_nearer_than_heldout": float(1 - nearer / (2 * len(floor)))}
