"""The command line: option types, one-sentence errors, durations."""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import importlib
import io
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, the file limit
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class UserError(Exception):
    """An error the user can fix; the message says in one sentence what is wrong and what to do."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None, which the help has to put into words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def new_parser(
    description: str | None, epilog: str = "", prog: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser whose --help shows every default, and the first paragraph of a description.

    From now on the command's output escapes what the terminal cannot show, names of files, say.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Python itself does so for stderr
    return argparse.ArgumentParser(
        description=(description or "").split("\n\n")[0],  # python -OO has no docstrings
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        epilog=epilog,
        prog=prog,
    )


def import_extra(module: str, package: str) -> Any:
    """Import what only some options need. Raises UserError where its package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"This needs {package}, which cannot be imported ({one_line(error)}): "
                        "pip install -r requirements-extras.txt") from None  # fmt: skip


def whole_number(minimum: int, maximum: int = 2**31) -> Callable[[str], int]:
    """Return an argparse type for integers from minimum to maximum."""

    def convert(text: str) -> int:
        if text.removeprefix("-").isdecimal() and minimum <= int(text) <= maximum:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a whole number from {minimum} to {maximum}"
        )

    return convert


def real_number(minimum: float, below: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type for numbers from minimum up to, but not including, `below`."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if minimum <= number < below:
            return number
        end = "" if below == math.inf else f" and below {below:g}"
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of at least {minimum:g}{end}")

    return convert


def same_letters(text: str) -> str:
    """Return a name in the form that is compared: accents within their letters (NFC)."""
    return unicodedata.normalize("NFC", text)


def run_command(work: Callable[[], None], after_interrupt: str, if_memory_ends: str) -> int:
    """Call work(); word what goes wrong in one sentence on stderr; return the exit code.

    after_interrupt says what Ctrl-C leaves behind, if_memory_ends what to type instead.
    """
    # When Python ends it need not look through the million objects of PyTorch: a second less.
    atexit.register(gc.freeze)
    try:
        work()
    except UserError as error:
        problem = str(error)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {after_interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # '| head' has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more at its end
        return 1
    except OSError as error:
        problem = word_os_error(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"Out of memory: {if_memory_ends}"
    else:
        return 0
    print(f"Error: {one_line(problem, 1000)}", file=sys.stderr)
    return 1


def one_line(text: object, length: int = 160) -> str:
    """Return the beginning of a text that a file may have filled, on one line, as can be shown."""
    line = re.sub(r"\s*\n\s*", " ", str(text).strip())
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return shown if len(shown) <= length else f"{shown[:length]} ..."


def word_os_error(error: OSError) -> str:
    """Say what the system refused, where, and what to do."""
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in DISK_FULL:
        advice = "free some space and run the same command again; files written before are whole"
    else:
        advice = "fix that or choose another place"
    return f"{error.strerror or error}{place}: {advice}."


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise the errors of CUDA, of the CPU's allocator and of Python itself."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in MEMORY_WORDS)


def print_list(heading: str, lines: Sequence[str]) -> None:
    """Print the first twenty lines under a heading; nothing where there are none."""
    if lines:
        print(f"{heading}: {len(lines)}", *lines[:20], sep="\n  ")
    if len(lines) > 20:
        print(f"  ... and {len(lines) - 20} more")


def duration(seconds: float) -> str:
    """Word seconds in the largest unit that gives a handy number."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
