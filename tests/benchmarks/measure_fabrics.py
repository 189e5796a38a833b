"""Measure the drawn fabrics: rendering time, distances between images, spread of colours.

    python tests/benchmarks/measure_fabrics.py     # writes training_results/reference/fabrics.json

The distance between two images is the root mean square of the difference of their pixels, in
[0, 1] (0 for equal images, 1 for black and white), and the smaller one of image to image and image
to mirrored image, as training flips them.
"""

from __future__ import annotations

import argparse
import json
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
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "training_results" / "reference" / "fabrics.json"
HELDOUT = 1000  # held-out images that are compared with all training images
HUES = 12  # bins of 30 degrees


def load_fabrics(folder):
    """Return (uint8 pixels [n, h, w, 3], labels) of a prepared folder, in the manifest's order."""
    traditions = json.loads((Path(folder) / "manifest.json").read_text())["traditions"]
    pixels = np.stack([np.asarray(Image.open(Path(folder) / file)) for file in traditions])
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


def oklab(pixels):
    """Return OKLab, [..., 3], of sRGB bytes, [..., 3]; Ottosson (2020)."""
    srgb = pixels / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lms = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    return lms @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def palette_spread(images):
    """Return the mean OKLab distance between the average colours of two images.

    Every second row and column is looked at, as for the hues.
    """
    means = oklab(images[:, ::2, ::2]).mean((1, 2))
    apart = np.linalg.norm(means[:, None] - means[None], axis=-1)
    return float(apart.sum() / (len(means) * (len(means) - 1)))


def hue_shares(images):
    """Return the shares of 30-degree bins of hue among pixels of a clear colour (chroma > 0.06)."""
    lab = oklab(images[:, ::2, ::2].reshape(-1, 3))
    clear = np.hypot(lab[:, 1], lab[:, 2]) > 0.06
    turn = np.arctan2(lab[clear, 2], lab[clear, 1]) / (2 * np.pi) % 1
    counts = np.bincount((turn * HUES).astype(int) % HUES, minlength=HUES)
    return counts / counts.sum()


def render(folder, *options):
    """Draw the fabrics of some options; return (seconds, seconds of processor time)."""
    command = [sys.executable, "-m", "ddpm_basics.fabrics", "--output", str(folder), *options]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def hardware():
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def measure():
    """Render both splits into a temporary folder and return the report."""
    with tempfile.TemporaryDirectory() as name:
        folder, load = Path(name), os.getloadavg()[0]
        seconds, processor_seconds = render(folder / "train")
        again, _ = render(folder / "train")
        render(folder / "heldout", "--split", "heldout", "--count", str(HELDOUT))
        train, labels = load_fabrics(folder / "train")
        heldout, _ = load_fabrics(folder / "heldout")
        manifest = json.loads((folder / "train" / "manifest.json").read_text())
    near, away = nearest_within(train), distances(heldout, train).min(1)
    spread = {label: palette_spread(train[labels == label]) for label in np.unique(labels)}
    return {
        "hardware": hardware(),
        "software": f"Python {platform.python_version()}, NumPy {np.__version__}, "
        f"Pillow {PIL.__version__}",
        "data": {key: manifest[key] for key in ("version", "seed", "count", "size", "sha256")},
        "render": {
            "seconds": round(seconds, 1),
            "processor_seconds": round(processor_seconds, 1),
            "load_of_the_machine_before": round(load, 1),
            "second_run_seconds": round(again, 1),
        },
        "distance": "root mean square pixel difference in [0, 1], mirrored images included",
        "train_to_nearest_train": {
            "minimum": round(float(near.min()), 4),
            "median": round(float(np.median(near)), 4),
        },
        "heldout_to_nearest_train": {
            "images": HELDOUT,
            "minimum": round(float(away.min()), 4),
            "median": round(float(np.median(away)), 4),
        },
        "palette_spread": {
            "unit": "mean OKLab distance between the average colours of two images",
            "all": round(palette_spread(train), 3),
            "by_tradition": {label: round(value, 3) for label, value in spread.items()},
            "hue_shares_by_30_degrees": [round(float(x), 3) for x in hue_shares(train)],
        },
    }


def main():
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPORT, help=f"default: {REPORT}")
    output = parser.parse_args().output
    text = json.dumps(measure(), indent=2) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(text + f"Wrote {output}")


if __name__ == "__main__":
    main()
