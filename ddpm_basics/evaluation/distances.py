"""How it is compared: sliced Wasserstein, Fréchet and kernel distance over random splits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ddpm_basics.evaluation.intervals import split_interval

SPLITS = 50  # random splits of the folders over which a distance is averaged
DIRECTIONS = 128  # random projections of the sliced Wasserstein distance
# What is compared with one half of the held-out set, and the folder it is drawn from:
SOURCES = {"samples": "samples", "train": "train", "floor": "heldout"}

Split = dict[str, NDArray[np.int64]]  # the n images of each of SOURCES, and of "heldout"
Floats = NDArray[np.float64]
PerSplit = dict[str, Floats]  # a distance in each split, for each of SOURCES


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Sliced 2-Wasserstein distance of point sets x and y (both N, d) along directions (d, L).

    In one dimension the best matching of two equally large sets pairs them in sorted order; the
    squares are averaged over points and directions (Rabin et al. 2011; Bonneel et al. 2015).
    """
    along_x, along_y = ((points @ directions).sort(0).values for points in (x, y))
    return float((along_x - along_y).square().mean().sqrt())


def random_directions(dimensions: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw unit vectors (dimensions, count), uniform on the sphere."""
    return F.normalize(torch.randn(dimensions, count, generator=generator), dim=0)


def gaussian_of(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of points (N, d), in double precision."""
    points = points.double()
    return points.mean(0), torch.cov(points.T).reshape(points.shape[1], -1)


def frechet_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Squared Fréchet distance of two Gaussians (mean, covariance), as FID reports it.

    |m1 - m2|² + tr(S1) + tr(S2) - 2 tr((S1 S2)^½)   (Dowson & Landau 1982; Heusel et al. 2017).
    The last trace is the sum of square roots of the eigenvalues of S1^½ S2 S1^½, which is
    symmetric, so that no general matrix square root is needed and nothing turns complex.
    """
    (mean_1, covariance_1), (mean_2, covariance_2) = one, other
    values, vectors = torch.linalg.eigh(covariance_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    squared = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace()
    return max(0.0, float(squared - 2 * cross))


def frechet_of_points(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance between the Gaussian fits of points x (N, d) and y (M, d).

    What frechet_distance gives, faster where points are fewer than dimensions: the eigenvalues of
    S1 S2 are the squared singular values of A Bᵀ, for S1 = AᵀA and S2 = BᵀB.
    """
    x, y = x.double(), y.double()
    a = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / math.sqrt(len(y) - 1)
    squared = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    return max(0.0, float(squared - 2 * torch.linalg.svdvals(a @ b.T).sum()))


def kernel_matrix(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (a·b/d + 1)³ between images with features x (N, m, d) and y (M, m, d): (N, M).

    Where an image has several points (patches) the kernel is the mean over all their pairs, which
    is a kernel between sets: pairs of one image never pass for independent draws.
    """
    points, dimensions = x.shape[1:]
    columns = y.flatten(0, 1).T / dimensions
    parts = []
    for part in torch.split(x, max(1, 2048 // points)):
        kernel = (part.flatten(0, 1) @ columns).add_(1).pow_(3)
        parts.append(kernel.reshape(len(part), points, len(y), points).mean((1, 3)))
    return torch.cat(parts)


def mean_of_pairs(kernel: Tensor) -> Tensor:
    """Mean of a kernel matrix (n, n) without its diagonal."""
    return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))


def unbiased_mmd2(k_xx: Tensor, k_yy: Tensor, k_xy: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy from kernel matrices (Gretton et al. 2012, eq. 3).

    With the kernel above this is the kernel distance KID (Bińkowski et al. 2018). It is 0 on
    average for equal distributions, so that it also comes out negative.
    """
    within = mean_of_pairs(k_xx.double()) + mean_of_pairs(k_yy.double())
    return float(within - 2 * k_xy.double().mean())


def chance_mmd2(k_xx: Tensor, k_yy: Tensor) -> float:
    """Return what the diagonals add to a biased squared MMD: its mean for equal distributions."""
    return sum(float(k.mean() - mean_of_pairs(k)) for k in (k_xx.double(), k_yy.double()))


def draw_splits(sizes: dict[str, int], n: int, rng: Generator) -> list[Split]:
    """Draw SPLITS random choices of n samples, n training and two disjoint sets of n held-out."""
    splits = []
    for _ in range(SPLITS):
        heldout = rng.permutation(sizes["heldout"])
        split = {name: rng.permutation(sizes[name])[:n] for name in ("samples", "train")}
        splits.append(split | {"heldout": heldout[:n], "floor": heldout[n : 2 * n]})
    return splits


def distance_report(
    spaces: dict[str, dict[str, Tensor]], splits: list[Split], seed: int, device: torch.device
) -> dict[str, Any]:
    """Measure every distance in every space: {space: {measure: summary}}.

    Ratios are of lengths, not of squares: the square root is taken of Fréchet, and of MMD after
    `chance` has been added, as an unbiased floor is 0 and nothing can be divided by it.
    """
    report = {}
    for space, features in tqdm(spaces.items(), "Distances"):
        sliced, frechet = compare_points(features, splits, seed)
        kernel, chance = compare_kernels(features, splits, device)
        pools = {name: len(own) for name, own in features.items()}
        n = len(splits[0]["heldout"])
        report[space] = {
            "sliced_wasserstein": summarise(sliced, n, pools, power=1.0),
            "frechet": summarise(frechet, n, pools, power=0.5),
            "kernel": summarise(kernel, n, pools, power=0.5, shift=chance) | {"chance": chance},
        }
    return report


def compare_points(
    features: dict[str, Tensor], splits: list[Split], seed: int
) -> tuple[PerSplit, PerSplit]:
    """Sliced Wasserstein and squared Fréchet distance of every pair in every split."""
    generator = torch.Generator().manual_seed(seed)
    directions = random_directions(features["heldout"].shape[2], DIRECTIONS, generator)
    sliced, frechet = ({pair: np.empty(len(splits)) for pair in SOURCES} for _ in range(2))
    for i, split in enumerate(splits):
        reference = features["heldout"][split["heldout"]].flatten(0, 1)
        gaussian = gaussian_of(reference)
        for pair, source in SOURCES.items():
            points = features[source][split[pair]].flatten(0, 1)
            sliced[pair][i] = sliced_wasserstein(points, reference, directions)
            frechet[pair][i] = frechet_distance(gaussian, gaussian_of(points))
    return sliced, frechet


def compare_kernels(
    features: dict[str, Tensor], splits: list[Split], device: torch.device
) -> tuple[PerSplit, float]:
    """Unbiased squared MMD of every pair in every split, and its biased size by chance."""
    own = {name: points.to(device) for name, points in features.items()}
    within = {name: kernel_matrix(points, points).cpu() for name, points in own.items()}
    across = {name: kernel_matrix(points, own["heldout"]).cpu() for name, points in own.items()}
    found, chance = {pair: np.empty(len(splits)) for pair in SOURCES}, np.empty(len(splits))
    for i, split in enumerate(splits):
        columns = split["heldout"]
        reference = within["heldout"][columns][:, columns]
        for pair, source in SOURCES.items():
            rows = split[pair]
            kernel = within[source][rows][:, rows]
            found[pair][i] = unbiased_mmd2(kernel, reference, across[source][rows][:, columns])
            if pair == "floor":
                chance[i] = chance_mmd2(kernel, reference)
    return found, float(chance.mean())


def summarise(
    values: PerSplit, n: int, pools: dict[str, int], *, power: float, shift: float = 0.0
) -> dict[str, Any]:
    """Means over the splits and ratios to the floor, with 95 % intervals.

    `pools` counts the images in each folder that the sets of n were drawn from. A length, of which
    ratios are taken, is (value + shift)^power.
    """
    summary: dict[str, Any] = {}
    pool = {pair: min(pools[source], pools["heldout"]) for pair, source in SOURCES.items()}
    for pair, own in values.items():
        bounds = split_interval(own.mean(), own, n, pool[pair])
        summary[pair] = {"value": float(own.mean()), "interval_95": bounds}

    def over_floor(own: Floats, floor: Floats) -> Floats:
        lengths, floors = (np.maximum(part + shift, 0) ** power for part in (own, floor))
        return lengths / np.maximum(floors, 1e-12)

    floor = values["floor"]
    for pair in ("samples", "train"):
        ratio = float(over_floor(values[pair].mean(), floor.mean()))
        low, high = split_interval(ratio, over_floor(values[pair], floor), n, pool[pair])
        summary[f"{pair}_over_floor"] = {"ratio": ratio, "interval_95": [max(low, 0.0), high]}
    return summary
