"""Fugu, or batakari: the striped smock of the north."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.shapes import cells, radius, sett, striped, wave

FUGU_DYES = """
1b2a55 eef0ee 16161c 6c8fc0
16161a f2efe6 2c4a86 8a8f98
223a70 dfe7ee 101830 c8372d
20304a f1ece0 4a6a96 d9a62a
14141a e9e9ea 5a5f6a 2f6a4c
2a4a80 f4f1e8 182440 8fb0d6
"""


def fugu(cloth: Cloth) -> None:
    """Fugu, or batakari: the striped smock of the north; Dagomba, Gonja, Mossi, Ghana and beyond.

    Hand-woven strips in indigo, white and black, sewn up with flaring gores and embroidered at the
    neck. See Venice Lamb, "West African Weaving" (1975); Picton and Mack, "African Textiles"
    (1979).
    """
    rng = cloth.rng
    cloth.hold(turn=8, hand=0.005, sag=0.035)
    colours = cloth.dyes(FUGU_DYES)
    strips = rng.uniform(0.9, 1.6)
    x, y = cloth.x, cloth.y
    layout = rng.integers(4)
    weft = None
    if layout == 1:  # gores: the strips spread downwards
        apex = rng.uniform(1.5, 2.6)
        side = rng.uniform(-0.3, 0.3)
        lean = np.where(x > side, 1.0, -1.0) * rng.uniform(0.18, 0.45)
        x = (x - side) - lean * (y + apex) * 0.8
        weft = np.abs(cloth.x - side)
    elif layout == 2:  # a yoke: the strips above run the other way
        y0 = rng.uniform(-0.5, 0.3)
        x = np.where(y < y0, y, x)
        weft = np.abs(cloth.y - y0)
    s, u = cells(x * strips + rng.uniform())
    one, two = sett(rng, [0, 1, 0, 1, 2, 3], 3, 6), sett(rng, [0, 1, 2], 2, 4)
    mixed = rng.uniform() < 0.45
    index = np.where((s % 2 == 0) & mixed, striped(two, u), striped(one, u))
    cloth.weave(index, colours)
    cloth.paint(0.5 * cloth.ink(0.48 - np.abs(u), strips, 2), colours[2])
    if weft is not None:
        cloth.paint(0.8 * cloth.ink(weft - 0.02, 1, 2), colours[2])
    if layout == 3:  # the embroidered neck
        r = radius(cloth.x - rng.uniform(-0.25, 0.25), (cloth.y + rng.uniform(0.7, 1.1)) * 0.8)
        size = rng.uniform(0.35, 0.6)
        cloth.paint(cloth.ink(r - size - 0.26), colours[0])
        angle = np.arctan2(cloth.y + 0.9, cloth.x)
        d = np.abs(r - size - 0.13 - 0.09 * (wave(angle * 3.5) - 0.5)) - 0.028
        cloth.paint(cloth.ink(np.minimum(d, np.abs(r - size - 0.24) - 0.02)), colours[1])
        cloth.paint(cloth.ink(r - size), colours[2])
    cloth.lab[0] += 0.015 * np.cos(2 * np.pi * u)
    cloth.slub, cloth.mottle = 0.03, 0.022
