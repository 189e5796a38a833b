"""95 % intervals of shares and of resampled figures."""

from __future__ import annotations

import math

import numpy as np

BOOTSTRAPS = 2000  # bootstrap resamples behind the intervals of shares and colours
LEVEL = 0.95  # of every interval


def wilson(hits: int, total: int) -> list[float]:
    """Return Wilson's 95 % interval of a share: honest at 0 hits too, where a bootstrap is not."""
    z = 1.959964
    centre = (hits + z * z / 2) / (total + z * z)
    half = z * math.sqrt(hits * (total - hits) / total + z * z / 4) / (total + z * z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def interval(values: np.ndarray) -> list[float]:
    """Return the central 95 % of resampled values."""
    tail = (1 - LEVEL) / 2
    return [float(v) for v in np.quantile(values, [tail, 1 - tail])]
