"""The training data: drawn where it is missing, looked through, read; held-out images."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, print_list
from ddpm_basics.datasets import DATA_SETS, describe_data, find_data_set, read_data_set
from ddpm_basics.fabrics.card import CARD
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.fabrics.manifest import MANIFEST, read_manifest
from ddpm_basics.images import (
    ImageFolder,
    decode,
    find_images,
    from_picture,
    label_of,
    open_picture,
    read_folder,
)
from ddpm_basics.training import FIXED_IMAGES

DEFAULT = Path("african_fabric_processed")
MIN_IMAGES = 100  # with fewer, a network of this kind can only memorise them
MIN_HELDOUT = 10
NEARLY_BLACK = 24  # of 255; twelve bits that are stored as sixteen stay below it


class Pictures(NamedTuple):
    """Images and their labels, on the device that trains."""

    images: Tensor  # uint8, (N, c, H, W)
    labels: Tensor  # (N,) places in the list of names, -1 for none

    def to(self, device: torch.device) -> Pictures:
        """Copy them to a device."""
        return Pictures(self.images.to(device), self.labels.to(device))


def provide(folder: Path) -> None:
    """Draw the default folder where it is missing, and the rest of one that is half drawn.

    Raises UserError for a name that is neither that of a folder nor of a data set.
    """
    manifest = read_manifest(folder)
    if folder == DEFAULT and not folder.exists():
        print(f"{folder} does not exist yet: drawing the fabrics first.", flush=True)
        draw_fabrics(folder)
    elif manifest and manifest.sha256 is None and manifest.photos is None:
        print(f"{folder} is only half drawn: drawing the rest first.", flush=True)
        draw_fabrics(
            folder, split=manifest.split or "train", count=manifest.count,
            seed=manifest.seed or 0, size=manifest.size,
        )  # fmt: skip
    elif not folder.exists() and not find_data_set(folder):
        raise UserError(f"The folder {folder} does not exist: name a folder of images, or one of "
                        f"the data sets {', '.join(DATA_SETS)}.")  # fmt: skip


def read_images(
    folder: Path, size: int, channels: int
) -> tuple[Pictures, list[str], dict[str, str]]:
    """Return a folder's pictures, the names of its labels, {file: checksum of its pixels}.

    Labels are the folders below it; pictures that lie directly in it have none. A data set that is
    named instead brings its own. All stay in memory, on a GPU in its memory, for the whole run.
    Raises UserError.
    """
    if find_data_set(folder):
        found = read_data_set(str(folder), size, channels)
    else:
        found = read_folder(folder, size, MIN_IMAGES, channels)
    names = sorted(set(found.labels) - {""})
    check_names(folder, names)
    return numbered(found, names), names, found.digests()


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError for a label that --label could not ask for."""
    if taken := {"all", "none"} & {*names}:
        raise UserError(f"A folder of pictures in {folder} is named {taken.pop()}, which --label "
                        "takes for something else: rename it.")  # fmt: skip


def numbered(found: ImageFolder, names: Sequence[str]) -> Pictures:
    """Return the pictures of a folder, with places in the list of names for labels."""
    places = [names.index(label) if label in names else -1 for label in found.labels]
    return Pictures(torch.from_numpy(found.pixels), torch.tensor(places))


def read_heldout(
    options: argparse.Namespace, names: Sequence[str], team: PartialState
) -> Pictures | None:
    """Return the pictures behind the held-out loss, or None; an unknown label counts as none.

    Those of --heldout where it is given. Without it, a data set with a name has a part of its own
    for this, and drawn fabrics have an endless supply of images that the network never sees: they
    are drawn into the results folder. For photographs there are none. Raises UserError.
    """
    folder, size, channels = options.heldout, options.image_size, options.channels
    if folder is None and find_data_set(options.data):
        found = read_data_set(str(options.data), size, channels, False, FIXED_IMAGES)
        return numbered(found, names)
    if folder is None:
        manifest = read_manifest(options.data)
        if manifest is None or manifest.split != "train":
            return None
        folder = options.results_dir / "heldout_fabrics"
        if team.is_main_process:
            draw_fabrics(folder, split="heldout", count=FIXED_IMAGES, size=manifest.size)
        team.wait_for_everyone()
    return numbered(read_folder(folder, size, MIN_HELDOUT, channels), names)


def survey(
    folder: Path, size: int, channels: int
) -> tuple[list[NDArray[np.float32]], int, list[Path]]:
    """Decode every image, print what is there; return nine, the number of good ones, broken files.

    The nine are spread evenly, [c, size, size] in [0, 1]. Raises UserError for a folder that is
    missing, cannot be read, or holds too few.
    """
    if find_data_set(folder):
        found = read_data_set(str(folder), size, channels)
        print(f"Data          {describe_data(folder, size)}")
        print_counts(found.labels)
        nine = [image.astype(np.float32) / 255 for image in spread([*found.pixels])]
        return nine, len(found.pixels), []
    good, broken = survey_folder(folder, size)
    if len(good) < MIN_IMAGES:
        raise UserError(f"{folder} holds {len(good)} readable images, and training needs at least "
                        f"{MIN_IMAGES}.")  # fmt: skip
    nine = [from_picture(decode(path, size, channels)) for path in spread(good)]
    return nine, len(good), broken


def spread(items: Sequence[Any]) -> list[Any]:
    """Return nine of some items, evenly spread."""
    return [items[int((i + 0.5) * len(items) / 9)] for i in range(9)]


def print_counts(labels: Iterable[str]) -> None:
    """Print how many pictures each label has."""
    for label, count in sorted(Counter(labels).items()):
        print(f"  {label or '(no label)':<24}{count:>6}")


def survey_folder(folder: Path, size: int) -> tuple[list[Path], list[Path]]:
    """Decode every image of a folder, print what is there; return (good, broken) files."""
    paths, passed_over = find_images(folder)
    check_names(folder, (label_of(path, folder) for path in paths))
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    tiny, dull, broken = [], [], []
    for path in tqdm(paths, desc="Decoding", unit="image", delay=1):
        try:
            low, high = np.array(decode(path).getextrema()).T  # of red, green, blue
        except UserError as error:
            broken.append((path, str(error)))
            continue
        if (low == high).all():
            dull.append(f"{path} (one colour)")
        elif high.max() < NEARLY_BLACK:
            dull.append(f"{path} (nearly black)")
        with open_picture(path) as picture:
            sizes[f"{picture.width}x{picture.height}"] += 1
            modes[picture.mode] += 1
            if min(picture.size) < size:
                tiny.append(f"{path} (only {picture.width}x{picture.height})")
    good = sorted(set(paths) - {path for path, _ in broken})
    print(f"Data folder   {describe_data(folder, size)}")
    print("Sizes         " + ", ".join(f"{name}: {n}" for name, n in sorted(sizes.items())))
    print("Modes         " + ", ".join(f"{name}: {n}" for name, n in sorted(modes.items())))
    print_counts(label_of(path, folder) for path in good)
    for ours in (MANIFEST, CARD):
        passed_over.pop(folder / ours, None)
    print_list("Passed over", [f"{path} ({why})" for path, why in passed_over.items()])
    print_list("Smaller than the network's images", tiny)
    print_list("One colour or nearly black", dull)
    print_list("BROKEN", [reason for _, reason in broken])
    return good, [path for path, _ in broken]
