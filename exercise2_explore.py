# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "ema-pytorch>=0.7",
#     "accelerate>=1.0",
#     "matplotlib>=3.8",
#     "imageio>=2.34",
#     "imageio-ffmpeg>=0.5.1",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "safetensors>=0.4.3",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 2 (modify): take the diffusion process apart and look at every piece.

    python exercise2_explore.py                     all parts, 10 to 20 minutes on two cores
    python exercise2_explore.py --part c d          some of them; these two take seconds
    python exercise2_explore.py --part inpainting_demo --picture my.jpg --mask keep.png

    a  the same noise, drawn in more and more steps     exercise2_sampling_comparison.png
    b  reverse denoising: from noise to a fabric        reverse_diffusion_demo.png, .gif
    c  forward diffusion: from a fabric to noise        forward_diffusion_demo.png, .gif
    d  three noise schedules beside each other          noise_schedule_comparison.png
    e  a morph through five fabrics, in a loop          ddpm_fabric_morph.gif, .mp4
    f  steering by guidance, from a given picture       guidance_demo.png, sdedit_demo.png
       around a region that stays, to a colour          inpainting_demo.png, colour_demo.png
       by a classifier, to cloth without seams          classifier_demo.png, tile_demo.png
    g  the perfect memory, which needs no network       ideal_denoiser_demo.png

Each figure comes with a .json file of the same name that holds its numbers. Parts c, d and f take a
fabric from the data folder, or --picture; where there is none, one that the network has drawn.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_basics import data, figures, hardware, sampling, steering
from ddpm_basics.console import duration, run_command
from ddpm_basics.fabrics.drawing import TRADITIONS
from ddpm_basics.files import check_folder, files_like, write_json
from ddpm_basics.images import decode, find_images, from_picture, save_picture, to_picture
from ddpm_basics.model import build_diffusion, label_vectors
from ddpm_basics.options import choose_shown, explore_options, process_of
from ddpm_basics.weight_files import load_weights

DATA = "african_fabric_processed"  # folder of fabrics
RANDOM_SEED = 42  # decides the noise that fabrics grow out of, and which training fabric is shown
GUIDANCE = 2.0  # how much of its label a fabric gets: 0 nothing, 1 as trained
SAMPLING_STEPS = {"dpmpp": 20, "ddim": 250}  # where a part names no others
SHORT_STEPS = 15  # DPM-Solver++ steps, where many fabrics are drawn: parts e and f

# Parts a and b
STEP_COUNTS = (50, 100, 250, 500, 1000)  # DDIM steps
FAST_STEP_COUNTS = (5, 10, 15, 20, 50)  # DPM-Solver++ steps
NUM_SAMPLES = 1  # fabrics drawn at each number of steps
CAPTURE_TIMESTEPS = (999, 800, 600, 400, 200, 100, 0)  # t of 1000; the nearest visited is shown

# Parts c to e
FORWARD_TIMESTEPS = (0, 100, 250, 500, 750, 999)  # t
SCHEDULE = "sigmoid"  # of part c, the module's own; part d compares it with the other two
MORPH_FABRICS = 5  # in the film
MORPH_FRAMES = 24  # from one fabric to the next
MORPH_PIXELS = 192  # per side

# Parts f and g
GUIDANCES = (0, 1, 2, 3, 5)  # w
SHOWN_LABELS = ("adinkra", "kente", "ndebele", "wax_print")  # unless --label names others
STRENGTHS = (0.2, 0.4, 0.6, 0.7, 0.8)  # how far a picture is noised, as a share of all timesteps
REGION_STEPS = 30  # ancestral steps around a region that is kept
REGION_ROUNDS = 4  # how often each of them is taken
COLOUR = (0.75, 0.3, 0.2)  # red, green, blue
COLOUR_WEIGHTS = (0, 1, 3, 10, 30)  # how much it counts
CLASSIFIER_WEIGHT = 20.0  # how much its gradient counts
CLASSIFIED_FABRICS = 12
COUNTED_FABRICS = 100  # of part g, among which copies are counted

BATCH_SIZE = {"cpu": 4, "mps": 16, "cuda": 64}  # frames the network sees at once


@dataclass
class Lab:
    """What the parts share: the options, the network, where it computes, and how."""

    options: argparse.Namespace
    diffusion: GaussianDiffusion
    device: torch.device
    precision: str
    levels: sampling.Levels
    noise: Tensor  # x_T [n, c, h, w] of the first fabrics from --seed on
    labels: Tensor | None  # [n, 4 dim], the traditions in turn; None where the network knows none

    def ask(self, labels: Tensor | None, guidance: float = GUIDANCE) -> steering.Ask:
        """Return the function of x_t and t that asks the network for x_0, with these labels."""
        guess = partial(sampling.predict_x_0, self.diffusion, self.levels,
                        labels=labels, guidance=guidance)  # fmt: skip
        return hardware.autocast(self.device, self.precision)(guess)

    def first(self, count: int, guidance: float = GUIDANCE) -> tuple[Tensor, steering.Ask]:
        """Return the noise of the first fabrics, and the network asked with their labels."""
        labels = None if self.labels is None else self.labels[:count]
        return self.noise[:count], self.ask(labels, guidance)


@torch.no_grad()
def walk(
    lab: Lab, x_t: Tensor, ask: steering.Ask, steps: int, sampler: str = "dpmpp",
    start: int | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """Walk from noise, or from x_t at t = start; yield t, x_t and the guess of x_0 at every step.

    ask guesses x_0: the network, or a function that changes its answer.
    """
    spread = sampling.log_snr_times if sampler == "dpmpp" else sampling.even_times
    x_t, past = x_t.to(lab.device), []
    longest = lab.diffusion.num_timesteps if start is None else start + 1
    for t, s in pairwise(spread(lab.levels, min(steps, longest), start)):
        x_0 = ask(x_t, t)
        yield t, x_t, x_0
        if sampler == "ddim":
            x_t = sampling.ddim_step(lab.levels, x_t, x_0, t, s)
        else:
            x_t = sampling.dpmpp_step(lab.levels, x_t, x_0, t, s, past)
            past = [(x_0, t), *past[:1]]


def draw(
    lab: Lab, x_t: Tensor, ask: steering.Ask, steps: int, sampler: str = "dpmpp",
    start: int | None = None, bar: tqdm | None = None,
) -> Tensor:  # fmt: skip
    """Draw the fabrics [n, c, h, w] in [0, 1] that grow out of noise, or out of x_t at `start`."""
    x_0 = x_t
    for _, _, x_0 in walk(lab, x_t, ask, steps, sampler, start):
        if bar is not None:
            bar.update(len(x_0))
    return figures.pixels(x_0)


def find_fabric(lab: Lab) -> tuple[Tensor, str]:
    """Return a fabric [1, c, h, w] in [-1, 1] and where it is from: the data, or the network."""
    folder, seed, path = lab.options.data, lab.options.seed, lab.options.picture
    if not path and folder.exists() and (paths := find_images(folder)[0]):
        path = random.Random(seed).choice(paths)
    if path:
        picture = decode(path, lab.noise.shape[-1], lab.diffusion.channels)
        return torch.from_numpy(from_picture(picture))[None] * 2 - 1, str(path)
    print(f"No fabrics in {folder.absolute()} (see 'python -m ddpm_basics.fabrics'): drawing one.")
    *_, (_, _, x_0) = walk(lab, *lab.first(1), SAMPLING_STEPS["dpmpp"])
    return x_0.cpu(), f"drawn by the network from seed {seed}"


def part_a(lab: Lab, path: Path) -> dict[str, Any]:
    """Draw the same noise with both samplers in more and more steps; measure time and distance."""
    (x_T, ask), timesteps = lab.first(NUM_SAMPLES), lab.diffusion.num_timesteps
    counts = dict.fromkeys([timesteps, *STEP_COUNTS])  # the reference first, and only once
    plan = [("ddim", n) for n in counts] + [("dpmpp", n) for n in FAST_STEP_COUNTS]
    plan = [(sampler, n) for sampler, n in plan if n <= timesteps]
    drawings = []
    with tqdm(total=sum(steps for _, steps in plan) * NUM_SAMPLES, desc="a", unit="step") as bar:
        draw(lab, x_T, ask, 1)  # the first is slow
        for sampler, steps in plan:
            started = time.perf_counter()
            images = draw(lab, x_T, ask, steps, sampler, bar=bar)
            seconds = (time.perf_counter() - started) / NUM_SAMPLES
            apart = figures.distance(images, drawings[0].images) if drawings else 0.0
            drawings.append(figures.Drawing(sampler, steps, seconds, images, apart))
    shown = [d for d in drawings if d.sampler == "dpmpp" or d.steps in STEP_COUNTS]
    figures.plot_sweep(path, shown)
    return {"fabrics": NUM_SAMPLES, **figures.sweep_numbers(shown)}


def part_b(lab: Lab, path: Path) -> dict[str, Any]:
    """Watch a fabric come out of noise, in a figure and a film."""
    steps = min(SAMPLING_STEPS["ddim"], lab.diffusion.num_timesteps)
    visited = tqdm(walk(lab, *lab.first(1), steps, "ddim"), "b", steps)
    frames = [(t, x_t[0].cpu(), x_0[0].cpu()) for t, x_t, x_0 in visited]
    wanted = [t * lab.diffusion.num_timesteps / 1000 for t in CAPTURE_TIMESTEPS]
    nearest = {min(frames, key=lambda frame: abs(frame[0] - t))[0] for t in wanted}
    captured = [frame for frame in frames if frame[0] in nearest]
    figures.plot_reverse(path, captured)
    figures.film_reverse(path.with_suffix(".gif"), frames)
    result = figures.pixels(frames[-1][2])
    numbers = [{"t": t, "distance_of_x_0": figures.distance(figures.pixels(x_0), result),
                "spread_of_x_t": x_t.std().item()} for t, x_t, x_0 in captured]  # fmt: skip
    return {"steps": len(frames), "captured": numbers}


def part_c(lab: Lab, path: Path) -> dict[str, Any]:
    """Watch a fabric drown in noise, in a figure and a film."""
    x_0, source = find_fabric(lab)
    process = build_diffusion(dim=8, dim_mults=(1,), beta_schedule=SCHEDULE)  # network unused
    # Any t in a single step (Ho 2020, equation 4), all with the same noise.
    mix = partial(steering.noised, sampling.noise_levels(process), x_0, noise=lab.noise[:1])
    figures.plot_forward(path, process, {t: mix(t)[0] for t in FORWARD_TIMESTEPS})
    film = {t: mix(t)[0] for t in [*range(0, 1000, 20), 999]}
    figures.film_forward(path.with_suffix(".gif"), process, film)
    rows = figures.levels_at(process, FORWARD_TIMESTEPS)
    return {"schedule": SCHEDULE, "fabric": source, "captured": rows}


def part_d(lab: Lab, path: Path) -> dict[str, Any]:
    """Compare three noise schedules, by their curves and by what they make of one fabric."""
    x_0, source = find_fabric(lab)
    processes = {name: build_diffusion(8, (1,), beta_schedule=name) for name in sampling.SCHEDULES}
    levels = {name: sampling.noise_levels(process) for name, process in processes.items()}
    noised = {name: {t: steering.noised(own, x_0, t, lab.noise[:1])[0] for t in FORWARD_TIMESTEPS}
              for name, own in levels.items()}  # fmt: skip
    figures.plot_schedules(path, processes, noised)
    times = sorted({*FORWARD_TIMESTEPS, 499})
    return {"fabric": source, **{n: figures.levels_at(p, times) for n, p in processes.items()}}


def part_e(lab: Lab, path: Path) -> dict[str, Any]:
    """Draw a loop through five fabrics, in even steps from noise to noise and label to label."""
    noise, labels, film = lab.noise, lab.labels, figures.announce_film()
    fractions = torch.arange(MORPH_FRAMES, device=lab.device) / MORPH_FRAMES
    drawn: list[Tensor] = []
    with tqdm(total=MORPH_FABRICS * MORPH_FRAMES * SHORT_STEPS, unit="step", desc="e") as bar:
        for i in range(MORPH_FABRICS):
            j = (i + 1) % MORPH_FABRICS
            for part in fractions.split(BATCH_SIZE[lab.device.type]):
                x_T = torch.stack([sampling.slerp(noise[i], noise[j], f) for f in part.tolist()])
                told = None if labels is None else torch.lerp(labels[i], labels[j], part[:, None])
                drawn.append(draw(lab, x_T, lab.ask(told), SHORT_STEPS, bar=bar))
    frames = torch.cat(drawn)
    figures.film_morph(path, frames, MORPH_PIXELS, 60, film)
    change = [figures.distance(a, b) for a, b in pairwise([*frames, frames[0]])]
    fabrics = frames[::MORPH_FRAMES]
    return {"fabrics": MORPH_FABRICS, "frames": len(frames), "steps_per_frame": SHORT_STEPS,
            "largest_change": max(change), "mean_change": sum(change) / len(change),
            "fabrics_apart": figures.distance(fabrics, fabrics.roll(1, 0))}  # fmt: skip


def steer_by_guidance(lab: Lab, path: Path) -> dict[str, Any]:
    """Draw one noise as several labels, with more and more of them (Ho & Salimans 2022)."""
    names = lab.options.shown
    x_T = lab.noise[:1].expand(len(names), -1, -1, -1)
    labels = label_vectors(lab.diffusion, names, range(len(names)))
    drawn = torch.stack([draw(lab, x_T, lab.ask(labels, w), SHORT_STEPS)
                         for w in tqdm(GUIDANCES, "f, guidance")], 1)  # fmt: skip
    columns, rows = [f"w = {w}" for w in GUIDANCES], dict(zip(names, drawn, strict=True))
    figures.plot_rows(path, "One noise, and more and more of a label", columns, rows)
    ends = ((drawn == 0) | (drawn == 1)).float()  # black or full in a channel
    return {"labels": names, "guidance": GUIDANCES, "at_the_ends": ends.mean((0, 2, 3, 4)).tolist(),
            "contrast": drawn.std((3, 4)).mean((0, 2)).tolist()}  # fmt: skip


def steer_a_picture(lab: Lab, path: Path) -> dict[str, Any]:
    """Noise a picture, and walk back from there with other labels (SDEdit, Meng 2022)."""
    (x_0, source), names = find_fabric(lab), lab.options.shown
    ask = lab.ask(label_vectors(lab.diffusion, names, range(len(names))))
    drawn = [figures.pixels(x_0).expand(len(names), -1, -1, -1)]
    for strength in tqdm(STRENGTHS, "f, picture"):
        start = round(strength * lab.diffusion.num_timesteps) - 1  # t counts from 0
        x_t = steering.noised(lab.levels, x_0, start, lab.noise[:1]).expand_as(drawn[0])
        steps = max(1, round(strength * SHORT_STEPS))  # fewer where less is left to do
        drawn.append(draw(lab, x_t, ask, steps, start=start))
    columns = ["the picture", *(f"strength {strength:g}" for strength in STRENGTHS)]
    rows = dict(zip(names, torch.stack(drawn, 1), strict=True))
    figures.plot_rows(path, "The same cloth, as another tradition", columns, rows)
    return {"picture": source, "labels": names, "strengths": STRENGTHS,
            "distance": [figures.distance(images, drawn[0]) for images in drawn[1:]]}  # fmt: skip


@torch.no_grad()
def draw_around(lab: Lab, x_0: Tensor, mask: Tensor, ask: steering.Ask, rounds: int) -> Tensor:
    """Draw what a mask leaves open of pictures x_0, and take each step in several rounds."""
    seeds = range(lab.options.seed, lab.options.seed + len(x_0))
    x_t, generators = sampling.starting_noise(seeds, x_0.shape[1:])
    x_0, mask, x_t = (tensor.to(lab.device) for tensor in (x_0, mask, x_t))
    steps = min(REGION_STEPS, lab.diffusion.num_timesteps)
    for t, s in pairwise(sampling.even_times(lab.levels, steps)):
        for rounds_left in reversed(range(rounds)):
            x_s = sampling.ancestral_step(lab.levels, x_t, ask(x_t, t), t, s, generators)
            x_s = steering.keep_region(lab.levels, x_s, x_0, mask, s, generators)
            x_t = steering.noise_again(lab.levels, x_s, s, t, generators) if rounds_left else x_s
    return x_t.cpu()


def steer_a_region(lab: Lab, path: Path) -> dict[str, Any]:
    """Keep half a fabric, a frame, or what --mask keeps, and draw the rest (RePaint)."""
    x_0, source = find_fabric(lab)
    own = [n for n in lab.diffusion.label_names if Path(source).parent == lab.options.data / n]
    label = (lab.options.label or own)[:1]
    ask = lab.ask(label_vectors(lab.diffusion, label, [0]), guidance=1.0)
    columns = ["kept", "steps taken once", f"steps taken {REGION_ROUNDS} times", "the picture"]
    rows, contrasts = {}, {}
    masks = steering.read_masks(x_0.shape[-1], lab.options.mask)
    for name, mask in tqdm(masks.items(), "f, region"):
        drawn = [draw_around(lab, x_0, mask, ask, rounds) for rounds in (1, REGION_ROUNDS)]
        rows[name] = figures.pixels(torch.cat([x_0 * mask, *drawn, x_0]))  # 0 is grey
        borders = [steering.border_contrast(image, mask) for image in (*drawn, x_0)]
        contrasts[name] = dict(zip(columns[1:], borders, strict=True))
    figures.plot_rows(path, "What is kept, and what is drawn around it", columns, rows)
    return {"picture": source, "label": label, "rounds": REGION_ROUNDS,
            "contrast_at_the_border": contrasts}  # fmt: skip


def steer_to_a_colour(lab: Lab, path: Path) -> dict[str, Any]:
    """Pull the guess of x_0 to a mean colour, by a gradient that runs through the network."""
    x_T, ask = lab.first(3, guidance=1.0)
    colour = torch.tensor(COLOUR[: x_T.shape[1]])
    score = partial(steering.colour_log_p, 2 * colour.to(lab.device) - 1)
    pulled = [partial(steering.pull, ask, score, weight, lab.levels) for weight in COLOUR_WEIGHTS]
    drawn = [draw(lab, x_T, way, SHORT_STEPS) for way in tqdm(pulled, "f, colour")]
    wanted = colour[:, None, None].expand_as(x_T)
    columns = [*(f"weight {weight}" for weight in COLOUR_WEIGHTS), "the colour"]
    rows = enumerate(torch.stack([*drawn, wanted], 1), lab.options.seed)
    figures.plot_rows(path, "Pulled to a colour", columns, {f"seed {i}": row for i, row in rows})
    errors = [figures.distance(images.mean((2, 3)), wanted[..., 0, 0]) for images in drawn]
    return {"colour": colour.tolist(), "weights": COLOUR_WEIGHTS, "distance_of_mean_colour": errors}


def steer_by_a_classifier(lab: Lab, path: Path) -> dict[str, Any]:
    """Ask for labels by a classifier's gradient, and by the network's own guidance."""
    cache, side = lab.options.output_dir / ".cache", lab.noise.shape[-1]
    noised, judge = steering.tradition_classifiers(cache, lab.levels, side, lab.device)
    # The classifier looks at x_t alone, so no gradient runs through the network.
    x_T, plain = lab.noise[:CLASSIFIED_FABRICS], torch.no_grad()(lab.ask(None))
    wanted = torch.arange(len(x_T)) % len(judge.names)
    score = partial(steering.label_log_p, noised, wanted)
    labels = label_vectors(lab.diffusion, judge.names, range(len(x_T)))
    ways = {"no label": plain,
            "classifier": partial(steering.pull, plain, score, CLASSIFIER_WEIGHT, lab.levels),
            "classifier-free": lab.ask(labels)}  # fmt: skip
    rows, recognised = {}, []
    for way, ask in tqdm(ways.items(), "f, classifier"):
        drawn = draw(lab, x_T, ask, SHORT_STEPS)
        rows[way], taken_for = drawn[:6], judge(drawn.to(lab.device)).argmax(1).cpu()
        recognised.append((taken_for == wanted).float().mean().item())
    columns = judge.names[: len(rows[way])]
    figures.plot_rows(path, "Labels by a classifier's gradient", columns, rows)
    return {"fabrics": len(x_T), "ways": [*ways], "recognised": recognised}


def steer_without_seams(lab: Lab, path: Path) -> dict[str, Any]:
    """Roll x_t by a random offset before each step, so that no edge can settle."""
    x_T, ask = lab.first(2)
    rolled = partial(steering.rolled, ask, torch.Generator().manual_seed(lab.options.seed))
    drawn = [draw(lab, x_T, asked, SHORT_STEPS)
             for asked in tqdm((ask, rolled), "f, seams")]  # fmt: skip
    names, tiles = ["ordinary", "rolled at every step"], torch.stack(drawn, 1)
    rows = {f"seed {lab.options.seed}": tiles[0].repeat(1, 1, 3, 3)}
    figures.plot_rows(path, "Nine tiles of one fabric", names, rows)
    save_picture(to_picture(tiles[0, 1]), path.with_name("tile_demo_single.png"))
    return {"cloth": names, "contrast_at_the_seam": [*map(steering.seam_contrast, drawn)]}


def part_g(lab: Lab, path: Path) -> dict[str, Any]:
    """Draw with the best denoiser for exactly the training images, and with the network."""
    side = lab.noise.shape[-1]
    images = data.read_images(lab.options.data, side, lab.diffusion.channels)[0].images
    known = (images.float() / 127.5 - 1).to(lab.device)
    ways = {"memory": partial(steering.ideal_x_0, known, lab.levels),
            "network": lab.ask(None)}  # fmt: skip
    rows, copies = {}, {}
    for way, ask in ways.items():
        batches = lab.noise[:COUNTED_FABRICS].split(BATCH_SIZE[lab.device.type])
        drawn = torch.cat([draw(lab, x_T, ask, SAMPLING_STEPS["dpmpp"])
                           for x_T in tqdm(batches, f"g, {way}")])  # fmt: skip
        nearest, copied = steering.nearest(drawn, images)
        rows |= {way: drawn[:5], f"{way}'s nearest": nearest[:5]}
        copies[way] = copied.float().mean().item()
    columns = [f"noise {i + 1}" for i in range(len(rows["memory"]))]
    figures.plot_rows(path, "Perfect memory", columns, rows)
    return {"images": len(images), "fabrics": COUNTED_FABRICS, "copies": copies}


PARTS = [  # what draws a figure and returns the numbers in it, and what the network must know
    ("a", part_a, "exercise2_sampling_comparison.png"),
    ("b", part_b, "reverse_diffusion_demo.png"),
    ("c", part_c, "forward_diffusion_demo.png"),
    ("d", part_d, "noise_schedule_comparison.png"),
    ("e", part_e, "ddpm_fabric_morph.gif"),
    ("f", steer_by_guidance, "guidance_demo.png", "labels"),
    ("f", steer_a_picture, "sdedit_demo.png", "labels"),
    ("f", steer_a_region, "inpainting_demo.png"),
    ("f", steer_to_a_colour, "colour_demo.png"),
    ("f", steer_by_a_classifier, "classifier_demo.png", "the twelve traditions in colour"),
    ("f", steer_without_seams, "tile_demo.png"),
    ("g", part_g, "ideal_denoiser_demo.png"),
]


def explore(options: argparse.Namespace) -> None:
    """Run the parts that were asked for."""
    started = time.perf_counter()
    device = hardware.pick_device(options.device)
    diffusion, facts = load_weights(options.weights, **process_of(options))
    precision = hardware.pick_precision(options.precision, device, diffusion)
    print(f"{facts.describe(options.weights)}; on {hardware.describe(device)} in {precision}")
    hardware.prepare_to_sample(diffusion, device, precision)
    check_folder(options.output_dir)
    steering.check_input(options, diffusion)
    options.shown = choose_shown(options, facts.labels, SHOWN_LABELS)
    count = max(NUM_SAMPLES, MORPH_FABRICS, CLASSIFIED_FABRICS, COUNTED_FABRICS)
    seeds = range(options.seed, options.seed + count)
    noise, _ = sampling.starting_noise(seeds, (diffusion.channels, *diffusion.image_size))
    labels = label_vectors(diffusion, facts.labels, range(count))
    levels = sampling.noise_levels(diffusion)
    lab = Lab(options, diffusion, device, precision, levels, noise, labels)
    ours = set(TRADITIONS) <= {*facts.labels} and diffusion.channels == 3
    there = {"labels": bool(facts.labels), "the twelve traditions in colour": ours}
    for part, work, name, *needed in PARTS:
        if not {part, Path(name).stem} & {*options.part}:
            continue
        if not all(there[what] for what in needed):
            print(f"Part {part}: skipped {name}, as {options.weights} does not know {needed[0]}.")
            continue
        begun, path = time.perf_counter(), options.output_dir / name
        before = files_like(path)
        numbers, seconds = work(lab, path), time.perf_counter() - begun
        record = {"seed": options.seed, "device": hardware.describe(device), "precision": precision}
        write_json(path.with_suffix(".json"), {**record, **numbers, "seconds": seconds})
        files = sorted(file for file, _ in files_like(path).items() - before.items())
        print(f"Part {part}: wrote {', '.join(files)} in {duration(seconds)}.")
    print(f"Done in {duration(time.perf_counter() - started)}.")


def main(argv: list[str] | None = None) -> int:
    """Run the exercise; return the exit code."""
    parts = {Path(row[2]).stem: row[0] for row in PARTS}
    options = explore_options(argv, __doc__, parts=parts, seed=RANDOM_SEED, data=DATA)
    return run_command(
        lambda: explore(options),
        after_interrupt=f"The parts that were finished are in {options.output_dir}.",
        if_memory_ends="lower BATCH_SIZE, or numbers of fabrics, at the top of the script.",
    )


if __name__ == "__main__":
    sys.exit(main())
