"""A folder of single images, all of one setting, that a run can be taken up in again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddpm_basics.console import UserError
from ddpm_basics.files import check_folder, read_json, remove_leftovers, write_json
from ddpm_basics.options import PRECISIONS

RECORD = "generation.json"


def image_path(folder: Path, index: int) -> Path:
    """Return where image `index` is kept."""
    return folder / f"fabric_{index:04d}.png"


def missing_images(folder: Path, indices: Iterable[int]) -> list[int]:
    """Return those of the indices that have no image yet."""
    return [index for index in indices if not image_path(folder, index).exists()]


def recorded_precision(folder: Path | None) -> str:
    """Return the precision that a folder's images were drawn in; auto where there is none."""
    record = read_json(folder / RECORD) if folder else None
    recorded = record.get("precision") if record else None
    return str(recorded) if recorded in PRECISIONS else "auto"


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder ready for images of these settings, and record them in it.

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
    write_json(record, settings)
