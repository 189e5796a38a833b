"""Images read and written: decoder, folder reader, grids, films."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg  # noqa: F401 - imageio looks for it only when it writes a film
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

from ddpm_basics.console import UserError
from ddpm_basics.files import write_atomically

MIN_IMAGES = 100  # fewer cannot teach a network of this kind anything but themselves
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}


def find_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """All image files below `folder`, sorted, and the files that were passed over.

    Raises UserError when the folder is missing or cannot be read.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"The data folder {folder} {what}; name a folder of images with --data.")

    def unreadable(error: OSError) -> None:
        raise UserError(f"The data folder {error.filename} cannot be read ({error.strerror}).")

    images, ignored = [], []
    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            hidden = name.startswith(".")
            wanted = path.suffix.lower() in IMAGE_SUFFIXES and not hidden
            (images if wanted else ignored).append(path)
    return sorted(images), sorted(ignored)


def decode_image(path: Path, size: int | None = None) -> Image.Image:
    """An RGB image: upright, on white where it is transparent, 16 bits scaled to 8.

    With `size` it is cropped to its central square and reduced to size x size pixels. The crop
    comes first, because stretching would change the patterns that the network is to learn.
    """
    with Image.open(path) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.uint8(np.clip(grey / 257, 0, 255)))
    if image.mode in ("P", "LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return image


def load_images(
    folder: Path, size: int, at_least: int = MIN_IMAGES
) -> tuple[torch.Tensor, dict[str, str]]:
    """All images of a folder as one tensor, and the digest of each.

    Returns (uint8 tensor of shape (N, 3, size, size), {path inside the folder: digest}). 1,059
    images of 64x64 are 13 MB, so they stay in memory (on a GPU: in its memory) for the whole run.
    Raises UserError for a broken file or too few images.
    """
    paths, _ = find_images(folder)
    if len(paths) < at_least:
        raise UserError(
            f"{folder} holds {len(paths)} images, and at least {at_least} are needed; add some, "
            "or name another folder."
        )
    pixels, digests = [], {}
    for path in tqdm(paths, desc="Reading images", unit="image", leave=False, delay=2):
        try:
            array = np.asarray(decode_image(path, size))
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise UserError(
                f"{path} cannot be read as an image ({error}); "
                "remove it, or see all that is wrong with --verify."
            ) from None
        pixels.append(array)
        digests[path.relative_to(folder).as_posix()] = hashlib.sha256(array.tobytes()).hexdigest()[
            :16
        ]
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return stacked, digests


def data_checksum(digests: dict[str, str]) -> str:
    """One checksum over the names and pixels of a whole data set."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def to_picture(image):
    """Turn an image [c, h, w] in [0, 1] into a PIL picture, 8 bits per channel."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(levels.squeeze())


def save_grid(images, path, title, columns=None, cell=160, captions=()):
    """Save images [n, c, h, w] in [0, 1] as one picture: a title above a grid of cells.

    columns: as many as make the grid square, unless given. cell: pixels per side that each image
    is enlarged to. captions: a line of text below each image.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    gap, top, foot = 8, 44, 24 if captions else 0
    font, small = ImageFont.load_default(20), ImageFont.load_default(14)
    grid_width = columns * (cell + gap) - gap
    width = math.ceil(max(grid_width, font.getlength(title))) + 2 * gap
    sheet = Image.new("RGB", (width, top + rows * (cell + foot + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((width / 2, top / 2), title, "black", font, anchor="mm")
    for i, image in enumerate(images):
        x = (width - grid_width) // 2 + i % columns * (cell + gap)
        y = top + i // columns * (cell + foot + gap)
        sheet.paste(to_picture(image).resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        if captions:
            draw.text((x + cell / 2, y + cell + foot / 2), captions[i], "black", small, "mm")
    with write_atomically(path) as temporary:
        sheet.save(temporary)


def read_image(path):
    """Read a picture as a tensor [c, h, w] in [0, 1]."""
    with Image.open(path) as picture:
        levels = np.atleast_3d(np.array(picture))
    return torch.from_numpy(levels).permute(2, 0, 1) / 255


def read_fabric(path, size=64):
    """Read an image file as RGB [3, size, size] in [0, 1], cropped to its middle square."""
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is no image that can be read: remove it from --data.") from error
    square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255


def pixels(x_t):
    """Turn what lies in [-1, 1], or with its noise beyond, into an image in [0, 1]."""
    return (x_t.float().cpu().clamp(-1, 1) + 1) / 2


def mosaic(images):
    """Put n images [n, c, h, w] into one that is about square."""
    columns = math.ceil(math.sqrt(len(images)))
    blank = torch.ones_like(images[:1]).expand(-len(images) % columns, -1, -1, -1)
    rows = torch.cat([images, blank]).split(columns)
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def panel(images, captions, cell=192):
    """Draw images [c, h, w] in [0, 1] side by side, each with a caption: a frame of a GIF."""
    gap, foot = 8, 28
    size = (gap + len(images) * (cell + gap), cell + gap + foot)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = gap + i * (cell + gap)
        sheet.paste(to_picture(image).resize((cell, cell), Image.Resampling.NEAREST), (x, gap))
        center = (x + cell / 2, gap + cell + foot / 2)
        draw.text(center, caption, "black", ImageFont.load_default(16), "mm")
    return sheet


def save_gif(pictures, path, milliseconds):
    """Write pictures as an animation that repeats; each gets 256 colours of its own."""
    frames = [picture.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
              for picture in pictures]  # fmt: skip
    if isinstance(milliseconds, int):
        milliseconds = [milliseconds] * len(frames)
    with write_atomically(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], loop=0,
                       duration=milliseconds)  # fmt: skip


def save_film(pictures, path, milliseconds):
    """Write pictures as an .mp4 that every browser plays."""
    with write_atomically(path) as temporary:
        imageio.mimwrite(temporary, [np.asarray(picture.convert("RGB")) for picture in pictures],
                         fps=1000 / milliseconds, codec="libx264", pixelformat="yuv420p",
                         quality=8, macro_block_size=2)  # fmt: skip
