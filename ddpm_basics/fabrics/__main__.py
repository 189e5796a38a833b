"""Draw the data set: 1,059 little pictures of cloth, after twelve African textile traditions.

    python -m ddpm_basics.fabrics                               # african_fabric_processed/
    python -m ddpm_basics.fabrics --split heldout --count 512   # african_fabric_heldout/
    python -m ddpm_basics.fabrics --photos my_photographs       # your own pictures instead

Writes FOLDER/<tradition>/NNNN.png and FOLDER/manifest.json, which names the seed, every image's
tradition and a checksum over all pixels; FOLDER/README.md is a data card, so that a drawn folder
can be uploaded to a hub as it is. The same command again finds the folder complete and does
nothing, or adds what an interrupted run left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ddpm_basics.console import new_parser, run_command, whole_number
from ddpm_basics.fabrics.drawing import IMAGE_SIZE, SPLITS
from ddpm_basics.fabrics.folder import CORES, COUNT, draw_fabrics, prepare_photographs

RANDOM_SEED = 0  # of the whole set; image i has a stream of its own under (seed, split, i)
OUTPUT = {"train": "african_fabric_processed", "heldout": "african_fabric_heldout"}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends with exit code 2."""
    parser = new_parser(
        "Draw the fabrics of the data set, or crop photographs into the same layout.",
        prog="python -m ddpm_basics.fabrics",
    )
    add = parser.add_argument
    folders = f"folder to write (default: {OUTPUT['train']}, or {OUTPUT['heldout']} for heldout)"
    add("--output", type=Path, metavar="DIR", help=folders)
    add("--count", type=whole_number(1), default=COUNT, help="images to draw")
    add("--seed", type=whole_number(0), default=RANDOM_SEED, help="of the whole set")
    add("--split", choices=SPLITS, default="train", help="heldout fabrics are never train ones")
    add("--photos", type=Path, metavar="DIR", help="crop photographs instead")
    add("--skip-broken", action="store_true", help="exit with 0 in spite of broken photographs")
    add("--size", type=whole_number(8, 1024), default=IMAGE_SIZE, help="pixels on a side")
    add("--force", action="store_true", help="replace what this command wrote there before")
    add("--workers", type=whole_number(1, 512), default=CORES, help="processes")
    options = parser.parse_args(argv)
    drawn = (options.count, options.seed, options.split)
    if options.photos is not None and drawn != (COUNT, RANDOM_SEED, "train"):
        parser.error("--count, --seed and --split go with drawn fabrics, not with --photos")
    if options.skip_broken and options.photos is None:
        parser.error("--skip-broken goes with --photos")
    return options


def main(argv: list[str] | None = None) -> int:
    """Draw or crop, and return the exit code."""
    options = parse_options(argv)
    output = options.output or Path(OUTPUT[options.split])
    shared = {"size": options.size, "workers": options.workers, "force": options.force}

    def work() -> None:
        if options.photos is not None:
            prepare_photographs(options.photos, output, skip_broken=options.skip_broken, **shared)
        else:
            draw_fabrics(
                output, split=options.split, count=options.count, seed=options.seed, **shared
            )

    return run_command(
        work,
        after_interrupt="Run the same command again to add the rest.",
        if_memory_ends="use fewer --workers, or a smaller --size.",
    )


if __name__ == "__main__":
    sys.exit(main())
