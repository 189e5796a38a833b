"""What more fabrics change: the same short training on 100, on 1,059 and on 20,000 of them.

    python tests/benchmarks/measure_more_fabrics.py      an hour and a half on two CPU cores

Each set is drawn by ddpm_basics.fabrics, and exercise 3 trains on it as --train --quick does. Its
own records give the loss on fabrics of the set and on held-out ones; of fabrics that exercise 1
draws, and of held-out ones, ddpm_basics.evaluation counts those that are copies of one of the set.
Writes more_fabrics.json in training_results/reference; interrupted, the same command goes on.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ddpm_basics.console import new_parser  # noqa: E402
from ddpm_basics.evaluation.copies import find_neighbours, is_copy  # noqa: E402
from ddpm_basics.evaluation.folders import Fabrics  # noqa: E402
from ddpm_basics.evaluation.intervals import wilson  # noqa: E402
from ddpm_basics.fabrics.folder import draw_fabrics  # noqa: E402
from ddpm_basics.files import write_json  # noqa: E402
from ddpm_basics.images import read_folder  # noqa: E402
from ddpm_basics.losses import read_losses  # noqa: E402

COUNTS = (100, 1059, 20_000)
SAVE_EVERY = 250  # steps between the losses on fixed fabrics, twice as often as --quick has it
CPU = torch.device("cpu")


def parse_options(argv=None):
    """Read the command line."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--counts", type=int, nargs="+", default=COUNTS, help="fabrics to train on")
    add("--images", type=int, default=500, help="fabrics to draw from each network")
    add("--heldout", type=int, default=1000, help="held-out fabrics that copies are counted among")
    add("--folder", type=Path, default=ROOT / "training_results" / "more_fabrics",
        help="where data sets, runs and fabrics go")  # fmt: skip
    add("--output", type=Path, default=ROOT / "training_results/reference/more_fabrics.json",
        help="file to write")  # fmt: skip
    return parser.parse_known_args(argv)


def start(script, folder, *options):
    """Run one of the exercises in a folder."""
    command = [sys.executable, ROOT / script, *options]
    subprocess.run([*map(str, command)], check=True, cwd=folder)


def read(folder, size):
    """The fabrics of a folder, as the network sees them."""
    found = read_folder(folder, size, at_least=1)
    return Fabrics(folder, found.labels, torch.from_numpy(found.pixels))


def copies(samples, train):
    """How many of some fabrics are copies, of how many, and the interval of the share."""
    found = find_neighbours(samples, train, CPU)
    flags, _ = is_copy(found)
    hits, total = int(flags.sum()), len(flags)
    return {"copies": hits, "of": total, "share": hits / total, "wilson_95": wilson(hits, total),
            "lowest_ratio": found.ratio.min().item()}  # fmt: skip


def train(options, count, more):
    """Train on so many fabrics, draw, count; return the row of the report."""
    root = options.folder.resolve()
    fabrics, folder = root / f"fabrics_{count}", root / f"run_{count}"
    draw_fabrics(fabrics, count=count)
    weights = folder / "weights.pt"
    if not weights.exists():
        start("exercise3_train.py", root, "--train", "--quick", "--resume", "--data", fabrics,
              "--results-dir", folder, "--weights-out", weights, "--save-every", SAVE_EVERY,
              *more)  # fmt: skip
    start("exercise1_generate.py", folder, "--weights", weights, "--samples-dir", "samples",
          "--num-samples", options.images)  # fmt: skip
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    samples = read(folder / "samples", None)
    size = record["image_size"]
    known, unseen = read(fabrics, size), read(root / "heldout", size)
    shown = record["steps_done"] * record["effective_batch"]
    curve = [
        {"step": int(row["step"]), "train": row["train_fixed"], "heldout": row["heldout_fixed"]}
        for row in read_losses(folder / "losses.csv")
        if row["train_fixed"] > 0
    ]
    return {
        "count": count,
        "passes": shown / count,
        "hardware": record["hardware"],
        "precision": record["precision"],
        "steps": record["steps_done"],
        "curve": curve,
        "samples": copies(samples, known),
        "heldout": copies(unseen, known),
    }


def main(argv=None):
    """Train on every set, write after each, print the table."""
    options, more = parse_options(argv)
    draw_fabrics(options.folder / "heldout", split="heldout", count=options.heldout, seed=1)
    rows = []
    for count in options.counts:
        rows.append(train(options, count, more))
        write_json(options.output, {"images": options.images, "rows": rows})
    for row in rows:
        last = row["curve"][-1]
        print(
            f"{row['count']:6,} fabrics, {row['passes']:.0f} passes: loss {last['train']:.4f}, "
            f"held-out {last['heldout']:.4f}; copies {row['samples']['share']:.1%} of samples, "
            f"{row['heldout']['share']:.1%} of held-out fabrics"
        )
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
