"""Wax print: bright machine-made batik, with discs, eyes, shells, flowers or snails."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.colour import Array
from ddpm_basics.fabrics.shapes import fold, grid, petals, radius

WAX_PRINT_DYES = """
f2b705 d7263d 1b6ca8 fff1d0 151a3a
0f7f8c f26419 f6ae2d fff4dc 13203a
d62246 f9c22e 17a398 fdf0d5 1d1a3c
2a4d9b f4a300 e4572e f7ead0 10152e
f28c28 1d3f8b 8f1d4e fff0cf 20123a
6a2c91 f5b82e 24a19c fbeed8 1c1035
1f8a4c f2c230 c8232c fdf3d8 12233a
f4d35e ee6352 2e86ab fffaf0 2b1b3d
e85d9c 2b3a8f f7c548 fff3e6 241238
"""


def wax_records(
    cloth: Cloth, scale: float, u: Array, v: Array, spokes: Array, slip: Array, dyes: Array
) -> None:
    """Discs of rings, one ring with spokes; the dark printing has slipped a little."""
    ground, main, second, light, dark = dyes
    ink, r = cloth.ink, radius(u, v)
    radii = np.sort(cloth.rng.uniform(0.10, 0.44, 4))[::-1] + np.array([0.03, 0.02, 0.01, 0.0])
    for size, colour in zip(radii, (main, light, second, ground), strict=True):
        cloth.paint(ink(r - size, scale), colour)
    cloth.paint(ink(r - radii[1], scale) * ink(radii[2] - r, scale) * (spokes > 0), dark)
    slipped = radius(u + slip[0], v + slip[1])
    nearest = np.min([np.abs(slipped - size) for size in radii], axis=0)
    cloth.paint(ink(nearest - 0.016, scale), dark)
    cloth.paint(ink(r - 0.05, scale), dark)


def wax_eyes(cloth: Cloth, scale: float, u: Array, v: Array, spokes: Array, dyes: Array) -> None:
    """Open eyes with lashes."""
    _, main, second, light, dark = dyes
    ink, r = cloth.ink, radius(u, v)
    lid = np.abs(v) * 1.9 - 0.48 * (1 - (2 * u) ** 2)
    lash = (lid < 0.26) & (spokes > 0.1)
    cloth.paint(ink(lid - 0.22, scale) * lash, dark)
    cloth.paint(ink(lid, scale), light)
    for size, colour in zip((0.21, 0.17, 0.12, 0.06), (dark, main, second, dark), strict=True):
        cloth.paint(ink(r - size, scale) * ink(lid, scale), colour)
    cloth.paint(ink(np.abs(lid) - 0.035, scale), dark)


def wax_shells(cloth: Cloth, scale: float, dyes: Array) -> None:
    """Fans in rows, each row behind the one below it."""
    ground, main, second, light, dark = dyes
    _, _, u, v = grid(cloth, scale, brick=True, aspect=0.25)
    down = 0.25 * (0.5 - v)
    front = radius(0.5 - np.abs(u), down + 0.25)
    r = np.where(front < 0.5, front, radius(u, down))
    bands = np.searchsorted(np.sort(cloth.rng.uniform(0.1, 0.47, 4)), r)
    cloth.weave(bands, np.stack([second, light, main, ground, dark]))
    cloth.paint(cloth.ink(np.abs(r - 0.5) - 0.03, scale), dark)
    spokes = np.cos(20 * np.arcsin(np.clip(down / np.maximum(r, 0.01), -1, 1))) > 0
    cloth.paint(cloth.ink(np.abs(r - 0.3) - 0.04, scale) * spokes, dark)


def wax_print(cloth: Cloth) -> None:
    """Wax print: bright machine-made batik, worn and named across West and Central Africa.

    Large discs, eyes, shells and flowers on a strong ground, with the fine veins of cracked resin.
    It began as a Dutch trade cloth and was made its own by the women who chose, sold and named the
    patterns. See Nina Sylvanus, "Patterns in Circulation" (2016); John Gillow, "African Textiles"
    (2003).
    """
    rng = cloth.rng
    cloth.hold(turn=10, hand=0.008, sag=0.05)
    dyes = ground, main, second, light, dark = cloth.dyes(WAX_PRINT_DYES)
    cloth.fill(ground)
    scale = rng.uniform(0.6, 1.25)
    filler = rng.integers(4)
    if filler == 0:
        _, _, u, v = grid(cloth, scale * 4, brick=True)
        cloth.paint(cloth.ink(radius(u, v) - 0.2, scale * 4), light)
    elif filler == 1:
        cloth.paint(cloth.ink(np.abs(fold(cloth.y * scale * 4)) - 0.14, scale * 4), second)
    elif filler == 2:
        cloth.paint(cloth.ink(np.abs(cloth.noise(7)) - 0.13, 7, 2), second)
    layout = rng.integers(6)
    _, _, u, v = grid(cloth, scale, brick=bool(rng.integers(2)) or layout == 3)
    r, angle = radius(u, v), np.arctan2(v, u)
    turns = int(rng.choice([8, 10, 12, 16]))
    spokes = np.cos(turns * angle)
    ink, slip = cloth.ink, rng.uniform(-0.02, 0.02, 2)
    if layout in (0, 5):
        wax_records(cloth, scale, u, v, spokes, slip, dyes)
    elif layout == 1:
        wax_eyes(cloth, scale, u, v, spokes, dyes)
    elif layout == 2:  # flowers
        n = int(rng.choice([5, 6, 7, 8]))
        for grow, colour in ((0.025, dark), (0.0, main), (-0.06, light), (-0.09, second)):
            cloth.paint(ink(petals(u, v, n, 0.24, 0.45) - grow, scale), colour)
        for size, colour in ((0.16, dark), (0.13, ground), (0.06, dark)):
            cloth.paint(ink(r - size, scale), colour)
    elif layout == 3:
        wax_shells(cloth, scale, dyes)
    else:  # snails
        turn = fold(r * 5 * 0.9 - angle / (2 * np.pi))
        cloth.paint(ink(r - 0.47, scale), dark)
        cloth.paint(ink(r - 0.44, scale), main)
        cloth.paint(ink(np.abs(turn) / 4.5 - 0.055, scale) * ink(r - 0.44, scale), light)
        cloth.paint(ink(r - 0.08, scale), second)
    veins = ink(np.abs(cloth.noise(9) + 0.4 * cloth.noise(23)) - 0.035, 11, 1.5)
    cloth.paint(rng.uniform(0.1, 0.4) * veins, dark)
    cloth.mottle = 0.010
