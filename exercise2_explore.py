# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "accelerate>=1.0",
#     "matplotlib>=3.8",
#     "imageio>=2.34",
#     "imageio-ffmpeg>=0.5.1",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 2 (modify): take the diffusion process apart and look at every piece.

    python exercise2_explore.py                     all five parts, some 15 minutes on two cores
    python exercise2_explore.py --part c d          some of them; these two take seconds
    python exercise2_explore.py --part b --seed 7   another fabric

    a  the same noise, drawn in more and more steps     exercise2_sampling_comparison.png
    b  reverse denoising: from noise to a fabric        reverse_diffusion_demo.png, .gif
    c  forward diffusion: from a fabric to noise        forward_diffusion_demo.png, .gif
    d  three noise schedules beside each other          noise_schedule_comparison.png
    e  a morph through five fabrics, in a loop          ddpm_fabric_morph.gif, .mp4

Beside each figure stands a .json of the same name with the numbers in it. Parts c and d take a
fabric from the data folder; where there is none, one that the network has drawn.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_basics import figures, hardware, sampling
from ddpm_basics.console import duration, run_command
from ddpm_basics.files import check_folder, write_json
from ddpm_basics.images import decode, find_images, from_picture
from ddpm_basics.model import build_diffusion, label_vectors
from ddpm_basics.options import explore_options
from ddpm_basics.weight_files import load_weights

RANDOM_SEED = 42  # decides the noise that fabrics grow out of, and which training fabric is shown
GUIDANCE = 2.0  # how much of its label a fabric gets: 0 nothing, 1 as trained
SAMPLING_STEPS = {"dpmpp": 20, "ddim": 250}  # where a part names no others

# Part a
STEP_COUNTS = (50, 100, 250, 500, 1000)  # DDIM steps
FAST_STEP_COUNTS = (5, 10, 15, 20, 50)  # DPM-Solver++ steps
NUM_SAMPLES = 1  # fabrics drawn at each number of steps

# Part b
CAPTURE_TIMESTEPS = (999, 800, 600, 400, 200, 100, 0)  # t; the nearest one visited is shown

# Parts c and d
FORWARD_TIMESTEPS = (0, 100, 250, 500, 750, 999)  # t
SCHEDULE = "sigmoid"  # of part c, the module's own; part d compares it with the other two

# Part e
MORPH_FABRICS = 5
MORPH_STEPS = 15  # DPM-Solver++ steps for each frame
MORPH_FRAMES = 24  # from one fabric to the next
MORPH_PIXELS = 192  # per side of the films
BATCH_SIZE = {"cpu": 4, "mps": 16, "cuda": 64}  # frames the network sees at once

DATA = "african_fabric_processed"


@dataclass
class Lab:
    """What the parts share: the options, the network, where it computes, and how."""

    options: argparse.Namespace
    diffusion: GaussianDiffusion
    device: torch.device
    precision: str
    noise: Tensor  # x_T [n, c, h, w] of the first fabrics from --seed on
    labels: Tensor | None  # [n, 4 dim], the traditions in turn; None where the network knows none

    def first(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return noise and labels of the first fabrics."""
        return self.noise[:count], None if self.labels is None else self.labels[:count]


@torch.inference_mode()
def walk(
    lab: Lab, sampler: str, x_T: Tensor, labels: Tensor | None, steps: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk from the noise x_T to images; yield t, x_t and the guess of x_0 at every step."""
    levels = sampling.noise_levels(lab.diffusion)
    spread = sampling.log_snr_times if sampler == "dpmpp" else sampling.even_times
    x_t, past = x_T.to(lab.device), []
    for t, s in pairwise(spread(levels, steps)):
        with hardware.autocast(lab.device, lab.precision):
            x_0 = sampling.predict_x_0(lab.diffusion, levels, x_t, t, labels, GUIDANCE)
        yield t, x_t, x_0
        if sampler == "ddim":
            x_t = sampling.ddim_step(levels, x_t, x_0, t, s)
        else:
            x_t = sampling.dpmpp_step(levels, x_t, x_0, t, s, past)
            past = [(x_0, t), *past[:1]]


def draw(
    lab: Lab, sampler: str, x_T: Tensor, labels: Tensor | None, steps: int, bar: tqdm
) -> Tensor:
    """Draw the fabrics [n, c, h, w] in [0, 1] that grow out of x_T."""
    for _, _, x_0 in walk(lab, sampler, x_T, labels, steps):
        bar.update(len(x_0))
    return figures.pixels(x_0)


def find_fabric(lab: Lab) -> tuple[Tensor, str]:
    """Return a fabric [1, c, h, w] in [-1, 1] and where it is from: the data, or the network."""
    folder, seed = lab.options.data, lab.options.seed
    if folder.exists() and (paths := find_images(folder)[0]):
        path = random.Random(seed).choice(paths)
        fabric = torch.from_numpy(from_picture(decode(path, 64)))[None]
        return fabric * 2 - 1, str(path)
    print(f"{folder} holds no fabrics ('python -m ddpm_basics.fabrics' draws some): drawing one.")
    noise, labels = lab.first(1)
    *_, (_, _, x_0) = walk(lab, "dpmpp", noise, labels, SAMPLING_STEPS["dpmpp"])
    return x_0.cpu(), f"drawn by the network from seed {seed}"


def part_a(lab: Lab, path: Path) -> dict[str, Any]:
    """Draw the same noise with both samplers in more and more steps; measure time and distance."""
    (x_T, labels), timesteps = lab.first(NUM_SAMPLES), lab.diffusion.num_timesteps
    sampling.check_steps(timesteps, max([*STEP_COUNTS, *FAST_STEP_COUNTS]))
    counts = dict.fromkeys([timesteps, *STEP_COUNTS])  # the reference first, and only once
    plan = [("ddim", n) for n in counts] + [("dpmpp", n) for n in FAST_STEP_COUNTS]
    drawings = []
    with tqdm(total=sum(steps for _, steps in plan) * NUM_SAMPLES, desc="a", unit="step") as bar:
        draw(lab, "ddim", x_T, labels, 1, tqdm(disable=True))  # the first is slow
        for sampler, steps in plan:
            started = time.perf_counter()
            images = draw(lab, sampler, x_T, labels, steps, bar)
            seconds = (time.perf_counter() - started) / NUM_SAMPLES
            apart = figures.distance(images, drawings[0].images) if drawings else 0.0
            drawings.append(figures.Drawing(sampler, steps, seconds, images, apart))
    shown = [d for d in drawings if d.sampler == "dpmpp" or d.steps in STEP_COUNTS]
    figures.plot_sweep(path, shown)
    return {"fabrics": NUM_SAMPLES, **figures.sweep_numbers(shown)}


def part_b(lab: Lab, path: Path) -> dict[str, Any]:
    """Watch a fabric come out of noise, in a figure and a film."""
    steps = min(SAMPLING_STEPS["ddim"], lab.diffusion.num_timesteps)
    steps_taken = tqdm(walk(lab, "ddim", *lab.first(1), steps), "b", steps)
    frames = [(t, x_t[0].cpu(), x_0[0].cpu()) for t, x_t, x_0 in steps_taken]
    nearest = {min(frames, key=lambda frame: abs(frame[0] - t))[0] for t in CAPTURE_TIMESTEPS}
    captured = [frame for frame in frames if frame[0] in nearest]
    figures.plot_reverse(path, captured)
    figures.film_reverse(path.with_suffix(".gif"), frames)
    result = figures.pixels(frames[-1][2])
    numbers = [{"t": t, "distance_of_x_0": figures.distance(figures.pixels(x_0), result),
                "spread_of_x_t": x_t.std().item()} for t, x_t, x_0 in captured]  # fmt: skip
    return {"steps": len(frames), "captured": numbers}


def add_noise(
    process: GaussianDiffusion, x_0: Tensor, seed: int, times: Sequence[int]
) -> dict[int, Tensor]:
    """Return {t: x_t} of one fabric and one noise: any t in a single step (Ho 2020, eq. 4)."""
    noise, _ = sampling.starting_noise([seed], x_0.shape[1:])
    return {t: process.q_sample(x_0, torch.tensor([t]), noise)[0] for t in times}


def part_c(lab: Lab, path: Path) -> dict[str, Any]:
    """Watch a fabric drown in noise, in a figure and a film."""
    x_0, source = find_fabric(lab)
    process = build_diffusion(dim=8, dim_mults=(1,), beta_schedule=SCHEDULE)  # network unused
    figures.plot_forward(
        path, process, add_noise(process, x_0, lab.options.seed, FORWARD_TIMESTEPS)
    )
    film = add_noise(process, x_0, lab.options.seed, [*range(0, 1000, 20), 999])
    figures.film_forward(path.with_suffix(".gif"), process, film)
    rows = figures.levels_at(process, FORWARD_TIMESTEPS)
    return {"schedule": SCHEDULE, "fabric": source, "captured": rows}


def part_d(lab: Lab, path: Path) -> dict[str, Any]:
    """Compare three noise schedules, by their curves and by what they make of one fabric."""
    x_0, source = find_fabric(lab)
    processes = {name: build_diffusion(8, (1,), beta_schedule=name) for name in sampling.SCHEDULES}
    noised = {name: add_noise(process, x_0, lab.options.seed, FORWARD_TIMESTEPS)
              for name, process in processes.items()}  # fmt: skip
    figures.plot_schedules(path, processes, noised)
    times = sorted({*FORWARD_TIMESTEPS, 499})
    rows = {name: figures.levels_at(process, times) for name, process in processes.items()}
    return {"fabric": source, **rows}


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Walk the great circle from one noise [c, h, w] to another (Shoemake 1985).

    Noise in d dimensions has a length near sqrt(d). A straight line between two of them passes
    through shorter vectors, which are unlike any noise the network has seen.
    """
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = cosine.clamp(-1, 1).acos()
    return (((1 - fraction) * angle).sin() * start + (fraction * angle).sin() * end) / angle.sin()


def part_e(lab: Lab, path: Path) -> dict[str, Any]:
    """Draw a loop through five fabrics, in even steps from noise to noise and label to label."""
    noise, labels = lab.first(MORPH_FABRICS)
    fractions = torch.arange(MORPH_FRAMES) / MORPH_FRAMES
    drawn: list[Tensor] = []
    with tqdm(total=MORPH_FABRICS * MORPH_FRAMES * MORPH_STEPS, unit="step", desc="e") as bar:
        for i in range(MORPH_FABRICS):
            j = (i + 1) % MORPH_FABRICS
            for part in fractions.split(BATCH_SIZE[lab.device.type]):
                x_T = torch.stack([slerp(noise[i], noise[j], f) for f in part])
                told = labels
                if told is not None:
                    told = torch.lerp(told[i], told[j], part[:, None])
                drawn.append(draw(lab, "dpmpp", x_T, told, MORPH_STEPS, bar))
    frames = torch.cat(drawn)
    figures.film_morph(path, frames, MORPH_PIXELS, 60)
    change = [figures.distance(a, b) for a, b in pairwise([*frames, frames[0]])]
    fabrics = frames[::MORPH_FRAMES]
    return {"fabrics": MORPH_FABRICS, "frames": len(frames), "steps_per_frame": MORPH_STEPS,
            "largest_change": max(change), "mean_change": sum(change) / len(change),
            "fabrics_apart": figures.distance(fabrics, fabrics.roll(1, 0))}  # fmt: skip


PARTS = {  # a part draws the figure it is given the path of, and returns the numbers in it
    "a": (part_a, "exercise2_sampling_comparison.png"),
    "b": (part_b, "reverse_diffusion_demo.png"),
    "c": (part_c, "forward_diffusion_demo.png"),
    "d": (part_d, "noise_schedule_comparison.png"),
    "e": (part_e, "ddpm_fabric_morph.gif"),
}


def explore(options: argparse.Namespace) -> None:
    """Run the parts that were asked for."""
    started = time.perf_counter()
    device = hardware.pick_device(options.device)
    diffusion, facts = load_weights(options.weights)
    precision = hardware.pick_precision(options.precision, device, diffusion)
    print(f"{facts.describe(options.weights)}; on {hardware.describe(device)} in {precision}")
    hardware.prepare_to_sample(diffusion, device, precision)
    check_folder(options.output_dir)
    seeds = range(options.seed, options.seed + max(NUM_SAMPLES, MORPH_FABRICS))
    noise, _ = sampling.starting_noise(seeds, (diffusion.channels, *diffusion.image_size))
    labels = label_vectors(diffusion, facts.labels, range(len(seeds)))
    lab = Lab(options, diffusion, device, precision, noise, labels)
    for part in sorted(set(options.part)):
        begun = time.perf_counter()
        work, path = PARTS[part][0], options.output_dir / PARTS[part][1]
        numbers, seconds = work(lab, path), time.perf_counter() - begun
        record = {"seed": options.seed, "device": hardware.describe(device), "precision": precision}
        write_json(path.with_suffix(".json"), {**record, **numbers, "seconds": seconds})
        files = ", ".join(map(str, sorted(options.output_dir.glob(f"{path.stem}.*"))))
        print(f"Part {part}: wrote {files} in {duration(seconds)}.")
    print(f"Done in {duration(time.perf_counter() - started)}.")


def main(argv: list[str] | None = None) -> int:
    """Run the exercise; return the exit code."""
    options = explore_options(
        argv, __doc__.split("\n\n")[0], parts=PARTS, seed=RANDOM_SEED, data=DATA
    )
    return run_command(
        lambda: explore(options),
        after_interrupt=f"The parts that were finished are in {options.output_dir}.",
        if_memory_ends="lower BATCH_SIZE or NUM_SAMPLES at the top of the script.",
    )


if __name__ == "__main__":
    sys.exit(main())
