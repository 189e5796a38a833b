"""The training data: drawn where it is missing, looked through, read; held-out images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, print_list
from ddpm_basics.fabrics.card import CARD
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.fabrics.manifest import MANIFEST, read_manifest
from ddpm_basics.images import ImageFolder, decode, find_images, label_of, read_folder
from ddpm_basics.training import FIXED_IMAGES

DEFAULT = Path("african_fabric_processed")
MIN_IMAGES = 100  # fewer cannot teach a network of this kind anything but themselves
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
    """Draw the default folder where it is missing, and the rest of one that is half drawn."""
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


def read_images(
    folder: Path, size: int, channels: int
) -> tuple[Pictures, list[str], dict[str, str]]:
    """Return a folder's pictures, the names of its labels, {file: checksum of its pixels}.

    Labels are the folders below it; pictures that lie directly in it have none. All stay in
    memory, on a GPU in its memory, for the whole run. Raises UserError.
    """
    found = read_folder(folder, size, MIN_IMAGES, channels)
    names = sorted(set(found.labels) - {""})
    return numbered(found, names), names, found.digests()


def numbered(found: ImageFolder, names: Sequence[str]) -> Pictures:
    """Return the pictures of a folder, with places in the list of names for labels."""
    places = [names.index(label) if label in names else -1 for label in found.labels]
    return Pictures(torch.from_numpy(found.pixels), torch.tensor(places))


def read_heldout(
    folder: Path | None,
    data: Path,
    results: Path,
    size: int,
    channels: int,
    names: Sequence[str],
    team: PartialState,
) -> Pictures | None:
    """Return the pictures behind the held-out loss, or None; an unknown label counts as none.

    Those of `folder` where one is named. Without it, only drawn fabrics have an endless supply of
    images that the network never sees: they are drawn into the results folder. For photographs
    there are none. Raises UserError.
    """
    if folder is None:
        manifest = read_manifest(data)
        if manifest is None or manifest.split != "train":
            return None
        folder = results / "heldout_fabrics"
        if team.is_main_process:
            draw_fabrics(folder, split="heldout", count=FIXED_IMAGES, size=manifest.size)
        team.wait_for_everyone()
    return numbered(read_folder(folder, size, MIN_HELDOUT, channels), names)


def survey(folder: Path, size: int) -> tuple[list[Path], list[Path]]:
    """Decode every image of a folder, print what is there; return (good, broken) files.

    Raises UserError for a folder that is missing or cannot be read.
    """
    paths, passed_over = find_images(folder)
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
        with Image.open(path) as picture:
            sizes[f"{picture.width}x{picture.height}"] += 1
            modes[picture.mode] += 1
            if min(picture.size) < size:
                tiny.append(f"{path} (only {picture.width}x{picture.height})")
    good = sorted(set(paths) - {path for path, _ in broken})
    print(f"Data folder   {folder}")
    print("Sizes         " + ", ".join(f"{name}: {n}" for name, n in sorted(sizes.items())))
    print("Modes         " + ", ".join(f"{name}: {n}" for name, n in sorted(modes.items())))
    for label, count in sorted(Counter(label_of(path, folder) for path in good).items()):
        print(f"  {label or '(no folder)':<24}{count:>6}")
    for ours in (MANIFEST, CARD):
        passed_over.pop(folder / ours, None)
    print_list("Passed over", [f"{path} ({why})" for path, why in passed_over.items()])
    print_list("Smaller than the network's images", tiny)
    print_list("Hardly a picture", dull)
    print_list("BROKEN", [reason for _, reason in broken])
    return good, [path for path, _ in broken]
