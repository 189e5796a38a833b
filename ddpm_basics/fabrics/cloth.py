"""The cloth to draw on, its yarn, and the light that falls on it."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ddpm_basics.fabrics.colour import Array, dye


class Cloth:
    """A square of cloth to draw on.

    `x` and `y`, shape (pixels, pixels), run from -1 to 1 across the picture. They are turned a
    little and bent by smooth noise, so whatever is drawn with them has the edge of a hand. `lab`,
    shape (3, pixels, pixels), is what has been painted so far.
    """

    def __init__(self, rng: np.random.Generator, pixels: int) -> None:
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

    def noise(self, cells: int) -> Array:
        """Return smooth noise with about `cells` bumps across, mean 0, spread near 0.7."""
        between = bicubic(self.pixels, cells)
        return between @ self.rng.standard_normal((cells + 3, cells + 3)) @ between.T

    def dyes(self, palettes: str) -> Array:
        """Choose one of the palettes, a line each, and dye it."""
        rows = palettes.strip().splitlines()
        return dye(self.rng, rows[self.rng.integers(len(rows))])

    def ink(self, distance: Array, scale: float = 1.0, soft: float = 1.0) -> Array:
        """Return coverage in [0, 1]: full where a distance is negative, soft by a pixel or so.

        `scale` is how many of the distance's units go into one unit of `x`.
        """
        return np.clip(0.5 - distance * (self.pixels / (2 * scale * soft)), 0, 1)

    def fill(self, colour: Array) -> None:
        """Paint the whole cloth in one colour."""
        self.lab[:] = colour[:, None, None]

    def paint(self, cover: Array, colour: Array) -> None:
        """Paint a colour, shape (3,), over what is there, where `cover` says so."""
        for channel in range(3):
            self.lab[channel] += cover * (colour[channel] - self.lab[channel])

    def weave(self, index: NDArray[np.integer], colours: Array) -> None:
        """Set every point to the colour with that index."""
        self.lab = np.ascontiguousarray(np.moveaxis(colours[index], -1, 0))


@functools.lru_cache
def bicubic(pixels: int, cells: int) -> Array:
    """Return the matrix, (pixels, cells + 3), that puts a smooth curve through random heights.

    Catmull-Rom weights: Keys, "Cubic convolution interpolation" (1981), equation 4 with a = -1/2.
    """
    at = (np.arange(pixels) + 0.5) * cells / pixels + 1
    far = np.abs(at[:, None] - np.arange(cells + 3))
    near = (1.5 * far - 2.5) * far * far + 1
    wide = ((-0.5 * far + 2.5) * far - 4) * far + 2
    return np.where(far < 1, near, np.where(far < 2, wide, 0.0))


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
