"""Two or more weight files of one run, by held-out error and by samples, side by side.

    python tests/benchmarks/compare_weights.py "after stage 2=old.pt=stage2_64x64/losses.csv" \\
        "after stage 5=models/ddpm_african_fabrics.pt=stage5_64x64/losses.csv=0" \\
        "after stage 5=models/ddpm_african_fabrics.pt=stage5_64x64/losses.csv"

Each argument is NAME=WEIGHTS=LOSSES or NAME=WEIGHTS=LOSSES=MIN_SIGNAL; the last file is the one
that ships, drawn as exercise 1 does by default, and LOSSES, from its run, lies in --reference.
exercise1_generate.py draws the samples (again only where they are missing), evaluate_fabrics.py
holds them against held-out fabrics. Writes versions.json there.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from reference_run import ROOT, run_script

import exercise1_generate as exercise1
from ddpm_basics.hardware import device_name, pick_device

MEASURES = ("sliced_wasserstein", "frechet", "kernel")


def parse_options(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="NAME=WEIGHTS=LOSSES[=MIN_SIGNAL]",
        type=lambda text: text.split("="))  # fmt: skip
    add("--samples", type=int, default=500, help="drawn from each")
    add("--sample-seed", type=int, default=5000, help="of the first of them")
    add("--train", type=Path, default=ROOT / "african_fabric_processed")
    add("--heldout", type=Path, default=None, help="rendered unless given")
    add("--folder", type=Path, default=ROOT / "training_results" / "versions")
    add("--reference", type=Path, default=ROOT / "training_results" / "reference")
    return parser.parse_args(argv)


def heldout_error(path):
    """The last error on held-out fabrics in a losses.csv, or None where there is none."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["heldout_fixed"]]
    return float(rows[-1]["heldout_fixed"]) if rows else None


def row_of(options, number, name, weights, losses, min_signal=exercise1.MIN_SIGNAL):
    """Draw, evaluate, and pick what the table shows."""
    samples, report = options.folder / f"samples{number}", options.folder / f"report{number}.json"
    run_script("exercise1_generate.py", "--weights", Path(weights).resolve(), "--num-samples",
               options.samples, "--seed", options.sample_seed, "--min-signal", min_signal,
               "--samples-dir", samples,
               "--output", options.folder / f"grid{number}.png")  # fmt: skip
    heldout = ["--heldout", options.heldout.resolve()] if options.heldout else []
    run_script("evaluate_fabrics.py", samples, "--train", options.train.resolve(), *heldout,
               "--output", report, "--figure", report.with_suffix(".png"))  # fmt: skip
    found = json.loads(report.read_text())
    colours = {
        key: sum(found["colours"]["samples"][key]["rgb"])
        / sum(found["colours"]["heldout"][key]["rgb"])
        for key in ("palette", "contrast")
    }
    return {
        "weights": name,
        "min_signal": float(min_signal),
        "shipped": number == len(options.files) - 1,
        "heldout_error": heldout_error(options.reference / losses),
        "samples_over_floor": {
            features: {m: found["distances"][features][m]["samples_over_floor"]["ratio"]
                       for m in MEASURES}
            for features in found["distances"]
        },
        "images_on_either_side": found["sizes"]["per_side"],
        **{f"{key}_over_heldout": value for key, value in colours.items()},
        **found["headline"],
    }  # fmt: skip


def main(argv=None):
    options = parse_options(argv)
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    record = {
        "hardware": device_name(pick_device("auto")),
        "samples": options.samples,
        "rows": [row_of(options, i, *file) for i, file in enumerate(options.files)],
    }
    (options.reference / "versions.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        error = row["heldout_error"]
        error = "unknown" if error is None else f"{error:.4f}"
        print(f"{row['weights']:<24}{error:>8}{row['median_ratio']:>8.2f}")


if __name__ == "__main__":
    main()
