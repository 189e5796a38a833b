"""The command line: options, one-sentence errors, progress, closing lines."""

from __future__ import annotations

import argparse
import math
import re
import sys


class UserError(Exception):
    """Something the user can mend; the message is one sentence that says what is wrong and how."""


def whole_number(minimum, maximum=2**31):
    """Return an argparse type for integers from minimum to maximum."""

    def convert(text):
        if not re.fullmatch(r"-?\d+", text) or not minimum <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a whole number from {minimum} to {maximum}"
            )
        return int(text)

    return convert


def share(text):
    """Read a number from 0 up to, but not including, 1: a type for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to below 1")
    return number


def number(kind, minimum, text_of_range):
    """An argparse type: a number of a kind, not below a minimum."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"'{text}' is not {text_of_range}")
        return value

    return convert


def duration(seconds: float) -> str:
    """Seconds in the largest unit that gives a handy number."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def run_and_explain(work, after_interrupt):
    """Call work() and return the exit code; say in one sentence on stderr what went wrong.

    after_interrupt says what Ctrl-C has left behind.
    """
    try:
        work()
    except UserError as error:
        problem = str(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        problem = "The memory of the GPU is too small: draw fewer images at once."
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        problem = f"{error.strerror or error}{place}: make room there or name another place."
    except KeyboardInterrupt:
        print(f"\nInterrupted. {after_interrupt}", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"Error: {problem}", file=sys.stderr)
    return 1
