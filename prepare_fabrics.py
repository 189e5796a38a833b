# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "pillow>=10.1", "tqdm>=4.66.1"]
# ///
"""The data set: 1,059 little pictures of cloth, after twelve African textile traditions.

    python prepare_fabrics.py                               # african_fabric_processed/
    python prepare_fabrics.py --split heldout --count 512   # african_fabric_heldout/
    python prepare_fabrics.py --photos my_photographs       # your own pictures instead

Writes FOLDER/<tradition>/NNNN.png and FOLDER/manifest.json, which names the seed, every image's
tradition and a checksum over all pixels. The same command again finds the folder complete and does
nothing, or adds what an interrupted run left out.

The fabrics are drawn by the twelve short functions below, one for each tradition. They are drawings
in homage, made with a few lines of arithmetic; they are not authentic textiles, and what the real
cloths mean to the people who make and wear them is not in them. Every function names the cloth, its
makers and a book to begin with.

One image is a pure function of (seed, split, index): it has its own stream of random numbers, so
the pixels are the same on every run, whatever the number of worker processes. It is drawn at four
times the size or more, in the OKLab colour space, and reduced in linear light.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - this line is for those who have an older one
    sys.exit(f"Error: this is Python {sys.version.split()[0]}, but 3.10 or newer is needed.")
try:
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError
    from tqdm import tqdm
except ImportError as problem:
    sys.exit(f"Error: {problem}; mend it: {sys.executable} -m pip install numpy pillow tqdm")
except KeyboardInterrupt:
    print("\nInterrupted; nothing was written.", file=sys.stderr)
    sys.exit(130)

COUNT = 1059  # images, as many as the photographs that the course used
RANDOM_SEED = 0  # of the whole set; image i has a stream of its own under (seed, split, i)
IMAGE_SIZE = 64  # pixels on a side
DATA_VERSION = "1"  # changes whenever the pixels do: weights are trained on exactly these

OUTPUT = {"train": "african_fabric_processed", "heldout": "african_fabric_heldout"}
MANIFEST = "manifest.json"
PHOTOGRAPHS = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"}  # in upper or lower case
CHUNK = 8  # images that a worker process makes between two looks at the clock

MIN_CANVAS = 256  # pixels on a side of the drawing, at least four times IMAGE_SIZE
SPLITS = {"train": 0, "heldout": 1}  # first word of an image's random stream
HUE_JITTER = 5.0  # degrees, standard deviation, one draw for each dye
CHROMA_JITTER = 0.10  # standard deviation of the logarithm of the chroma
LIGHTNESS_JITTER = 0.022  # standard deviation, OKLab lightness runs from 0 to 1

# --------------------------------------------------------------------------- colour

# Björn Ottosson, "A perceptual color space for image processing" (2020): linear sRGB -> cone
# responses -> (cube root) -> lightness, green-red, blue-yellow.
RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
LMS_TO_RGB = np.linalg.inv(RGB_TO_LMS)
LAB_TO_LMS = np.linalg.inv(LMS_TO_LAB)


def oklab(colour: str) -> np.ndarray:
    """Return the OKLab coordinates, shape (3,), of an sRGB colour written as six hex digits."""
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return LMS_TO_LAB @ np.cbrt(RGB_TO_LMS @ linear)


def linear_rgb(lab: np.ndarray) -> np.ndarray:
    """Return linear sRGB, unclipped, for OKLab values; the channels are the first axis of both."""
    lms = np.tensordot(LAB_TO_LMS, lab, 1)
    return np.tensordot(LMS_TO_RGB, lms * lms * lms, 1)


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Clip linear sRGB to [0, 1] and encode it as bytes with the sRGB transfer curve."""
    linear = np.clip(linear, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.floor(srgb * 255 + 0.5).astype(np.uint8)


def dye(rng: np.random.Generator, colours: str) -> np.ndarray:
    """Dye a palette: jitter each colour in OKLCh, with part of the hue shift common to all.

    `colours` is a row of hex colours; returns OKLab, shape (number of colours, 3).
    """
    lab = np.stack([oklab(colour) for colour in colours.split()])
    n = len(lab)
    chroma = np.hypot(lab[:, 1], lab[:, 2]) * np.exp(CHROMA_JITTER * rng.standard_normal(n))
    shift = HUE_JITTER * (rng.standard_normal(n) + rng.standard_normal())
    hue = np.arctan2(lab[:, 2], lab[:, 1]) + np.deg2rad(shift)
    light = lab[:, 0] + LIGHTNESS_JITTER * (rng.standard_normal(n) + rng.standard_normal())
    return np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], 1)


# --------------------------------------------------------------------------- the cloth


class Cloth:
    """A square of cloth to draw on.

    `x` and `y`, shape (pixels, pixels), run from -1 to 1 across the picture. They are turned a
    little and bent by smooth noise, so whatever is drawn with them has the edge of a hand. `lab`,
    shape (3, pixels, pixels), is what has been painted so far.
    """

    def __init__(self, rng: np.random.Generator, pixels: int):
        self.rng, self.pixels = rng, pixels
        self.slub = 0.014  # unevenness of the yarn, in OKLab lightness
        self.mottle = 0.016  # unevenness of the dye, in OKLab lightness
        self.lab = np.zeros((3, pixels, pixels))

    def hold(self, turn: float = 4.0, hand: float = 0.010, sag: float = 0.03) -> None:
        """Lay the cloth down: turn (degrees), hand (fine wobble) and sag (slow bend)."""
        rng, n = self.rng, self.pixels
        axis = (np.arange(n) + 0.5) * (2 / n) - 1
        x, y = axis[None, :], axis[:, None]
        angle = np.deg2rad(turn * np.clip(rng.standard_normal(), -2, 2) / 2)
        cos, sin = np.cos(angle), np.sin(angle)
        self.x = cos * x - sin * y
        self.y = sin * x + cos * y
        if hand or sag:
            self.x = self.x + sag * self.noise(2) + hand * self.noise(13)
            self.y = self.y + sag * self.noise(2) + hand * self.noise(13)

    def noise(self, cells: int) -> np.ndarray:
        """Return smooth noise with about `cells` bumps across, mean 0, spread near 0.7."""
        between = bicubic(self.pixels, cells)
        return between @ self.rng.standard_normal((cells + 3, cells + 3)) @ between.T

    def dyes(self, palettes: str) -> np.ndarray:
        """Choose one of the palettes, a line each, and dye it."""
        rows = palettes.strip().splitlines()
        return dye(self.rng, rows[self.rng.integers(len(rows))])

    def ink(self, distance: np.ndarray, scale: float = 1.0, soft: float = 1.0) -> np.ndarray:
        """Return coverage in [0, 1]: full where a distance is negative, soft by a pixel or so.

        `scale` is how many of the distance's units go into one unit of `x`.
        """
        return np.clip(0.5 - distance * (self.pixels / (2 * scale * soft)), 0, 1)

    def fill(self, colour: np.ndarray) -> None:
        """Paint the whole cloth in one colour."""
        self.lab[:] = colour[:, None, None]

    def paint(self, cover: np.ndarray, colour: np.ndarray) -> None:
        """Paint a colour, shape (3,), over what is there, where `cover` says so."""
        for channel in range(3):
            self.lab[channel] += cover * (colour[channel] - self.lab[channel])

    def weave(self, index: np.ndarray, colours: np.ndarray) -> None:
        """Set every point to the colour with that index."""
        self.lab = np.ascontiguousarray(np.moveaxis(colours[index], -1, 0))


@functools.lru_cache
def bicubic(pixels: int, cells: int) -> np.ndarray:
    """Return the matrix, (pixels, cells + 3), that puts a smooth curve through random heights.

    Catmull-Rom weights: Keys, "Cubic convolution interpolation" (1981), equation 4 with a = -1/2.
    """
    at = (np.arange(pixels) + 0.5) * cells / pixels + 1
    far = np.abs(at[:, None] - np.arange(cells + 3))
    near = (1.5 * far - 2.5) * far * far + 1
    wide = ((-0.5 * far + 2.5) * far - 4) * far + 2
    return np.where(far < 1, near, np.where(far < 2, wide, 0.0))


def cells(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a coordinate into the number of its cell and the place in it, -0.5 to 0.5."""
    number = np.floor(t)
    return number.astype(np.int64), t - number - 0.5


def fold(t: np.ndarray) -> np.ndarray:
    """Return the place in the cell, -0.5 to 0.5."""
    return t - np.floor(t) - 0.5


def wave(t: np.ndarray) -> np.ndarray:
    """Return a triangle wave of period 1 from 0 to 1."""
    return 2 * np.abs(t - np.floor(t) - 0.5)


def radius(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the distance from the middle of the cell."""
    return np.sqrt(u * u + v * v)


def lookup(table: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return table[i, j] with the table repeated without end in both directions."""
    return table[i % table.shape[0], j % table.shape[1]]


def grid(cloth: Cloth, scale: float, brick: bool = False, aspect: float = 1.0):
    """Cut the cloth into cells, `scale` to a unit; return numbers (i, j) and places (u, v)."""
    j, v = cells(cloth.y * scale / aspect + cloth.rng.uniform())
    across = cloth.x * scale + cloth.rng.uniform()
    i, u = cells(across + 0.5 * (j % 2) if brick else across)
    return i, j, u, v


def each(number: np.ndarray, shapes: list, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the distance to shapes[number] at every point."""
    distance = np.empty_like(u)
    for k, shape in enumerate(shapes):
        here = number == k
        if here.any():
            distance[here] = shape(u[here], v[here])
    return distance


def sett(rng: np.random.Generator, colours: list[int], least: int = 2, most: int = 5) -> tuple:
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


def striped(stripes: tuple, u: np.ndarray) -> np.ndarray:
    """Return the colour numbers of a sett at the places u, -0.5 to 0.5."""
    edges, order = stripes
    return order[np.searchsorted(edges, np.abs(u))]


# --------------------------------------------------------------------------- shapes
# Each returns about the distance to its outline, negative inside, in a cell from -0.5 to 0.5.


def rings(u, v, count=3, first=0.12, width=0.055):
    """Concentric rings with a full middle."""
    r = radius(u, v)
    step = (0.44 - first) / max(count - 1, 1)
    nearest = first + step * np.clip(np.round((r - first) / step), 0, count - 1)
    return np.minimum(np.abs(r - nearest) - width / 2, r - first * 0.45)


def petals(u, v, count=6, low=0.14, high=0.42):
    """A flower or star with so many points."""
    middle, swing = (high + low) / 2, (high - low) / 2
    return 0.7 * (radius(u, v) - middle - swing * np.cos(count * np.arctan2(v, u)))


def sun(u, v, count=8):
    """A disc with rays."""
    r, angle = radius(u, v), np.arctan2(v, u)
    rays = np.maximum(np.abs(fold(angle * count / (2 * np.pi))) * r * 6.28 / count - 0.03, r - 0.45)
    return np.minimum(np.maximum(rays, 0.24 - r), np.abs(r - 0.15) - 0.045)


def spiral(u, v, turns=2.5, width=0.07):
    """A line that winds out from the middle."""
    r, angle = radius(u, v), np.arctan2(v, u) / (2 * np.pi)
    pitch = 0.44 / turns
    return np.maximum(np.abs(fold(r / pitch - angle)) * pitch - width / 2, r - 0.45)


def lattice(u, v, count=3, width=0.06):
    """Crossing diagonals."""
    p, q = (u + v) * count / 2, (u - v) * count / 2
    lines = np.minimum(0.5 - np.abs(fold(p)), 0.5 - np.abs(fold(q))) * 1.4 / count
    return np.maximum(lines - width / 2, np.maximum(np.abs(u), np.abs(v)) - 0.45)


def dots(u, v, count=3, size=0.085):
    """Dots in rows."""
    p, q = fold((u + 0.5) * count), fold((v + 0.5) * count)
    return radius(p, q) / count - size


def zigzag(u, v, count=3, swing=0.14, width=0.08, teeth=2.0):
    """Zigzag lines, one above the other."""
    t = v - swing * wave(u * teeth) + swing / 2
    return np.abs(fold(t * count + 0.5 * (1 - count % 2))) / count - width / 2


def cross(u, v, arm=0.38, width=0.13):
    """An upright cross."""
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - arm, b - width / 2), np.maximum(b - arm, a - width / 2))


def saltire(u, v, arm=0.4, width=0.13):
    """A cross on its side."""
    return cross((u + v) * 0.7071, (u - v) * 0.7071, arm * 1.25, width)


def lozenges(u, v, count=2, width=0.08):
    """Diamonds, one within the other."""
    t = (np.abs(u) + np.abs(v)) * 0.7071
    step = 0.31 / count
    nearest = step * np.clip(np.round(t / step), 1, count)
    return np.minimum(np.abs(t - nearest) - width / 2, t - 0.055)


def leaf(u, v, width=0.24):
    """A leaf with its veins left open."""
    p, q = (u + v) * 0.7071, (u - v) * 0.7071
    body = np.abs(q) - width * (1 - (p / 0.5) ** 2)
    veins = np.minimum(np.abs(q), np.abs(fold((np.abs(q) * 0.9 + p) * 6)) / 6 + 0.008) - 0.024
    return np.maximum(body * 0.8, -veins)


def cashew(u, v):
    """A bent drop: the paisley, or cashew, of the kanga."""
    bend = u - 0.9 * (v + 0.1) ** 2 + 0.10
    drop = np.sqrt(bend * bend + 0.45 * (v - 0.08) ** 2) - (0.20 + 0.30 * v)
    return 0.75 * np.maximum(drop, radius(u, v) - 0.47)


def heart(u, v):
    """A heart with its point down."""
    a = np.abs(u)
    lobes = radius(a - 0.19, v + 0.14) - 0.22
    point = np.maximum(0.78 * a + 0.62 * v - 0.262, -0.14 - v)
    return np.minimum(lobes, point)


def horns(u, v):
    """Two pairs of curling horns, mirrored."""
    a, b = np.abs(u) - 0.21, np.abs(v) - 0.21
    curls = np.maximum(spiral(a * 1.9, b * 1.9, 1.6, 0.15) / 1.9, radius(a, b) - 0.22)
    bars = np.maximum(np.abs(u) - 0.045, np.abs(v) - 0.42)
    return np.minimum(curls, np.minimum(bars, np.maximum(np.abs(v) - 0.04, np.abs(u) - 0.25)))


def twist(u, v):
    """Two winding lines side by side."""
    t = np.abs(u - 0.24 * (wave(v * 2.2) - 0.5))
    return np.maximum(np.abs(t - 0.11) - 0.055, np.abs(v) - 0.43)


def comb(u, v):
    """A wooden comb."""
    top = np.maximum(np.abs(u) - 0.28, np.abs(v + 0.02) - 0.09)
    teeth = np.maximum(np.abs(fold(u * 8.2 + 0.5)) / 8.2 - 0.036, np.abs(v - 0.2) - 0.24)
    teeth = np.maximum(teeth, np.abs(u) - 0.28)
    grip = np.abs(radius(u, v + 0.26) - 0.14) - 0.05
    return np.minimum(np.minimum(top, teeth), grip)


# --------------------------------------------------------------------------- twelve traditions


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

    def block(kind):
        order = rng.permutation(5)
        if kind == 0:  # weft bars
            n = int(rng.choice([5, 7]))
            return order[np.abs(np.floor((v + 0.5) * n).astype(int) - n // 2) % 3]
        if kind == 1:  # chequers
            n = int(rng.choice([3, 4, 5]))
            t = np.floor((u + 0.5) * n) + np.floor((v + 0.5) * n)
            return order[t.astype(int) % 2]
        if kind == 2:  # nested diamonds
            return order[np.minimum((a + z) // 2, 3).astype(int)]
        if kind == 3:  # hourglass
            return order[np.where(z >= a, 0, 1 + (a % 3 == 0))]
        return order[((q + a) // 2).astype(int) % 3]  # chevrons

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
    kinds = [
        lambda u, v: rings(u, v, int(few), first, 0.07),
        lambda u, v: petals(u, v, int(petal), first, 0.43),
        lambda u, v: sun(u, v, int(petal) + 4),
        lambda u, v: spiral(u, v, few - 0.5, 0.085),
        lambda u, v: lattice(u, v, few, 0.075),
        lambda u, v: dots(u, v, 3, 0.1),
        lambda u, v: np.maximum(zigzag(u, v, 3, 0.16, 0.10), np.maximum(abs(u), abs(v)) - 0.43),
        lambda u, v: leaf(u, v),
        lambda u, v: lozenges(u, v, 2, 0.09),
    ]
    petal, few, first = rng.choice([4, 5, 6, 7, 8]), rng.choice([2, 3]), rng.uniform(0.11, 0.17)
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


BOGOLAN_DYES = """
2a1c14 eadfc4 9a5a2a
1d1714 e3d3ae b06a2c
40261a efdcb4 8c4a22
33211a d9b77c 6e3a1f
241a18 e9e2d2 5c4a3c
5a3019 f0dcae 2a1a12
"""


def bogolan(cloth: Cloth) -> None:
    """Bogolanfini: cotton painted with iron-rich mud over a leaf dye; Bamana women, Mali.

    The dark mud is painted around the figures, which stay the colour of the cloth. See Victoria L.
    Rovine, "Bogolan: Shaping Culture through Cloth in Contemporary Mali" (2001); Picton and Mack,
    "African Textiles" (1979).
    """
    rng = cloth.rng
    cloth.hold(turn=6, hand=0.015)
    mud, line, warm = cloth.dyes(BOGOLAN_DYES)
    if rng.uniform() < 0.15:
        mud, line = line, mud
    cloth.fill(mud)
    wide = rng.uniform(0.9, 1.25)
    kinds = [
        lambda u, v: zigzag(u, v, 2, 0.22, 0.11 * wide, 1.0),
        lambda u, v: saltire(u, v, 0.34, 0.13 * wide),
        lambda u, v: lozenges(u, v, 2, 0.09 * wide),
        lambda u, v: cross(u, v, 0.32, 0.13 * wide),
        lambda u, v: dots(u, v, 2, 0.105 * wide),
        lambda u, v: rings(u, v, 2, 0.18, 0.10 * wide),
        lambda u, v: np.minimum(lattice(u, v, 2, 0.10 * wide), radius(u, v) - 0.07),
        lambda u, v: np.abs(fold(u * 3)) / 3 - 0.05 * wide,
    ]
    layout = rng.integers(4)
    scale = rng.uniform(0.9, 1.7)
    if layout == 0:  # bands, each of one figure
        i, j, u, v = grid(cloth, scale)
        table = rng.permutation(8)[:4][None, :]
        frame = np.abs(0.5 - np.abs(v)) - 0.045 * wide
    elif layout == 1:  # squares of two or three figures
        i, j, u, v = grid(cloth, scale)
        table = rng.permutation(8)[rng.integers(0, 3, (3, 3))]
        frame = 0.5 - np.maximum(np.abs(u), np.abs(v)) - 0.04 * wide
    else:  # a diamond net, or diamonds without the net
        x, y = cloth.x, cloth.y
        cloth.x, cloth.y = (x + y) * 0.7071, (x - y) * rng.uniform(0.55, 0.9)
        i, j, u, v = grid(cloth, scale)
        table = rng.choice([1, 2, 3, 4, 5], (1, 2) if layout == 2 else (2, 2))
        frame = 0.5 - np.maximum(np.abs(u), np.abs(v)) - (0.05 * wide if layout == 2 else -1)
    which = lookup(table, i, j)
    distance = np.minimum(each(which, kinds, u, v), frame)
    if rng.uniform() < 0.5:  # some fields washed lighter
        cloth.paint(0.8 * (which == table.flat[0]) * (frame > 0), warm)
    distance = distance + 0.012 * cloth.noise(20)
    cloth.paint(cloth.ink(distance, scale, 2.0), line)
    cloth.paint(0.30 * np.clip(cloth.noise(9) - 0.2, 0, 1), warm)
    cloth.mottle = 0.03


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


def wax_records(cloth: Cloth, scale: float, u, v, spokes, slip, dyes) -> None:
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


def wax_eyes(cloth: Cloth, scale: float, u, v, spokes, dyes) -> None:
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


def wax_shells(cloth: Cloth, scale: float, dyes) -> None:
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


SHWESHWE_DYES = """
1c2760 eef0f4 6f86c8
15204e e9eef6 5575b8
54281a f4e8d8 b5754a
9c1c2c f8ece6 e07a72
155e63 eef6f0 5aa9a4
5b2463 f4ebf4 a871b4
"""


def shweshwe(cloth: Cloth) -> None:
    """Shweshwe: printed cotton with a fine white discharge design; Sotho and Xhosa dress.

    Rollers took the colour out of dyed cloth in dots and hairlines; indigo came first, then brown
    and red. See Juliette Leeb-du Toit, "isiShweshwe" (2017); Chris Spring, "African Textiles Today"
    (2012).
    """
    rng = cloth.rng
    cloth.hold(turn=8, hand=0.003, sag=0.03)
    ground, white, tint = cloth.dyes(SHWESHWE_DYES)
    cloth.fill(ground)
    scale = rng.uniform(1.3, 2.4)
    layout = rng.integers(6)
    i, j, u, v = grid(cloth, scale, brick=bool(rng.integers(2)) and layout < 3)
    r, angle = radius(u, v), np.arctan2(v, u)
    count = int(rng.choice([6, 8]))
    away = fold(angle * count / (2 * np.pi) + 0.5)

    def beads(at, size):  # a ring of dots
        return radius((r - at), away * 2 * np.pi * at / count) - size

    if layout == 0:  # dotted rounds
        d = np.minimum(beads(0.33, 0.075), r - 0.10)
        tinted = np.abs(r - 0.20) - 0.03
    elif layout == 1:  # flowers
        d = np.minimum(np.abs(petals(u, v, count, 0.16, 0.38)) - 0.04, r - 0.07)
        tinted = radius(np.abs(u) - 0.5, np.abs(v) - 0.5) - 0.12
    elif layout == 2:  # diamonds of dots
        p, q = fold((u + v) * 2), fold((u - v) * 2)
        far = np.abs(u) + np.abs(v)
        d = np.where(far < 0.5, radius(p, q) / 2 - 0.10, np.abs(far - 0.55) - 0.05)
        tinted = np.abs(far - 0.75) - 0.04
    elif layout == 3:  # stripes of dots and lines
        if rng.uniform() < 0.4:
            i, u, v = j, v, u
        column = i % int(rng.choice([2, 3])) == 0
        lines, bead = rng.choice([1.0, 2.0, 3.0]), rng.choice([1.0, 2.0, 3.0])
        rung = np.abs(fold(u * lines)) / lines - rng.uniform(0.03, 0.07)
        d = np.where(column, radius(u, fold(v * bead) / bead) - rng.uniform(0.3, 0.4) / bead, rung)
        tinted = np.where(column, 0.5 - np.abs(u) - rng.uniform(0.03, 0.09), 1.0)
    elif layout == 4:  # scallops
        r = radius(u, v - 0.5)
        at = rng.uniform(0.30, 0.47)
        d = np.minimum(np.abs(r - at) - rng.uniform(0.03, 0.06), radius(u, v - 0.4) - 0.10)
        d = np.minimum(d, radius(np.abs(u) - 0.5, v + rng.uniform(0.0, 0.3)) - rng.uniform(0, 0.12))
        tinted = np.abs(r - at - rng.uniform(0.12, 0.25)) - 0.035
    else:  # a net with stars at the crossings
        d = np.minimum(np.abs(np.abs(u) - np.abs(v)) * 0.7 - 0.035, petals(u, v, 8, 0.10, 0.26))
        tinted = radius(0.5 - np.abs(u), np.minimum(np.abs(v), 0.5)) - 0.10
    cloth.paint(0.9 * cloth.ink(tinted, scale), tint)
    cloth.paint(cloth.ink(d, scale), white)
    cloth.slub, cloth.mottle = 0.008, 0.008


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


def fish(u, v):
    """A fish, its head to the right, with its scales left open."""
    body = np.abs(v) - 0.21 * (1 - ((u - 0.05) / 0.36) ** 2)
    tail = np.maximum(np.abs(v) + (u + 0.26) * 1.1 - 0.04, -(u + 0.46))
    fins = np.maximum(np.abs(v) - 0.30 + 1.2 * np.abs(u), -0.4 + np.abs(u))
    scales = np.maximum(np.abs(fold((u + np.abs(v) * 0.8) * 7)) / 7 - 0.022, np.abs(u) - 0.2)
    eye = np.abs(radius(u - 0.27, v + 0.04) - 0.035) - 0.016
    return np.maximum(np.minimum(np.minimum(body, tail), fins), -np.minimum(scales, eye))


def turtle(u, v):
    """A turtle from above, with a chequered shell."""
    shell = radius(u, v * 0.85) - 0.27
    legs = radius(np.abs(u) - 0.27, np.abs(v) - 0.27) - 0.085
    head = radius(u, v + 0.40) - 0.09
    tail = np.maximum(np.abs(u) - 0.03, np.abs(v - 0.36) - 0.11)
    p, q = fold((u + v) * 5), fold((u - v) * 5)
    net = np.maximum(np.minimum(0.5 - np.abs(p), 0.5 - np.abs(q)) / 5 - 0.02, shell + 0.05)
    outer = np.minimum(np.minimum(shell, legs), np.minimum(head, tail))
    return np.maximum(outer, -net)


def bird(u, v):
    """A long-legged bird, looking right."""
    body = radius((u + 0.06) * 0.72, v + 0.02 + 0.25 * (u + 0.06)) - 0.17
    neck = np.maximum(np.abs(u - 0.20 + 0.25 * (v + 0.2)) - 0.05, np.abs(v + 0.20) - 0.15)
    head = radius(u - 0.25, v + 0.35) - 0.075
    beak = np.maximum(np.abs(v + 0.34) + 0.35 * (u - 0.46), 0.3 - u) - 0.01
    legs = np.maximum(np.abs(np.abs(u + 0.03) - 0.08) - 0.026, np.abs(v - 0.28) - 0.17)
    feet = np.maximum(np.abs(v - 0.43) - 0.025, np.abs(u) - 0.20)
    wing = np.maximum(np.abs(fold((v * 1.0 + 0.5 * u) * 8)) / 8 - 0.022, body + 0.06)
    outer = np.minimum(
        np.minimum(np.minimum(body, neck), np.minimum(head, beak)), np.minimum(legs, feet)
    )
    return np.maximum(outer, -wing)


def crocodile(u, v):
    """A crocodile from above, along the cell, with bands on its back."""
    half = np.interp(u, [-0.47, -0.2, 0.0, 0.2, 0.27, 0.46], [0.0, 0.11, 0.15, 0.12, 0.085, 0.06])
    body = np.maximum(np.abs(v) - half, u - 0.46)
    legs = np.maximum(np.abs(np.abs(u) - 0.17 - 0.1 * np.abs(v)) - 0.042, np.abs(v) - 0.31)
    spine = np.abs(fold(u * 7)) / 7 + np.abs(v) * 0.7 - 0.042
    return np.maximum(np.minimum(body, legs), -np.maximum(spine, np.abs(u) - 0.25))


def mask_face(u, v):
    """A carved face with horns."""
    face = radius(u * 1.25, (v - 0.05) * 0.82) - 0.30
    horns_ = np.abs(radius(np.abs(u) - 0.18, v + 0.24) - 0.17) - 0.04
    horns_ = np.maximum(horns_, v + 0.20)
    eyes = np.maximum(np.abs(v + 0.02) - 0.03, np.abs(np.abs(u) - 0.11) - 0.065)
    nose = np.maximum(np.abs(u) - 0.024, np.abs(v - 0.06) - 0.11)
    mouth = np.maximum(np.abs(v - 0.25) - 0.03, np.abs(u) - 0.075)
    return np.maximum(np.minimum(face, horns_), -np.minimum(np.minimum(eyes, nose), mouth))


KORHOGO_DYES = """
e8dcc0 2a1c16 a9703c
f0e7d2 1c1715 b5843f
dfcba2 33201a 8c4f2a
ead9b5 3e2a1c c08a45
e3d6c0 241a20 7a4a34
"""


def korhogo(cloth: Cloth) -> None:
    """Korhogo cloth: strips painted with animals and masks in mud; Senufo, Côte d'Ivoire.

    Freehand or stencilled in brown-black on undyed cotton: fish, turtle, bird, crocodile, masked
    dancer, within bands of geometry. See John Gillow, "African Textiles" (2003); Picton and Mack,
    "African Textiles" (1989).
    """
    rng = cloth.rng
    cloth.hold(turn=6, hand=0.013)
    ground, ink, warm = cloth.dyes(KORHOGO_DYES)
    cloth.fill(ground)
    kinds = [fish, turtle, bird, crocodile, mask_face]
    kinds += [lambda u, v, f=f: f(-u, v) for f in kinds[:3]]
    layout = rng.integers(4)
    scale = [0.56, 0.62, 0.95, 0.95][layout] * rng.uniform(0.9, 1.15)
    i, j, u, v = grid(cloth, scale, aspect=1.0 if layout != 2 else 1.25)
    if layout == 0:  # one animal
        u, v = cloth.x * scale + rng.uniform(-0.05, 0.05), cloth.y * scale
        i, j = np.zeros(u.shape, int), np.zeros(u.shape, int)
    table = rng.integers(0, 8, (1, 1) if layout == 0 else (3, 3))
    if layout == 2:  # rows of one animal
        table = rng.permutation(8)[:3][None, :]
    which = lookup(table, i, j)
    room = 1.18 if layout else 1.3
    distance = each(which, kinds, u * room, v * room) / room
    edge = 0.5 - np.maximum(np.abs(u), np.abs(v))
    if layout == 0:
        far = np.maximum(np.abs(u), np.abs(v)) - 0.42
        teeth = np.maximum(np.abs(far - 0.05) - 0.018 - 0.04 * wave(u * 9) * wave(v * 9), -far)
        distance = np.minimum(distance, teeth)
        cloth.paint(0.75 * cloth.ink(-far, scale), warm)
    elif layout == 2:
        band = 0.5 - np.abs(v)
        distance = np.minimum(distance, np.maximum(band - 0.05, wave(u * 5) * 0.1 - 0.05))
        cloth.paint(0.7 * cloth.ink(band - 0.06, scale), warm)
    elif layout == 3:
        cloth.paint(0.6 * ((i + j) % 2 == 0), warm)
        distance = np.minimum(distance, edge - 0.02)
    else:
        distance = np.minimum(distance, np.abs(edge - 0.015) - 0.02)
    cloth.paint(cloth.ink(distance + 0.008 * cloth.noise(24), scale, 2), ink)
    cloth.slub, cloth.mottle = 0.026, 0.02


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


def kanga_border(cloth: Cloth, along, inward, deep: float, scale: float, figure, dark) -> None:
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


def kanga_saying(cloth: Cloth, x, y, half: float, plate_colour, dark) -> None:
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
    shapes = [
        cashew,
        lambda u, v: petals(u, v, 6, 0.16, 0.4),
        lambda u, v: rings(u, v, 2, 0.2, 0.1),
    ]
    shapes += [lambda u, v: np.abs(u) + np.abs(v) - 0.36, lambda u, v: petals(u, v, 4, 0.1, 0.44)]
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
    (1989).
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


TRADITIONS = {
    "adinkra": adinkra,
    "adire": adire,
    "aso_oke": aso_oke,
    "bogolan": bogolan,
    "fugu": fugu,
    "kanga": kanga,
    "kente": kente,
    "korhogo": korhogo,
    "kuba": kuba,
    "ndebele": ndebele,
    "shweshwe": shweshwe,
    "wax_print": wax_print,
}


# --------------------------------------------------------------------------- the photograph


def finish(cloth: Cloth) -> None:
    """Turn the drawing into cloth under a lamp: yarn, dye, folds and uneven light."""
    rng = cloth.rng
    light = cloth.mottle * cloth.noise(5)
    for t in (cloth.x, cloth.y):  # uneven threads, in both directions
        yarn = cloth.slub * rng.standard_normal(256)
        light += yarn[((t + 2) * 60).astype(np.int64) % 256]
    cloth.lab[0] += light
    cloth.lab[1:] *= 1 + 0.05 * cloth.noise(4)
    angle, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.09)
    lamp = tilt * (np.cos(angle) * cloth.x + np.sin(angle) * cloth.y)
    lamp -= rng.uniform(0.0, 0.035) * (cloth.x**2 + cloth.y**2)
    folds = rng.uniform(0.0, 0.05) * cloth.noise(2)
    cloth.lab[0] *= 1 + lamp + folds
    cloth.lab[0] = np.minimum(cloth.lab[0], 0.46 + 0.5 * cloth.lab[0])  # white is never blown out
    cloth.lab[2] += rng.uniform(-0.006, 0.010)  # a warmer or a cooler lamp


def render(seed: int, index: int, split: str = "train", size: int = IMAGE_SIZE) -> np.ndarray:
    """Draw one fabric: a pure function of its arguments.

    Returns bytes, sRGB, shape (size, size, 3). Index i is of tradition i modulo their number, so
    every tradition has its fair share of any count, within one.
    """
    stream = np.random.SeedSequence(entropy=seed, spawn_key=(SPLITS[split], index))
    rng = np.random.Generator(np.random.PCG64(stream))
    cloth = Cloth(rng, size * max(4, -(-MIN_CANVAS // size)))
    names = list(TRADITIONS)
    TRADITIONS[names[index % len(names)]](cloth)
    finish(cloth)
    linear = np.clip(linear_rgb(cloth.lab), 0, 1).astype(np.float32)
    small = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.LANCZOS))
        for channel in linear
    ]
    return encode_srgb(np.stack(small, -1).astype(np.float64))


# --------------------------------------------------------------------------- photographs


class BrokenPhotograph(Exception):
    """A file that cannot be decoded; the message names it and says why."""


def flatten(image: Image.Image) -> Image.Image:
    """Return any kind of picture as RGB: over white where it is transparent, 16 bits scaled to 8.

    Raises ValueError for pixels that are neither integers of up to 16 bits nor colours.
    """
    if image.mode.startswith("I"):  # Pillow's own conversion would saturate
        levels = np.asarray(image).astype(np.float64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("more than 16 bits in a channel")
        image = Image.fromarray(np.floor(levels / 257 + 0.5).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def photograph(path: Path, size: int) -> np.ndarray:
    """Read a photograph, turn it upright, crop the middle square, and reduce that.

    Returns bytes, sRGB, shape (size, size, 3). Raises BrokenPhotograph.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("ignore")
            image = flatten(ImageOps.exif_transpose(file))
    except UnidentifiedImageError:
        raise BrokenPhotograph(f"{path}: not an image") from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        raise BrokenPhotograph(f"{path}: {error or type(error).__name__}") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    # Not resize(box=square): at its edges that would mix in what lies outside the square.
    return np.asarray(image.crop(square).resize((size, size), Image.Resampling.LANCZOS))


def find_photographs(folder: Path, output: Path) -> tuple[list[Path], int]:
    """Return the photographs in a folder and its subfolders, sorted, and how many files are not.

    Hidden files and the output folder are passed over. Raises UserError.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: name one with photographs after --photos.")
    if output.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(
            f"--photos {folder} is in the output folder {output}: choose another --output."
        )
    found, others, own = [], 0, output.resolve()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or own in path.resolve().parents:
            continue
        if path.suffix.lower() in PHOTOGRAPHS:
            found.append(path)
        else:
            others += 1
    if not found:
        kinds = ", ".join(sorted(PHOTOGRAPHS))
        raise UserError(f"{folder} holds no photographs: files that end in {kinds} are taken.")
    return found, others


# --------------------------------------------------------------------------- the folder


# Copied from exercise1_generate.py
class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what is wrong and how."""


@dataclass(frozen=True)
class Picture:
    """A picture to make: where it goes in the folder, its label, and what it is made from."""

    file: str
    label: str
    source: int | Path  # the index of a drawn fabric, or a photograph


def plan_fabrics(options: argparse.Namespace) -> tuple[dict, list[Picture]]:
    """Return what tells one set of drawn fabrics from another, and its pictures."""
    settings = {
        "version": DATA_VERSION,
        "seed": options.seed,
        "split": options.split,
        "count": options.count,
        "size": options.size,
    }
    names = list(TRADITIONS)
    labels = [names[index % len(names)] for index in range(options.count)]
    return settings, [Picture(f"{x}/{i:04d}.png", x, i) for i, x in enumerate(labels)]


def plan_photographs(options: argparse.Namespace) -> tuple[dict, list[Picture]]:
    """Return what tells one set of photographs from another, and its pictures. Raises UserError."""
    folder = Path(options.photos)
    paths, others = find_photographs(folder, options.output)
    if others:
        print(f"{others} other files in {folder} are left out.")
    pictures, listing = [], hashlib.sha256()
    for index, path in enumerate(paths):
        inside = path.relative_to(folder)
        label = inside.parent.as_posix() if inside.parent != Path(".") else "photographs"
        pictures.append(Picture(f"{label}/{index:04d}.png", label, path))
        listing.update(f"{inside.as_posix()} {path.stat().st_size}\n".encode())
    settings = {
        "photos": folder.resolve().name,
        "listing": listing.hexdigest()[:16],  # of the photographs' names and lengths
        "count": len(pictures),
        "size": options.size,
    }
    return settings, pictures


def read_manifest(output: Path) -> dict | None:
    """Return the manifest that an earlier run left; None where there is none of ours."""
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        if manifest["made_by"] != "prepare_fabrics.py":
            return None
        files = [Path(file) for file in manifest["traditions"]]
        dict(manifest.get("pixels", {})), dict(manifest.get("broken", {}))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    safe = not any(file.is_absolute() or ".." in file.parts for file in files)
    return manifest if safe else None


def write_manifest(output: Path, settings: dict, pictures: list[Picture], **results) -> None:
    """Note what the folder holds, or is going to hold as long as its sha256 is null."""
    manifest = {"made_by": "prepare_fabrics.py", **settings, "sha256": None, **results}
    manifest["traditions"] = {picture.file: picture.label for picture in pictures}
    with write_atomically(output / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def describe(manifest: dict) -> str:
    """Say in a few words what a folder holds."""
    count, size, photos, split, seed, version = (
        manifest.get(key) for key in ("count", "size", "photos", "split", "seed", "version")
    )
    what = f"{count} images of {size}x{size}"
    if photos:
        return f"{what} from the photographs in '{photos}'"
    return f"{what} ({split}, seed {seed}, version {version})"


def other_files(output: Path, manifest: dict | None) -> list[str]:
    """Return the files in the folder that this script did not write, hidden ones aside."""
    ours = {MANIFEST, *manifest["traditions"]} if manifest else set()
    inside = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    seen = [path.as_posix() for path in inside if not path.name.startswith(".")]
    return sorted(set(seen) - ours)


def claim(output: Path, settings: dict, pictures: list[Picture], force: bool) -> dict:
    """Make the folder ready; return the manifest of an earlier run that is to be completed.

    Without one, or under --force, write a new manifest and return {}. Raises UserError rather than
    touch anything that this script did not write.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose a folder with --output.")
    old = read_manifest(output)
    if old and not force:
        if all(old.get(key) == value for key, value in settings.items()):
            return old
        raise UserError(
            f"{output} holds {describe(old)}: choose another --output, or render anew with --force."
        )
    others = other_files(output, old)
    if others and not force:
        raise UserError(
            f"{output} holds files of your own, such as {others[0]}: choose another --output."
        )
    taken = sorted({MANIFEST, *(picture.file for picture in pictures)}.intersection(others))
    if taken:
        raise UserError(
            f"{output / taken[0]} is not from this script, and not even --force replaces it: "
            "move it away or choose another --output."
        )
    if old:
        remove_written(output, old)
    output.mkdir(parents=True, exist_ok=True)
    write_manifest(output, settings, pictures)
    return {}


def remove_written(output: Path, manifest: dict) -> None:
    """Remove the files that the manifest lists, then the folders that are empty without them."""
    for file in manifest["traditions"]:
        (output / file).unlink(missing_ok=True)
    remove_leftovers(output, manifest["traditions"])
    folders = {parent for file in manifest["traditions"] for parent in Path(file).parents}
    for folder in sorted(folders - {Path(".")}, reverse=True):
        if (output / folder).is_dir() and not any((output / folder).iterdir()):
            (output / folder).rmdir()


def remove_leftovers(output: Path, files) -> None:
    """Remove the temporary files of a run that was killed in the middle of writing."""
    for folder in {output, *((output / file).parent for file in files)}:
        for path in [*folder.glob(".*.tmp.png"), *folder.glob(".manifest.*.tmp.json")]:
            path.unlink(missing_ok=True)


def read_back(output: Path, pictures: list[Picture], size: int) -> tuple[dict, str]:
    """Decode what stands in the folder.

    Returns a short checksum for each whole picture of the right size, and one over the pixels of
    all of them in order: SHA-256 of their bytes, row by row, red, green, blue.
    """
    found, everything = {}, hashlib.sha256()
    for picture in tqdm(pictures, "reading", unit="image", delay=2, leave=False):
        try:
            with Image.open(output / picture.file) as image:
                if image.size != (size, size) or image.mode != "RGB":
                    continue
                pixels = image.tobytes()
        except (OSError, ValueError, SyntaxError):
            continue  # missing or damaged: it will be made again
        found[picture.file] = hashlib.sha256(pixels).hexdigest()[:16]
        everything.update(pixels)
    return found, everything.hexdigest()


# --------------------------------------------------------------------------- the work


# Copied from exercise1_generate.py
@contextmanager
def write_atomically(path):
    """Give a temporary name beside path, and rename it to path once all is written.

    Whoever looks, and whenever the power fails: there is a whole file under that name or none.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_some(pictures: list[Picture], settings: dict, output: Path) -> list[tuple]:
    """Make a few pictures and write them; return (file, None or what is wrong with its source)."""
    results = []
    for picture in pictures:
        try:
            if isinstance(picture.source, int):
                seed, split = settings["seed"], settings["split"]
                pixels = render(seed, picture.source, split, settings["size"])
            else:
                pixels = photograph(picture.source, settings["size"])
        except BrokenPhotograph as error:
            results.append((picture.file, str(error)))
            continue
        with write_atomically(output / picture.file) as temporary:
            Image.fromarray(pixels).save(temporary)
        results.append((picture.file, None))
    return results


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process: a worker first finishes what it is writing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block; processes started in it never see one."""
    mask = getattr(signal, "pthread_sigmask", lambda *_: None)  # Windows has none
    mask(getattr(signal, "SIG_BLOCK", 0), {signal.SIGINT})
    try:
        yield
    finally:
        mask(getattr(signal, "SIG_UNBLOCK", 0), {signal.SIGINT})


def make_all(pictures: list[Picture], settings: dict, output: Path, workers: int) -> dict:
    """Make all pictures with a progress bar; return what is wrong with those that are broken."""
    for folder in {(output / picture.file).parent for picture in pictures}:
        folder.mkdir(parents=True, exist_ok=True)
    work = functools.partial(make_some, settings=settings, output=output)
    chunks = [pictures[i : i + CHUNK] for i in range(0, len(pictures), CHUNK)]
    workers = min(workers, -(-len(chunks) // 4))  # a process takes half a second to start
    broken, pool, results = {}, None, map(work, chunks)
    with tqdm(total=len(pictures), desc=output.name, unit="image") as bar:
        try:
            if workers > 1:
                os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the matrices are small
                context = multiprocessing.get_context("spawn")
                pool = ProcessPoolExecutor(workers, context, ignore_interrupts)
                with interrupts_held():
                    results = pool.map(work, chunks)
            for done in results:
                broken.update((file, wrong) for file, wrong in done if wrong)
                bar.update(len(done))
        except BrokenProcessPool:
            raise UserError("A worker process was killed: run this with --workers 1.") from None
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
    return broken


def refuse_changed(output: Path, manifest: dict, found: dict) -> None:
    """Raise UserError when a picture in a complete folder is no longer the one that was written."""
    for file, pixels in manifest.get("pixels", {}).items():
        if found.get(file, pixels) != pixels:
            raise UserError(
                f"{output / file} was changed after this script wrote it: move it away and run "
                "this again, or render everything anew with --force."
            )


def prepare(options: argparse.Namespace) -> None:
    """Bring the folder to completion. Raises UserError."""
    started = time.perf_counter()
    settings, pictures = (plan_photographs if options.photos else plan_fabrics)(options)
    output, size = options.output, settings["size"]
    manifest = claim(output, settings, pictures, options.force)
    remove_leftovers(output, [picture.file for picture in pictures])
    found, _ = read_back(output, pictures, size)
    refuse_changed(output, manifest, found)
    broken = manifest.get("broken", {})
    missing = [p for p in pictures if p.file not in found and p.file not in broken]
    if missing or not manifest.get("sha256"):
        broken = {**broken, **make_all(missing, settings, output, options.workers)}
        found, checksum = read_back(output, pictures, size)
        lost = [p.file for p in pictures if p.file not in found and p.file not in broken]
        if lost:
            raise UserError(f"{output / lost[0]} cannot be read back: is the disk all right?")
        notes = {"broken": broken} if options.photos else {}
        kept = [picture for picture in pictures if picture.file in found]
        write_manifest(output, settings, pictures, sha256=checksum, pixels=found, **notes)
        shares = Counter(picture.label for picture in kept)
        print(f"{len(kept)} images in {len(shares)} folders:", *share_words(shares))
    report(output, len(found), len(missing) - len(broken), time.perf_counter() - started)
    for wrong in broken.values():
        print(f"Broken, left out: {wrong}", file=sys.stderr)
    if broken and not options.skip_broken:
        raise UserError(
            f"{len(broken)} photographs could not be read (see above): mend or remove them, or "
            "accept that with --skip-broken."
        )


def share_words(shares: Counter) -> list[str]:
    """Say how many images each label has, the first twenty of them."""
    words = [f"{label} {count}" for label, count in sorted(shares.items())]
    return [", ".join(words[:20] + ["..."] * (len(words) > 20))]


def report(output: Path, count: int, new: int, seconds: float) -> None:
    """Print the closing line."""
    if new <= 0:
        print(f"{output} is complete: {count} images, nothing to do ({seconds:.1f} s).")
    elif new < count:
        print(f"{output} is complete now: {new} images added to {count - new} ({seconds:.1f} s).")
    else:
        print(f"Wrote {count} images and {MANIFEST} to {output} in {seconds:.1f} s.")


# Copied from exercise1_generate.py
def whole_number(minimum, maximum=2**31):
    """Return an argparse type for integers from minimum to maximum."""

    def convert(text):
        if not re.fullmatch(r"-?\d+", text) or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a whole number from {minimum} to {maximum}"
            )
        return int(text)

    return convert


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends with exit code 2."""
    parser = argparse.ArgumentParser(
        description="Draw the fabrics of the data set, or crop photographs into the same layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, unset = parser.add_argument, argparse.SUPPRESS
    folders = f"folder to write (default: {OUTPUT['train']}, or {OUTPUT['heldout']} for heldout)"
    add("--output", type=Path, default=unset, metavar="DIR", help=folders)
    add("--count", type=whole_number(1), default=COUNT, help="images to draw")
    add("--seed", type=whole_number(0), default=RANDOM_SEED, help="of the whole set")
    add("--split", choices=SPLITS, default="train", help="heldout fabrics are never train ones")
    add("--photos", default=unset, metavar="DIR", help="crop the photographs in DIR instead")
    add("--skip-broken", action="store_true", help="exit with 0 in spite of broken photographs")
    add("--size", type=whole_number(8, 1024), default=IMAGE_SIZE, help="pixels on a side")
    add("--force", action="store_true", help="replace what this script wrote there before")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=whole_number(1, 512), default=cores or 1, help="processes")
    options = parser.parse_args(argv)
    options.photos = getattr(options, "photos", None)
    options.output = getattr(options, "output", Path(OUTPUT[options.split]))
    drawn = (options.count, options.seed, options.split)
    if options.photos is not None and drawn != (COUNT, RANDOM_SEED, "train"):
        parser.error("--count, --seed and --split go with drawn fabrics, not with --photos")
    if options.skip_broken and options.photos is None:
        parser.error("--skip-broken goes with --photos")
    return options


def main(argv: list[str] | None = None) -> int:
    """Prepare the folder, and turn what goes wrong into one sentence and an exit code."""
    try:
        prepare(parse_options(argv))
        return 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            advice = "free some and run this again, it goes on where it stopped"
        else:
            advice = "mend that or choose another --output"
        where = f" ({error.filename})" if error.filename else ""
        print(f"Error: {error.strerror or error}{where}: {advice}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted: run the same command again to add the rest.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
