"""Kanga: printed cotton with a border, a field and a saying."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.colour import Array
from ddpm_basics.fabrics.shapes import Shape, cashew, cells, fold, grid, petals, radius, rings, wave

KANGA_DYES = """
c8202e f5efe2 f2b01e 17130f
f2a51a 17130f c8202e f8f1e0
f4efe4 c8202e 17130f e4a01c
1d5fa8 f4c430 f5f2e8 101b3a
5a2a7c f7e6b4 ef7d1a 1a0f24
1f7a45 f5c518 f5f2e8 0f2015
ef6a1f 1f2f6b fbf1dc 17130f
e8457a fbf3e4 2b1a5a 20102a
f7d23e 1a6b46 c8202e 14140f
17130f e9e2d0 d0342c f0b52a
"""


def kanga_border(
    cloth: Cloth,
    along: Array,
    inward: Array,
    deep: float,
    scale: float,
    figure: Array,
    dark: Array,
) -> None:
    """Print a row of figures along the hem, `scale` of them to a unit."""
    u = fold(along * scale + cloth.rng.uniform())
    v = (inward - deep / 2) / deep * 1.05
    kind = cloth.rng.integers(4)
    if kind == 0:
        d = cashew(u, v) * 0.8
    elif kind == 1:  # teeth
        d = (v + 0.38 - 0.76 * wave(u)) * 0.5
    elif kind == 2:
        d = radius(u, v) - 0.34
    else:
        d = np.abs(u) + np.abs(v) - 0.42
    within = cloth.ink(inward - deep)
    cloth.paint(within * cloth.ink(d, scale), figure)
    cloth.paint(within * cloth.ink(d + (0.2 if kind == 1 else 0.16), scale), dark)


def kanga_saying(
    cloth: Cloth, x: Array, y: Array, half: float, plate_colour: Array, dark: Array
) -> None:
    """Print a plate, 2 * half long, with strokes in place of the letters."""
    plate = np.maximum(np.abs(y) - 0.10, np.abs(x) - half)
    i, u = cells(x * 9)
    stroke = np.abs(u) * 0.11 - 0.022 - 0.012 * (i % 3)
    height = np.abs(y) - 0.035 - 0.02 * ((i * 7) % 3)
    cloth.paint(cloth.ink(plate), plate_colour)
    cloth.paint(cloth.ink(np.maximum(np.maximum(stroke, height), plate + 0.04)), dark)


def kanga(cloth: Cloth) -> None:
    """Kanga: printed cotton with a border (pindo), a field (mji) and a saying; the Swahili coast.

    Worn in pairs by women in Kenya, Tanzania and beyond; the cashew is its best-known figure. The
    saying is drawn here as plain strokes. See Chris Spring, "African Textiles Today" (2012).
    """
    rng = cloth.rng
    cloth.hold(turn=4, hand=0.005, sag=0.03)
    ground, border, figure, dark = cloth.dyes(KANGA_DYES)
    cloth.fill(ground)
    layout = rng.integers(3)
    centre = np.array([[0, 0], [0.55, 0.55], [0.0, 0.62]][layout]) * rng.choice([-1, 1], 2)
    half = np.array([[0.98, 0.94], [1.52, 1.5], [3.0, 1.56]][layout]) * rng.uniform(0.97, 1.02)
    x, y = cloth.x - centre[0], cloth.y - centre[1]
    a, b = np.abs(x) - half[0], np.abs(y) - half[1]
    inward = -np.maximum(a, b)  # how far from the hem
    deep = rng.uniform(0.26, 0.40)
    along = np.where(a > b, y, x)
    ink = cloth.ink
    scale = rng.uniform(1.3, 2.0)
    shapes: list[Shape] = [
        cashew,
        lambda u, v: petals(u, v, 6, 0.16, 0.4),
        lambda u, v: rings(u, v, 2, 0.2, 0.1),
        lambda u, v: np.abs(u) + np.abs(v) - 0.36,
        lambda u, v: petals(u, v, 4, 0.1, 0.44),
    ]
    middle = shapes[rng.integers(5)]
    if rng.uniform() < 0.35 and layout == 0:  # one great figure
        u, v, size = x * 0.9, y * 0.9, 0.9
    else:
        _, _, u, v = grid(cloth, scale, brick=True)
        size = scale
    d = middle(u, v)
    cloth.paint(ink(d - 0.03, size), dark)
    cloth.paint(ink(d + 0.02, size), figure)
    cloth.paint(ink(d + 0.13, size), border)
    cloth.paint(ink(inward - deep), border)
    kanga_border(cloth, along, inward, deep, round(scale * 1.3 * 2) / 2, figure, dark)
    cloth.paint(ink(np.abs(inward - deep) - 0.03), dark)
    cloth.paint(ink(np.abs(inward - 0.03) - 0.03), dark)
    if layout != 1 and rng.uniform() < 0.7:  # the saying
        low = (half[1] - deep - 0.17) * (1 if centre[1] <= 0 else -1)
        kanga_saying(cloth, x, y - low, min(0.62, half[0] - deep - 0.04), border, dark)
    cloth.paint(ink(inward), border)
    cloth.slub, cloth.mottle = 0.010, 0.010
