"""Aso oke: dress cloth of narrow strips with warp stripes and openwork."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.shapes import cells, fold, radius, sett, striped

ASO_OKE_DYES = """
b99468 8a6238 f0e3c8 4a3220
8d1638 c23a5e f0c9a0 4a0a1e
a3265a 6e123c f2d9e4 3a0a22
d9c3a0 a87f50 fff6e2 6a4a2c
6a3a8a a06cc0 eadcf4 2e1440
c8642e 8a3414 ffe2b4 4a1c0c
2f8a86 16545a dff2e6 0a2e34
b98a1e 7a5410 fff0c0 463008
c24a6a f09a9a ffe9d6 5a1628
"""


def aso_oke(cloth: Cloth) -> None:
    """Aso oke: dress cloth of narrow strips with warp stripes and openwork; Yoruba, Nigeria.

    Beige wild silk (sanyan), crimson (alaari) and deep indigo (etu) are the classic three; lurex
    and bright rayon followed. See Venice Lamb, "West African Weaving" (1975); Duncan Clarke, "The
    Art of African Textiles" (1997).
    """
    rng = cloth.rng
    cloth.hold(turn=5, hand=0.004, sag=0.025)
    base, line, shine, dark = cloth.dyes(ASO_OKE_DYES)
    strips = rng.uniform(1.0, 1.9)
    s, u = cells(cloth.x * strips + rng.uniform())
    one, two = sett(rng, [0, 0, 1, 2]), sett(rng, [0, 1, 3])
    index = np.where((s % 2 == 0) | (rng.uniform() < 0.4), striped(one, u), striped(two, u))
    cloth.weave(index, np.stack([base, line, shine, dark]))
    rows = strips * rng.uniform(0.5, 0.95)
    j, v = cells(cloth.y * rows + rng.uniform() + rng.choice([0.0, 0.5]) * s)
    w = v * strips / rows  # as long as u
    layout = rng.integers(4)
    if layout in (0, 1):  # rows of holes, with the threads drawn together between them
        holes = int(rng.choice([3, 4]))
        p = fold((u + 0.5) * holes) / holes
        slit = radius(p * 1.9, w) - 0.17
        cloth.paint(0.95 * cloth.ink(slit, strips), dark)
        if rng.uniform() < 0.5:
            cloth.paint(0.8 * cloth.ink(np.abs(np.abs(w) - 0.24) - 0.025, strips), shine)
    if layout in (1, 2, 3):  # inlaid figures in shining weft
        here = (s + (0 if layout == 3 else j)) % 2 == 0
        step = 0.062
        a = np.abs(np.round(u / step) * step)
        z = np.abs(np.round(w / step) * step)
        shape = rng.integers(3)
        if shape == 0:
            figure = np.where((a + z) < 0.34, ((a + z) < 0.12) | ((a + z) > 0.2), False)
        elif shape == 1:
            figure = (a < 0.30) & (z < 0.05 + 0.24 * (np.abs(a - 0.15) < 0.1))
        else:
            figure = (np.abs(a - z) < 0.07) & (np.maximum(a, z) < 0.3)
        cloth.paint(0.92 * (figure & here), shine)
    cloth.paint(0.55 * cloth.ink(0.475 - np.abs(u), strips, 2), dark)
    cloth.lab[0] += 0.02 * np.cos(2 * np.pi * u)  # each strip is a little round
    cloth.slub = 0.022
