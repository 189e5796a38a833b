"""Images read and written: the one decoder, the one folder reader, tilings, films."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, same_letters
from ddpm_basics.files import write_atomically

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp"}  # or upper case
KINDS = ", ".join(sorted(SUFFIXES))


# ---- Reading -------------------------------------------------------------------------------------


def find_images(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the images in a folder and its subfolders, sorted, and {what is passed over: why}.

    Links are followed, but none leads to a folder a second time, so there is no going round in
    circles. Raises UserError when the folder is missing or cannot be read.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"The folder {folder} {what}: name a folder of images.")

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).")

    here, seen = folder.resolve(), set[Path]()
    files: dict[Path, str] = {}
    passed_over: dict[Path, str] = {}
    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        for path in (Path(root, name) for name in sorted(folders)):
            target = path.resolve()
            if path.name.startswith("."):
                passed_over[path] = "hidden"
            elif target in seen or (path.is_symlink() and related(target, here)):
                passed_over[path] = "a link to a folder that is read anyway"
            else:
                seen.add(target)
        folders[:] = [name for name in folders if Path(root, name) not in passed_over]
        files |= {path: why_no_image(path) for path in (Path(root, name) for name in names)}
    passed_over |= {path: reason for path, reason in files.items() if reason}
    return sorted(files.keys() - passed_over.keys()), dict(sorted(passed_over.items()))


def related(one: Path, other: Path) -> bool:
    """Tell whether one of two folders is, or lies in, the other."""
    return one.is_relative_to(other) or other.is_relative_to(one)


def why_no_image(path: Path) -> str:
    """Say why a file is no image, as far as its name and kind tell; "" for one to be decoded."""
    if path.name.startswith("."):
        return "hidden"
    if path.exists() and not path.is_file():
        return "no file"  # but a pipe or a device, which opening would wait for
    if path.suffix.lower() in SUFFIXES:
        return ""
    return f"none of {KINDS}" if path.exists() else "a link to nothing"


def label_of(path: Path, folder: Path) -> str:
    """Return a picture's label: the path of its folder below the data folder, or ""."""
    below = path.relative_to(folder).parent
    return "" if below == Path(".") else same_letters(below.as_posix())


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture without Pillow's warnings, of many pixels and odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as file:
            yield file


def decode(path: Path, size: int | None = None, channels: int = 3) -> Image.Image:
    """Read a picture as RGB, or as grey: upright, over white where it is transparent, in 8 bits.

    With `size` its central square is cut out, then reduced to size x size pixels: stretching
    would change the patterns, and resizing with a box would mix in what lies outside the square.
    Raises UserError that names the file and the reason.
    """
    try:
        with open_picture(path) as file:
            picture = flatten(file).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        reason = "an empty file" if path.is_file() and path.stat().st_size == 0 else error
        raise UserError(
            f"{path} cannot be read as an image ({reason}): repair or remove it."
        ) from None
    return picture if size is None else central_square(picture, size)


def central_square(picture: Image.Image, size: int) -> Image.Image:
    """Cut out a picture's central square and bring it to size x size pixels."""
    if picture.size == (size, size):
        return picture
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def flatten(file: Image.Image) -> Image.Image:
    """Turn any kind of picture into RGB, upright.

    Raises ValueError for pixels whose white nobody knows: floating-point, signed and long numbers.
    """
    picture = ImageOps.exif_transpose(file)
    if picture.mode == "F" or (picture.mode == "I" and file.format not in ("PNG", "PPM")):
        raise ValueError(
            "its floating-point or long numbers do not define a white level: save it with 16 bits"
        )
    if picture.mode.startswith("I"):  # Pillow's own conversion would saturate
        tags = getattr(file, "tag_v2", {})  # of a TIFF: bits (258), whether 0 is white (262)
        white = 2 ** tags.get(258, (16,))[0] - 1
        levels = np.asarray(picture) / white
        levels = 1 - levels if tags.get(262) == 0 else levels
        picture = Image.fromarray(np.floor(levels * 255 + 0.5).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder: pixels (N, c, H, W) uint8, a file and a label for each."""

    folder: Path
    files: list[Path]
    labels: list[str]
    pixels: NDArray[np.uint8]

    def digests(self) -> dict[str, str]:
        """Return {path inside the folder: checksum of the pixels as they were read}."""
        return {
            path.relative_to(self.folder).as_posix(): hashlib.sha256(image.tobytes()).hexdigest()[
                :16
            ]
            for path, image in zip(self.files, self.pixels, strict=True)
        }


def read_folder(
    folder: Path, size: int | None = None, at_least: int = 1, channels: int = 3
) -> ImageFolder:
    """Read all pictures of a folder and its subfolders, in colour or, with one channel, in grey.

    size: pixels per side that each is brought to; without it all have to have one size, as
    resizing unasked would change what is measured. 1,059 images of 64x64 take 13 MB. Raises
    UserError for a missing folder, too few pictures, broken ones, and mixed sizes.
    """
    files = list_images(folder, at_least)
    pixels = np.stack([*decode_all(folder, files, size, channels)])
    return ImageFolder(folder, files, [label_of(path, folder) for path in files], pixels)


def list_images(folder: Path, at_least: int) -> list[Path]:
    """Return the images of a folder and its subfolders. Raises UserError for too few."""
    files, _ = find_images(folder)
    if len(files) < at_least:
        raise UserError(
            f"{folder} holds {len(files)} images ({KINDS}), and at least {at_least} are needed: "
            "add some, or name another folder."
        )
    return files


def decode_all(
    folder: Path, files: Sequence[Path], size: int | None = None, channels: int = 3
) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels (c, h, w) uint8 of one picture after the other.

    Raises UserError, in the end, for broken ones and mixed sizes.
    """
    broken, sizes = [], []
    for path in tqdm(files, f"Reading {folder.name}", unit="image", leave=False, delay=2):
        try:
            picture = np.atleast_3d(np.asarray(decode(path, size, channels)))
        except UserError as error:
            broken.append(str(error))
            continue
        sizes.append(picture.shape[:2])
        yield np.ascontiguousarray(picture.transpose(2, 0, 1))
    if broken:
        raise UserError(f"{len(broken)} of {len(files)} images in {folder} are broken: {broken[0]}")
    check_one_size(files, sizes)


def check_one_size(files: Sequence[Path], sizes: Sequence[tuple[int, ...]]) -> None:
    """Raise UserError that names the first picture of another size (height, width) than most."""
    (usual, _), *others = Counter(sizes).most_common()
    if others:
        odd = next(i for i, size in enumerate(sizes) if size != usual)
        height, width = sizes[odd]
        raise UserError(
            f"{files[odd]} has {width}x{height} pixels and most of its folder have "
            f"{usual[1]}x{usual[0]}: remove it, or bring all to one size with "
            "'python -m ddpm_basics.fabrics --photos'."
        )


# ---- Showing -------------------------------------------------------------------------------------


def to_picture(image: ArrayLike) -> Image.Image:
    """Turn an image [c, h, w] in [0, 1], an array or a tensor on the CPU, into 8 bits a channel."""
    levels = np.rint(np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))


def from_picture(picture: Image.Image) -> NDArray[np.float32]:
    """Turn a picture of 8 bits a channel into an image [c, h, w] in [0, 1]."""
    levels = np.atleast_3d(np.asarray(picture))
    return levels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def tile(
    images: Iterable[Any],
    columns: int | None = None,
    *,
    cell: int | None = None,
    gap: int = 8,
    title: str = "",
    captions: Sequence[str] = (),
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Draw images [c, h, w] in [0, 1], or pictures of equal size, row by row on a white sheet.

    columns: as many as make the sheet square, unless given. cell: pixels per side that each image
    is enlarged to. title: a line above all; captions: one below each.
    """
    pictures = [i if isinstance(i, Image.Image) else to_picture(i) for i in images]
    width, height = (cell, cell) if cell else pictures[0].size
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    head, foot = 44 if title else gap, 24 if captions else 0
    large, small = ImageFont.load_default(20), ImageFont.load_default(14)
    grid_width = columns * (width + gap) - gap
    sheet_width = math.ceil(max(grid_width, large.getlength(title) if title else 0)) + 2 * gap
    sheet = Image.new("RGB", (sheet_width, head + rows * (height + foot + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((sheet_width / 2, head / 2), title, "black", large, "mm")
    for i, picture in enumerate(pictures):
        x = (sheet_width - grid_width) // 2 + i % columns * (width + gap)
        y = head + i // columns * (height + foot + gap)
        sheet.paste(picture.resize((width, height), resample), (x, y))
        if captions:
            draw.text((x + width / 2, y + height + foot / 2), captions[i], "black", small, "mm")
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format that its name says."""
    with write_atomically(path) as temporary:
        picture.save(temporary)


def save_gif(pictures: Sequence[Image.Image], path: Path, milliseconds: Sequence[int]) -> None:
    """Write pictures as an animation that repeats; each gets 256 colours of its own."""
    frames = [
        picture.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
        for picture in pictures
    ]
    with write_atomically(path) as temporary:
        frames[0].save(
            temporary, save_all=True, append_images=frames[1:], loop=0, duration=list(milliseconds)
        )


def film_trouble() -> str:
    """Say why no .mp4 can be written on this machine, or "": ffmpeg is tried."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_film([Image.new("RGB", (16, 16))], Path(folder, "trial.mp4"), 40)
    except Exception as error:  # it is missing, not to be executed, built without H.264 ...
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def save_film(pictures: Iterable[Image.Image], path: Path, milliseconds: int) -> None:
    """Write pictures as an .mp4 that every browser plays, each shown so long."""
    frames: list[Any] = [np.asarray(picture.convert("RGB")) for picture in pictures]
    with write_atomically(path) as temporary:
        imageio.mimwrite(
            temporary, frames, fps=1000 / milliseconds, codec="libx264", pixelformat="yuv420p",
            quality=8, macro_block_size=2,
        )  # fmt: skip
