"""One fabric from (seed, split, index): the traditions, and how a drawing becomes pixels.

Every image has its own stream of random numbers, so the pixels are the same on every run,
whatever the number of worker processes. It is drawn at four times the size or more, in the
OKLab colour space, and reduced in linear light.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ddpm_basics.fabrics.adinkra import adinkra
from ddpm_basics.fabrics.adire import adire
from ddpm_basics.fabrics.aso_oke import aso_oke
from ddpm_basics.fabrics.bogolan import bogolan
from ddpm_basics.fabrics.cloth import Cloth, finish
from ddpm_basics.fabrics.colour import encode_srgb, linear_rgb
from ddpm_basics.fabrics.fugu import fugu
from ddpm_basics.fabrics.kanga import kanga
from ddpm_basics.fabrics.kente import kente
from ddpm_basics.fabrics.korhogo import korhogo
from ddpm_basics.fabrics.kuba import kuba
from ddpm_basics.fabrics.ndebele import ndebele
from ddpm_basics.fabrics.shweshwe import shweshwe
from ddpm_basics.fabrics.wax_print import wax_print

IMAGE_SIZE = 64  # pixels on a side
DATA_VERSION = "1"  # changes whenever the pixels do: weights are trained on exactly these
MIN_CANVAS = 256  # pixels on a side of the drawing, at least four times IMAGE_SIZE
SPLITS = {"train": 0, "heldout": 1}  # first word of an image's random stream

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


def render(seed: int, index: int, split: str = "train", size: int = IMAGE_SIZE) -> Image.Image:
    """Draw one fabric, size x size pixels, RGB: a pure function of its arguments.

    Index i is of tradition i modulo their number, so
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
    return Image.fromarray(encode_srgb(np.stack(small, -1).astype(np.float64)))
