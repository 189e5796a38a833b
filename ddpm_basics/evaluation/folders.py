"""Folders of fabrics: read and checked, held-out ones found or drawn, set apart, split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from ddpm_basics.console import UserError
from ddpm_basics.data import provide
from ddpm_basics.fabrics.drawing import IMAGE_SIZE
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.fabrics.manifest import read_manifest
from ddpm_basics.images import decode_all, label_of, list_images

DEFAULT_HELDOUT = Path("african_fabric_evaluation")  # drawn here, apart from the user's own
HELDOUT_COUNT = 4000  # fabrics drawn where --heldout is not given
HELDOUT_SEED = 1  # whatever --seed says; the training script watches those of seed 0
MINIMUM_IMAGES = 50  # fewer in a folder say nothing about a distribution
MINIMUM_PER_LABEL = 10  # held-out images of a tradition, half of which train the classifier
CLASSIFIER_IMAGES = 2000  # held-out fabrics that train the classifier (at most half of the folder)
SMALLEST_SIDE, LARGEST_SIDE = 24, 256  # pixels; the features are made for small pictures
BATCH = 256  # images at a time on the device
IN_MEMORY = 10_000  # images of a folder; those of a larger one stay in their files


@dataclass(frozen=True)
class PixelsOnDisk:
    """Pixels (N, 3, H, W) uint8 that are decoded when they are asked for, a few at a time."""

    folder: Path
    files: Sequence[Path]
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, chosen: slice | Iterable[int]) -> Tensor:
        """Decode some of the images: (n, 3, H, W)."""
        files = self.files[chosen] if isinstance(chosen, slice) else [self.files[i] for i in chosen]
        return torch.from_numpy(np.stack([*decode_all(self.folder, files)]))

    def at(self, chosen: Sequence[int]) -> Tensor | PixelsOnDisk:
        """Choose images: decoded where they are few enough to be kept."""
        files = [self.files[i] for i in chosen]
        some = PixelsOnDisk(self.folder, files, (len(files), *self.shape[1:]))
        return some if len(some) > IN_MEMORY else some[:]


@dataclass(frozen=True)
class Fabrics:
    """The images of one folder: a label for each, and `pixels` (N, 3, H, W) uint8."""

    folder: Path
    labels: list[str]
    pixels: Tensor | PixelsOnDisk

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Iterable[int]) -> Fabrics:
        """Return the images at these indices."""
        chosen = [int(i) for i in indices]
        own = self.pixels
        pixels = own.at(chosen) if isinstance(own, PixelsOnDisk) else own[chosen]
        return Fabrics(self.folder, [self.labels[i] for i in chosen], pixels)

    def in_parts(self, size: int) -> Iterator[Tensor]:
        """Yield the pixels (up to `size`, 3, H, W) part by part, all of them in order."""
        return (self.pixels[start : start + size] for start in range(0, len(self), size))

    def fingerprints(self) -> list[bytes]:
        """Return a digest of every image's pixels."""
        images = (image for part in self.in_parts(BATCH) for image in part)
        return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]


def collect(count: int, parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Join tensors along their rows, `count` in all, in memory that is there from the start.

    Small results that come to lie between large batches leave holes in which no later batch finds
    room: after 50,000 images those were 2 GB.
    """
    whole: list[Tensor] = []
    start = 0
    for part in parts:
        whole = whole or [own.new_empty(count, *own.shape[1:]) for own in part]
        stop = start + len(part[0])
        for own, new in zip(whole, part, strict=True):
            own[start:stop] = new
        start = stop
    return whole


def read_folders(samples: Path, train: Path, heldout: Path) -> dict[str, Fabrics]:
    """Read what is compared; draw the folders of fabrics that are not there yet.

    Held-out images that also stand among the others are left out. Raises UserError.
    """
    own = read_fabrics(samples)
    provide(train)
    known = read_fabrics(train, like=own)
    unseen = read_fabrics(find_heldout(heldout, known), like=own)
    return {"samples": own, "train": known, "heldout": leave_out_known(unseen, own, known)}


def read_fabrics(folder: Path, like: Fabrics | None = None) -> Fabrics:
    """Read a folder that can be measured, and compared with another one.

    Raises UserError for too few images, sizes that are mixed or unsuitable, and other sizes than
    those in `like`.
    """
    files = list_images(folder, MINIMUM_IMAGES)
    pixels = read_pixels(folder, files)
    height, width = pixels.shape[2:]
    if min(height, width) < SMALLEST_SIDE or max(height, width) > LARGEST_SIDE:
        raise UserError(
            f"The images in {folder} have {width}x{height} pixels, and {SMALLEST_SIDE} to "
            f"{LARGEST_SIDE} a side can be measured: bring them to one size with "
            "'python -m ddpm_basics.fabrics --photos'."
        )
    if like is not None and like.pixels.shape[2:] != (height, width):
        h, w = like.pixels.shape[2:]
        raise UserError(
            f"The images in {like.folder} have {w}x{h} pixels, those in {folder} {width}x{height}: "
            f"only equal sizes can be compared, so prepare {folder} anew "
            f"('python -m ddpm_basics.fabrics --size {h} --output ANOTHER_FOLDER')."
        )
    return Fabrics(folder, [label_of(path, folder) for path in files], pixels)


def read_pixels(folder: Path, files: Sequence[Path]) -> Tensor | PixelsOnDisk:
    """Decode every image, to see that it is sound; keep them where they are few enough.

    Raises UserError.
    """
    pictures = decode_all(folder, files)
    if len(files) <= IN_MEMORY:
        return torch.from_numpy(np.stack([*pictures]))
    sizes = [picture.shape for picture in pictures]
    return PixelsOnDisk(folder, files, (len(files), *sizes[0]))


def find_heldout(folder: Path, train: Fabrics) -> Path:
    """Return the held-out folder; the default one is drawn, once for each size of image.

    Raises UserError where the training images are photographs, as more of them cannot be drawn,
    or were drawn by another version of the fabrics than the held-out ones.
    """
    drawn = read_manifest(train.folder)
    if folder == DEFAULT_HELDOUT:
        if drawn is None or drawn.version is None:
            raise UserError(
                f"{train.folder} has no manifest.json of drawn fabrics, so more of them cannot be "
                "drawn: give images of the same kind that the model never saw with --heldout DIR."
            )
        size = train.pixels.shape[-1]
        folder = folder if size == IMAGE_SIZE else folder.with_name(f"{folder.name}_{size}")
        draw_fabrics(folder, split="heldout", count=HELDOUT_COUNT, seed=HELDOUT_SEED, size=size)
    versions = {m.version for m in (drawn, read_manifest(folder)) if m and m.version}
    if len(versions) > 1:
        raise UserError(
            f"{train.folder} and {folder} were drawn by versions {' and '.join(sorted(versions))} "
            "of the fabrics: draw both with the same 'python -m ddpm_basics.fabrics'."
        )
    return folder


def leave_out_known(heldout: Fabrics, *others: Fabrics) -> Fabrics:
    """Leave out held-out images that are, pixel for pixel, among the others or came before."""
    seen = {key for other in others for key in other.fingerprints()}
    kept = []
    for index, key in enumerate(heldout.fingerprints()):
        if key not in seen:
            kept.append(index)
            seen.add(key)
    if len(kept) < MINIMUM_IMAGES:
        raise UserError(
            f"Only {len(kept)} of the {len(heldout)} images in {heldout.folder} are held out, as "
            "the others also stand among samples or training images: draw others with "
            "'python -m ddpm_basics.fabrics --split heldout --seed 1 --output ANOTHER_FOLDER' and "
            "give --heldout ANOTHER_FOLDER."
        )
    if len(kept) < len(heldout):
        print(
            f"Left out {len(heldout) - len(kept)} images of {heldout.folder} that stand among "
            "samples or training images, or twice in it."
        )
    return heldout.at(kept)


def split_heldout(heldout: Fabrics, rng: Generator) -> tuple[Fabrics | None, Fabrics]:
    """Split held-out images into those that train the classifier and those that are measured.

    No image is in both, or the classifier would know the measured ones better than it knows the
    samples. Returns (None, all) where labels are missing: fewer than two, or too rare ones.
    """
    counts = Counter(heldout.labels)
    if len(counts) < 2 or min(counts.values()) < MINIMUM_PER_LABEL:
        return None, heldout
    share = min(0.5, CLASSIFIER_IMAGES / len(heldout))
    teach: set[int] = set()
    for label in sorted(counts):
        places = np.flatnonzero([own == label for own in heldout.labels])
        teach.update(rng.permutation(places)[: round(share * len(places))].tolist())
    return heldout.at(sorted(teach)), heldout.at(sorted(set(range(len(heldout))) - teach))
