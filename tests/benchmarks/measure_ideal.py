"""The error of the best denoiser for exactly the training images, beside the network's.

    python tests/benchmarks/measure_ideal.py      half an hour on two CPU cores

At ten noise levels all training fabrics, unflipped, and as many held-out ones are noised; the
perfect memory (ddpm_basics.steering.ideal_x_0) and the shipped network, without labels, guess them.
Writes the mean squared errors of x_0, in [-1, 1], to ideal_denoiser.json in
training_results/reference.
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from ddpm_basics import hardware, sampling, steering  # noqa: E402
from ddpm_basics.console import new_parser, whole_number  # noqa: E402
from ddpm_basics.fabrics.folder import draw_fabrics  # noqa: E402
from ddpm_basics.files import file_digest, write_json  # noqa: E402
from ddpm_basics.images import read_folder  # noqa: E402
from ddpm_basics.options import default_weights  # noqa: E402
from ddpm_basics.weight_files import load_weights  # noqa: E402

TIMES = (50, 150, 250, 300, 400, 500, 600, 700, 800, 950)  # t
BATCH_SIZE = 32
FOLDERS = {"train": "african_fabric_processed", "heldout": "african_fabric_heldout"}


def read(split, count):
    """So many fabrics [n, c, h, w] in [-1, 1], drawn first where they are missing."""
    folder = ROOT / FOLDERS[split]
    draw_fabrics(folder, split=split)
    return torch.from_numpy(read_folder(folder).pixels[:count]).float() / 127.5 - 1


@torch.no_grad()
def error(ask, levels, images, t, bar):
    """The mean squared error of what is guessed from the images at t, the same noise for all."""
    total = 0.0
    generator = torch.Generator().manual_seed(t)
    for x_0 in images.split(BATCH_SIZE):
        x_t = steering.noised(levels, x_0, t, torch.randn(x_0.shape, generator=generator))
        total += (ask(x_t, t) - x_0).square().mean((1, 2, 3)).sum().item()
        bar.update(len(x_0))
    return total / len(images)


def main(argv=None):
    """Measure and write."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, default=default_weights(), help="weight file")
    add("--times", type=whole_number(0), nargs="+", default=TIMES, help="t")
    add("--images", type=whole_number(1), default=1059, help="fabrics of each kind")
    add("--output", type=Path, default=ROOT / "training_results/reference/ideal_denoiser.json",
        help="file to write")  # fmt: skip
    options = parser.parse_args(argv)
    device = torch.device("cpu")
    diffusion, _ = load_weights(options.weights)
    precision = hardware.pick_precision("auto", device, diffusion)
    hardware.prepare_to_sample(diffusion, device, precision)
    levels = sampling.noise_levels(diffusion)
    images = {split: read(split, options.images) for split in FOLDERS}
    known = read("train", None)

    def network(x_t, t):
        with hardware.autocast(device, precision):
            return sampling.predict_x_0(diffusion, levels, x_t, t)

    asked = {"memory": partial(steering.ideal_x_0, known, levels), "network": network}
    rows = []
    with tqdm(total=len(options.times) * 4 * options.images, unit="fabric") as bar:
        for t in options.times:
            rows.append({"t": t, **{name: {split: error(ask, levels, own, t, bar)
                                           for split, own in images.items()}
                                    for name, ask in asked.items()}})  # fmt: skip
    write_json(options.output, {
        "weights": file_digest(options.weights), "images": options.images, "rows": rows,
        "precision": precision, "hardware": hardware.describe(device),
    })  # fmt: skip
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
