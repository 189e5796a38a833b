"""Colour: sRGB, the OKLab space in which the fabrics are drawn, and the dyes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HUE_JITTER = 5.0  # degrees, standard deviation, one draw for each dye
CHROMA_JITTER = 0.10  # standard deviation of the logarithm of the chroma
LIGHTNESS_JITTER = 0.022  # standard deviation, OKLab lightness runs from 0 to 1

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


def oklab(colour: str) -> Array:
    """Return the OKLab coordinates, shape (3,), of an sRGB colour written as six hex digits."""
    return to_oklab(np.array([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]))


def to_oklab(srgb: Array) -> Array:
    """Return OKLab, (3,) or (3, n), for sRGB in [0, 1] of the same shape."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lab: Array = LMS_TO_LAB @ np.cbrt(RGB_TO_LMS @ linear)
    return lab


def linear_rgb(lab: Array) -> Array:
    """Return linear sRGB, unclipped, for OKLab values; the channels are the first axis of both."""
    lms = np.tensordot(LAB_TO_LMS, lab, 1)
    return np.tensordot(LMS_TO_RGB, lms * lms * lms, 1)


def encode_srgb(linear: Array) -> NDArray[np.uint8]:
    """Clip linear sRGB to [0, 1] and encode it as bytes with the sRGB transfer curve."""
    linear = np.clip(linear, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.floor(srgb * 255 + 0.5).astype(np.uint8)


def dye(rng: np.random.Generator, colours: str) -> Array:
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
