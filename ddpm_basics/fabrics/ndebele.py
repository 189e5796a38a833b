"""Ndebele geometry: stepped, mirrored figures in flat colours."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.shapes import cells, fold

NDEBELE_DYES = """
16140f f6f2e6 2a62b0 e4a81c c8372d 2f8a57
16140f f6f2e6 3b8fc4 e86a8a f0c23a 5a3a86
16140f f4efe2 1f7a6c d9542a f2b632 7fb7d8
16140f f8f4ea c4312f 2456a0 f3c83f e88fae
16140f f3ecdc 7a3f2a d98a3a 3f7f9e b9c24a
"""


def ndebele(cloth: Cloth) -> None:
    """Ndebele geometry: stepped, mirrored figures in flat colours; Ndebele women, South Africa.

    The language of painted walls, beaded aprons and blankets: black outlines, white ground, flat
    bright colour. See Margaret Courtney-Clarke, "Ndebele: The Art of an African Tribe" (1986).
    """
    rng = cloth.rng
    cloth.hold(turn=3, hand=0.007, sag=0.015)
    dyed = cloth.dyes(NDEBELE_DYES)
    black, white, bright = dyed[0], dyed[1], dyed[2:][rng.permutation(4)]
    tall = int(rng.choice([1, 1, 2, 3]))
    row, v = cells((cloth.y + 1) * tall / 2 + 0.1 * rng.standard_normal())
    across = rng.choice([0.5, 1.0, 1.0, 1.5], 4)
    scale = across[row % 4]
    u = fold(cloth.x * scale + 0.5)
    v = v * (2 * scale / tall)
    w = rng.uniform(0.012, 0.02)
    steps = rng.choice([8.0, 10.0, 12.0])
    su, sv = (np.floor(np.abs(t) * steps + 0.5) / steps for t in (u, v))
    fields = [
        np.abs(u) + np.abs(v),
        su + sv,
        np.maximum(np.abs(u), np.abs(v)),
        np.abs(u) + v + 0.5,
        su + np.where(v > 0, sv, -sv) + 0.5,
        np.abs(u) * 2 - v + 0.5,
    ]
    chosen = rng.permutation(6)[:4]
    field = np.choose(chosen[row % 4], fields)
    levels = rng.choice([3.0, 4.0, 5.0])
    level, place = cells(field * levels)
    paints = np.stack([bright[0], white, bright[1], bright[2], white, bright[3]])
    if rng.uniform() < 0.5:  # the two halves of a figure in two colours
        level = level + 2 * (np.abs(v) < np.abs(u))
    cloth.weave((level + row) % 6, paints)
    line = (0.5 - np.abs(place)) / levels - w * 1.3
    cloth.paint(cloth.ink(line, 1.0), black)
    seam = (0.5 - np.abs(fold(cloth.x * scale))) / scale
    cloth.paint(cloth.ink(seam - w, 1.0) * (rng.uniform() < 0.4), black)
    if tall > 1:
        edge = (0.5 - np.abs(fold((cloth.y + 1) * tall / 2))) * 2 / tall
        cloth.paint(cloth.ink(edge - 0.06), white)
        cloth.paint(cloth.ink(np.abs(edge - 0.06) - 0.022), black)
    cloth.slub, cloth.mottle = 0.008, 0.012
