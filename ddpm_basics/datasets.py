"""Data sets that have a name: fetched once, then read as a folder of pictures would be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, import_extra, one_line
from ddpm_basics.images import ImageFolder, central_square

CACHE = Path("data")  # what is fetched goes here, as torchvision lays it out
LARGEST_FRAME = 1.5  # times its own side: a picture is padded up to this, beyond it enlarged
HELD_BACK = 10  # digits has no part for tests: one picture in so many is not trained on


class DataSet(NamedTuple):
    """What is known of a data set before it is read."""

    kind: str  # its class in torchvision; "" for scikit-learn's digits
    side: int  # pixels of the shorter side
    channels: int
    mirrored: bool  # whether a mirror image means the same


DATA_SETS = {
    "mnist": DataSet("MNIST", 28, 1, mirrored=False),
    "fashion_mnist": DataSet("FashionMNIST", 28, 1, mirrored=True),
    "cifar10": DataSet("CIFAR10", 32, 3, mirrored=True),
    "celeba": DataSet("CelebA", 178, 3, mirrored=True),
    "digits": DataSet("", 8, 1, mirrored=False),
}


def find_data_set(data: Path) -> DataSet | None:
    """Return the data set that --data names; None for a folder, also for one of such a name."""
    return None if data.exists() else DATA_SETS.get(str(data))


def usual_size(known: DataSet, size: int, multiple: int) -> int:
    """Return the pixels per side to train on: its own, `size` at most, up to a multiple."""
    return -(-min(known.side, size) // multiple) * multiple


def is_padded(side: int, size: int) -> bool:
    """Tell whether pictures of `side` pixels are set into a black frame to be of `size`."""
    return side < size < LARGEST_FRAME * side


def describe_data(data: Path, size: int) -> str:
    """Say what --data is, and what happens to its pictures on the way to `size` pixels."""
    known = find_data_set(data)
    if known is None:
        note = " (the folder here, not the data set of that name)"
        return f"{data}{note if str(data) in DATA_SETS else ''}"
    how = "padded" if is_padded(known.side, size) else "enlarged"
    how = "reduced" if size < known.side else how
    change = f"{known.side}x{known.side}, {how} to {size}x{size}"
    return f"the data set {data} ({change if size != known.side else f'{size}x{size}'})"


def read_data_set(
    name: str, size: int, channels: int, train: bool = True, at_most: int | None = None
) -> ImageFolder:
    """Read the training part of a data set, or `at_most` pictures of its other part, evenly spread.

    Each picture's central square is brought to size x size pixels at once, so that memory holds no
    more than the result: 2 GB for the 162,770 faces at 64 pixels, 0.15 GB for 50,000 of 32.
    Raises UserError for what is neither there nor to be fetched.
    """
    pairs, classes = open_data_set(name, train)
    chosen = np.arange(len(pairs))
    if at_most is not None and at_most < len(pairs):
        chosen = np.linspace(0, len(pairs) - 1, at_most).round().astype(int)
    pixels = np.empty((len(chosen), channels, size, size), np.uint8)
    labels = []
    for place, index in enumerate(tqdm(chosen, f"Reading {name}", leave=False, delay=2)):
        picture, target = pairs[int(index)]
        picture = picture.convert("L" if channels == 1 else "RGB")
        levels = np.atleast_3d(np.asarray(fit(picture, size)))
        pixels[place] = levels.transpose(2, 0, 1)
        labels.append(str(classes[int(target)]) if len(classes) else "")
    return ImageFolder(Path(name), [Path(name, f"{i:06d}") for i in chosen], labels, pixels)


def fit(picture: Image.Image, size: int) -> Image.Image:
    """Bring a picture to size x size pixels: in a black frame where that is a little larger."""
    side = min(picture.size)
    if not is_padded(side, size):
        return central_square(picture, size)
    framed = Image.new(picture.mode, (size, size))
    framed.paste(central_square(picture, side), ((size - side) // 2,) * 2)
    return framed


def open_data_set(name: str, train: bool) -> tuple[Sequence[tuple[Image.Image, Any]], Any]:
    """Return pairs of a picture and its place in a list of class names, and that list."""
    if name == "digits":
        return open_digits(train)
    from torchvision import datasets

    part: dict[str, Any] = {"train": train}
    if name == "celeba":  # whose 40 attributes are no classes
        part = {"split": "train" if train else "valid", "target_type": []}
    kind = getattr(datasets, DATA_SETS[name].kind)
    found = fetch(name, kind, partial(kind, CACHE, **part))
    return found, getattr(found, "classes", ())


def open_digits(train: bool) -> tuple[list[tuple[Image.Image, Any]], Any]:
    """Return the digits that come with scikit-learn, whose 17 grey levels are 0 to 16."""
    bunch = import_extra("sklearn.datasets", "scikit-learn").load_digits()
    levels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    rows = [i for i in range(len(levels)) if (i % HELD_BACK > 0) == train]
    return [(Image.fromarray(levels[i]), bunch.target[i]) for i in rows], bunch.target_names


def fetch(name: str, kind: Any, make: Callable[..., Any]) -> Any:
    """Open what is in the cache; fetch it first where it is not. Raises UserError."""
    source = getattr(kind, "mirrors", [getattr(kind, "url", "Google Drive")])[0]
    try:
        with suppress(RuntimeError):  # it is not there, or not whole
            return make(download=False)
        print(f"Fetching {name} from {source} into {CACHE}/.", flush=True)
        if name == "celeba":
            import_extra("gdown", "gdown")
        with redirect_stdout(StringIO()):  # each address that failed
            return make(download=True)
    except UserError:
        raise
    except Exception as error:  # the network, archives and pickles have dozens of kinds
        raise UserError(
            f"The data set {name} can neither be read in {CACHE}/ nor fetched from {source} "
            f"({one_line(error)}): copy {CACHE}/ from a machine that has fetched it, or name a "
            "folder of images."
        ) from None
