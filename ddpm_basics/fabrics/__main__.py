"""Draw the data set: 1,059 little pictures of cloth, after twelve African textile traditions.

    python -m ddpm_basics.fabrics                               # african_fabric_processed/
    python -m ddpm_basics.fabrics --split heldout --count 512   # african_fabric_heldout/
    python -m ddpm_basics.fabrics --photos my_photographs       # your own pictures instead

Writes FOLDER/<tradition>/NNNN.png and FOLDER/manifest.json, which names the seed, every image's
tradition and a checksum over all pixels. The same command again finds the folder complete and does
nothing, or adds what an interrupted run left out.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path

from ddpm_basics.console import UserError, whole_number
from ddpm_basics.fabrics.drawing import IMAGE_SIZE, SPLITS
from ddpm_basics.fabrics.folder import prepare

COUNT = 1059  # images, as many as the photographs that the course used
RANDOM_SEED = 0  # of the whole set; image i has a stream of its own under (seed, split, i)
OUTPUT = {"train": "african_fabric_processed", "heldout": "african_fabric_heldout"}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_basics.fabrics",
        description="Draw the fabrics of the data set, or crop photographs into the same layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, unset = parser.add_argument, argparse.SUPPRESS
    folders = f"folder to write (default: {OUTPUT['train']}, or {OUTPUT['heldout']} for heldout)"
    add("--output", type=Path, default=unset, metavar="DIR", help=folders)
    add("--count", type=whole_number(1), default=COUNT, help="images to draw")
    add("--seed", type=whole_number(0), default=RANDOM_SEED, help="of the whole set")
    add("--split", choices=SPLITS, default="train", help="heldout fabrics are never train ones")
    add("--photos", default=unset, metavar="DIR", help="crop the photographs in DIR instead")
    add("--skip-broken", action="store_true", help="exit with 0 in spite of broken photographs")
    add("--size", type=whole_number(8, 1024), default=IMAGE_SIZE, help="pixels on a side")
    add("--force", action="store_true", help="replace what this command wrote there before")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=whole_number(1, 512), default=cores or 1, help="processes")
    options = parser.parse_args(argv)
    options.photos = getattr(options, "photos", None)
    options.output = getattr(options, "output", Path(OUTPUT[options.split]))
    drawn = (options.count, options.seed, options.split)
    if options.photos is not None and drawn != (COUNT, RANDOM_SEED, "train"):
        parser.error("--count, --seed and --split go with drawn fabrics, not with --photos")
    if options.skip_broken and options.photos is None:
        parser.error("--skip-broken goes with --photos")
    return options


def main(argv: list[str] | None = None) -> int:
    """Prepare the folder, and turn what goes wrong into one sentence and an exit code."""
    try:
        prepare(parse_options(argv))
        return 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            advice = "free some and run this again, it goes on where it stopped"
        else:
            advice = "mend that or choose another --output"
        where = f" ({error.filename})" if error.filename else ""
        print(f"Error: {error.strerror or error}{where}: {advice}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted: run the same command again to add the rest.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
