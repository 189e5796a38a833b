"""How good is a folder of samples? Distances, copies and shares, measured against held-out fabrics.

Takes folders of images, as the field's metric tools do, and knows nothing of networks:

    python -m ddpm_basics.evaluation fabrics
    python -m ddpm_basics.evaluation fabrics --heldout african_fabric_heldout
    python -m ddpm_basics.evaluation my_samples --train my_photos --heldout my_other_photos
    python -m ddpm_basics.evaluation fabrics --inception weights-inception-2015-12-05-6726825d.pth

A falling training loss cannot tell fitting from copying; images that the model never saw can. Every
figure for the samples therefore stands beside the same figure for held-out fabrics ("the floor":
how far two sets of real fabrics of the same size are apart by chance). Measured are

1. copies:     how many samples lie far nearer to one training image than to any other;
2. distances:  sliced Wasserstein, Fréchet and kernel distance, each on reduced pixels, patches,
               fixed random convolutions, and a small tradition classifier trained on the spot;
3. traditions: their shares among the samples, corrected for the classifier's own errors;
4. colours:    means and spreads of the three channels;
5. with --inception, if you like: FID, KID and the Inception Score, by torch-fidelity. Read in
   ddpm_basics.evaluation.inception what FID is worth on a thousand images.

Without --heldout, ddpm_basics.fabrics renders 4,000 held-out fabrics, once. 2,000 samples take a
few minutes on two CPU cores. The numbers go to evaluation.json, the samples most like a training
image to evaluation_neighbours.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_basics import data
from ddpm_basics.console import duration, new_parser, run_command, whole_number
from ddpm_basics.evaluation.copies import Neighbours, copy_report, find_neighbours
from ddpm_basics.evaluation.distances import SPLITS, distance_report, draw_splits
from ddpm_basics.evaluation.features import feature_spaces, train_classifier
from ddpm_basics.evaluation.folders import (
    DEFAULT_HELDOUT,
    HELDOUT_COUNT,
    Fabrics,
    read_folders,
    split_heldout,
)  # fmt: skip
from ddpm_basics.evaluation.inception import inception_report, load_inception, look
from ddpm_basics.evaluation.intervals import BOOTSTRAPS
from ddpm_basics.evaluation.report import (
    DEFINITIONS,
    TOOL,
    headline,
    is_ours,
    print_report,
    save_figure,
)  # fmt: skip
from ddpm_basics.evaluation.shares import colour_report, tradition_report
from ddpm_basics.files import check_output, write_json
from ddpm_basics.hardware import pick_device

RANDOM_SEED = 0  # splits, bootstrap, patch positions, directions and the classifier follow from it
PER_SIDE = 500  # images on either side of a distance (fewer where a folder holds under 1,000)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(
        "How good is a folder of samples? Distances, copies and shares, measured against held-out "
        "fabrics.",
        prog=f"python -m {TOOL}",
        epilog="Folders are searched with their subfolders, whose names are the labels. All images "
        "must have one size.",
    )
    add = parser.add_argument
    add("samples", type=Path, metavar="SAMPLES_DIR", help="folder of images to judge")
    add("--train", type=Path, default=data.DEFAULT, metavar="DIR",
        help="folder of the training images")  # fmt: skip
    add("--heldout", type=Path, default=DEFAULT_HELDOUT, metavar="DIR",
        help="folder of images like the training images that no training saw; in the default one "
        f"{HELDOUT_COUNT} fabrics are drawn, once")  # fmt: skip
    add("--inception", nargs="?", const="", metavar="FILE",
        help="FID, KID and Inception Score, too, by torch-fidelity (requirements-extras.txt) with "
        "Inception's weights from a file; fetched where none is named")  # fmt: skip
    add("--output", type=Path, default="evaluation.json", help="all numbers (.json)")
    add("--figure", type=Path, default="evaluation_neighbours.png",
        help="samples above their nearest training images (.png)")  # fmt: skip
    add("--seed", type=whole_number(0), default=RANDOM_SEED,
        help="of splits, intervals and the classifier")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    return parser.parse_args(argv)


def evaluate(
    samples: Fabrics,
    train: Fabrics,
    heldout: Fabrics,
    seed: int,
    device: torch.device,
    extractor: Any = None,
) -> tuple[dict[str, Any], Neighbours]:
    """Measure everything; return the report, and the training images nearest to the samples.

    extractor: torch-fidelity's Inception, for FID, KID and Inception Score.
    """
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5)]
    found = find_neighbours(samples, train, device)
    copies = copy_report(found, find_neighbours(heldout, train, device), streams[0])
    teach, measured = split_heldout(heldout, streams[1])
    folders = {"samples": samples, "train": train, "heldout": measured}
    classifier, traditions = None, None
    if teach is None:
        print("No classifier: the held-out images are not sorted into subfolders by label.")
    else:
        classifier = train_classifier(teach, seed, device)
        traditions = tradition_report(classifier, folders, streams[2], device)
    colours = colour_report(folders, streams[3])
    n = min(PER_SIDE, *(len(own) // 2 for own in folders.values()))
    few = {name: np.sort(streams[4].permutation(len(own))[: 4 * n])
           for name, own in folders.items()}  # fmt: skip
    chosen = {name: own.at(few[name]) for name, own in folders.items()}
    splits = draw_splits({name: len(own) for name, own in chosen.items()}, n, streams[4])
    spaces = feature_spaces(chosen, classifier, seed, device)
    report = {
        "copies": copies,
        "traditions": traditions,
        "colours": colours,
        "distances": distance_report(spaces, splits, seed, device),
        "sizes": {
            "samples": len(samples),
            "distinct_samples": len(set(samples.fingerprints())),
            "train": len(train),
            "heldout": len(heldout),
            "heldout_for_classifier": len(teach or ()),
            "heldout_measured": len(measured),
            "per_side": n,
            "splits": SPLITS,
            "bootstraps": BOOTSTRAPS,
        },
    }
    if extractor is not None:
        shown = folders | {"train": chosen["train"]}  # of which no figure is about all
        few["train"] = np.arange(len(chosen["train"]))
        seen = {name: look(extractor, own, few[name], device) for name, own in shown.items()}
        report["inception"] = inception_report(seen, splits, device)
    return report | {"headline": headline(report)}, found


def run(options: argparse.Namespace) -> None:
    """Read the folders, measure, print, write. Raises UserError."""
    started = time.perf_counter()
    check_output(options.output, ".json", may_replace=is_ours(options.output))
    check_output(options.figure, ".png", may_replace=is_ours(options.figure))
    device = pick_device(options.device)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    extractor = None if options.inception is None else load_inception(options.inception, device)
    folders = read_folders(options.samples, options.train, options.heldout)
    report, found = evaluate(**folders, seed=options.seed, device=device, extractor=extractor)
    print_report(report)
    rng = np.random.default_rng(options.seed)
    save_figure(options.figure, folders["samples"], folders["train"], found, rng)
    about = {
        "tool": TOOL,
        "folders": {name: str(own.folder) for name, own in folders.items()},
        "seed": options.seed,
        "device": str(device),
        "inception_weights": options.inception,
        "definitions": DEFINITIONS,
    }
    seconds = round(time.perf_counter() - started, 1)
    write_json(options.output, about | report | {"seconds": seconds})
    print(f"\nWrote {options.output} and {options.figure} in {duration(seconds)}.")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = parse_options(argv)
    return run_command(
        lambda: run(options),
        after_interrupt="No result was written.",
        if_memory_ends="use --device cpu, or fewer images.",
    )


if __name__ == "__main__":
    sys.exit(main())
