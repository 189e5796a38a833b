"""Folders of images: read them, check them, find or draw held-out ones, split those."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddpm_basics.console import UserError

DEFAULT_TRAIN = "african_fabric_processed"
DEFAULT_HELDOUT = "african_fabric_evaluation"  # the 4,000 rendered here, apart from yours
HELDOUT_COUNT = 4000  # fabrics rendered when --heldout is not given
HELDOUT_SEED = 1  # whatever --seed says; the training script watches those of seed 0
MINIMUM_IMAGES = 50  # fewer in a folder say nothing about a distribution
MINIMUM_PER_LABEL = 10  # held-out images of a tradition, half of which train the classifier
CLASSIFIER_IMAGES = 2000  # held-out fabrics that train the classifier (at most half of the folder)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
SMALLEST_SIDE, LARGEST_SIDE = 24, 256  # pixels; the features below are made for small pictures
BATCH = 256  # images at a time on the device
ROOT = Path(__file__).resolve().parents[2]  # of the repository


@dataclass
class Fabrics:
    """The images of one folder: `pixels` (N, 3, H, W) uint8, a file and a label for each."""

    folder: Path
    files: list[Path]
    labels: list[str]
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def at(self, indices) -> Fabrics:
        """Return the images at these indices."""
        indices = [int(i) for i in indices]
        return Fabrics(
            self.folder,
            [self.files[i] for i in indices],
            [self.labels[i] for i in indices],
            self.pixels[indices],
        )


def find_images(folder: Path) -> list[Path]:
    """Every image file in a folder and its subfolders, sorted, hidden files left out."""
    if not folder.exists():
        raise UserError(f"{folder} does not exist: give a folder of images.")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder of images.")
    files = []
    for here, subfolders, names in os.walk(folder, onerror=_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [
            Path(here, name)
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    if not files:
        raise UserError(
            f"{folder} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))})."
        )
    return sorted(files)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): change its permissions.")


def read_image(path: Path) -> np.ndarray:
    """Decode one image into (H, W, 3) uint8; transparency is laid over white."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits per channel")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def read_folder(folder: Path, what: str) -> Fabrics:
    """Read a folder of equally large images; the name of a subfolder is the label of its images.

    Raises UserError for a missing or empty folder, broken images, too few of them, mixed sizes.
    """
    files, arrays, broken = find_images(folder), [], []
    for path in tqdm(files, desc=f"Reading {what}", unit=" images", leave=False):
        try:
            arrays.append(read_image(path))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            broken.append(path)
    if broken:
        names = ", ".join(str(path) for path in broken[:3]) + (", ..." if len(broken) > 3 else "")
        raise UserError(
            f"{len(broken)} of {len(files)} files cannot be read as 8-bit images: repair or remove "
            f"{names}."
        )
    if len(files) < MINIMUM_IMAGES:
        raise UserError(
            f"{folder} holds {len(files)} images, and an evaluation needs {MINIMUM_IMAGES} or more "
            "in every folder (2,000 samples give narrow intervals)."
        )
    check_sizes(folder, files, arrays)
    labels = [parts[0] if len(parts := p.relative_to(folder).parts) > 1 else "" for p in files]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Fabrics(folder, files, labels, pixels)


def check_sizes(folder: Path, files: list[Path], arrays: list[np.ndarray]) -> None:
    """Refuse mixed, tiny and huge images: resizing them unasked would change what is measured."""
    sizes = Counter(array.shape[:2] for array in arrays)
    (height, width), _ = sizes.most_common(1)[0]
    for path, array in zip(files, arrays, strict=True):
        if array.shape[:2] != (height, width):
            raise UserError(
                f"{path} has {array.shape[1]}x{array.shape[0]} pixels and most of {folder} have "
                f"{width}x{height}: remove it, or bring all to one size with "
                "python -m ddpm_basics.fabrics --photos."
            )
    if not SMALLEST_SIDE <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
        raise UserError(
            f"The images in {folder} have {width}x{height} pixels, and {SMALLEST_SIDE} to "
            f"{LARGEST_SIDE} a side can be measured: bring them to one size with "
            "python -m ddpm_basics.fabrics --photos."
        )


def check_same_size(one: Fabrics, other: Fabrics) -> None:
    """Distances between folders need equal image sizes."""
    (h, w), (height, width) = one.pixels.shape[2:], other.pixels.shape[2:]
    if (h, w) != (height, width):
        raise UserError(
            f"The images in {one.folder} have {w}x{h} pixels, those in {other.folder} "
            f"{width}x{height}: only equal sizes can be compared, so prepare {other.folder} anew "
            f"(python -m ddpm_basics.fabrics --size {h} --output ANOTHER_FOLDER)."
        )


def procedural_manifest(folder: Path) -> dict | None:
    """Return what ddpm_basics.fabrics notes beside fabrics it drew; None for other folders."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    drawn = isinstance(manifest, dict) and {"seed", "split", "version"} <= manifest.keys()
    return manifest if drawn else None


def render(split: str, folder: Path, options: list[str]) -> None:
    """Start ddpm_basics.fabrics in a process of its own; what is there already it keeps."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "ddpm_basics.fabrics"]
    command += ["--split", split, "--output", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = subprocess.run(command, check=False, env=environment).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(
            f"python -m ddpm_basics.fabrics could not render {folder}: mend what it says above."
        )


def find_train(folder: Path) -> Path:
    """Return the training folder; the default one is rendered where it is missing."""
    if folder == Path(DEFAULT_TRAIN) and not folder.exists():
        print(f"{folder} is missing: rendering it.", flush=True)
        render("train", folder, [])
    return folder


def find_heldout(folder: Path | None, train: Fabrics) -> Path:
    """Return the held-out folder, rendered now where none was given.

    Raises UserError where the training images are photographs, as more of them cannot be drawn,
    or were drawn by another version of ddpm_basics.fabrics.
    """
    drawn = procedural_manifest(train.folder)
    if folder is None:
        if drawn is None:
            raise UserError(
                f"{train.folder} has no manifest.json of drawn fabrics, so more of them cannot be "
                "drawn: give images of the same kind that the model never saw with --heldout DIR."
            )
        side = train.pixels.shape[-1]
        folder = Path(DEFAULT_HELDOUT if side == 64 else f"{DEFAULT_HELDOUT}_{side}")
        print(f"Held-out fabrics: {HELDOUT_COUNT} in {folder} (rendered once).", flush=True)
        options = {"--count": HELDOUT_COUNT, "--seed": HELDOUT_SEED, "--size": side}
        render("heldout", folder, [str(part) for option in options.items() for part in option])
    other = procedural_manifest(folder)
    if drawn and other and drawn["version"] != other["version"]:
        raise UserError(
            f"{train.folder} was drawn by version {drawn['version']} of the fabrics and {folder} "
            f"by version {other['version']}: draw both with "
            "the same python -m ddpm_basics.fabrics."
        )
    return folder


def leave_out_known(heldout: Fabrics, *others: Fabrics) -> Fabrics:
    """Held-out images without those that are, pixel for pixel, among the others or came before."""
    seen = {key for other in others for key in fingerprints(other)}
    kept = []
    for index, key in enumerate(fingerprints(heldout)):
        if key not in seen:
            kept.append(index)
            seen.add(key)
    if len(kept) < MINIMUM_IMAGES:
        raise UserError(
            f"Only {len(kept)} of the {len(heldout)} images in {heldout.folder} are held out, as "
            "the others also stand among samples or training images: render others with "
            "python -m ddpm_basics.fabrics --split heldout --seed 1 --output ANOTHER_FOLDER and "
            "give --heldout ANOTHER_FOLDER."
        )
    if len(kept) < len(heldout):
        print(
            f"Left out {len(heldout) - len(kept)} images of {heldout.folder} that stand among "
            "samples or training images, or twice in it."
        )
    return heldout.at(kept)


def fingerprints(fabrics: Fabrics) -> list[bytes]:
    """Return a digest of every image's pixels."""
    return [
        hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
        for image in fabrics.pixels
    ]


def split_heldout(heldout: Fabrics, rng: np.random.Generator) -> tuple[Fabrics | None, Fabrics]:
    """Split held-out images into those that train the classifier and those that are measured.

    No image is in both, or the classifier would know the measured ones better than it knows the
    samples. Returns (None, all) where labels are missing: fewer than two, or too rare ones.
    """
    counts = Counter(heldout.labels)
    if len(counts) < 2 or min(counts.values()) < MINIMUM_PER_LABEL:
        return None, heldout
    share = min(0.5, CLASSIFIER_IMAGES / len(heldout))
    teach = []
    for label in sorted(counts):
        places = np.flatnonzero([own == label for own in heldout.labels])
        teach += rng.permutation(places)[: round(share * len(places))].tolist()
    rest = sorted(set(range(len(heldout))) - set(teach))
    return heldout.at(sorted(teach)), heldout.at(rest)
