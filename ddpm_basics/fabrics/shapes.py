"""Cells, stripes and the shapes in them: the arithmetic that the traditions share.

A shape returns about the distance to its outline, negative inside, in a cell from -0.5 to 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.colour import Array

Numbers = NDArray[np.int64]
Shape = Callable[[Array, Array], Array]


def cells(t: Array) -> tuple[Numbers, Array]:
    """Split a coordinate into the number of its cell and the place in it, -0.5 to 0.5."""
    number = np.floor(t)
    return number.astype(np.int64), t - number - 0.5


def fold(t: Array) -> Array:
    """Return the place in the cell, -0.5 to 0.5."""
    return t - np.floor(t) - 0.5


def wave(t: Array) -> Array:
    """Return a triangle wave of period 1 from 0 to 1."""
    return 2 * np.abs(t - np.floor(t) - 0.5)


def radius(u: Array, v: Array) -> Array:
    """Return the distance from the middle of the cell."""
    return np.sqrt(u * u + v * v)


def lookup(table: Numbers, i: Numbers, j: Numbers) -> Numbers:
    """Return table[i, j] with the table repeated without end in both directions."""
    entries: Numbers = table[i % table.shape[0], j % table.shape[1]]
    return entries


def grid(
    cloth: Cloth, scale: float, brick: bool = False, aspect: float = 1.0
) -> tuple[Numbers, Numbers, Array, Array]:
    """Cut the cloth into cells, `scale` to a unit; return numbers (i, j) and places (u, v)."""
    j, v = cells(cloth.y * scale / aspect + cloth.rng.uniform())
    across = cloth.x * scale + cloth.rng.uniform()
    i, u = cells(across + 0.5 * (j % 2) if brick else across)
    return i, j, u, v


def each(number: Numbers, shapes: Sequence[Shape], u: Array, v: Array) -> Array:
    """Return the distance to shapes[number] at every point."""
    distance = np.empty_like(u)
    for k, shape in enumerate(shapes):
        here = number == k
        if here.any():
            distance[here] = shape(u[here], v[here])
    return distance


def sett(
    rng: np.random.Generator, colours: list[int], least: int = 2, most: int = 5
) -> tuple[Array, Numbers]:
    """Make up an order of stripes, mirrored about its middle: (edges in 0..0.5, colour numbers)."""
    count = int(rng.integers(least, most + 1))
    widths = rng.uniform(0.35, 1.0, count) * rng.choice([1.0, 1.0, 2.2], count)
    edges = 0.5 * np.cumsum(widths)[:-1] / widths.sum()
    order = [int(colours[rng.integers(len(colours))])]
    while len(order) < count:
        step = int(colours[rng.integers(len(colours))])
        if step != order[-1]:
            order.append(step)
    return edges, np.array(order)


def striped(stripes: tuple[Array, Numbers], u: Array) -> Numbers:
    """Return the colour numbers of a sett at the places u, -0.5 to 0.5."""
    edges, order = stripes
    numbers: Numbers = order[np.searchsorted(edges, np.abs(u))]
    return numbers


def rings(u: Array, v: Array, count: int = 3, first: float = 0.12, width: float = 0.055) -> Array:
    """Concentric rings with a full middle."""
    r = radius(u, v)
    step = (0.44 - first) / max(count - 1, 1)
    nearest = first + step * np.clip(np.round((r - first) / step), 0, count - 1)
    return np.minimum(np.abs(r - nearest) - width / 2, r - first * 0.45)


def petals(u: Array, v: Array, count: int = 6, low: float = 0.14, high: float = 0.42) -> Array:
    """A flower or star with so many points."""
    middle, swing = (high + low) / 2, (high - low) / 2
    waves: Array = swing * np.cos(count * np.arctan2(v, u))
    return 0.7 * (radius(u, v) - middle - waves)


def sun(u: Array, v: Array, count: int = 8) -> Array:
    """A disc with rays."""
    r, angle = radius(u, v), np.arctan2(v, u)
    rays = np.maximum(np.abs(fold(angle * count / (2 * np.pi))) * r * 6.28 / count - 0.03, r - 0.45)
    return np.minimum(np.maximum(rays, 0.24 - r), np.abs(r - 0.15) - 0.045)


def spiral(u: Array, v: Array, turns: float = 2.5, width: float = 0.07) -> Array:
    """A line that winds out from the middle."""
    r, angle = radius(u, v), np.arctan2(v, u) / (2 * np.pi)
    pitch = 0.44 / turns
    return np.maximum(np.abs(fold(r / pitch - angle)) * pitch - width / 2, r - 0.45)


def lattice(u: Array, v: Array, count: int = 3, width: float = 0.06) -> Array:
    """Crossing diagonals."""
    p, q = (u + v) * count / 2, (u - v) * count / 2
    lines = np.minimum(0.5 - np.abs(fold(p)), 0.5 - np.abs(fold(q))) * 1.4 / count
    return np.maximum(lines - width / 2, np.maximum(np.abs(u), np.abs(v)) - 0.45)


def dots(u: Array, v: Array, count: int = 3, size: float = 0.085) -> Array:
    """Dots in rows."""
    p, q = fold((u + 0.5) * count), fold((v + 0.5) * count)
    return radius(p, q) / count - size


def zigzag(
    u: Array, v: Array, count: int = 3, swing: float = 0.14, width: float = 0.08, teeth: float = 2.0
) -> Array:
    """Zigzag lines, one above the other."""
    t = v - swing * wave(u * teeth) + swing / 2
    return np.abs(fold(t * count + 0.5 * (1 - count % 2))) / count - width / 2


def cross(u: Array, v: Array, arm: float = 0.38, width: float = 0.13) -> Array:
    """An upright cross."""
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - arm, b - width / 2), np.maximum(b - arm, a - width / 2))


def saltire(u: Array, v: Array, arm: float = 0.4, width: float = 0.13) -> Array:
    """A cross on its side."""
    return cross((u + v) * 0.7071, (u - v) * 0.7071, arm * 1.25, width)


def lozenges(u: Array, v: Array, count: int = 2, width: float = 0.08) -> Array:
    """Diamonds, one within the other."""
    t = (np.abs(u) + np.abs(v)) * 0.7071
    step = 0.31 / count
    nearest = step * np.clip(np.round(t / step), 1, count)
    return np.minimum(np.abs(t - nearest) - width / 2, t - 0.055)


def leaf(u: Array, v: Array, width: float = 0.24) -> Array:
    """A leaf with its veins left open."""
    p, q = (u + v) * 0.7071, (u - v) * 0.7071
    body = np.abs(q) - width * (1 - (p / 0.5) ** 2)
    veins = np.minimum(np.abs(q), np.abs(fold((np.abs(q) * 0.9 + p) * 6)) / 6 + 0.008) - 0.024
    return np.maximum(body * 0.8, -veins)


def cashew(u: Array, v: Array) -> Array:
    """A bent drop: the paisley, or cashew, of the kanga."""
    bend = u - 0.9 * (v + 0.1) ** 2 + 0.10
    drop = np.sqrt(bend * bend + 0.45 * (v - 0.08) ** 2) - (0.20 + 0.30 * v)
    return 0.75 * np.maximum(drop, radius(u, v) - 0.47)


def heart(u: Array, v: Array) -> Array:
    """A heart with its point down."""
    a = np.abs(u)
    lobes = radius(a - 0.19, v + 0.14) - 0.22
    point = np.maximum(0.78 * a + 0.62 * v - 0.262, -0.14 - v)
    return np.minimum(lobes, point)


def horns(u: Array, v: Array) -> Array:
    """Two pairs of curling horns, mirrored."""
    a, b = np.abs(u) - 0.21, np.abs(v) - 0.21
    curls = np.maximum(spiral(a * 1.9, b * 1.9, 1.6, 0.15) / 1.9, radius(a, b) - 0.22)
    bars = np.maximum(np.abs(u) - 0.045, np.abs(v) - 0.42)
    return np.minimum(curls, np.minimum(bars, np.maximum(np.abs(v) - 0.04, np.abs(u) - 0.25)))


def twist(u: Array, v: Array) -> Array:
    """Two winding lines side by side."""
    t = np.abs(u - 0.24 * (wave(v * 2.2) - 0.5))
    return np.maximum(np.abs(t - 0.11) - 0.055, np.abs(v) - 0.43)


def comb(u: Array, v: Array) -> Array:
    """A wooden comb."""
    top = np.maximum(np.abs(u) - 0.28, np.abs(v + 0.02) - 0.09)
    teeth = np.maximum(np.abs(fold(u * 8.2 + 0.5)) / 8.2 - 0.036, np.abs(v - 0.2) - 0.24)
    teeth = np.maximum(teeth, np.abs(u) - 0.28)
    grip = np.abs(radius(u, v + 0.26) - 0.14) - 0.05
    return np.minimum(np.minimum(top, teeth), grip)
