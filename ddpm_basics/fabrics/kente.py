"""Kente: narrow strips with blocks of weft, sewn edge to edge."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.shapes import Numbers, cells, sett, striped

KENTE_DYES = """
1b1512 e3a11c b3202a 1d7340 e9c65a
241019 d8951a 8f1730 23713c f0d58a
14213f f0b323 1f4fa3 c22c2c f3e3b5
201a17 f2c230 e0661d 2c7a4b f5e6c0
1a1a3a c9a24a 6a2a86 e26a8d f2e2c4
27301f e2b53a 9a2b22 2f5f9e ece0bd
2a1c14 d46a1f f0c14b 1e6f74 f3e4c3
"""


def kente(cloth: Cloth) -> None:
    """Kente: narrow strips with blocks of weft, sewn edge to edge; Asante and Ewe, Ghana and Togo.

    Silk or rayon, woven by men on the horizontal loom; blocks of dense weft alternate with plain
    warp stripes. See Doran H. Ross, "Wrapped in Pride" (1998); Venice Lamb, "West African Weaving"
    (1975).
    """
    rng = cloth.rng
    cloth.hold(turn=5, hand=0.007)
    colours = cloth.dyes(KENTE_DYES)
    strips = rng.uniform(1.2, 2.2)
    long = rng.uniform(0.75, 1.25)
    s, u = cells(cloth.x * strips + rng.uniform())
    shift = rng.choice([0.0, 0.5, 0.5, 1.0]) * s
    b, v = cells(cloth.y * strips / long + shift + rng.uniform())
    fine = 9 if strips < 1.6 else 7
    p, q = (np.floor((t + 0.5) * fine) - fine // 2 for t in (u, v))
    a, z = np.abs(p), np.abs(q)

    def block(kind: int) -> Numbers:
        order = rng.permutation(5)
        if kind == 0:  # weft bars
            n = int(rng.choice([5, 7]))
            index = np.abs(np.floor((v + 0.5) * n).astype(int) - n // 2) % 3
        elif kind == 1:  # chequers
            n = int(rng.choice([3, 4, 5]))
            t = np.floor((u + 0.5) * n) + np.floor((v + 0.5) * n)
            index = t.astype(int) % 2
        elif kind == 2:  # nested diamonds
            index = np.minimum((a + z) // 2, 3).astype(int)
        elif kind == 3:  # hourglass
            index = np.where(z >= a, 0, 1 + (a % 3 == 0))
        else:  # chevrons
            index = ((q + a) // 2).astype(int) % 3
        numbers: Numbers = order[index]
        return numbers

    warp = striped(sett(rng, [0, 1, 2, 3, 4]), u)
    kinds = rng.permutation(5)
    first, second = block(kinds[0]), block(kinds[1])
    layout = rng.integers(4)
    odd = b % 2 == 0
    if layout == 0:  # blocks and plain warp by turns
        index = np.where(odd, first, warp)
    elif layout == 1:  # two blocks by turns: the weaver has used up every design
        index = np.where(odd, first, second)
    elif layout == 2:  # two strips by turns
        index = np.where(s % 2 == 0, np.where(odd, first, warp), np.where(odd, warp, second))
    else:  # one block, plain warp, another block, plain warp
        index = np.where(odd, warp, np.where(b % 4 == 1, first, second))
    bars = (np.abs(v) > 0.40) & (layout != 1)
    index = np.where(bars, rng.integers(5), index)
    cloth.weave(index, colours)
    cloth.paint(0.45 * cloth.ink(0.485 - np.abs(u), strips), colours[0])
    cloth.slub = 0.02
