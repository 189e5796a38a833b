"""Shweshwe: printed cotton with a fine white discharge design."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.colour import Array
from ddpm_basics.fabrics.shapes import fold, grid, petals, radius

SHWESHWE_DYES = """
1c2760 eef0f4 6f86c8
15204e e9eef6 5575b8
54281a f4e8d8 b5754a
9c1c2c f8ece6 e07a72
155e63 eef6f0 5aa9a4
5b2463 f4ebf4 a871b4
"""


def shweshwe(cloth: Cloth) -> None:
    """Shweshwe: printed cotton with a fine white discharge design; Sotho and Xhosa dress.

    Rollers took the colour out of dyed cloth in dots and hairlines; indigo came first, then brown
    and red. See Juliette Leeb-du Toit, "isiShweshwe" (2017); Chris Spring, "African Textiles Today"
    (2012).
    """
    rng = cloth.rng
    cloth.hold(turn=8, hand=0.003, sag=0.03)
    ground, white, tint = cloth.dyes(SHWESHWE_DYES)
    cloth.fill(ground)
    scale = rng.uniform(1.3, 2.4)
    layout = int(rng.integers(6))
    i, j, u, v = grid(cloth, scale, brick=bool(rng.integers(2)) and layout < 3)
    r, angle = radius(u, v), np.arctan2(v, u)
    count = int(rng.choice([6, 8]))
    away = fold(angle * count / (2 * np.pi) + 0.5)

    def beads(at: float, size: float) -> Array:  # a ring of dots
        return radius((r - at), away * 2 * np.pi * at / count) - size

    if layout == 0:  # dotted rounds
        d = np.minimum(beads(0.33, 0.075), r - 0.10)
        tinted = np.abs(r - 0.20) - 0.03
    elif layout == 1:  # flowers
        d = np.minimum(np.abs(petals(u, v, count, 0.16, 0.38)) - 0.04, r - 0.07)
        tinted = radius(np.abs(u) - 0.5, np.abs(v) - 0.5) - 0.12
    elif layout == 2:  # diamonds of dots
        p, q = fold((u + v) * 2), fold((u - v) * 2)
        far = np.abs(u) + np.abs(v)
        d = np.where(far < 0.5, radius(p, q) / 2 - 0.10, np.abs(far - 0.55) - 0.05)
        tinted = np.abs(far - 0.75) - 0.04
    elif layout == 3:  # stripes of dots and lines
        if rng.uniform() < 0.4:
            i, u, v = j, v, u
        column = i % int(rng.choice([2, 3])) == 0
        lines, bead = rng.choice([1.0, 2.0, 3.0]), rng.choice([1.0, 2.0, 3.0])
        rung = np.abs(fold(u * lines)) / lines - rng.uniform(0.03, 0.07)
        d = np.where(column, radius(u, fold(v * bead) / bead) - rng.uniform(0.3, 0.4) / bead, rung)
        tinted = np.where(column, 0.5 - np.abs(u) - rng.uniform(0.03, 0.09), 1.0)
    elif layout == 4:  # scallops
        r = radius(u, v - 0.5)
        at = rng.uniform(0.30, 0.47)
        d = np.minimum(np.abs(r - at) - rng.uniform(0.03, 0.06), radius(u, v - 0.4) - 0.10)
        d = np.minimum(d, radius(np.abs(u) - 0.5, v + rng.uniform(0.0, 0.3)) - rng.uniform(0, 0.12))
        tinted = np.abs(r - at - rng.uniform(0.12, 0.25)) - 0.035
    else:  # a net with stars at the crossings
        d = np.minimum(np.abs(np.abs(u) - np.abs(v)) * 0.7 - 0.035, petals(u, v, 8, 0.10, 0.26))
        tinted = radius(0.5 - np.abs(u), np.minimum(np.abs(v), 0.5)) - 0.10
    cloth.paint(0.9 * cloth.ink(tinted, scale), tint)
    cloth.paint(cloth.ink(d, scale), white)
    cloth.slub, cloth.mottle = 0.008, 0.008
