"""Adire eleko: cotton painted with cassava paste and dyed in indigo."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.shapes import (
    dots,
    each,
    fold,
    grid,
    lattice,
    leaf,
    lookup,
    lozenges,
    petals,
    rings,
    spiral,
    sun,
    zigzag,
)

ADIRE_DYES = """
16275c 2f5aa5 d8e6f4
101d4a 27509a c4daf0
1b3370 3a6fb8 e8f0f4
142c58 2a6a9e cfe6ea
"""


def adire(cloth: Cloth) -> None:
    """Adire eleko: cotton painted with cassava paste and dyed in indigo; Yoruba women, Nigeria.

    The paste keeps the dye out, so the drawing comes out pale on blue; squares that each hold a
    figure are the classic arrangement. See Jane Barbour and Doig Simmonds, "Adire Cloth in Nigeria"
    (1971); Picton and Mack, "African Textiles" (1979).
    """
    rng = cloth.rng
    cloth.hold(turn=5, hand=0.014)
    deep, mid, pale = cloth.dyes(ADIRE_DYES)
    cloth.fill(deep)
    petal, few = int(rng.choice([4, 5, 6, 7, 8])), int(rng.choice([2, 3]))
    first = rng.uniform(0.11, 0.17)
    kinds = [
        lambda u, v: rings(u, v, few, first, 0.07),
        lambda u, v: petals(u, v, petal, first, 0.43),
        lambda u, v: sun(u, v, petal + 4),
        lambda u, v: spiral(u, v, few - 0.5, 0.085),
        lambda u, v: lattice(u, v, few, 0.075),
        lambda u, v: dots(u, v, 3, 0.1),
        lambda u, v: np.maximum(zigzag(u, v, 3, 0.16, 0.10), np.maximum(abs(u), abs(v)) - 0.43),
        leaf,
        lambda u, v: lozenges(u, v, 2, 0.09),
    ]
    layout = rng.choice(4, p=[0.3, 0.25, 0.25, 0.2])
    if layout == 3:  # one great figure in a frame
        scale = rng.uniform(0.46, 0.64)
        u = cloth.x * scale + rng.uniform(-0.06, 0.06)
        v = cloth.y * scale + rng.uniform(-0.06, 0.06)
        edge = np.maximum(np.abs(u), np.abs(v))
        wide = rng.uniform(0.30, 0.42)
        room = 0.5 / wide
        big = each(np.full(u.shape, rng.integers(9)), kinds, u * room, v * room) / room
        around = kinds[rng.choice([1, 2, 5, 5, 8])]
        little = around(*(fold(t * rng.choice([4.0, 5.0])) for t in (u, v))) / 4.5
        distance = np.where(edge < wide, big, np.where(edge < wide + 0.03, 0.01, little))
        frame = np.abs(edge - wide - 0.015) - 0.018
    else:
        scale = rng.uniform(0.9, 1.9)
        x, y = cloth.x, cloth.y
        if layout == 2:  # the squares stand on their points
            cloth.x, cloth.y = (x + y) * 0.7071, (x - y) * 0.7071
        i, j, u, v = grid(cloth, scale, brick=layout == 1)
        table = rng.permutation(9)[rng.integers(0, int(rng.integers(2, 6)), (4, 4))]
        distance = each(lookup(table, i, j), kinds, u * 1.15, v * 1.15) / 1.15
        frame = 0.5 - np.maximum(np.abs(u), np.abs(v)) - rng.uniform(0.018, 0.035)
    bleed = rng.uniform(1.5, 3.0)
    cloth.paint(0.75 * cloth.ink(distance - 0.035, scale, 7), mid)
    cloth.paint(cloth.ink(distance, scale, bleed), pale)
    cloth.paint(cloth.ink(frame, scale, bleed), pale)
    cloth.paint(0.35 * np.clip(cloth.noise(6), 0, 1), mid)
    cloth.mottle = 0.035
