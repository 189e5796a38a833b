"""manifest.json: what a folder of fabrics holds, noted beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from ddpm_basics.files import read_json, write_json

MANIFEST = "manifest.json"
MADE_BY = ("ddpm_basics.fabrics", "prepare_fabrics.py")  # the latter in older folders


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds or, as long as `sha256` is None, is going to hold."""

    count: int
    size: int  # pixels on a side
    version: str | None = None  # of drawn fabrics, as are seed and split
    seed: int | None = None
    split: str | None = None
    photos: str | None = None  # the name of the folder of photographs
    listing: str | None = None  # checksum of the photographs' names and lengths
    sha256: str | None = None  # of the pixels of all pictures
    traditions: dict[str, str]  # {file: label}, in order
    pixels: dict[str, str] = field(default_factory=dict)  # {file: checksum of its pixels}
    broken: dict[str, str] = field(default_factory=dict)  # {file: what is wrong with its source}

    def plan(self) -> Manifest:
        """Return the same without results: what tells one set of pictures from another."""
        return replace(self, sha256=None, pixels={}, broken={})

    def __str__(self) -> str:
        drawn = f"{self.split}, seed {self.seed}, version {self.version}"
        what = drawn if self.photos is None else f"from the photographs in '{self.photos}'"
        return f"{self.count} images of {self.size}x{self.size} ({what})"


def read_manifest(folder: Path) -> Manifest | None:
    """Return what a folder holds; None if it is not ours, or its manifest is damaged."""
    content = read_json(folder / MANIFEST) or {}
    if content.pop("made_by", None) not in MADE_BY:
        return None
    try:
        manifest = Manifest(**content)
        return manifest if is_sound(manifest) else None
    except (TypeError, AttributeError, ValueError):  # a key is missing or unknown, or no table
        return None


def is_sound(manifest: Manifest) -> bool:
    """Tell whether all values are of their kinds, and all files are names inside the folder."""
    m, files = manifest, [Path(file) for file in manifest.traditions]
    tables = (m.traditions, m.pixels, m.broken)
    words = [word for table in tables for word in table.values()]
    words += [w for w in (m.version, m.split, m.photos, m.listing, m.sha256) if w is not None]
    numbers = (m.count, m.size, m.seed or 0)
    return (
        all(isinstance(word, str) for word in words)
        and all(isinstance(number, int) for number in numbers)
        and m.count == len(files) and 0 < m.size < 2**16 and (m.seed or 0) >= 0
        and m.split in (None, "train", "heldout")
        and not any(file.is_absolute() or ".." in file.parts for file in files)
        and not any(b"\0" in os.fsencode(file) for file in files)
    )  # fmt: skip


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json; its sha256 is null until the folder is complete."""
    known = {name: value for name, value in vars(manifest).items() if value is not None}
    write_json(folder / MANIFEST, {"made_by": MADE_BY[0], "sha256": None, **known})
