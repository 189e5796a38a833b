# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "accelerate>=1.0",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 1: draw new fabrics from noise with a trained diffusion model.

    python exercise1_generate.py                                 16 fabrics, 20 steps each
    python exercise1_generate.py --seed 7 --num-samples 36       others, and more of them
    python exercise1_generate.py --sampler ddim --steps 250      the classic way, slower
    python exercise1_generate.py --min-signal 0                  ask the network even in pure noise
    accelerate launch exercise1_generate.py --num-samples 10000  share the work, e.g. on 4 GPUs

Writes exercise1_output.png (the grid) and generated_samples/fabric_0000.png, ... (one file per
image). Image i depends on seed + i alone, so image 3 of seed 42 is image 0 of seed 45; batch
size, number of images and number of processes change nothing but the last bits.

The samples folder holds the images of one setting (weights, sampler, steps, seed, ...), which
stands in its generation.json. Run again with the same setting, and only missing images are
drawn; with another one, the folder is first renamed to generated_samples.1, .2, ...: nothing is
lost and nothing gets mixed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, run_and_explain, share, whole_number
from ddpm_basics.files import file_digest, write_atomically
from ddpm_basics.hardware import pick_device, pick_precision, prepare_network
from ddpm_basics.images import read_image, save_grid, to_picture
from ddpm_basics.model import describe, load_weights
from ddpm_basics.sampling import SAMPLERS, check_steps, starting_noise

RANDOM_SEED = 42  # image i is drawn from the noise of RANDOM_SEED + i
NUM_SAMPLES = 16  # images
SAMPLING_STEPS = {"dpmpp": 20, "ddim": 250, "ddpm": 1000}
MIN_SIGNAL = 0.03  # alpha_t below which x_t is taken for pure noise, and the network is not asked
BATCH_SIZE = {"cpu": 8, "mps": 16, "cuda": 64}  # images the network sees at once
GRID_LIMIT = 64  # images in the grid; the folder holds all of them
WEIGHTS = "models/ddpm_african_fabrics.pt"
OUTPUT = "exercise1_output.png"
SAMPLES_DIR = "generated_samples"

SAMPLER_NAMES = {"dpmpp": "DPM-Solver++", "ddim": "DDIM", "ddpm": "ancestral sampling"}
STARTED = time.perf_counter()


def parse_options(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Image i depends on seed + i alone. Run the same command again to draw only what "
        "is missing in the samples folder; images of other settings are kept beside it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", type=Path, default=WEIGHTS, help="weight file (.pt)")
    add("--num-samples", type=whole_number(1), default=NUM_SAMPLES, help="images to draw")
    add("--sampler", choices=SAMPLING_STEPS, default="dpmpp", help="how to walk from noise to x_0")
    defaults = ", ".join(f"{steps} for {name}" for name, steps in SAMPLING_STEPS.items())
    add("--steps", type=whole_number(1), default=argparse.SUPPRESS,
        help=f"steps from noise to image (default: {defaults})")  # fmt: skip
    add("--min-signal", type=share, default=MIN_SIGNAL,
        help="alpha_t below which x_t counts as noise and the network is not asked")  # fmt: skip
    add("--seed", type=whole_number(0), default=RANDOM_SEED, help="seed of image 0")
    add("--output", type=Path, default=OUTPUT, help="the grid of images (.png)")
    add("--samples-dir", type=Path, default=SAMPLES_DIR, help="folder of single images")
    add("--image-size", type=whole_number(1), default=64,
        help="pixels per side, for weight files that do not say it themselves")  # fmt: skip
    batches = ", ".join(f"{count} on {device}" for device, count in BATCH_SIZE.items())
    add("--batch-size", type=whole_number(1), default=argparse.SUPPRESS,
        help=f"images at once; changes speed and memory only (default: {batches})")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the network; auto takes bf16 where the hardware has it")  # fmt: skip
    add("--compile", choices=["on", "off"], default="off",
        help="torch.compile the network: minutes that thousands of images earn back")  # fmt: skip
    options = parser.parse_args(argv)
    options.steps = getattr(options, "steps", SAMPLING_STEPS[options.sampler])
    return options


def check_output(path):
    """Refuse a path that cannot or must not become the grid, before any work is done."""
    if path.suffix.lower() != ".png":
        raise UserError(f"The grid is a PNG: give --output a name that ends in .png, not {path}.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give --output the name of a file.")
    if path.exists() and path != Path(OUTPUT):  # the default is this script's own to replace
        raise UserError(f"{path} exists already: delete it or give --output another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass  # whether the folder can be written


def claim_folder(folder, settings):
    """Make the samples folder ready for images of these settings.

    A folder of other settings is renamed to folder.1, folder.2, ... as a whole. Raises UserError
    where there are fabrics that this script has not written.
    """
    record = folder / "generation.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder with --samples-dir.")
    try:
        found = json.loads(record.read_text()) if record.exists() else None
    except ValueError:
        found = {}
    if found is None and any(folder.glob("fabric_*.png")):
        raise UserError(
            f"{folder} holds fabrics without a generation.json, so it is not known how they were "
            "made: name another folder with --samples-dir."
        )
    if found is not None and found != settings:
        found = found if isinstance(found, dict) else {}
        numbers = itertools.count(1)
        kept = next(p for n in numbers if not (p := Path(f"{folder}.{n}")).exists())
        folder.rename(kept)
        changed = ", ".join(key for key in settings if found.get(key) != settings[key])
        print(f"{folder} held images of another setting ({changed}); they are now in {kept}.")
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(record) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def image_path(folder, index):
    """Return where image `index` is kept."""
    return folder / f"fabric_{index:04d}.png"


def missing_images(folder, indices):
    """Return those of the indices that have no image yet."""
    return [index for index in indices if not image_path(folder, index).exists()]


# ---- The exercise --------------------------------------------------------------------------------


def draw_fabrics(diffusion, indices, options, precision, show_bar):
    """Draw the images of these indices, batch by batch, and save each under its number."""
    shape, device = (diffusion.channels, *diffusion.image_size), diffusion.betas.device
    batch_size = getattr(options, "batch_size", BATCH_SIZE[device.type])
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    bar = tqdm(total=options.steps * len(batches), unit="step", disable=not show_bar)
    with bar:
        for batch in batches:
            seeds = [options.seed + index for index in batch]
            if options.compile == "on":  # a batch of another size would be compiled anew
                seeds += seeds[-1:] * (min(batch_size, len(indices)) - len(batch))
            x_T, generators = starting_noise(seeds, shape)
            images = SAMPLERS[options.sampler](
                diffusion,
                x_T.to(device),
                options.steps,
                callback=lambda t, x_t, x_0: bar.update(),
                generators=generators,
                precision=precision,
                min_signal=options.min_signal,
            )
            for index, image in zip(batch, images.cpu(), strict=False):
                with write_atomically(image_path(options.samples_dir, index)) as temporary:
                    to_picture(image).save(temporary)


def write_grid(options, count):
    """Write the grid of the first `count` images, read from their files whoever drew them."""
    name = SAMPLER_NAMES[options.sampler]
    title = f"{count} new fabrics: {name}, {options.steps} steps, seed {options.seed}"
    paths = [image_path(options.samples_dir, index) for index in range(count)]
    save_grid(torch.stack([read_image(path) for path in paths]), options.output, title)


def generate(options):
    """Do the exercise: load the weights, draw the images that are missing, write the grid."""
    device = pick_device(options.device)
    # This process, and as many others beside it as 'accelerate launch' has started.
    team = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
    if team.num_processes > 1:
        device = team.device
    precision = pick_precision(options.precision, device)
    precision_name = str(precision).removeprefix("torch.")
    diffusion, facts = load_weights(options.weights, options.image_size)
    check_steps(diffusion.num_timesteps, options.steps)

    wanted = range(options.num_samples)
    if team.is_main_process:
        print(describe(facts, options.weights))
        print(f"{SAMPLER_NAMES[options.sampler]}, {options.steps} steps, on {device} in "
              f"{precision_name} (the classic way: --sampler ddim --steps 250)")  # fmt: skip
        check_output(options.output)
        claim_folder(options.samples_dir, {
            "weights": file_digest(options.weights),
            "sampler": options.sampler,
            "steps": options.steps,
            "min_signal": options.min_signal,
            "seed": options.seed,
            "image_size": facts["image_size"],
            "precision": precision_name,
        })  # fmt: skip
    to_draw = len(missing_images(options.samples_dir, wanted))
    team.wait_for_everyone()

    started = time.perf_counter()
    mine = missing_images(options.samples_dir, wanted[team.process_index :: team.num_processes])
    if mine:
        prepare_network(diffusion, device, precision, options.compile == "on")
        draw_fabrics(diffusion, mine, options, precision, team.is_main_process)
    team.wait_for_everyone()
    if team.is_main_process:
        write_grid(options, min(options.num_samples, GRID_LIMIT))
        report(options, to_draw, time.perf_counter() - started)


def report(options, drawn, seconds):
    """Say what was written and how long it took."""
    there = options.num_samples - drawn
    if there:
        print(f"{there} of the images were there already, drawn by an earlier run.")
    each = f" ({seconds / drawn:.2f} s per image)" if drawn else ""
    print(
        f"Wrote {options.output} and {drawn} images in {options.samples_dir}{each}; "
        f"{time.perf_counter() - STARTED:.1f} s in all."
    )


def main(argv=None):
    """Run the exercise."""
    options = parse_options(argv)
    return run_and_explain(
        lambda: generate(options),
        f"The images finished so far are in {options.samples_dir}; "
        "the same command draws the others.",
    )


def leave(code):
    """End the process at once: to take torch apart first costs a second, with all files written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
