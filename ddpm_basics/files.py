"""A whole file or none: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_basics.console import DISK_FULL, UserError

TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")  # .NAME.PID.tmp.SUFFIX


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary name beside path, and rename it to path once all is written.

    Whoever looks, and whenever the power fails: there is a whole file under that name or none.
    Raises OSError, for a full disk also where a library hides that in an error of its own.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # makes the rename itself survive a power cut
            flush(path.parent)
    except RuntimeError as error:  # torch.save's, with the OSError before it
        if disk_is_full(error.__context__, path.parent):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk now."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_is_full(error: BaseException | None, folder: Path) -> bool:
    """Tell whether an error while writing means that there is no more room."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return shutil.disk_usage(folder).free < 2**20


def write_json(path: Path, content: Any) -> None:
    """Write content as JSON."""
    with write_atomically(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        # A file's name that is no text becomes \udcNN, which JSON reads back as that name.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is no file or none with an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process of ours has left in a folder."""
    for path in folder.glob(".*.tmp*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def files_like(path: Path) -> dict[str, int]:
    """Return the files beside path whose names begin as its own does, {name: last change in ns}."""
    return {str(file): file.stat().st_mtime_ns for file in path.parent.glob(f"{path.stem}*")}


def unused_name(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, ... that does not exist yet."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate


def check_output(path: Path, suffix: str, may_replace: bool) -> None:
    """Refuse, before any work, a file that cannot or must not be written. Raises UserError."""
    if path.exists() and not path.is_file():  # a device would lose its place
        raise UserError(f"{path} is a folder or a device: name a file that ends in {suffix}.")
    if path.suffix.lower() != suffix:
        raise UserError(f"{path} has to end in {suffix}.")
    if path.exists() and not may_replace:
        raise UserError(f"{path} exists already: delete it or name another file.")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Make a folder, and refuse one that cannot be written. Raises UserError."""
    probe = folder / f".write-test.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise UserError(f"Cannot write into {folder} ({error.strerror}): name another.") from None
    else:
        probe.unlink()


def file_digest(path: Path) -> str:
    """Return the first half of a file's SHA-256, enough to tell one from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
