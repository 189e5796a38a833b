"""How often the fabrics are what was asked for, and how varied, at several strengths of guidance.

    python tests/benchmarks/measure_labels.py      three times 240 fabrics; an hour on two CPU cores

Exercise 1 draws the labels in turn at w = 1, 2 and 3, from the same noise; the classifier of
ddpm_basics.evaluation, trained on held-out fabrics, says what it takes them for. On other held-out
fabrics it shows what can be reached. Diversity is the spread of the fabrics of one tradition, in
random convolutions, in units of that of held-out ones. Writes labels.json in
training_results/reference; interrupted, the same command goes on.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ddpm_basics.console import new_parser  # noqa: E402
from ddpm_basics.evaluation.features import (  # noqa: E402
    RandomConvolutions,
    in_batches,
    standardise,
    train_classifier,
)
from ddpm_basics.evaluation.folders import Fabrics, read_fabrics, split_heldout  # noqa: E402
from ddpm_basics.evaluation.intervals import wilson  # noqa: E402
from ddpm_basics.evaluation.shares import predict  # noqa: E402
from ddpm_basics.fabrics.folder import draw_fabrics  # noqa: E402
from ddpm_basics.files import file_digest, write_json  # noqa: E402
from ddpm_basics.hardware import describe  # noqa: E402
from ddpm_basics.options import default_weights  # noqa: E402
from ddpm_basics.sample_folder import recorded_precision  # noqa: E402
from ddpm_basics.weight_files import load_weights  # noqa: E402

STRENGTHS = (1, 2, 3)  # w
SEED = 7000  # of the first fabric
CPU = torch.device("cpu")


def parse_options(argv=None):
    """Read the command line."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, default=default_weights(), help="weight file")
    add("--images", type=int, default=240, help="fabrics at each strength")
    add(
        "--heldout", type=int, default=4000, help="held-out fabrics, half of which are learned from"
    )
    add("--folder", type=Path, default=ROOT / "training_results" / "labels",
        help="where the fabrics go")  # fmt: skip
    add("--output", type=Path, default=ROOT / "training_results" / "reference" / "labels.json",
        help="file to write")  # fmt: skip
    return parser.parse_args(argv)


def draw(options, strength, names):
    """The fabrics of one strength, with the labels that were asked for."""
    folder = options.folder / f"w{strength}"
    command = [sys.executable, str(ROOT / "exercise1_generate.py"), "--label", "all",
               "--weights", str(options.weights.resolve()), "--num-samples", str(options.images),
               "--guidance", str(strength), "--seed", str(SEED),
               "--samples-dir", str(folder.resolve())]  # fmt: skip
    subprocess.run(command, check=True, cwd=options.folder)
    found = read_fabrics(folder)
    return Fabrics(folder, [names[i % len(names)] for i in range(len(found))], found.pixels)


def recognised(classifier, fabrics):
    """The share whose label the classifier guesses, with its interval, and that of each label."""
    guess, _ = predict(classifier, fabrics, CPU)
    right = np.array([classifier.names[g] == own for g, own in
                      zip(guess, fabrics.labels, strict=True)])  # fmt: skip
    labels = np.array(fabrics.labels)
    return {
        "recognised": float(right.mean()),
        "wilson_95": wilson(int(right.sum()), len(right)),
        "by_label": {name: float(right[labels == name].mean()) for name in classifier.names},
    }


def spreads(points, labels):
    """The spread of the points (N, d) of each label about their middle, averaged over labels."""
    labels = np.array(labels)
    return float(np.mean([points[labels == name].var(0).sum().sqrt() for name in set(labels)]))


def main(argv=None):
    """Draw, judge, write."""
    options = parse_options(argv)
    _, facts = load_weights(options.weights)
    unseen = options.folder / "heldout"
    draw_fabrics(unseen, split="heldout", count=options.heldout, seed=1)
    teach, measured = split_heldout(read_fabrics(unseen), np.random.default_rng(0))
    drawn = {strength: draw(options, strength, facts.labels) for strength in STRENGTHS}
    classifier = train_classifier(teach, 0, CPU)
    folders = {"heldout": measured, **drawn}
    points = standardise({
        name: in_batches(RandomConvolutions(), CPU, "convolutions", fabrics)
        for name, fabrics in folders.items()
    })  # fmt: skip
    spread = {name: spreads(points[name].flatten(0, 1), own.labels)
              for name, own in folders.items()}  # fmt: skip
    rows = [{"w": strength, **recognised(classifier, own),
             "diversity": spread[strength] / spread["heldout"]}
            for strength, own in drawn.items()]  # fmt: skip
    ceiling = recognised(classifier, measured)
    precision = recorded_precision(options.folder / f"w{STRENGTHS[0]}")
    write_json(options.output, {
        "weights": file_digest(options.weights), "images": options.images, "seed": SEED,
        "precision": precision, "hardware": describe(CPU), "heldout": ceiling, "rows": rows,
    })  # fmt: skip
    for row in rows:
        print(
            f"w = {row['w']}: {row['recognised']:.1%} recognised, diversity {row['diversity']:.2f}"
        )
    print(f"held-out fabrics: {ceiling['recognised']:.1%}. Wrote {options.output}.")


if __name__ == "__main__":
    main()
