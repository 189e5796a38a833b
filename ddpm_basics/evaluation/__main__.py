"""How good is a folder of samples? Distances, copies and shares, measured against held-out fabrics.

Takes folders of images, as the field's metric tools do, and knows nothing of networks:

    python -m ddpm_basics.evaluation generated_samples
    python -m ddpm_basics.evaluation generated_samples --heldout african_fabric_heldout
    python -m ddpm_basics.evaluation my_samples --train my_photos --heldout my_other_photos

A falling training loss cannot tell fitting from copying; images that the model never saw can. Every
figure for the samples therefore stands beside the same figure for held-out fabrics ("the floor":
how far two sets of real fabrics of the same size are apart by chance). Measured are

1. copies:     how many samples lie far nearer to one training image than to any other;
2. distances:  sliced Wasserstein, Fréchet and kernel distance, each on reduced pixels, patches,
               fixed random convolutions, and a small tradition classifier trained on the spot;
3. traditions: their shares among the samples, corrected for the classifier's own errors;
4. colours:    means and spreads of the three channels.

Without --heldout, ddpm_basics.fabrics renders 4,000 held-out fabrics, once. 2,000 samples take a
few minutes on two CPU cores. The numbers go to evaluation.json, the samples most like a training
image to evaluation_neighbours.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ddpm_basics.console import UserError, whole_number
from ddpm_basics.evaluation.copies import copy_report, find_neighbours
from ddpm_basics.evaluation.distances import SPLITS, distance_report, draw_splits
from ddpm_basics.evaluation.features import feature_spaces, train_classifier
from ddpm_basics.evaluation.folders import (
    DEFAULT_HELDOUT,
    DEFAULT_TRAIN,
    HELDOUT_COUNT,
    Fabrics,
    check_same_size,
    find_heldout,
    find_train,
    fingerprints,
    leave_out_known,
    read_folder,
    split_heldout,
)
from ddpm_basics.evaluation.intervals import BOOTSTRAPS
from ddpm_basics.evaluation.report import (
    DEFINITIONS,
    TOOL,
    check_target,
    headline,
    is_our_figure,
    is_our_report,
    print_report,
    save_figure,
)
from ddpm_basics.evaluation.shares import colour_report, fair_shares, predict, tradition_report
from ddpm_basics.files import write_atomically
from ddpm_basics.hardware import pick_device

RANDOM_SEED = 0  # splits, bootstrap, patch positions, directions and the classifier follow from it
PER_SIDE = 500  # images on either side of a distance (fewer where a folder holds under 1,000)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ddpm_basics.evaluation",
        description=__doc__.split("\n\n")[0],
        epilog="Folders are searched with their subfolders, whose names are the labels. All images "
        "must have one size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("samples", type=Path, metavar="SAMPLES_DIR", help="folder of images to judge")
    add("--train", type=Path, default=DEFAULT_TRAIN, help="folder of the training images")
    add("--heldout", type=Path, default=argparse.SUPPRESS,
        help="folder of images like the training images that no training saw (default: "
        f"{HELDOUT_COUNT} fabrics are rendered to {DEFAULT_HELDOUT} once)")  # fmt: skip
    add("--output", type=Path, default="evaluation.json", help="all numbers (.json)")
    add("--figure", type=Path, default="evaluation_neighbours.png",
        help="samples beside their nearest training images (.png)")  # fmt: skip
    add("--seed", type=whole_number(0), default=RANDOM_SEED,
        help="of splits, intervals and the classifier")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    options = parser.parse_args(argv)
    options.heldout = getattr(options, "heldout", None)
    return options


def evaluate(samples: Fabrics, train: Fabrics, heldout: Fabrics, args, device) -> dict:
    """Measure everything; returns the report, with "neighbours" still in it for the figure."""
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(args.seed).spawn(5)]
    found = find_neighbours(samples, train, device)
    report = {"copies": copy_report(found, find_neighbours(heldout, train, device), streams[0])}
    teach, measured = split_heldout(heldout, streams[1])
    n = min(PER_SIDE, len(samples) // 2, len(train) // 2, len(measured) // 2)
    classifier, report["traditions"] = None, None
    if teach is None:
        print("No classifier: the held-out images are not sorted into subfolders by label.")
    else:
        names = sorted(set(teach.labels))
        classifier = train_classifier(teach, names, args.seed, device)
        report["traditions"] = tradition_report(
            names,
            predict(classifier, samples, device),
            predict(classifier, measured, device),
            np.array([names.index(label) for label in measured.labels]),
            fair_shares(names, train, measured),
            streams[2],
        )
    folders = {"samples": samples, "train": train, "heldout": measured}
    report["colours"] = colour_report(folders, streams[3])
    chosen = {
        name: own.at(np.sort(streams[4].permutation(len(own))[: 4 * n]))
        for name, own in folders.items()
    }
    splits = draw_splits({name: len(own) for name, own in chosen.items()}, n, streams[4])
    spaces = feature_spaces(chosen, classifier, args.seed, device)
    report["distances"] = distance_report(spaces, splits, args.seed, device)
    report["sizes"] = {
        "samples": len(samples),
        "distinct_samples": len(set(fingerprints(samples))),
        "train": len(train),
        "heldout": len(heldout),
        "heldout_for_classifier": len(teach or ()),
        "heldout_measured": len(measured),
        "per_side": n,
        "splits": SPLITS,
        "bootstraps": BOOTSTRAPS,
    }
    report["headline"] = headline(report)
    return report | {"neighbours": found}


def run(options: argparse.Namespace) -> None:
    """Read the folders, measure, print, write."""
    started = time.perf_counter()
    check_target(options.output, ".json", is_our_report)
    check_target(options.figure, ".png", is_our_figure)
    device = pick_device(options.device)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    samples = read_folder(options.samples, "samples")
    train = read_folder(find_train(options.train), "train")
    check_same_size(samples, train)
    heldout = read_folder(find_heldout(options.heldout, train), "held-out")
    check_same_size(samples, heldout)
    heldout = leave_out_known(heldout, samples, train)
    report = evaluate(samples, train, heldout, options, device)
    neighbours = report.pop("neighbours")
    print_report(report)
    report = {
        "tool": TOOL,
        "folders": {"samples": str(options.samples), "train": str(train.folder),
                    "heldout": str(heldout.folder)},
        "seed": options.seed,
        "device": str(device),
        "definitions": DEFINITIONS,
        **report,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    save_figure(options.figure, samples, train, neighbours, np.random.default_rng(options.seed))
    with write_atomically(options.output) as temporary:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"\nWrote {options.output} and {options.figure} in {report['seconds']:.0f} s.")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        run(parse_options(argv))
    except UserError as error:
        message, code = f"Error: {error}", 1
    except OSError as error:
        message, code = f"Error: {error.filename or 'a file'}: {error.strerror or error}.", 1
    except torch.cuda.OutOfMemoryError:
        message, code = "Error: the GPU's memory is full: use --device cpu.", 1
    except KeyboardInterrupt:
        message, code = "Interrupted; nothing was written.", 130
    else:
        return 0
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
