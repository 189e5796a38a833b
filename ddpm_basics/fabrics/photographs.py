"""Photographs: found in a folder, read, turned upright, and cropped to a square."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpm_basics.console import UserError

PHOTOGRAPHS = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"}  # in upper or lower case


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
