"""Kuba, or Shoowa, velvet: raffia embroidered with cut pile."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.shapes import cells, fold

KUBA_DYES = """
c39a5c 2b1a12 e6cf9a
b9824a 3a2016 e3c48a
a4683a 24140f dfb877
8c3b2e 21120f dcae72
d2b27a 4a2a1a f0dfb4
7a4a5e 2a161d dcb98a
c98a3c 3b1d1a f0d39a
"""


def kuba(cloth: Cloth) -> None:
    """Kuba, or Shoowa, velvet: raffia embroidered with cut pile; Kuba peoples, DR Congo.

    Lines in pairs and threes interlace, and the design changes its mind on the way across. See
    Georges Meurant, "Shoowa Design: African Textiles from the Kingdom of Kuba" (1986).
    """
    rng = cloth.rng
    cloth.hold(turn=7, hand=0.012, sag=0.05)
    ground, dark, light = cloth.dyes(KUBA_DYES)
    cloth.fill(ground)
    scale = rng.uniform(0.75, 1.35)
    tall = rng.uniform(0.6, 1.0)
    drift = 0.10 * cloth.noise(2)
    p = (cloth.x + cloth.y * tall) * scale + drift + rng.uniform()
    q = (cloth.x - cloth.y * tall) * scale - drift + rng.uniform()
    i, u = cells(p)
    j, v = cells(q)
    layout = rng.integers(5)
    if layout == 0:  # bands over and under
        over = (i + j) % 2 == 0
        a, b = np.where(over, u, v), np.where(over, v, u)
        strand = np.abs(a) - 0.36
        lines = np.abs(fold(a * 5)) / 5 - 0.045
        under = np.where(np.abs(b) < 0.36, np.abs(fold(b * 5)) / 5 - 0.045, 0.1)
        band = np.where(strand < 0, lines, under)
        hole = np.minimum(np.abs(u), np.abs(v)) - 0.36
        cloth.paint(cloth.ink(-hole, scale), dark)
    elif layout == 1:  # nested lozenges, light and dark by turns
        t = np.maximum(np.abs(u), np.abs(v))
        cloth.paint(((i + j) % 2 == 0) * 0.9, light)
        band = np.abs(fold(t * rng.choice([5.0, 6.0]) + 0.5)) / 5.5 - 0.045
    elif layout == 2:  # hooked meanders
        a = np.where((i + j) % 2 == 0, u, -u)
        t = np.where(a + v > 0, np.maximum(a, v), -np.minimum(a, v) + 0.17)
        band = np.abs(fold(t * 3)) / 3 - 0.075
    elif layout == 3:  # chevrons that meet
        t = np.where(v > 0, np.abs(u) + v, np.abs(u) - v * rng.choice([-1.0, 1.0]))
        band = np.abs(fold(t * 4)) / 4 - 0.05
        cloth.paint(((i + j) % 2 == 0) * 0.85, light)
    else:  # knots: rounds of line tied at the corners
        t = np.abs(np.abs(u) - 0.25) + np.abs(np.abs(v) - 0.25)
        band = np.abs(fold(t * 5)) / 5 - 0.05
        cloth.paint(cloth.ink(t - 0.12, scale), light)
    cloth.paint(cloth.ink(band, scale, 1.5), dark)
    edge = 0.5 - np.maximum(np.abs(u), np.abs(v)) - 0.04
    if layout != 0:
        cloth.paint(cloth.ink(edge, scale, 1.5), light if layout in (2, 4) else dark)
    cloth.lab[0] += 0.022 * cloth.noise(48)
    cloth.mottle = 0.028
