# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "matplotlib>=3.8",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "torch>=2.5",
#     "tqdm>=4.66.1",
# ]
# ///
"""How good is a folder of samples? Distances, copies and shares, measured against held-out fabrics.

Takes folders of images, as the field's metric tools do, and knows nothing of networks:

    python evaluate_fabrics.py generated_samples
    python evaluate_fabrics.py generated_samples --heldout african_fabric_heldout
    python evaluate_fabrics.py my_samples --train my_photos --heldout my_other_photos

A falling training loss cannot tell fitting from copying; images that the model never saw can. Every
figure for the samples therefore stands beside the same figure for held-out fabrics ("the floor":
how far two sets of real fabrics of the same size are apart by chance). Measured are

1. copies:     how many samples lie far nearer to one training image than to any other;
2. distances:  sliced Wasserstein, Fréchet and kernel distance, each on reduced pixels, patches,
               fixed random convolutions, and a small tradition classifier trained on the spot;
3. traditions: their shares among the samples, corrected for the classifier's own errors;
4. colours:    means and spreads of the three channels.

Without --heldout, prepare_fabrics.py beside this script renders 4,000 held-out fabrics, once.
2,000 samples take a few minutes on two CPU cores. The numbers go to evaluation.json, the samples
most like a training image to evaluation_neighbours.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RANDOM_SEED = 0  # splits, bootstrap, patch positions, directions and the classifier follow from it
PER_SIDE = 500  # images on either side of a distance (fewer where a folder holds under 1,000)
SPLITS = 50  # random splits of the folders over which a distance is averaged
BOOTSTRAPS = 2000  # bootstrap resamples behind the intervals of shares and colours
DIRECTIONS = 128  # random projections of the sliced Wasserstein distance
PATCHES = 8  # patches taken from every image
PATCH_SIDE = 5  # pixels
FILTERS = 8  # random filters per scale
SCALES = 3  # full, half and quarter resolution
COPY_RATIO = 1 / 3  # a copy is nearer than this times the distance to the second nearest
COPY_NEIGHBOURS = 50  # training images around a sample, for the second definition of a copy
COPY_FACTOR = 0.5  # a copy, by the second definition: nearer than this times their mean distance
CLASSIFIER_IMAGES = 2000  # held-out fabrics that train the classifier (at most half of the folder)
CLASSIFIER_STEPS = 400  # batches of 64
HELDOUT_COUNT = 4000  # fabrics rendered when --heldout is not given
HELDOUT_SEED = 1  # whatever --seed says; the training script watches those of seed 0
MINIMUM_IMAGES = 50  # fewer in a folder say nothing about a distribution
MINIMUM_PER_LABEL = 10  # held-out images of a tradition, half of which train the classifier
TOOL = "evaluate_fabrics.py"  # stands in what it writes, so that it replaces nothing else
DEFAULT_TRAIN = "african_fabric_processed"
DEFAULT_HELDOUT = "african_fabric_evaluation"  # the 4,000 rendered here, apart from yours

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
SMALLEST_SIDE, LARGEST_SIDE = 24, 256  # pixels; the features below are made for small pictures
CONVOLUTION_SEED = 20  # the random convolutions are the same in every evaluation, anywhere
BATCH = 256  # images at a time on the device
LEVEL = 0.95  # of every interval


# Copied from exercise1_generate.py
class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what is wrong and how."""


def missing_library(error: BaseException) -> str:
    """Turn a failed import into one sentence with the command that mends it."""
    name = getattr(error, "name", None) or f"a library ({type(error).__name__}: {error})"
    return (
        f"Error: {name} is missing or cannot be loaded; mend it with: "
        f"{sys.executable} -m pip install --upgrade matplotlib numpy pillow torch tqdm"
    )


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


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Folders are searched with their subfolders, whose names are the labels. All images "
        "must have one size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("samples", type=Path, metavar="SAMPLES_DIR", help="folder of images to judge")
    add("--train", type=Path, default=DEFAULT_TRAIN, help="folder of the training images")
    add("--heldout", type=Path, default=argparse.SUPPRESS,
        help="folder of images like the training images that no training saw (default: "
        f"{HELDOUT_COUNT} fabrics are rendered to {DEFAULT_HELDOUT} once)")  # fmt: skip
    add("--output", type=Path, default="evaluation.json", help="all numbers (.json)")
    add("--figure", type=Path, default="evaluation_neighbours.png",
        help="samples beside their nearest training images (.png)")  # fmt: skip
    add("--seed", type=whole_number(0), default=RANDOM_SEED,
        help="of splits, intervals and the classifier")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    options = parser.parse_args(argv)
    options.heldout = getattr(options, "heldout", None)
    return options


if __name__ == "__main__":
    parse_options()  # the imports below take seconds; --help and wrong usage answer at once

try:
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor, nn
    from torch.nn import functional as F
    from tqdm import tqdm
except (ImportError, RuntimeError, OSError, KeyboardInterrupt) as import_error:
    if __name__ != "__main__":
        raise
    print(missing_library(import_error), file=sys.stderr)
    sys.exit(130 if isinstance(import_error, KeyboardInterrupt) else 1)


# Copied from exercise1_generate.py
def pick_device(name):
    """Return the torch.device for auto, cpu, cuda or mps; auto takes a GPU where there is one."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"This machine or this build of torch has no {name}: use --device auto.")
    return torch.device(name)


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


# ---- Folders of images ---------------------------------------------------------------------------


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
                f"{width}x{height}: remove it, or bring all to one size with prepare_fabrics.py."
            )
    if not SMALLEST_SIDE <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
        raise UserError(
            f"The images in {folder} have {width}x{height} pixels, and {SMALLEST_SIDE} to "
            f"{LARGEST_SIDE} a side can be measured: bring them to one size with "
            "prepare_fabrics.py --photos."
        )


def check_same_size(one: Fabrics, other: Fabrics) -> None:
    """Distances between folders need equal image sizes."""
    (h, w), (height, width) = one.pixels.shape[2:], other.pixels.shape[2:]
    if (h, w) != (height, width):
        raise UserError(
            f"The images in {one.folder} have {w}x{h} pixels, those in {other.folder} "
            f"{width}x{height}: only equal sizes can be compared, so prepare {other.folder} anew "
            f"(prepare_fabrics.py --size {h} --output ANOTHER_FOLDER)."
        )


# ---- Held-out fabrics ----------------------------------------------------------------------------


def procedural_manifest(folder: Path) -> dict | None:
    """Return what prepare_fabrics.py notes beside fabrics it drew; None for other folders."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    drawn = isinstance(manifest, dict) and {"seed", "split", "version"} <= manifest.keys()
    return manifest if drawn else None


def render(split: str, folder: Path, options: list[str]) -> None:
    """Start prepare_fabrics.py, which stands beside this script; what is there already it keeps."""
    script = Path(__file__).resolve().with_name("prepare_fabrics.py")
    if not script.exists():
        raise UserError(
            f"{script.name} does not stand beside {Path(__file__).name}, so no {split} fabrics can "
            "be rendered: put it there, or give folders with --train and --heldout."
        )
    command = [sys.executable, str(script), "--split", split, "--output", str(folder), *options]
    code = subprocess.run(command, check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{script.name} could not render {folder}: mend what it says above.")


def find_train(folder: Path) -> Path:
    """Return the training folder; the default one is rendered where it is missing."""
    if folder == Path(DEFAULT_TRAIN) and not folder.exists():
        print(f"{folder} is missing: rendering it.", flush=True)
        render("train", folder, [])
    return folder


def find_heldout(folder: Path | None, train: Fabrics) -> Path:
    """Return the held-out folder, rendered now where none was given.

    Raises UserError where the training images are photographs, as more of them cannot be drawn,
    or were drawn by another version of prepare_fabrics.py.
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
            f"by version {other['version']}: draw both with the same prepare_fabrics.py."
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
            "prepare_fabrics.py --split heldout --seed 1 --output ANOTHER_FOLDER and give "
            "--heldout ANOTHER_FOLDER."
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


# ---- 1. Copies -----------------------------------------------------------------------------------


@dataclass
class Neighbours:
    """Nearest training images: index (N, k), mirrored (N, k) bool, distance (N, k) rising with k.

    A distance is the root mean square over pixels and channels, in units of the range 0 to 1.
    `crowd` (N,) is the mean distance of the COPY_NEIGHBOURS nearest.
    """

    index: Tensor
    mirrored: Tensor
    distance: Tensor
    crowd: Tensor

    @property
    def ratio(self) -> Tensor:
        """d1/d2 (N,): 0 for an exact copy, also of an image that stands twice in the folder."""
        nearest, second = self.distance[:, 0], self.distance[:, 1]
        return torch.where(nearest == 0, nearest, nearest / second)


@torch.no_grad()
def find_neighbours(queries: Fabrics, train: Fabrics, device, keep: int = 4) -> Neighbours:
    """Find for every query the training images nearest in pixel distance, mirrored ones included.

    An image and its mirror image count as one, at the smaller distance. Candidates come from one
    matrix product per batch; the `keep` nearest are then measured again by subtraction, because
    |a|² + |b|² - 2ab cancels badly for the near copies that matter here.
    """
    bank = (train.pixels.flatten(1).to(device).float() / 255 - 0.5, train.pixels.flip(-1))
    bank = (bank[0], bank[1].flatten(1).to(device).float() / 255 - 0.5)
    squares = bank[0].square().sum(1)
    parts = []
    for start in tqdm(range(0, len(queries), BATCH), desc=f"Neighbours of {queries.folder.name}"):
        x = queries.pixels[start : start + BATCH].flatten(1).to(device).float() / 255 - 0.5
        both = torch.stack([squares - 2 * (x @ side.T) for side in bank])
        squared, mirrored = both.min(0)  # (batch, train), less |x|²
        squared = (squared + x.square().sum(1, keepdim=True)).clamp(min=0) / x.shape[1]
        crowd, index = squared.topk(min(COPY_NEIGHBOURS, len(train)), largest=False)
        index = index[:, :keep]
        mirrored = mirrored.gather(1, index).bool()
        images = torch.where(mirrored[..., None], bank[1][index], bank[0][index])
        distance = (images - x[:, None]).square().mean(-1).sqrt()
        distance, order = distance.sort(dim=1, stable=True)
        found = (index.gather(1, order), mirrored.gather(1, order), distance)
        parts.append([part.cpu() for part in (*found, crowd.sqrt().mean(1))])
    return Neighbours(*(torch.cat(column) for column in zip(*parts, strict=True)))


def is_copy(neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
    """Which images are copies, by two definitions of the literature, each (N,) bool.

    d1/d2 < 1/3: the nearest training image is at under a third of the second nearest's distance
    (Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize").
    d1 < 0.5 x mean of the 50 nearest (after Carlini et al. 2023, "Extracting training data from
    diffusion models", section 5.1), which two training images that are alike cannot hide from.
    """
    ratio = neighbours.ratio < COPY_RATIO
    crowd = neighbours.distance[:, 0] < COPY_FACTOR * neighbours.crowd
    return ratio.numpy(), (crowd | (neighbours.distance[:, 0] == 0)).numpy()


def wilson(hits: int, total: int) -> list[float]:
    """Return Wilson's 95 % interval of a share: honest at 0 hits too, where a bootstrap is not."""
    z = 1.959964
    centre = (hits + z * z / 2) / (total + z * z)
    half = z * math.sqrt(hits * (total - hits) / total + z * z / 4) / (total + z * z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def interval(values: np.ndarray) -> list[float]:
    """Return the central 95 % of resampled values."""
    tail = (1 - LEVEL) / 2
    return [float(v) for v in np.quantile(values, [tail, 1 - tail])]


def copy_report(samples: Neighbours, heldout: Neighbours, rng: np.random.Generator) -> dict:
    """Shares of copies among samples and held-out images, with intervals, and how near they lie.

    A bootstrap of a share draws N times from N images, so the hits are binomial.
    """
    report = {}
    names = ("ratio_to_second_nearest", "ratio_to_mean_of_nearest")
    for name, own, floor in zip(names, is_copy(samples), is_copy(heldout), strict=True):
        shares = {}
        for key, flags in (("samples", own), ("heldout", floor)):
            resampled = rng.binomial(len(flags), flags.mean(), BOOTSTRAPS) / len(flags)
            shares[key] = {
                "copies": int(flags.sum()),
                "of": len(flags),
                "share": float(flags.mean()),
                "bootstrap_95": interval(resampled),
                "wilson_95": wilson(int(flags.sum()), len(flags)),
                "resampled": resampled,
            }
        difference = shares["samples"].pop("resampled") - shares["heldout"].pop("resampled")
        shares["difference_bootstrap_95"] = interval(difference)
        report[name] = shares
    report["nearest_distance"] = nearness(samples, heldout)
    return report


def nearness(samples: Neighbours, heldout: Neighbours) -> dict:
    """Quantiles of d1 and d1/d2, and how often a sample lies nearer than a held-out image does.

    The latter is 0.5 where samples are as near to the training images as held-out ones are; more
    means nearer, by copying, but also by being blurred.
    """
    quantiles = (0.01, 0.05, 0.5, 0.95)
    own, floor = samples.distance[:, 0].numpy(), heldout.distance[:, 0].numpy()
    below = np.searchsorted(np.sort(floor), own, side="left")
    up_to = np.searchsorted(np.sort(floor), own, side="right")
    table = {"quantiles": list(quantiles)}
    for key, found in (("samples", samples), ("heldout", heldout)):
        table[key] = {
            "d1": [float(v) for v in np.quantile(found.distance[:, 0].numpy(), quantiles)],
            "d1_over_d2": [float(v) for v in np.quantile(found.ratio.numpy(), quantiles)],
        }
    table["sample_nearer_than_heldout"] = float(1 - (below + up_to).mean() / (2 * len(floor)))
    return table


# ---- 2. Distances: what is compared --------------------------------------------------------------


def pixel_features(x: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] reduced to 4x4 by area averages: (N, 1, 48)."""
    return F.adaptive_avg_pool2d(x, 4).flatten(1).unsqueeze(1)


def patch_features(x: Tensor, places: Tensor) -> Tensor:
    """Multi-scale patches of images (N, 3, H, W) around places (N, P, 2) in [0, 1): (N, P, 225).

    Each point of the result is what stands at one place at three resolutions of a Laplacian
    pyramid (as in the sliced Wasserstein distance of Karras et al. 2018, section 5): fine detail,
    coarser detail, and colour; each a patch of 5x5 pixels.
    """
    levels = []
    for _ in range(SCALES - 1):
        smaller = F.avg_pool2d(x, 2)
        blurred = F.interpolate(smaller, size=x.shape[2:], mode="bilinear", align_corners=False)
        levels.append(x - blurred)
        x = smaller
    levels.append(x)
    return torch.cat([cut_patches(level, places) for level in levels], dim=2)


def cut_patches(x: Tensor, places: Tensor) -> Tensor:
    """Cut patches out of x (N, C, H, W), their corners at places (N, P, 2): (N, P, C * 25)."""
    room = torch.tensor([x.shape[2], x.shape[3]], device=x.device) - PATCH_SIDE + 1
    top, left = (places * room).long().unbind(-1)  # (N, P)
    step = torch.arange(PATCH_SIDE, device=x.device)
    rows = (top[..., None] + step)[..., :, None]  # (N, P, side, 1)
    columns = (left[..., None] + step)[..., None, :]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    return x.permute(0, 2, 3, 1)[image, rows, columns].flatten(2)


class RandomConvolutions(nn.Module):
    """Fixed random filters, two layers at three scales; statistics of their answers (N, 1, 96).

    Weight-free: the filters come from CONVOLUTION_SEED, not from training. The mean and the spread
    of a filter's rectified answer say how much of a texture an image holds; a second layer over
    the first says how the textures lie beside each other.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(CONVOLUTION_SEED)
        first = torch.randn(SCALES, FILTERS, 3, 5, 5, generator=generator) / math.sqrt(3 * 25)
        second = torch.randn(SCALES, 2 * FILTERS, FILTERS, 3, 3, generator=generator)
        self.register_buffer("first", first)
        self.register_buffer("second", second / math.sqrt(9 * FILTERS))

    def forward(self, x: Tensor) -> Tensor:
        """Features of images (N, 3, H, W) in [0, 1]."""
        x, found = 2 * x - 1, []
        for first, second in zip(self.first, self.second, strict=True):
            texture = F.relu(F.conv2d(x, first, padding=2))
            layout = F.relu(F.conv2d(F.avg_pool2d(texture, 2), second, padding=1))
            found += [texture.mean((2, 3)), texture.std((2, 3)), layout.mean((2, 3))]
            x = F.avg_pool2d(x, 2)
        return torch.cat(found, 1).unsqueeze(1)


class Classifier(nn.Module):
    """A small network that tells traditions apart; its last layer but one is a feature space."""

    def __init__(self, classes: int, width: int = 24):
        super().__init__()

        def block(inputs, outputs, side, stride):
            convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *block(3, width, 5, 2),
            *block(width, 2 * width, 3, 2),
            *block(2 * width, 3 * width, 3, 2),
            *block(3 * width, 4 * width, 3, 1),
        )
        self.middle = nn.Sequential(nn.Linear(8 * width, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to (N, 64)."""
        maps = self.body(4 * x - 2)
        return self.middle(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes), before the softmax."""
        return self.head(self.features(x))


def train_classifier(fabrics: Fabrics, names: list[str], seed: int, device) -> Classifier:
    """Train on labelled images for CLASSIFIER_STEPS batches of 64, mirrored and shifted at random.

    The same seed gives the same network on the same device.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(len(names)).to(device, memory_format=torch.channels_last)
    targets = torch.tensor([names.index(label) for label in fabrics.labels])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, CLASSIFIER_STEPS)
    order = torch.empty(0, dtype=torch.long)
    for _ in tqdm(range(CLASSIFIER_STEPS), desc="Training the classifier"):
        if len(order) < 64:
            order = torch.cat([order, torch.randperm(len(fabrics), generator=generator)])
        chosen, order = order[:64], order[64:]
        x = augment(fabrics.pixels[chosen].float() / 255, generator).to(device)
        loss = F.cross_entropy(model(x), targets[chosen].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images (N, 3, H, W) and shift all of them by up to 4 pixels."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    height, width = x.shape[2:]
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    return F.pad(x, (4, 4, 4, 4), mode="reflect")[..., down : down + height, right : right + width]


@torch.no_grad()
def in_batches(function, fabrics: Fabrics, device, desc: str) -> Tensor:
    """Apply function(images in [0, 1], their slice) batch by batch; the results, on the CPU."""
    parts = []
    for start in tqdm(range(0, len(fabrics), BATCH), desc=desc, leave=False):
        where = slice(start, start + BATCH)
        parts.append(function(fabrics.pixels[where].to(device).float() / 255, where).cpu())
    return torch.cat(parts)


def feature_spaces(folders: dict[str, Fabrics], classifier, seed: int, device) -> dict:
    """Features of every folder in every space: {space: {folder: (N, points per image, d)}}.

    Each dimension is shifted and scaled to mean 0 and spread 1 over the held-out images.
    """
    convolutions = RandomConvolutions().to(device)
    generator = torch.Generator().manual_seed(seed)
    places = {n: torch.rand(len(f), PATCHES, 2, generator=generator) for n, f in folders.items()}
    spaces = {
        "pixels": lambda x, where, name: pixel_features(x),
        "patches": lambda x, where, name: patch_features(x, places[name][where].to(device)),
        "convolutions": lambda x, where, name: convolutions(x),
    }
    if classifier is not None:
        spaces["classifier"] = lambda x, where, name: classifier.features(x).unsqueeze(1)
    found = {}
    for space, function in spaces.items():
        found[space] = {
            name: in_batches(
                lambda x, where, f=function, name=name: f(x, where, name), fabrics, device, space
            )
            for name, fabrics in folders.items()
        }
        found[space] = standardise(found[space])
    return found


def standardise(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shift and scale each dimension by its mean and spread over the held-out images.

    Dimensions that hardly vary there are scaled by a twentieth of the median spread instead, lest
    they drown all others.
    """
    reference = features["heldout"].flatten(0, 1)
    spread = reference.std(0)
    spread = spread.clamp(min=max(float(spread.median()) / 20, 1e-6))
    return {name: (own - reference.mean(0)) / spread for name, own in features.items()}


# ---- 2. Distances: how it is compared ------------------------------------------------------------


def sliced_wasserstein(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Sliced 2-Wasserstein distance of point sets x and y (both N, d) along directions (d, L).

    In one dimension the best matching of two equally large sets pairs them in sorted order; the
    squares are averaged over points and directions (Rabin et al. 2011; Bonneel et al. 2015).
    """
    along_x, along_y = in_order(x, directions), in_order(y, directions)
    return float((along_x - along_y).square().mean().sqrt())


def in_order(points: Tensor, directions: Tensor) -> Tensor:
    """Project points (N, d) on directions (d, L) and sort each column: (N, L)."""
    return (points @ directions).sort(0).values


def random_directions(dimensions: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw unit vectors (dimensions, count), uniform on the sphere."""
    return F.normalize(torch.randn(dimensions, count, generator=generator), dim=0)


def gaussian_of(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of points (N, d), in double precision."""
    points = points.double()
    return points.mean(0), torch.cov(points.T).reshape(points.shape[1], -1)


def frechet_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Squared Fréchet distance of two Gaussians (mean, covariance), as FID reports it.

    |m1 - m2|² + tr(S1) + tr(S2) - 2 tr((S1 S2)^½)   (Dowson & Landau 1982; Heusel et al. 2017).
    The last trace is the sum of square roots of the eigenvalues of S1^½ S2 S1^½, which is
    symmetric, so that no general matrix square root is needed and nothing turns complex.
    """
    (mean_1, covariance_1), (mean_2, covariance_2) = one, other
    values, vectors = torch.linalg.eigh(covariance_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    squared = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace()
    return max(0.0, float(squared - 2 * cross))


def kernel_matrix(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (a·b/d + 1)³ between images with features x (N, m, d) and y (M, m, d): (N, M).

    Where an image has several points (patches) the kernel is the mean over all their pairs, which
    is a kernel between sets: pairs of one image never pass for independent draws.
    """
    points, dimensions = x.shape[1:]
    columns = y.flatten(0, 1).T / dimensions
    rows = max(1, 2048 // points)
    parts = [
        (part.flatten(0, 1) @ columns)
        .add_(1)
        .pow_(3)
        .reshape(len(part), points, len(y), points)
        .mean((1, 3))
        for part in x.split(rows)
    ]
    return torch.cat(parts)


def unbiased_mmd2(k_xx: Tensor, k_yy: Tensor, k_xy: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy from kernel matrices (Gretton et al. 2012, eq. 3).

    With the kernel above this is the kernel distance KID (Bińkowski et al. 2018). It is 0 on
    average for equal distributions, so that it also comes out negative.
    """
    n, m = len(k_xx), len(k_yy)
    k_xx, k_yy, k_xy = k_xx.double(), k_yy.double(), k_xy.double()
    within_x = (k_xx.sum() - k_xx.trace()) / (n * (n - 1))
    within_y = (k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * k_xy.mean())


def chance_mmd2(k_xx: Tensor, k_yy: Tensor) -> float:
    """Return what the diagonals add to a biased squared MMD: its mean for equal distributions."""
    n, total = len(k_xx), 0.0
    for k in (k_xx.double(), k_yy.double()):
        total += float(k.mean() - (k.sum() - k.trace()) / (n * (n - 1)))
    return total


def draw_splits(sizes: dict[str, int], n: int, rng: np.random.Generator) -> list[dict]:
    """Draw SPLITS random choices of n samples, n training and two disjoint sets of n held-out."""
    splits = []
    for _ in range(SPLITS):
        heldout = rng.permutation(sizes["heldout"])
        splits.append(
            {
                "samples": rng.permutation(sizes["samples"])[:n],
                "train": rng.permutation(sizes["train"])[:n],
                "heldout": heldout[:n],
                "floor": heldout[n : 2 * n],
            }
        )
    return splits


PAIRS = ("samples", "train", "floor")  # each is compared with the other half of the held-out set


def compare_points(features: dict[str, Tensor], splits: list[dict], seed: int) -> dict:
    """Sliced Wasserstein and squared Fréchet distance of every pair in every split."""
    generator = torch.Generator().manual_seed(seed)
    directions = random_directions(features["heldout"].shape[2], DIRECTIONS, generator)
    found = {measure: {pair: [] for pair in PAIRS} for measure in ("sliced_wasserstein", "frechet")}
    for split in splits:
        reference = features["heldout"][split["heldout"]].flatten(0, 1)
        gaussian, along = gaussian_of(reference), in_order(reference, directions)
        for pair in PAIRS:
            source = features["heldout" if pair == "floor" else pair]
            points = source[split[pair]].flatten(0, 1)
            sliced = (in_order(points, directions) - along).square().mean().sqrt()
            found["sliced_wasserstein"][pair].append(float(sliced))
            found["frechet"][pair].append(frechet_distance(gaussian, gaussian_of(points)))
    return found


def compare_kernels(features: dict[str, Tensor], splits: list[dict], device) -> tuple[dict, float]:
    """Unbiased squared MMD of every pair in every split, and its biased size by chance."""
    features = {name: own.to(device) for name, own in features.items()}
    matrices = {}
    for one, other in (
        ("samples", "samples"),
        ("train", "train"),
        ("heldout", "heldout"),
        ("samples", "heldout"),
        ("train", "heldout"),
    ):
        matrices[one, other] = kernel_matrix(features[one], features[other]).cpu()
    found, chance = {pair: [] for pair in PAIRS}, []
    for split in splits:
        reference = split["heldout"]
        own = matrices["heldout", "heldout"][reference][:, reference]
        for pair in PAIRS:
            name, chosen = ("heldout" if pair == "floor" else pair), split[pair]
            within = matrices[name, name][chosen][:, chosen]
            across = matrices[name, "heldout"][chosen][:, reference]
            found[pair].append(unbiased_mmd2(within, own, across))
            if pair == "floor":
                chance.append(chance_mmd2(within, own))
    return found, float(np.mean(chance))


def distance_report(spaces: dict, splits: list[dict], seed: int, device) -> dict:
    """Measure every distance in every space: {space: {measure: summary}}."""
    report, n = {}, len(splits[0]["heldout"])
    for space, features in tqdm(spaces.items(), desc="Distances"):
        found = compare_points(features, splits, seed)
        kernel, chance = compare_kernels(features, splits, device)
        found["kernel"] = kernel
        pools = {name: len(own) for name, own in features.items()}
        report[space] = {}
        for measure, values in found.items():
            values = {pair: np.array(own) for pair, own in values.items()}
            report[space][measure] = summarise(measure, values, chance, pools, n)
    return report


def summarise(
    measure: str, values: dict[str, np.ndarray], chance: float, pools: dict[str, int], n: int
) -> dict:
    """Means over the splits and ratios to the floor, with 95 % intervals.

    `values` are distances per split, `pools` the images in each folder that the sets of n were
    drawn from. Ratios are of lengths, not of squares: the square root is taken of Fréchet, and of
    MMD after `chance` has been added, as an unbiased floor is 0 and nothing can be divided by it.
    """
    summary, lengths, means = {}, {}, {}
    for pair, own in values.items():
        own_pool = min(pools["heldout" if pair == "floor" else pair], pools["heldout"])
        summary[pair] = {
            "value": float(own.mean()),
            "interval_95": split_interval(own.mean(), own, n, own_pool),
        }
        shift = chance if measure == "kernel" else 0.0
        power = 1.0 if measure == "sliced_wasserstein" else 0.5
        lengths[pair] = np.maximum(own + shift, 0) ** power
        means[pair] = max(own.mean() + shift, 0) ** power
    for pair in ("samples", "train"):
        ratio = means[pair] / max(means["floor"], 1e-12)
        ratios = lengths[pair] / np.maximum(lengths["floor"], 1e-12)
        low, high = split_interval(ratio, ratios, n, min(pools[pair], pools["heldout"]))
        summary[f"{pair}_over_floor"] = {"ratio": ratio, "interval_95": [max(low, 0.0), high]}
    if measure == "kernel":
        summary["chance"] = chance
    return summary


def split_interval(centre: float, values: np.ndarray, n: int, pool: int) -> list[float]:
    """95 % interval of a mean over splits, from its values in sets of n drawn from `pool` images.

    Sets of n out of N images vary by a factor of (N - n)/N less than independent sets would, and
    the mean rests on all N images: together its variance is n/(N - n) of that between sets (the
    delete-d jackknife; Shao & Wu 1989). At n = N/2 the two are equal.
    """
    half = 1.959964 * float(values.std(ddof=1)) * math.sqrt(n / (pool - n))
    return [float(centre) - half, float(centre) + half]


# ---- 3. Traditions -------------------------------------------------------------------------------


def predict(classifier: Classifier, fabrics: Fabrics, device) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest tradition of each image (N,) and its probability (N,)."""
    scores = in_batches(lambda x, where: classifier(x), fabrics, device, "classifying")
    confidence, guess = scores.softmax(1).max(1)
    return guess.numpy(), confidence.numpy()


def confusion_matrix(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """Count pairs (classes, classes): row = true tradition, column = guess."""
    counts = np.zeros((classes, classes))
    np.add.at(counts, (truth, guess), 1)
    return counts


def true_shares(guessed: np.ndarray, confusion: np.ndarray, steps: int = 500) -> np.ndarray:
    """Shares p that explain the guessed shares q through the classifier's errors: q = p C.

    `guessed` (..., K) are shares, `confusion` (..., K, K) counts with true traditions in rows. The
    maximum-likelihood p, which cannot go negative as C's inverse makes it do, by EM
    (Saerens, Latinne & Decaestecker 2002): p_i <- sum_j q_j p_i C_ij / (p C)_j.
    """
    rates = (confusion + 1e-6) / (confusion + 1e-6).sum(-1, keepdims=True)
    shares = np.full(guessed.shape, 1 / guessed.shape[-1])
    for _ in range(steps):
        expected = np.einsum("...i,...ij->...j", shares, rates)
        shares = shares * np.einsum("...ij,...j->...i", rates, guessed / expected)
    return shares


def tradition_report(
    names: list[str],
    samples: tuple[np.ndarray, np.ndarray],
    heldout: tuple[np.ndarray, np.ndarray],
    truth: np.ndarray,
    fair: np.ndarray,
    rng: np.random.Generator,
) -> dict:
    """Shares of the traditions among the samples, from predictions (guess, confidence).

    The bootstrap draws the samples and the held-out images behind the confusion matrix anew.
    """
    k, (guess, confidence), (checked, sure) = len(names), samples, heldout
    confusion = confusion_matrix(truth, checked, k)
    guessed = np.bincount(guess, minlength=k) / len(guess)
    shares = true_shares(guessed, confusion)
    guesses = rng.multinomial(len(guess), guessed, BOOTSTRAPS) / len(guess)
    rows = confusion.sum(1).astype(int)
    rates = confusion / rows[:, None]
    confusions = np.stack(
        [rng.multinomial(n, rate, BOOTSTRAPS) for n, rate in zip(rows, rates, strict=True)], 1
    )
    resampled = true_shares(guesses, confusions, steps=200)
    wrong = int((truth != checked).sum())
    threshold = float(np.quantile(sure, 0.05))
    return {
        "names": names,
        "fair_share": fair.tolist(),
        "guessed_share": guessed.tolist(),
        "share": shares.tolist(),
        "share_bootstrap_95": [interval(resampled[:, i]) for i in range(k)],
        "share_over_fair": (shares / fair).tolist(),
        "recall_on_heldout": np.diag(rates).tolist(),
        "confusion_on_heldout": confusion.astype(int).tolist(),
        "classifier_error": wrong / len(truth),
        "classifier_error_wilson_95": wilson(wrong, len(truth)),
        "unclear_share": float((confidence < threshold).mean()),
        "unclear_share_heldout": float((sure < threshold).mean()),
    }


# ---- 4. Colours ----------------------------------------------------------------------------------


def colour_report(folders: dict[str, Fabrics], rng: np.random.Generator) -> dict:
    """Channel statistics in units of the range 0 to 1, each with a bootstrap interval over images.

    mean, spread: over all pixels of all images; palette: spread of the images' mean colours;
    contrast: spread inside an image, averaged (root mean square).
    """
    report = {}
    for name, fabrics in folders.items():
        flat = fabrics.pixels.flatten(2).double() / 255
        mean, power = flat.mean(2).numpy(), flat.square().mean(2).numpy()  # (N, 3) each
        weights = rng.multinomial(len(mean), np.full(len(mean), 1 / len(mean)), BOOTSTRAPS // 4)
        resampled = colour_moments(weights / len(mean), mean, power)
        exact = colour_moments(np.full((1, len(mean)), 1 / len(mean)), mean, power)
        report[name] = {
            key: {
                "rgb": exact[key][0].tolist(),
                "bootstrap_95": [interval(resampled[key][:, c]) for c in range(3)],
            }
            for key in exact
        }
    return report


def colour_moments(weights: np.ndarray, mean: np.ndarray, power: np.ndarray) -> dict:
    """Moments (B, 3) under weights (B, N) of images with channel means and mean squares (N, 3)."""
    centre = weights @ mean
    palette = np.maximum(weights @ mean**2 - centre**2, 0)
    contrast = np.maximum(weights @ (power - mean**2), 0)
    return {
        "mean": centre,
        "spread": np.sqrt(palette + contrast),
        "palette": np.sqrt(palette),
        "contrast": np.sqrt(contrast),
    }


# ---- What is written -----------------------------------------------------------------------------

DEFINITIONS = {
    "floor": "the same figure for held-out images against other held-out images (copies: for "
    "held-out images against the training images), so what real fabrics show by chance",
    "copy": "ratio_to_second_nearest: d1/d2 < 1/3, with d1 and d2 the distances in pixels to the "
    "nearest and second nearest training image, an image and its mirror image counting as one "
    "(Yoon et al. 2023); ratio_to_mean_of_nearest: d1 < 0.5 x the mean distance of the 50 nearest "
    "(after Carlini et al. 2023)",
    "nearest_distance": "root mean square difference over pixels and channels, range 0 to 1",
    "pixels": "images reduced to 4x4 by area averages, 48 numbers",
    "patches": "8 patches of 5x5 pixels per image at three levels of a Laplacian pyramid, 225 "
    "numbers each",
    "convolutions": "means and spreads of the rectified answers of fixed random filters, two "
    "layers at three scales, 96 numbers",
    "classifier": "last layer but one of the tradition classifier, 64 numbers",
    "scaling": "each of these numbers is shifted and scaled to mean 0 and spread 1 over the "
    "held-out images that are measured",
    "sliced_wasserstein": "square root of the mean squared 2-Wasserstein distance over 128 random "
    "directions",
    "frechet": "squared Fréchet distance between Gaussian fits, as FID reports it; biased upwards "
    "in the same way in samples, train and floor, as all sets have equal size",
    "kernel": "KID: unbiased squared MMD with the kernel (a.b/d + 1)^3; negative values are "
    "chance; `chance` is what a biased estimate shows on average for two equal distributions",
    "ratio": "distance over floor, both as lengths: the square root is taken of frechet and of "
    "kernel + chance; depends on `per_side`, so compare ratios of equal `per_side` only",
    "interval_95": "from the spread between random splits, by the delete-d jackknife; rather too "
    "wide than too narrow where a distance is near its floor",
    "bootstrap_95": "central 95 % of the figure when images are drawn anew, with replacement",
    "wilson_95": "Wilson interval of a share, which has a width at 0 hits too",
    "share": "maximum-likelihood share, corrected by the classifier's confusion matrix on held-out "
    "images it was not trained on; fair_share is the share among the training images",
    "unclear_share": "images of which the classifier is less sure than of 95 % of the held-out",
}


def headline(report: dict) -> dict:
    """Pick the figures that decide: ratios at the median and at worst, copies, extreme shares."""
    ratios = {
        f"{space}, {measure.replace('_', ' ')}": values["samples_over_floor"]["ratio"]
        for space, measures in report["distances"].items()
        for measure, values in measures.items()
    }
    worst = max(ratios, key=ratios.get)
    copies = report["copies"]["ratio_to_second_nearest"]
    result = {
        "median_ratio": float(np.median(list(ratios.values()))),
        "worst_ratio": ratios[worst],
        "worst_ratio_of": worst,
        "copy_share": copies["samples"]["share"],
        "copy_share_heldout": copies["heldout"]["share"],
        "more_copies_than_heldout": copies["difference_bootstrap_95"][0] > 0,
    }
    if report["traditions"]:
        names, shares = report["traditions"]["names"], report["traditions"]["share_over_fair"]
        order = np.argsort(shares)
        result["rarest_tradition"] = [names[order[0]], shares[order[0]]]
        result["commonest_tradition"] = [names[order[-1]], shares[order[-1]]]
    return result


def print_report(report: dict) -> None:
    """Print the readable form of the report."""
    print_copies(report["copies"])
    print_distances(report)
    if report["traditions"]:
        print_traditions(report["traditions"])
    print_colours(report["colours"])
    print_headline(report["headline"])


def percent(share: float) -> str:
    """Write a share as a percentage of fixed width."""
    return f"{100 * share:6.2f} %"


def print_copies(copies: dict) -> None:
    """Print the shares of copies."""
    print("\nCopies of training images (mirrored ones included)     samples   95 % interval")
    rules = {
        "ratio_to_second_nearest": "d1/d2 < 1/3",
        "ratio_to_mean_of_nearest": "d1 < half the mean of the 50 nearest",
    }
    for rule, text in rules.items():
        for key, who in (("samples", text), ("heldout", "  the same for held-out images")):
            row = copies[rule][key]
            low, high = row["wilson_95"]
            print(f"  {who:<50} {percent(row['share'])}  {percent(low)} to {percent(high).strip()}")
    nearest = copies["nearest_distance"]
    print(
        f"  median d1/d2: samples {nearest['samples']['d1_over_d2'][2]:.3f}, held-out "
        f"{nearest['heldout']['d1_over_d2'][2]:.3f}\n  a sample is nearer to the training images "
        f"than a held-out image in {100 * nearest['sample_nearer_than_heldout']:.0f} % of pairs"
    )


def print_distances(report: dict) -> None:
    """Print the table of distances."""
    n = report["sizes"]["per_side"]
    print(f"\nDistances to held-out images, {n} against {n}, mean of {SPLITS} random splits")
    print(f"  {'':<33}{'samples':>11}{'train':>11}{'floor':>11}   ratio to floor")
    for space, measures in report["distances"].items():
        for measure, row in measures.items():
            name = f"{space}, {measure.replace('_', ' ')}"
            values = "".join(f"{row[pair]['value']:>11.3g}" for pair in PAIRS)
            ratio = row["samples_over_floor"]
            low, high = ratio["interval_95"]
            print(f"  {name:<33}{values}   {ratio['ratio']:5.2f}  ({low:.2f} to {high:.2f})")


def print_traditions(traditions: dict) -> None:
    """Print the shares of the traditions."""
    low, high = traditions["classifier_error_wilson_95"]
    print(
        f"\nTraditions (classifier wrong on {percent(traditions['classifier_error']).strip()} of "
        f"held-out images, {percent(low).strip()} to {percent(high).strip()})"
    )
    print(f"  {'':<24}{'share':>9}   95 % interval       of its fair share")
    rows = zip(
        traditions["names"],
        traditions["share"],
        traditions["share_bootstrap_95"],
        traditions["share_over_fair"],
        strict=True,
    )
    for name, share, (low, high), relative in rows:
        mark = "" if 0.5 <= relative <= 2 else "  <- under half or over twice"
        print(
            f"  {name:<24}{percent(share)}  {percent(low)} to {percent(high)}  "
            f"{relative:5.2f}{mark}"
        )
    print(
        f"  unclear images: {percent(traditions['unclear_share']).strip()} of the samples, "
        f"{percent(traditions['unclear_share_heldout']).strip()} of the held-out"
    )


def print_colours(colours: dict) -> None:
    """Print the channel statistics."""
    print("\nColours (red green blue, 0 to 1)")
    keys = list(next(iter(colours.values())))
    print(" " * 12 + "".join(f"{key:<22}" for key in keys))
    for folder, values in colours.items():
        cells = "".join(f"{' '.join(f'{v:.3f}' for v in values[key]['rgb']):<22}" for key in keys)
        print(f"  {folder:<10}{cells}")


def print_headline(result: dict) -> None:
    """Print the figures that decide."""
    print(
        f"\nDistance: {result['median_ratio']:.2f} times the floor at the median, "
        f"{result['worst_ratio']:.2f} at worst ({result['worst_ratio_of']})."
    )
    verdict = "more than" if result["more_copies_than_heldout"] else "no more than"
    print(
        f"Copies: {percent(result['copy_share']).strip()} of the samples, {verdict} among held-out "
        f"images ({percent(result['copy_share_heldout']).strip()})."
    )
    if "rarest_tradition" in result:
        (rare, low), (common, high) = result["rarest_tradition"], result["commonest_tradition"]
        print(f"Traditions: {rare} at {low:.2f} of its fair share, {common} at {high:.2f}.")


def draw_pairs(axis, samples: Fabrics, train: Fabrics, found: Neighbours, chosen: list) -> None:
    """Draw samples, eight to a row, each above its nearest training image and their distances."""
    height, width = samples.pixels.shape[2:]
    gap, foot = width // 8, height // 2
    rows = math.ceil(len(chosen) / 8)
    shape = (rows * (2 * height + gap + foot), 8 * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, np.uint8)
    for place, i in enumerate(chosen):
        top, left = place // 8 * (2 * height + gap + foot), place % 8 * (width + gap)
        nearest = train.pixels[found.index[i, 0]]
        nearest = nearest.flip(-1) if found.mirrored[i, 0] else nearest
        for y, image in ((top, samples.pixels[i]), (top + height + gap // 2, nearest)):
            sheet[y : y + height, left : left + width] = image.permute(1, 2, 0).numpy()
        text = f"d1 {found.distance[i, 0]:.3f}\nd1/d2 {found.ratio[i]:.2f}"
        axis.text(left + width / 2, top + 2 * height + gap, text, ha="center", va="top", size=8)
    axis.imshow(sheet)
    axis.set_axis_off()


def save_figure(path: Path, samples: Fabrics, train: Fabrics, found: Neighbours, rng) -> None:
    """Draw samples above their nearest training images: the most alike, then a random choice."""
    figure = Figure(figsize=(11, 13.4))
    groups = {
        "The samples most like one training image": torch.argsort(found.ratio, stable=True),
        "Samples picked at random": rng.permutation(len(samples)),
    }
    for row, (title, order) in enumerate(groups.items()):
        axis = figure.add_axes((0.02, 0.5 * (1 - row) + 0.005, 0.96, 0.465))
        axis.set_title(f"{title} (above), and their nearest training images (below)")
        draw_pairs(axis, samples, train, found, order[:16].tolist())
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": TOOL})


def evaluate(samples: Fabrics, train: Fabrics, heldout: Fabrics, args, device) -> dict:
    """Measure everything; returns the report, with "neighbours" still in it for the figure."""
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(args.seed).spawn(5)]
    found = find_neighbours(samples, train, device)
    report = {"copies": copy_report(found, find_neighbours(heldout, train, device), streams[0])}
    teach, measured = split_heldout(heldout, streams[1])
    n = min(PER_SIDE, len(samples) // 2, len(train) // 2, len(measured) // 2)
    classifier, report["traditions"] = None, None
    if teach is None:
        print("No classifier: the held-out images are not sorted into subfolders by label.")
    else:
        names = sorted(set(teach.labels))
        classifier = train_classifier(teach, names, args.seed, device)
        report["traditions"] = tradition_report(
            names,
            predict(classifier, samples, device),
            predict(classifier, measured, device),
            np.array([names.index(label) for label in measured.labels]),
            fair_shares(names, train, measured),
            streams[2],
        )
    folders = {"samples": samples, "train": train, "heldout": measured}
    report["colours"] = colour_report(folders, streams[3])
    chosen = {
        name: own.at(np.sort(streams[4].permutation(len(own))[: 4 * n]))
        for name, own in folders.items()
    }
    splits = draw_splits({name: len(own) for name, own in chosen.items()}, n, streams[4])
    spaces = feature_spaces(chosen, classifier, args.seed, device)
    report["distances"] = distance_report(spaces, splits, args.seed, device)
    report["sizes"] = {
        "samples": len(samples),
        "distinct_samples": len(set(fingerprints(samples))),
        "train": len(train),
        "heldout": len(heldout),
        "heldout_for_classifier": len(teach or ()),
        "heldout_measured": len(measured),
        "per_side": n,
        "splits": SPLITS,
        "bootstraps": BOOTSTRAPS,
    }
    report["headline"] = headline(report)
    return report | {"neighbours": found}


def fair_shares(names: list[str], train: Fabrics, heldout: Fabrics) -> np.ndarray:
    """Shares of the traditions among the training images, or, if unlabelled, the held-out ones."""
    counts = Counter(train.labels)
    if set(counts) != set(names):
        print(
            f"The subfolders of {train.folder} and {heldout.folder} differ: the fair shares are "
            "those of the latter."
        )
        counts = Counter(heldout.labels)
    return np.array([counts[name] for name in names]) / counts.total()


def check_target(path: Path, suffix: str, ours) -> None:
    """Refuse, before the work, a path that cannot be written or holds what others wrote."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file that ends in {suffix}.")
    if path.suffix.lower() != suffix:
        raise UserError(f"{path} has to end in {suffix}.")
    if path.exists() and not ours(path):
        raise UserError(f"{path} exists and this script did not write it: name another file.")
    try:
        with write_atomically(path) as temporary:
            temporary.touch()
            raise FileExistsError  # leaves the probe without renaming it
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): name another one."
        ) from error


def is_our_report(path: Path) -> bool:
    """Whether an earlier run wrote this file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("tool") == TOOL
    except (OSError, ValueError, AttributeError):
        return False


def is_our_figure(path: Path) -> bool:
    """Whether an earlier run wrote this picture."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == TOOL
    except OSError:
        return False


def run(options: argparse.Namespace) -> None:
    """Read the folders, measure, print, write."""
    started = time.perf_counter()
    check_target(options.output, ".json", is_our_report)
    check_target(options.figure, ".png", is_our_figure)
    device = pick_device(options.device)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    samples = read_folder(options.samples, "samples")
    train = read_folder(find_train(options.train), "train")
    check_same_size(samples, train)
    heldout = read_folder(find_heldout(options.heldout, train), "held-out")
    check_same_size(samples, heldout)
    heldout = leave_out_known(heldout, samples, train)
    report = evaluate(samples, train, heldout, options, device)
    neighbours = report.pop("neighbours")
    print_report(report)
    report = {
        "tool": TOOL,
        "folders": {"samples": str(options.samples), "train": str(train.folder),
                    "heldout": str(heldout.folder)},
        "seed": options.seed,
        "device": str(device),
        "definitions": DEFINITIONS,
        **report,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    save_figure(options.figure, samples, train, neighbours, np.random.default_rng(options.seed))
    with write_atomically(options.output) as temporary:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"\nWrote {options.output} and {options.figure} in {report['seconds']:.0f} s.")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        run(parse_options(argv))
    except UserError as error:
        message, code = f"Error: {error}", 1
    except OSError as error:
        message, code = f"Error: {error.filename or 'a file'}: {error.strerror or error}.", 1
    except torch.cuda.OutOfMemoryError:
        message, code = "Error: the GPU's memory is full: use --device cpu.", 1
    except KeyboardInterrupt:
        message, code = "Interrupted; nothing was written.", 130
    else:
        return 0
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
