"""How it is compared: sliced Wasserstein, Fréchet and kernel distance over random splits."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

SPLITS = 50  # random splits of the folders over which a distance is averaged
DIRECTIONS = 128  # random projections of the sliced Wasserstein distance
PAIRS = ("samples", "train", "floor")  # each is compared with the other half of the held-out set


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Sliced 2-Wasserstein distance of point sets x and y (both N, d) along directions (d, L).

    In one dimension the best matching of two equally large sets pairs them in sorted order; the
    squares are averaged over points and directions (Rabin et al. 2011; Bonneel et al. 2015).
    """
    along_x, along_y = in_order(x, directions), in_order(y, directions)
    return float((along_x - along_y).square().mean().sqrt())


def in_order(points: Tensor, directions: Tensor) -> Tensor:
    """Project points (N, d) on directions (d, L) and sort each column: (N, L)."""
    return (points @ directions).sort(0).values


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


def kernel_matrix(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (a·b/d + 1)³ between images with features x (N, m, d) and y (M, m, d): (N, M).

    Where an image has several points (patches) the kernel is the mean over all their pairs, which
    is a kernel between sets: pairs of one image never pass for independent draws.
    """
    points, dimensions = x.shape[1:]
    columns = y.flatten(0, 1).T / dimensions
    rows = max(1, 2048 // points)
    parts = [
        (part.flatten(0, 1) @ columns)
        .add_(1)
        .pow_(3)
        .reshape(len(part), points, len(y), points)
        .mean((1, 3))
        for part in x.split(rows)
    ]
    return torch.cat(parts)


def unbiased_mmd2(k_xx: Tensor, k_yy: Tensor, k_xy: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy from kernel matrices (Gretton et al. 2012, eq. 3).

    With the kernel above this is the kernel distance KID (Bińkowski et al. 2018). It is 0 on
    average for equal distributions, so that it also comes out negative.
    """
    n, m = len(k_xx), len(k_yy)
    k_xx, k_yy, k_xy = k_xx.double(), k_yy.double(), k_xy.double()
    within_x = (k_xx.sum() - k_xx.trace()) / (n * (n - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * k_xy.mean())


def chance_mmd2(k_xx: Tensor, k_yy: Tensor) -> float:
    """Return what the diagonals add to a biased squared MMD: its mean for equal distributions."""
    n, total = len(k_xx), 0.0
    for k in (k_xx.double(), k_yy.double()):
        total += float(k.mean() - (k.sum() - k.trace()) / (n * (n - 1)))
    return total


def draw_splits(sizes: dict[str, int], n: int, rng: np.random.Generator) -> list[dict]:
    """Draw SPLITS random choices of n samples, n training and two disjoint sets of n held-out."""
    splits = []
    for _ in range(SPLITS):
        heldout = rng.permutation(sizes["heldout"])
        splits.append(
            {
                "samples": rng.permutation(sizes["samples"])[:n],
                "train": rng.permutation(sizes["train"])[:n],
                "heldout": heldout[:n],
                "floor": heldout[n : 2 * n],
            }
        )
    return splits


def compare_points(features: dict[str, Tensor], splits: list[dict], seed: int) -> dict:
    """Sliced Wasserstein and squared Fréchet distance of every pair in every split."""
    generator = torch.Generator().manual_seed(seed)
    directions = random_directions(features["heldout"].shape[2], DIRECTIONS, generator)
    found = {measure: {pair: [] for pair in PAIRS} for measure in ("sliced_wasserstein", "frechet")}
    for split in splits:
        reference = features["heldout"][split["heldout"]].flatten(0, 1)
        gaussian, along = gaussian_of(reference), in_order(reference, directions)
        for pair in PAIRS:
            source = features["heldout" if pair == "floor" else pair]
            points = source[split[pair]].flatten(0, 1)
            sliced = (in_order(points, directions) - along).square().mean().sqrt()
            found["sliced_wasserstein"][pair].append(float(sliced))
            found["frechet"][pair].append(frechet_distance(gaussian, gaussian_of(points)))
    return found


def compare_kernels(features: dict[str, Tensor], splits: list[dict], device) -> tuple[dict, float]:
    """Unbiased squared MMD of every pair in every split, and its biased size by chance."""
    features = {name: own.to(device) for name, own in features.items()}
    matrices = {}
    for one, other in (
        ("samples", "samples"),
        ("train", "train"),
        ("heldout", "heldout"),
        ("samples", "heldout"),
        ("train", "heldout"),
    ):
        matrices[one, other] = kernel_matrix(features[one], features[other]).cpu()
    found, chance = {pair: [] for pair in PAIRS}, []
    for split in splits:
        reference = split["heldout"]
        own = matrices["heldout", "heldout"][reference][:, reference]
        for pair in PAIRS:
            name, chosen = ("heldout" if pair == "floor" else pair), split[pair]
            within = matrices[name, name][chosen][:, chosen]
            across = matrices[name, "heldout"][chosen][:, reference]
            found[pair].append(unbiased_mmd2(within, own, across))
            if pair == "floor":
                chance.append(chance_mmd2(within, own))
    return found, float(np.mean(chance))


def distance_report(spaces: dict, splits: list[dict], seed: int, device) -> dict:
    """Measure every distance in every space: {space: {measure: summary}}."""
    report, n = {}, len(splits[0]["heldout"])
    for space, features in tqdm(spaces.items(), desc="Distances"):
        found = compare_points(features, splits, seed)
        kernel, chance = compare_kernels(features, splits, device)
        found["kernel"] = kernel
        pools = {name: len(own) for name, own in features.items()}
        report[space] = {}
        for measure, values in found.items():
            values = {pair: np.array(own) for pair, own in values.items()}
            report[space][measure] = summarise(measure, values, chance, pools, n)
    return report


def summarise(
    measure: str, values: dict[str, np.ndarray], chance: float, pools: dict[str, int], n: int
) -> dict:
    """Means over the splits and ratios to the floor, with 95 % intervals.

    `values` are distances per split, `pools` the images in each folder that the sets of n were
    drawn from. Ratios are of lengths, not of squares: the square root is taken of Fréchet, and of
    MMD after `chance` has been added, as an unbiased floor is 0 and nothing can be divided by it.
    """
    summary, lengths, means = {}, {}, {}
    for pair, own in values.items():
        own_pool = min(pools["heldout" if pair == "floor" else pair], pools["heldout"])
        summary[pair] = {
            "value": float(own.mean()),
            "interval_95": split_interval(own.mean(), own, n, own_pool),
        }
        shift = chance if measure == "kernel" else 0.0
        power = 1.0 if measure == "sliced_wasserstein" else 0.5
        lengths[pair] = np.maximum(own + shift, 0) ** power
        means[pair] = max(own.mean() + shift, 0) ** power
    for pair in ("samples", "train"):
        ratio = means[pair] / max(means["floor"], 1e-12)
        ratios = lengths[pair] / np.maximum(lengths["floor"], 1e-12)
        low, high = split_interval(ratio, ratios, n, min(pools[pair], pools["heldout"]))
        summary[f"{pair}_over_floor"] = {"ratio": ratio, "interval_95": [max(low, 0.0), high]}
    if measure == "kernel":
        summary["chance"] = chance
    return summary


def split_interval(centre: float, values: np.ndarray, n: int, pool: int) -> list[float]:
    """95 % interval of a mean over splits, from its values in sets of n drawn from `pool` images.

    Sets of n out of N images vary by a factor of (N - n)/N less than independent sets would, and
    the mean rests on all N images: together its variance is n/(N - n) of that between sets (the
    delete-d jackknife; Shao & Wu 1989). At n = N/2 the two are equal.
    """
    half = 1.959964 * float(values.std(ddof=1)) * math.sqrt(n / (pool - n))
    return [float(centre) - half, float(centre) + half]
