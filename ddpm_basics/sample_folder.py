"""A folder of single images, all of one setting, that a run can be taken up in again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpm_basics.console import UserError
from ddpm_basics.files import check_folder, read_json, remove_leftovers, write_json
from ddpm_basics.options import PRECISIONS

RECORD = "generation.json"


def image_path(folder: Path, index: int) -> Path:
    """Return where image `index` is kept."""
    return folder / f"fabric_{index:04d}.png"


def missing_images(folder: Path | None, count: int) -> list[int]:
    """Return which of the images 0 to count - 1 are not there yet: all, without a folder."""
    return [i for i in range(count) if not (folder and image_path(folder, i).exists())]


def recorded_precision(folder: Path | None) -> str:
    """Return the precision that a folder's images were drawn in; auto where there is none."""
    recorded = recorded_in(folder).get("precision")
    return str(recorded) if recorded in PRECISIONS else "auto"


def recorded_in(folder: Path | None) -> dict[str, Any]:
    """Return what a folder says of its images."""
    return (read_json(folder / RECORD) if folder else None) or {}


def is_grid_of(folder: Path | None, output: Path) -> bool:
    """Tell whether a grid is that of a folder's own images, which may be drawn anew."""
    return recorded_in(folder).get("grid") == str(output.absolute())


def claim_folder(folder: Path, settings: dict[str, Any], grid: Path) -> None:
    """Make the folder ready for images of these settings; record them, and where their grid is.

    Raises UserError where it holds images of other settings, or fabrics of unknown origin.
    """
    record = folder / RECORD
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder with --samples-dir.")
    found = read_json(record)
    if found is None:
        if record.exists() or any(folder.glob("fabric_*.png")):
            raise UserError(
                f"{folder} holds fabrics without a readable {RECORD}, so it is not known how they "
                "were made: name another folder with --samples-dir."
            )
    elif changed := [key for key in settings if found.get(key) != settings[key]]:
        then = ", ".join(f"{key} {found.get(key)}, now {settings[key]}" for key in changed)
        raise UserError(
            f"{folder} holds images of another setting ({then}): name another --samples-dir."
        )
    check_folder(folder)
    remove_leftovers(folder)
    write_json(record, {**settings, "grid": str(grid.absolute())})
