"""Bogolanfini: cotton painted with iron-rich mud over a leaf dye."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.shapes import (
    cross,
    dots,
    each,
    fold,
    grid,
    lattice,
    lookup,
    lozenges,
    radius,
    rings,
    saltire,
    zigzag,
)

BOGOLAN_DYES = """
2a1c14 eadfc4 9a5a2a
1d1714 e3d3ae b06a2c
40261a efdcb4 8c4a22
33211a d9b77c 6e3a1f
241a18 e9e2d2 5c4a3c
5a3019 f0dcae 2a1a12
"""


def bogolan(cloth: Cloth) -> None:
    """Bogolanfini: cotton painted with iron-rich mud over a leaf dye; Bamana women, Mali.

    The dark mud is painted around the figures, which stay the colour of the cloth. See Victoria L.
    Rovine, "Bogolan: Shaping Culture through Cloth in Contemporary Mali" (2001); Picton and Mack,
    "African Textiles" (1979).
    """
    rng = cloth.rng
    cloth.hold(turn=6, hand=0.015)
    mud, line, warm = cloth.dyes(BOGOLAN_DYES)
    if rng.uniform() < 0.15:
        mud, line = line, mud
    cloth.fill(mud)
    wide = rng.uniform(0.9, 1.25)
    kinds = [
        lambda u, v: zigzag(u, v, 2, 0.22, 0.11 * wide, 1.0),
        lambda u, v: saltire(u, v, 0.34, 0.13 * wide),
        lambda u, v: lozenges(u, v, 2, 0.09 * wide),
        lambda u, v: cross(u, v, 0.32, 0.13 * wide),
        lambda u, v: dots(u, v, 2, 0.105 * wide),
        lambda u, v: rings(u, v, 2, 0.18, 0.10 * wide),
        lambda u, v: np.minimum(lattice(u, v, 2, 0.10 * wide), radius(u, v) - 0.07),
        lambda u, v: np.abs(fold(u * 3)) / 3 - 0.05 * wide,
    ]
    layout = rng.integers(4)
    scale = rng.uniform(0.9, 1.7)
    if layout == 0:  # bands, each of one figure
        i, j, u, v = grid(cloth, scale)
        table = rng.permutation(8)[:4][None, :]
        frame = np.abs(0.5 - np.abs(v)) - 0.045 * wide
    elif layout == 1:  # squares of two or three figures
        i, j, u, v = grid(cloth, scale)
        table = rng.permutation(8)[rng.integers(0, 3, (3, 3))]
        frame = 0.5 - np.maximum(np.abs(u), np.abs(v)) - 0.04 * wide
    else:  # a diamond net, or diamonds without the net
        x, y = cloth.x, cloth.y
        cloth.x, cloth.y = (x + y) * 0.7071, (x - y) * rng.uniform(0.55, 0.9)
        i, j, u, v = grid(cloth, scale)
        table = rng.choice([1, 2, 3, 4, 5], (1, 2) if layout == 2 else (2, 2))
        frame = 0.5 - np.maximum(np.abs(u), np.abs(v)) - (0.05 * wide if layout == 2 else -1)
    which = lookup(table, i, j)
    distance = np.minimum(each(which, kinds, u, v), frame)
    if rng.uniform() < 0.5:  # some fields washed lighter
        cloth.paint(0.8 * (which == table.flat[0]) * (frame > 0), warm)
    distance = distance + 0.012 * cloth.noise(20)
    cloth.paint(cloth.ink(distance, scale, 2.0), line)
    cloth.paint(0.30 * np.clip(cloth.noise(9) - 0.2, 0, 1), warm)
    cloth.mottle = 0.03
