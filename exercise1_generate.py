# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "accelerate>=1.0",
#     "imageio>=2.34",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "safetensors>=0.4.3",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 1 (execute): draw new fabrics from noise with a trained diffusion model.

    python exercise1_generate.py                                 16 fabrics, 20 steps each
    python exercise1_generate.py --label kente --guidance 3      one tradition, exaggerated
    python exercise1_generate.py --label none                    whatever comes, in half the time
    python exercise1_generate.py --seed 7 --num-samples 36       others, and more of them
    python exercise1_generate.py --sampler ddim --steps 250      the classic way, slower
    python exercise1_generate.py --samples-dir fabrics           one file per image as well
    accelerate launch exercise1_generate.py --samples-dir fabrics --num-samples 10000

Writes exercise1_output.png, a grid. Image i depends on seed + i and its label alone; batch size,
number of images and number of processes change nothing but the last bits. A samples folder holds
the images of one setting (weights, label, sampler, steps, seed, ...), which stands in its
generation.json; run again with the same setting, and only missing images are drawn.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import timedelta
from itertools import pairwise

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from denoising_diffusion_pytorch import GaussianDiffusion
from PIL import Image
from tqdm.auto import tqdm

from ddpm_basics import sample_folder as samples
from ddpm_basics.console import UserError, duration, run_command
from ddpm_basics.files import check_output, file_digest
from ddpm_basics.hardware import autocast, describe, pick_device, pick_precision, prepare_to_sample
from ddpm_basics.images import decode, save_picture, tile, to_picture
from ddpm_basics.model import label_vectors
from ddpm_basics.options import choose_labels, generate_options, process_of
from ddpm_basics.sampling import (
    ancestral_step,
    check_steps,
    ddim_step,
    dpmpp_step,
    even_times,
    log_snr_times,
    noise_levels,
    predict_x_0,
    starting_noise,
)
from ddpm_basics.weight_files import Facts, load_weights

RANDOM_SEED = 42  # image i is drawn from the noise of RANDOM_SEED + i
NUM_SAMPLES = 16  # images
LABEL = "all"  # what to draw: a tradition, all of them in turn, or none
GUIDANCE = 2.0  # how much of its label: 0 nothing, 1 as trained, above 1 exaggerated
SAMPLING_STEPS = {"dpmpp": 20, "ddim": 250, "ddpm": 1000}
BATCH_SIZE = {"cpu": 8, "mps": 16, "cuda": 64}  # images the network sees at once
GRID_LIMIT = 64  # images in the grid; a samples folder holds all of them
OUTPUT = "exercise1_output.png"

SAMPLER_NAMES = {"dpmpp": "DPM-Solver++", "ddim": "DDIM", "ddpm": "ancestral sampling"}


@torch.inference_mode()
def draw(
    diffusion: GaussianDiffusion, seeds: list[int], labels: torch.Tensor | None,
    options: argparse.Namespace, bar: tqdm,
) -> torch.Tensor:  # fmt: skip
    """Walk from noise to images [n, c, h, w] in [0, 1], one for each seed and label vector."""
    levels = noise_levels(diffusion)
    spread = log_snr_times if options.sampler == "dpmpp" else even_times

    x_T, generators = starting_noise(seeds, (diffusion.channels, *diffusion.image_size))
    x_t, past = x_T.to(diffusion.betas.device), []
    for t, s in pairwise(spread(levels, options.steps)):
        x_0 = predict_x_0(diffusion, levels, x_t, t, labels, options.guidance)
        if options.sampler == "ddpm":
            x_t = ancestral_step(levels, x_t, x_0, t, s, generators)
        elif options.sampler == "ddim":
            x_t = ddim_step(levels, x_t, x_0, t, s)
        else:
            x_t = dpmpp_step(levels, x_t, x_0, t, s, past)
            past = [(x_0, t), *past[:1]]
        bar.update()
    return (x_t + 1) / 2


def draw_all(
    diffusion: GaussianDiffusion, indices: list[int], options: argparse.Namespace, precision: str,
    show_bar: bool,
) -> dict[int, Image.Image]:  # fmt: skip
    """Draw the images of these indices batch by batch; return those that the grid shows."""
    device = diffusion.betas.device
    size = options.batch_size or BATCH_SIZE[device.type]
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    shown = {}
    with (
        tqdm(total=options.steps * len(batches), unit="step", disable=not show_bar) as bar,
        autocast(device, precision),
    ):
        for batch in batches:
            seeds = [options.seed + index for index in batch]
            labels = label_vectors(diffusion, options.labels, batch)
            images = draw(diffusion, seeds, labels, options, bar)
            for index, image in zip(batch, images.cpu(), strict=True):
                picture = to_picture(image)
                if options.samples_dir:
                    save_picture(picture, samples.image_path(options.samples_dir, index))
                if index < GRID_LIMIT:
                    shown[index] = picture
    return shown


def claim_outputs(options: argparse.Namespace, facts: Facts, precision: str) -> None:
    """Refuse, before any work, what cannot be written or would mix images of two settings."""
    ours = str(options.output) == OUTPUT or samples.is_grid_of(options.samples_dir, options.output)
    check_output(options.output, ".png", may_replace=ours)
    if options.samples_dir:
        typed = ("labels", "guidance", "sampler", "steps", "seed")
        settings = {
            "weights": file_digest(options.weights),
            **{key: getattr(options, key) for key in typed},
            "image_size": facts.image_size, "precision": precision,
            "objective": facts.objective, "schedule": facts.schedule,
        }  # fmt: skip
        samples.claim_folder(options.samples_dir, settings, options.output)
    elif options.num_samples > GRID_LIMIT:
        raise UserError(
            f"The grid holds {GRID_LIMIT} images at most: name a folder for all "
            f"{options.num_samples} with --samples-dir."
        )


def setting(options: argparse.Namespace) -> str:
    """Say how the images are drawn."""
    guided = f", guidance {options.guidance:g}" if options.labels else ""
    return f"{SAMPLER_NAMES[options.sampler]}, {options.steps} steps{guided}"


def write_grid(options: argparse.Namespace, shown: dict[int, Image.Image], subject: str) -> None:
    """Write the grid; images that an earlier run has drawn come from the samples folder."""
    count, folder = min(options.num_samples, GRID_LIMIT), options.samples_dir
    pictures = [shown.get(i) or decode(samples.image_path(folder, i)) for i in range(count)]
    title = f"{count} new {subject}: {setting(options)}, seed {options.seed}"
    captions = [options.labels[i % len(options.labels)] for i in range(count) if options.labels]
    save_picture(tile(pictures, cell=160, title=title, captions=captions), options.output)


def generate(options: argparse.Namespace) -> None:
    """Load the weights, draw the images that are missing, write the grid."""
    started = time.perf_counter()
    device = pick_device(options.device)
    # This process, and as many others beside it as 'accelerate launch' has started.
    team = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
    if team.num_processes > 1:
        device = team.device
    if options.precision == "auto":
        options.precision = samples.recorded_precision(options.samples_dir)
    diffusion, facts = load_weights(options.weights, **process_of(options))
    precision = pick_precision(options.precision, device, diffusion, team)
    options.steps = options.steps or min(SAMPLING_STEPS[options.sampler], facts.timesteps)
    check_steps(facts.timesteps, options.steps)
    choose_labels(options, facts.labels, LABEL, GUIDANCE)
    if team.is_main_process:
        print(facts.describe(options.weights))
        print(f"{setting(options)}, on {describe(device)} in {precision}")
        claim_outputs(options, facts, precision)
    team.wait_for_everyone()

    todo = samples.missing_images(options.samples_dir, options.num_samples)
    team.wait_for_everyone()  # all have counted before the first image is written
    prepare_to_sample(diffusion, device, precision)
    mine = todo[team.process_index :: team.num_processes]
    shown = draw_all(diffusion, mine, options, precision, team.is_main_process)
    shown = dict(gather_object(list(shown.items())))
    if team.is_main_process:
        write_grid(options, shown, facts.subject)
        report(options, len(todo), time.perf_counter() - started)


def report(options: argparse.Namespace, drawn: int, seconds: float) -> None:
    """Say what was written and how long it took."""
    if drawn < options.num_samples:
        there = options.num_samples - drawn
        print(f"{there} images of an earlier run were kept.")
    folder = f" and {drawn} images in {options.samples_dir}" if options.samples_dir else ""
    print(f"Wrote {options.output}{folder} in {duration(seconds)}.")


def main(argv: list[str] | None = None) -> int:
    """Run the exercise; return the exit code."""
    options = generate_options(
        argv, __doc__, seed=RANDOM_SEED, num_samples=NUM_SAMPLES,
        label=LABEL, guidance=GUIDANCE, steps=SAMPLING_STEPS, batch_size=BATCH_SIZE, output=OUTPUT,
    )  # fmt: skip
    return run_command(
        lambda: generate(options),
        after_interrupt="The same command draws what is missing in a samples folder.",
        if_memory_ends="draw fewer images at once, with a smaller --batch-size.",
    )


if __name__ == "__main__":
    sys.exit(main())
