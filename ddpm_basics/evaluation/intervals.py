"""95 % intervals of shares and of resampled figures."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

BOOTSTRAPS = 2000  # resamples behind the intervals of shares and colours
LEVEL = 0.95  # of every interval
Z = 1.959964  # a normal variable lies that many spreads around its mean in 95 % of cases


def wilson(hits: int, total: int) -> list[float]:
    """Return Wilson's interval of a share: honest at 0 hits too, where a bootstrap is not."""
    centre = (hits + Z * Z / 2) / (total + Z * Z)
    half = Z * math.sqrt(hits * (total - hits) / total + Z * Z / 4) / (total + Z * Z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def interval(values: NDArray[np.float64]) -> list[float]:
    """Return the central 95 % of resampled values."""
    return [float(v) for v in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def split_interval(
    centre: float, values: NDArray[np.float64], n: int, pool: int
) -> tuple[float, float]:
    """Return the interval of a mean over splits, from its values in sets of n out of `pool` images.

    Sets of n out of N images vary by a factor of (N - n)/N less than independent sets would, and
    the mean rests on all N images: together its variance is n/(N - n) of that between sets (the
    delete-d jackknife; Shao & Wu 1989). At n = N/2 the two are equal.
    """
    half = Z * float(values.std(ddof=1)) * math.sqrt(n / (pool - n))
    return centre - half, centre + half
