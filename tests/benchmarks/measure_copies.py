"""Copies among judged fabrics, searched for in every fabric that the shipped network was shown.

    python tests/benchmarks/measure_copies.py SAMPLES [SAMPLES ...]     ten minutes on two CPU cores

ddpm_basics.evaluation looks for copies among the 1,059 fabrics of the lesson; the run behind the
weights went on drawing. This draws all of its fabrics again and counts the samples that are copies
of one of them, beside as many held-out fabrics. Writes training_results/reference/copies.json.
"""

import json
from pathlib import Path

from measure_more_fabrics import ROOT, copies, read

from ddpm_basics.console import new_parser
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.files import write_json

REFERENCE = ROOT / "training_results" / "reference"


def main(argv=None):
    """Draw the fabrics that are not there yet, search, write the file, print the table."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("samples", type=Path, nargs="+", help="folders of fabrics to judge")
    add("--count", type=int, help="fabrics of the run (default: what its run.json says)")
    add("--heldout", type=int, default=2000, help="held-out fabrics to compare with")
    add("--folder", type=Path, default=ROOT / "training_results" / "copies",
        help="where the fabrics are drawn")  # fmt: skip
    add("--output", type=Path, default=REFERENCE / "copies.json", help="file to write")
    options = parser.parse_args(argv)
    record = json.loads((REFERENCE / "run.json").read_text(encoding="utf-8"))
    count = options.count or record["num_images"]
    draw_fabrics(options.folder / "train", count=count)
    draw_fabrics(options.folder / "heldout", split="heldout", count=options.heldout, seed=1)
    train = read(options.folder / "train", None)
    rows = []
    for folder in (*options.samples, options.folder / "heldout"):
        found = copies(read(folder, None), train)
        rows.append({"what": folder.name, **found})
        print(f"{folder.name}: {found['copies']} copies of {found['of']:,}, "
              f"lowest d1/d2 {found['lowest_ratio']:.2f}")  # fmt: skip
    write_json(options.output, {"train": count, "rows": rows})
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
