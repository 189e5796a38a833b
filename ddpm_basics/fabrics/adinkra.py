"""Adinkra: cotton stamped with signs in bark ink."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.shapes import (
    comb,
    cross,
    each,
    grid,
    heart,
    horns,
    lozenges,
    petals,
    radius,
    rings,
    saltire,
    spiral,
    twist,
)

ADINKRA_DYES = """
c0512f 1c1210 f0b82c 2a6a3a d9d2b8
a03c2a 17100e e6a021 1f5a8a f0e6d0
d98e2b 1f1512 b3202a 1d6a3c f5ecd6
efe8da 211816 c8302a e6a81e 1f6a4a
925c34 150f0d e8b23a c8402a dcd0b0
e8c24a 1c1512 a8202a 1f5f3c f5f0e0
5f7fb4 14131c f0c23a c8302a f2efe6
8f9a54 171510 c8402a f0c040 f5efdc
"""


def adinkra(cloth: Cloth) -> None:
    """Adinkra: cotton stamped with signs in bark ink; Asante, Ghana.

    Calabash stamps, each with a name and a proverb, fill squares ruled with a comb; coloured
    whip-stitching joins the panels. Red and brown are for mourning, white and yellow for joy. See
    R. S. Rattray, "Religion and Art in Ashanti" (1927); Picton and Mack, "African Textiles" (1979).
    """
    rng = cloth.rng
    cloth.hold(turn=5, hand=0.006)
    ground, ink, *threads = cloth.dyes(ADINKRA_DYES)
    cloth.fill(ground)
    kinds = [
        lambda u, v: rings(u, v, 3, 0.13, 0.075),
        heart,
        lambda u, v: petals(u, v, 8, 0.16, 0.4),
        horns,
        comb,
        lambda u, v: np.minimum(
            radius(np.abs(u) - 0.2, np.abs(v) - 0.2) - 0.15, cross(u, v, 0.4, 0.09)
        ),
        twist,
        lambda u, v: spiral(u, v, 2.0, 0.10),
        lambda u, v: np.minimum(lozenges(u, v, 1, 0.1), saltire(u, v, 0.36, 0.07)),
    ]
    scale = rng.uniform(1.15, 2.1)
    i, j, u, v = grid(cloth, scale)
    layout = rng.integers(3)
    group = int(rng.choice([2, 3]))
    table = rng.permutation(9)[:4]
    if layout == 0:  # one sign in each panel
        which = table[(i // group + j // group) % 2]
    elif layout == 1:  # a row of each
        which = table[j % 3]
    else:  # by turns
        which = table[(i + j) % 2]
    distance = each(which, kinds, u * 1.2, v * 1.2) / 1.2
    worn = 0.72 + 0.28 * np.clip(cloth.noise(16) + 0.8, 0, 1)
    cloth.paint(worn * cloth.ink(distance, scale, 1.5), ink)
    if layout == 0:  # combed lines around the panels
        for t, number in ((u, i), (v, j)):
            far = np.minimum((number % group) + t + 0.5, group - (number % group) - t - 0.5)
            cloth.paint(0.85 * cloth.ink(np.abs(far - 0.03) - 0.022, scale), ink)
    else:  # whip-stitched seams
        t, along = (v + j % group + 0.5, cloth.x) if layout == 1 else (u + i % group + 0.5, cloth.y)
        far = np.minimum(t, group - t)
        stitch = np.floor(along * scale * rng.choice([1.5, 2.0]) + 50).astype(int) % 3
        for k, colour in enumerate(threads):
            cloth.paint(cloth.ink(far - 0.085, scale) * (stitch == k), colour)
    cloth.slub = 0.016
