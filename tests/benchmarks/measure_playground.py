"""What the playground's network draws, and what int8 costs it.

    python tests/benchmarks/measure_playground.py     20 minutes on one CPU core; needs Node

The page's own engine draws squares of 32 pixels with the labels in turn at w = 1 and 2. A
classifier that has learned from squares of held-out fabrics says what it takes them for, and what
it takes squares of other held-out fabrics for: that is as much as can be reached. From the same
noise the network with its own fp32 weights draws the squares of w = 2 again. Both are compared with
held-out squares by the lesson's distances, and with each other. And as the page asks what fabrics
from one noise share: how alike their grey levels are. Writes playground.json in
training_results/reference; interrupted, the same command goes on.
"""

import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from make_playground import WEIGHTS, run_engine, to_bytes  # noqa: E402
from measure_labels import CPU, recognised  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from ddpm_basics.console import new_parser  # noqa: E402
from ddpm_basics.evaluation import features  # noqa: E402
from ddpm_basics.evaluation.distances import distance_report, draw_splits  # noqa: E402
from ddpm_basics.evaluation.features import feature_spaces, train_classifier  # noqa: E402
from ddpm_basics.evaluation.folders import Fabrics, read_fabrics  # noqa: E402
from ddpm_basics.fabrics.folder import draw_fabrics  # noqa: E402
from ddpm_basics.files import file_digest, write_atomically, write_json  # noqa: E402
from ddpm_basics.hardware import describe  # noqa: E402
from ddpm_basics.model import label_vectors  # noqa: E402
from ddpm_basics.sampling import dpmpp_step, log_snr_times, noise_levels, predict_x_0  # noqa: E402
from ddpm_basics.weight_files import load_weights  # noqa: E402

STRENGTHS = (2, 1)  # w
COMPARED = 2  # the strength at which int8 meets fp32
STEPS = 20
SEED = 7000  # of the first square
SIDE = 32  # pixels
SQUARES = 12  # cut from each fabric that the classifier learns from
CLASSIFIER_STEPS = 1200  # a square tells less than a whole fabric, so it needs to see more of them


def parse_options(argv=None):
    """Read the command line."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=240, help="squares at each strength")
    add(
        "--heldout",
        type=int,
        default=4000,
        help="held-out fabrics; the classifier learns from three in four",
    )
    add("--folder", type=Path, default=ROOT / "training_results" / "playground",
        help="where the fabrics go")  # fmt: skip
    add("--output", type=Path, default=ROOT / "training_results" / "reference" / "playground.json",
        help="file to write")  # fmt: skip
    return parser.parse_args(argv)


def cut(fabrics, each, rng):
    """Squares cut at random from fabrics, `each` of them from each."""
    room = fabrics.pixels.shape[-1] - SIDE + 1
    corners = rng.integers(0, room, (each * len(fabrics), 2))
    squares = [
        fabrics.pixels[i % len(fabrics), :, y : y + SIDE, x : x + SIDE]
        for i, (y, x) in enumerate(corners)
    ]
    return Fabrics(fabrics.folder, fabrics.labels * each, torch.stack(squares))


def in_batches(folder, name, images, size, draw):
    """Draw squares [N, 32, 32, 3] in [-1, 1] batch by batch; those that are there are read."""
    parts = []
    for start in tqdm(range(0, images, size), name):
        path = folder / f"{name}-{start:03d}.npy"
        if not path.exists():
            with write_atomically(path) as temporary, temporary.open("wb") as file:
                np.save(file, draw(range(start, min(start + size, images))))
        parts.append(np.load(path).reshape(-1, SIDE, SIDE, 3))
    return np.concatenate(parts)


def draw_engine(names, images, strength, folder):
    """The squares that the page draws, labels in turn."""

    def draw(indices):
        return run_engine([
            {"seed": SEED + i, "label": i % len(names), "guidance": strength, "steps": STEPS}
            for i in indices
        ])  # fmt: skip

    return as_fabrics(in_batches(folder, f"w{strength}", images, len(names), draw), names)


def noises(images):
    """The page's x_T of each square, [N, 32, 32, 3]."""
    return run_engine([{"noise": SEED + i} for i in range(images)]).reshape(-1, SIDE, SIDE, 3)


def draw_torch(diffusion, names, images, folder):
    """The same squares from the same noise, with the network's own weights in fp32."""
    levels = noise_levels(diffusion)
    noise = torch.from_numpy(noises(images)).permute(0, 3, 1, 2)

    def draw(indices):
        x_t, past = noise[list(indices)].contiguous(), []
        labels = label_vectors(diffusion, names, indices)
        for t, s in pairwise(log_snr_times(levels, STEPS)):
            x_0 = predict_x_0(diffusion, levels, x_t, t, labels, COMPARED)
            x_t = dpmpp_step(levels, x_t, x_0, t, s, past)
            past = [(x_0, t), *past[:1]]
        return x_t.permute(0, 2, 3, 1).numpy()

    return as_fabrics(in_batches(folder, "fp32", images, len(names), draw), names)


def as_fabrics(x, names):
    """Drawn squares (N, ...) in [-1, 1], labels in turn, as the evaluation takes them."""
    pixels = torch.from_numpy(to_bytes(x)).permute(0, 3, 1, 2)
    labels = [names[i % len(names)] for i in range(len(x))]
    return Fabrics(Path("drawn"), labels, pixels.contiguous())


def distances(drawn, train, heldout, classifier):
    """Every distance to held-out squares, in units of the floor, and their median."""
    folders = {"samples": drawn, "train": train, "heldout": heldout}
    spaces = feature_spaces(folders, classifier, 0, CPU)
    sizes = {name: len(own) for name, own in folders.items()}
    splits = draw_splits(sizes, len(drawn) // 2, np.random.default_rng(0))
    report = distance_report(spaces, splits, 0, CPU)
    ratios = {
        f"{space}, {measure}": report[space][measure]["samples_over_floor"]["ratio"]
        for space in report
        for measure in ("sliced_wasserstein", "frechet", "kernel")
    }
    return {"median": float(np.median(list(ratios.values()))), **ratios}


def apart(one, other):
    """The root mean square difference of squares that grew out of the same noise, in [0, 1]."""
    difference = (one.pixels.float() - other.pixels.float()) / 255
    return float(difference.square().mean((1, 2, 3)).sqrt().mean())


def layout_from_noise(names, folder, seeds=12):
    """How alike fabrics of different traditions are: from one x_T, and from two.

    The mean correlation of the grey levels of two squares, over all pairs of different traditions.
    """
    count = len(names)

    def draw(indices):
        return run_engine([
            {"seed": SEED + i // count, "label": i % count, "guidance": COMPARED, "steps": STEPS}
            for i in indices
        ])  # fmt: skip

    grey = in_batches(folder, "layout", seeds * count, count, draw).mean(-1)
    alike = np.corrcoef(grey.reshape(seeds * count, -1)).reshape(seeds, count, seeds, count)
    other_label = ~np.eye(count, dtype=bool)[None, :, None, :]
    same_noise = np.eye(seeds, dtype=bool)[:, None, :, None]
    return {
        "seeds": seeds,
        "same_noise": float(alike[other_label & same_noise].mean()),
        "other_noise": float(alike[other_label & ~same_noise].mean()),
    }


@torch.inference_mode()
def compare(diffusion, names, int8, heldout, classifier, folder):
    """What int8 costs: distances of both to held-out squares, and to each other."""
    fp32 = draw_torch(diffusion, names, len(int8), folder)
    train = heldout.at(range(len(heldout) // 2))
    rest = heldout.at(range(len(heldout) // 2, len(heldout)))
    shuffled = int8.at(np.roll(np.arange(len(int8)), len(names)))
    return {
        "w": COMPARED,
        "int8": distances(int8, train, rest, classifier),
        "fp32": distances(fp32, train, rest, classifier),
        "fp32_recognised": recognised(classifier, fp32)["recognised"],
        "apart": apart(int8, fp32),
        "apart_other_noise": apart(int8, shuffled),
    }


def main(argv=None):
    """Draw, judge, write."""
    options = parse_options(argv)
    features.CLASSIFIER_STEPS = CLASSIFIER_STEPS
    diffusion, facts = load_weights(WEIGHTS)
    names = list(facts.labels)
    unseen = options.folder / "heldout"
    draw_fabrics(unseen, split="heldout", count=options.heldout, seed=1)
    rng = np.random.default_rng(0)
    fabrics = read_fabrics(unseen)
    order = rng.permutation(len(fabrics))
    learned = cut(fabrics.at(order[: 3 * len(order) // 4]), SQUARES, rng)
    measured = cut(fabrics.at(order[3 * len(order) // 4 :]), 1, rng)
    classifier = train_classifier(learned, 0, CPU)
    record = {
        "weights": file_digest(WEIGHTS), "images": options.images, "steps": STEPS, "seed": SEED,
        "hardware": describe(CPU), "heldout": recognised(classifier, measured), "rows": [],
    }  # fmt: skip
    print(f"held-out squares: {record['heldout']['recognised']:.1%} recognised")
    for strength in STRENGTHS:
        drawn = draw_engine(names, options.images, strength, options.folder)
        row = {"w": strength, **recognised(classifier, drawn)}
        record["rows"].append(row)
        print(f"w = {strength}: {row['recognised']:.1%} recognised")
        if strength == COMPARED:
            int8 = drawn
    record["layout_from_noise"] = layout_from_noise(names, options.folder)
    record["int8"] = compare(diffusion, names, int8, measured, classifier, options.folder)
    write_json(options.output, record)
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
