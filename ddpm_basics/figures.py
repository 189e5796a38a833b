"""How figures look: style, captions, layout."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ddpm_basics.files import write_atomically
from ddpm_basics.images import to_picture
from ddpm_basics.runs import read_losses

STYLE = {  # of every figure: 7 inches are 700 points on the page, so that text stays readable
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
FIGURE_WIDTH = 7  # inches


def number(value):
    """Write a number with the digits that count: 3e-7, 0.0123, 4.56, 3,333."""
    if value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4f}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def show(axes, image, caption="", title=""):
    """Show one image [c, h, w] in [0, 1] with a line of text below and one above."""
    axes.imshow(np.asarray(to_picture(image)), cmap="gray", interpolation="nearest")
    axes.set_xlabel(caption)
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(False)


def save_figure(figure, path):
    """Write a figure."""
    with write_atomically(path) as temporary:
        figure.savefig(temporary)


def plot_losses(csv_path: Path, figure_path: Path) -> None:
    """loss_curve.png: the training loss, and the fixed losses on training and held-out images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_losses(csv_path)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*columns(rows, "loss"), color="0.6", linewidth=0.8, label="training loss")
    axes.plot(*columns(rows, "train_fixed"), "o-", ms=3, label="EMA's error, training images")
    axes.plot(*columns(rows, "heldout_fixed"), "s-", ms=3, label="EMA's error, held-out images")
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axes.set_title("Loss while training, and the plain error of the noise")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, which="both")
    with write_atomically(figure_path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def columns(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have a value in a column."""
    pairs = [(row["step"], row[name]) for row in rows if not math.isnan(row[name])]
    return [p[0] for p in pairs], [p[1] for p in pairs]
