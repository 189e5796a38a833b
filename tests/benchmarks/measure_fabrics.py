"""Measure the drawn fabrics: rendering time, distances between images, spread of colours.

    python tests/benchmarks/measure_fabrics.py     # writes training_results/reference/fabrics.json

The distance between two images is the root mean square of the difference of their pixels, in
[0, 1] (0 for equal images, 1 for black and white), and the smaller one of image to image and image
to mirrored image, as training flips them.
"""

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ddpm_basics.fabrics.colour import to_oklab  # noqa: E402
from ddpm_basics.fabrics.manifest import read_manifest  # noqa: E402
from ddpm_basics.files import write_json  # noqa: E402
from ddpm_basics.hardware import describe  # noqa: E402
from ddpm_basics.images import decode  # noqa: E402

REPORT = ROOT / "training_results" / "reference" / "fabrics.json"
HELDOUT = 1000  # held-out images that are compared with all training images
HUES = 12  # bins of 30 degrees


def load_fabrics(folder):
    """Return (uint8 pixels [n, h, w, 3], labels) of a prepared folder, in the manifest's order."""
    traditions = read_manifest(Path(folder)).traditions
    pixels = np.stack([np.asarray(decode(Path(folder, file))) for file in traditions])
    return pixels, np.array(list(traditions.values()))


def distances(images, others):
    """Return the distance of every image to every one of the others, mirrored ones included."""

    def flat(pixels):
        return pixels.reshape(len(pixels), -1).astype(np.float32) / 255

    a, result = flat(images), None
    for b in (flat(others), flat(others[:, :, ::-1])):
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        rms = np.sqrt(np.maximum(squares, 0) / a.shape[1])
        result = rms if result is None else np.minimum(result, rms)
    return result


def nearest_within(images):
    """Return each image's distance to the nearest other one of the same set."""
    table = distances(images, images)
    np.fill_diagonal(table, np.inf)
    return table.min(1)


def coarse_oklab(images):
    """Return OKLab, [3, pixels], of every second row and column of the images."""
    return to_oklab(images[:, ::2, ::2].reshape(-1, 3).T / 255)


def palette_spread(images):
    """Return the mean OKLab distance between the average colours of two images."""
    means = coarse_oklab(images).reshape(3, len(images), -1).mean(2).T
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1)
    return float(apart.sum() / (len(means) * (len(means) - 1)))


def hue_shares(images):
    """Return the shares of 30-degree bins of hue among pixels of a clear colour (chroma > 0.06)."""
    _, green_red, blue_yellow = coarse_oklab(images)
    clear = np.hypot(green_red, blue_yellow) > 0.06
    turn = np.arctan2(blue_yellow[clear], green_red[clear]) / (2 * np.pi) % 1
    counts = np.bincount((turn * HUES).astype(int) % HUES, minlength=HUES)
    return counts / counts.sum()


def render(folder, *options):
    """Draw the fabrics of some options; return (seconds, seconds of processor time)."""
    command = [sys.executable, "-m", "ddpm_basics.fabrics", "--output", str(folder), *options]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure():
    """Render both splits into a temporary folder and return the report."""
    with tempfile.TemporaryDirectory() as name:
        folder, load = Path(name), os.getloadavg()[0]
        seconds, processor_seconds = render(folder / "train")
        again, _ = render(folder / "train")
        render(folder / "heldout", "--split", "heldout", "--count", str(HELDOUT))
        train, labels = load_fabrics(folder / "train")
        heldout, _ = load_fabrics(folder / "heldout")
        manifest = read_manifest(folder / "train")
    near, away = nearest_within(train), distances(heldout, train).min(1)
    spread = {label: palette_spread(train[labels == label]) for label in np.unique(labels)}
    return {
        "hardware": describe(torch.device("cpu")),
        "software": f"Python {platform.python_version()}, NumPy {np.__version__}, "
        f"Pillow {PIL.__version__}",
        "data": {key: getattr(manifest, key) for key in ("version", "seed", "count", "size",
                                                         "sha256")},
        "render": {
            "seconds": round(seconds, 1), "processor_seconds": round(processor_seconds, 1),
            "load_of_the_machine_before": round(load, 1), "second_run_seconds": round(again, 1),
        },
        "distance": "root mean square pixel difference in [0, 1], mirrored images included",
        "train_to_nearest_train": summary(near),
        "heldout_to_nearest_train": {"images": HELDOUT, **summary(away)},
        "palette_spread": {
            "unit": "mean OKLab distance between the average colours of two images",
            "all": round(palette_spread(train), 3),
            "by_tradition": {label: round(value, 3) for label, value in spread.items()},
            "hue_shares_by_30_degrees": [round(float(x), 3) for x in hue_shares(train)],
        },
    }  # fmt: skip


def summary(values):
    """Return the minimum and the median."""
    return {"minimum": round(float(values.min()), 4), "median": round(float(np.median(values)), 4)}


if __name__ == "__main__":
    write_json(REPORT, measure())
    print(f"{REPORT.read_text()}Wrote {REPORT}")
