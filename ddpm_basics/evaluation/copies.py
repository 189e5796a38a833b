"""Copies: how many samples lie far nearer to one training image than to any other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_basics.evaluation.folders import BATCH, Fabrics
from ddpm_basics.evaluation.intervals import BOOTSTRAPS, interval, wilson

COPY_RATIO = 1 / 3  # a copy is nearer than this times the distance to the second nearest
COPY_NEIGHBOURS = 50  # training images around a sample, for the second definition of a copy
COPY_FACTOR = 0.5  # a copy, by the second definition: nearer than this times their mean distance


@dataclass
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
def find_neighbours(queries: Fabrics, train: Fabrics, device, keep: int = 4) -> Neighbours:
    """Find for every query the training images nearest in pixel distance, mirrored ones included.

    An image and its mirror image count as one, at the smaller distance. Candidates come from one
    matrix product per batch; the `keep` nearest are then measured again by subtraction, because
    |a|² + |b|² - 2ab cancels badly for the near copies that matter here.
    """
    bank = (train.pixels.flatten(1).to(device).float() / 255 - 0.5, train.pixels.flip(-1))
    bank = (bank[0], bank[1].flatten(1).to(device).float() / 255 - 0.5)
    squares = bank[0].square().sum(1)
    parts = []
    for start in tqdm(range(0, len(queries), BATCH), desc=f"Neighbours of {queries.folder.name}"):
        x = queries.pixels[start : start + BATCH].flatten(1).to(device).float() / 255 - 0.5
        both = torch.stack([squares - 2 * (x @ side.T) for side in bank])
        squared, mirrored = both.min(0)  # (batch, train), less |x|²
        squared = (squared + x.square().sum(1, keepdim=True)).clamp(min=0) / x.shape[1]
        crowd, index = squared.topk(min(COPY_NEIGHBOURS, len(train)), largest=False)
        index = index[:, :keep]
        mirrored = mirrored.gather(1, index).bool()
        images = torch.where(mirrored[..., None], bank[1][index], bank[0][index])
        distance = (images - x[:, None]).square().mean(-1).sqrt()
        distance, order = distance.sort(dim=1, stable=True)
        found = (index.gather(1, order), mirrored.gather(1, order), distance)
        parts.append([part.cpu() for part in (*found, crowd.sqrt().mean(1))])
    return Neighbours(*(torch.cat(column) for column in zip(*parts, strict=True)))


def is_copy(neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
    """Which images are copies, by two definitions of the literature, each (N,) bool.

    d1/d2 < 1/3: the nearest training image is at under a third of the second nearest's distance
    (Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize").
    d1 < 0.5 x mean of the 50 nearest (after Carlini et al. 2023, "Extracting training data from
    diffusion models", section 5.1), which two training images that are alike cannot hide from.
    """
    ratio = neighbours.ratio < COPY_RATIO
    crowd = neighbours.distance[:, 0] < COPY_FACTOR * neighbours.crowd
    return ratio.numpy(), (crowd | (neighbours.distance[:, 0] == 0)).numpy()


def copy_report(samples: Neighbours, heldout: Neighbours, rng: np.random.Generator) -> dict:
    """Shares of copies among samples and held-out images, with intervals, and how near they lie.

    A bootstrap of a share draws N times from N images, so the hits are binomial.
    """
    report = {}
    names = ("ratio_to_second_nearest", "ratio_to_mean_of_nearest")
    for name, own, floor in zip(names, is_copy(samples), is_copy(heldout), strict=True):
        shares = {}
        for key, flags in (("samples", own), ("heldout", floor)):
            resampled = rng.binomial(len(flags), flags.mean(), BOOTSTRAPS) / len(flags)
            shares[key] = {
                "copies": int(flags.sum()),
                "of": len(flags),
                "share": float(flags.mean()),
                "bootstrap_95": interval(resampled),
                "wilson_95": wilson(int(flags.sum()), len(flags)),
                "resampled": resampled,
            }
        difference = shares["samples"].pop("resampled") - shares["heldout"].pop("resampled")
        shares["difference_bootstrap_95"] = interval(difference)
        report[name] = shares
    report["nearest_distance"] = nearness(samples, heldout)
    return report


def nearness(samples: Neighbours, heldout: Neighbours) -> dict:
    """Quantiles of d1 and d1/d2, and how often a sample lies nearer than a held-out image does.

    The latter is 0.5 where samples are as near to the training images as held-out ones are; more
    means nearer, by copying, but also by being blurred.
    """
    quantiles = (0.01, 0.05, 0.5, 0.95)
    own, floor = samples.distance[:, 0].numpy(), heldout.distance[:, 0].numpy()
    below = np.searchsorted(np.sort(floor), own, side="left")
    up_to = np.searchsorted(np.sort(floor), own, side="right")
    table = {"quantiles": list(quantiles)}
    for key, found in (("samples", samples), ("heldout", heldout)):
        table[key] = {
            "d1": [float(v) for v in np.quantile(found.distance[:, 0].numpy(), quantiles)],
            "d1_over_d2": [float(v) for v in np.quantile(found.ratio.numpy(), quantiles)],
        }
    table["sample_nearer_than_heldout"] = float(1 - (below + up_to).mean() / (2 * len(floor)))
    return table
