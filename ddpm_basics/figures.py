"""How figures look: axes, captions, layout. What is in them, the exercises decide."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "IPython" not in sys.modules:  # a shell may inherit a notebook's, which is not installed here
    os.environ.pop("MPLBACKEND", None)

import matplotlib.style
import numpy as np
from denoising_diffusion_pytorch import GaussianDiffusion
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor

from ddpm_basics.files import write_atomically
from ddpm_basics.images import film_trouble, save_film, save_gif, tile, to_picture

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
WIDTH = 7  # inches
COLORS = {"sigmoid": "#c2410c", "cosine": "#0f766e", "linear": "#4338ca"}  # of the schedules
LINES = {"sigmoid": "-", "cosine": "--", "linear": "-"}
SAMPLERS = {"ddim": ("DDIM", "#4338ca"), "dpmpp": ("DPM-Solver++", "#c2410c")}


@contextmanager
def new_figure(path: Path, height: float, title: str) -> Iterator[Figure]:
    """Give a figure of the house's width and style, and write it to path at the end."""
    # A matplotlibrc of the user's does not count: with LaTeX, say, where none is installed.
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure((WIDTH, height), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left")
        yield figure
        with write_atomically(path) as temporary:
            figure.savefig(temporary)
    gc.collect()  # figures before this one: 5 MB each in circles of references, kept for long


def show(axes: Axes, image: Any, caption: str = "", title: str = "") -> None:
    """Show a picture, or an image [c, h, w] in [0, 1], with a line of text below and above."""
    picture = image if isinstance(image, Image.Image) else to_picture(image)
    # As RGB, since of a grey picture matplotlib would stretch the contrast.
    axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
    axes.set_xlabel(caption)
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.grid(False)


def pixels(x_t: Tensor) -> Tensor:
    """Turn what lies in [-1, 1], or with its noise beyond, into an image in [0, 1] on the CPU."""
    return (x_t.float().cpu().clamp(-1, 1) + 1) / 2


def distance(images: Tensor, others: Tensor) -> float:
    """Return the root mean square difference of images in [0, 1]."""
    return (images - others).square().mean().sqrt().item()


def levels_at(process: GaussianDiffusion, times: Iterable[int]) -> list[dict[str, float]]:
    """Return t, alpha-bar, beta and the signal-to-noise ratio at these timesteps."""
    alpha_bar, beta = process.alphas_cumprod.tolist(), process.betas.tolist()
    return [
        {
            "t": t,
            "alpha_bar": alpha_bar[t],
            "beta": beta[t],
            "snr": alpha_bar[t] / (1 - alpha_bar[t]),
        }
        for t in times
    ]


def number(value: float) -> str:
    """Write a number with the digits that count: 3e-7, 0.0123, 4.56, 3,333."""
    if value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4f}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


# ---- Exercise 2 ----------------------------------------------------------------------------------


@dataclass
class Drawing:
    """The same noise drawn by a sampler in so many steps: images [n, c, h, w] in [0, 1].

    seconds are per image; distance is that to the result of all DDIM steps.
    """

    sampler: str
    steps: int
    seconds: float
    images: Tensor
    distance: float


def sweep_numbers(drawings: Iterable[Drawing]) -> dict[str, list[dict[str, float]]]:
    """Return {sampler: rows of steps, distance and seconds}, the fewest steps first."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in SAMPLERS}
    for d in sorted(drawings, key=lambda drawing: drawing.steps):
        rows[d.sampler].append({"steps": d.steps, "distance": d.distance, "seconds": d.seconds})
    return rows


def plot_sweep(path: Path, drawings: Sequence[Drawing]) -> None:
    """Draw the pictures of each sampler in a row, and the distances below them."""
    drawings = sorted(drawings, key=lambda drawing: drawing.steps)
    rows = {name: [d for d in drawings if d.sampler == name] for name in SAMPLERS}
    columns = max(map(len, rows.values()))
    with new_figure(path, 7, "One noise, more and more steps") as figure:
        grid = figure.add_gridspec(3, columns, height_ratios=(1, 1, 1))
        below = figure.add_subplot(grid[2, :])
        for i, (sampler, row) in enumerate(rows.items()):
            name, color = SAMPLERS[sampler]
            for j, drawing in enumerate(row):
                title = f"{name}\n" if j == 0 else "\n"
                apart = f"distance {drawing.distance:.3f}" if drawing.distance else "the reference"
                caption = f"{drawing.seconds:.1f} s\n{apart}"
                sheet = tile(drawing.images, gap=0)
                show(
                    figure.add_subplot(grid[i, j]), sheet, caption, f"{title}{drawing.steps} steps"
                )
            others = [drawing for drawing in row if drawing.distance > 0]
            counts, distances = [d.steps for d in others], [d.distance for d in others]
            below.loglog(counts, distances, "o-", color=color, label=name)
        below.set(xlabel="steps", ylabel="distance")
        below.set_title("Distance to the DDIM result of all steps (pixels from 0 to 1)")
        below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        below.yaxis.set_major_formatter("{x:g}")
        steps = sorted({drawing.steps for drawing in drawings})
        below.set_xticks(steps, [str(step) for step in steps])
        below.minorticks_off()
        below.legend()


def plot_reverse(path: Path, frames: Sequence[tuple[int, Tensor, Tensor]]) -> None:
    """Draw x_t in the first row and what the network takes for x_0 in the second."""
    title = "Out of noise: the guess comes first, the details last"
    with new_figure(path, 0.6 + 2 * WIDTH / len(frames), title) as figure:
        axes = figure.subplots(2, len(frames), squeeze=False)
        for column, (t, x_t, x_0) in enumerate(frames):
            show(axes[0, column], pixels(x_t), title=f"t = {t}")
            show(axes[1, column], pixels(x_0))
        axes[0, 0].set_ylabel("$x_t$")
        axes[1, 0].set_ylabel("predicted $x_0$")


def film_reverse(path: Path, frames: Sequence[tuple[int, Tensor, Tensor]]) -> None:
    """Write about fifty of the frames (t, x_t, x_0) as a .gif; the last one stays for long."""
    shown = frames[:: max(1, len(frames) // 50)]
    shown = shown if shown[-1] is frames[-1] else [*shown, frames[-1]]
    sheets = [
        tile(
            [pixels(x_t), pixels(x_0)], 2, cell=192, resample=Image.Resampling.NEAREST,
            captions=[f"x_t, t = {t}", "predicted x_0"],
        )
        for t, x_t, x_0 in shown
    ]  # fmt: skip
    save_gif(sheets, path, [80] * (len(sheets) - 1) + [2500])


def plot_forward(path: Path, process: GaussianDiffusion, noised: Mapping[int, Tensor]) -> None:
    """Draw a fabric {t: x_t}, with alpha-bar and SNR below."""
    with new_figure(path, 0.85 + WIDTH / len(noised), "A fabric sinks into noise") as figure:
        axes = figure.subplots(1, len(noised), squeeze=False)[0]
        for place, x_t, row in zip(axes, noised.values(), levels_at(process, noised), strict=True):
            alpha_bar, snr = number(row["alpha_bar"]), number(row["snr"])
            show(
                place, pixels(x_t), f"$\\bar\\alpha$ = {alpha_bar}\nSNR = {snr}", f"t = {row['t']}"
            )


def film_forward(path: Path, process: GaussianDiffusion, noised: Mapping[int, Tensor]) -> None:
    """Write a fabric {t: x_t} as a .gif; the first and the last one stay for longer."""
    sheets = [
        tile(
            [pixels(x_t)], cell=256, resample=Image.Resampling.NEAREST,
            captions=[f"t = {row['t']}, alpha-bar = {number(row['alpha_bar'])}"],
        )
        for x_t, row in zip(noised.values(), levels_at(process, noised), strict=True)
    ]  # fmt: skip
    save_gif(sheets, path, [1500] + [80] * (len(sheets) - 2) + [1500])


def announce_film() -> bool:
    """Tell whether films can be written here; where not, say so before anything is drawn."""
    if trouble := film_trouble():
        print(f"ffmpeg cannot be used ({trouble}): a .gif is written, but no .mp4.", flush=True)
    return not trouble


def film_morph(
    path: Path, images: Iterable[Tensor], side: int, milliseconds: int, film: bool
) -> None:
    """Write images [c, h, w] in [0, 1], `side` pixels wide and high, as .gif and, a film, .mp4."""
    size = (side, side)
    frames = [to_picture(image).resize(size, Image.Resampling.BICUBIC) for image in images]
    save_gif(frames, path.with_suffix(".gif"), [milliseconds] * len(frames))
    if film:
        save_film(frames, path.with_suffix(".mp4"), milliseconds)


def plot_schedules(
    path: Path,
    processes: Mapping[str, GaussianDiffusion],
    noised: Mapping[str, Mapping[int, Tensor]],
) -> None:
    """Draw three curves of each schedule, and below them one fabric {schedule: {t: x_t}}."""
    count = max(map(len, noised.values()))
    height, title = 2.9 + 3 * WIDTH / (count + 1), "Three schedules: how fast the signal goes"
    with new_figure(path, height, title) as figure:
        above, below = figure.subfigures(  # type: ignore[misc]  # it is an array
            2, 1, height_ratios=(2.4, 0.5 + 3 * WIDTH / count)
        )
        curves = above.subplots(1, 3)
        for name, process in processes.items():
            style: Any = {"color": COLORS[name], "label": name, "linestyle": LINES[name]}
            alpha_bar = process.alphas_cumprod.double()
            curves[0].plot(alpha_bar, **style)
            curves[1].semilogy(process.betas, **style)
            curves[2].plot((alpha_bar / (1 - alpha_bar)).log(), **style)
        titles = ("alpha-bar: signal left", "beta: noise added", "log SNR")
        for axes, text in zip(curves, titles, strict=True):
            axes.set(title=text, xlabel="t", xticks=(0, 500, 1000))
        above.legend(*curves[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
        tiles = below.subplots(len(noised), count, squeeze=False)
        for i, (name, row) in enumerate(noised.items()):
            for axes, (t, x_t) in zip(tiles[i], row.items(), strict=True):
                show(axes, pixels(x_t), title=f"t = {t}" if i == 0 else "")
            tiles[i, 0].set_ylabel(name, color=COLORS[name])


def plot_rows(path: Path, title: str, columns: Sequence[str], rows: Mapping[str, Tensor]) -> None:
    """Draw {name of a row: images [columns, c, h, w] in [0, 1]}."""
    with new_figure(path, 0.6 + len(rows) * WIDTH / (len(columns) + 0.3), title) as figure:
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for i, (name, images) in enumerate(rows.items()):
            for axes, text, image in zip(grid[i], columns, images, strict=True):
                show(axes, image, title=text if i == 0 else "")
            shown = name.encode(errors="backslashreplace").decode()  # a file's may be no text
            grid[i, 0].set_ylabel(shown, parse_math=False)


# ---- Exercise 3 ----------------------------------------------------------------------------------


def plot_losses(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw the training loss, and the fixed losses on training and held-out images."""
    title = "Loss while training, and of the averaged weights on fixed images"
    with new_figure(path, 4, title) as figure:
        axes = figure.subplots()
        axes.plot(*curve(rows, "loss"), color="0.6", linewidth=0.8, label="training loss")
        axes.plot(*curve(rows, "train_fixed"), "o-", ms=3, label="fixed training images")
        axes.plot(*curve(rows, "heldout_fixed"), "s-", ms=3, label="fixed held-out images")
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend()


def curve(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of the rows that have a value in a column."""
    pairs = [(row["step"], row[name]) for row in rows if not math.isnan(row[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]
