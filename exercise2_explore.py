# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "matplotlib>=3.8",
#     "imageio>=2.34",
#     "imageio-ffmpeg>=0.5.1",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 2: take the diffusion process apart and look at every piece.

    python exercise2_explore.py                     all five parts, some ten minutes on two cores
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
import json
import platform
import random
import sys
import time
from functools import cached_property
from pathlib import Path

import imageio_ffmpeg  # noqa: F401 - imageio looks for it only when it writes a film
import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from tqdm.auto import tqdm

from ddpm_basics.console import run_and_explain, whole_number
from ddpm_basics.figures import FIGURE_WIDTH, STYLE, number, save_figure, show
from ddpm_basics.files import write_atomically
from ddpm_basics.hardware import pick_device, pick_precision, prepare_network
from ddpm_basics.images import mosaic, panel, pixels, read_fabric, save_film, save_gif, to_picture
from ddpm_basics.model import build_diffusion, load_weights
from ddpm_basics.sampling import SAMPLERS, check_steps, starting_noise

RANDOM_SEED = 42  # decides the noise that fabrics grow out of, and which training fabric is shown
SAMPLING_STEPS = {"dpmpp": 20, "ddim": 250}  # where a part names no others
MIN_SIGNAL = 0.03  # alpha_t below which x_t is taken for pure noise, and the network is not asked

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
MORPH_FRAMES = (60, 120)  # to begin with, and at most
MORPH_CHANGE = 0.08  # aim: largest change from frame to frame (root mean square, pixels 0 to 1)
MORPH_BYTES = 6_000_000  # largest size of the .gif

WEIGHTS = "models/ddpm_african_fabrics.pt"
DATA = "african_fabric_processed"
BATCH_SIZE = {"cpu": 4, "mps": 16, "cuda": 64}  # images the network sees at once
COLORS = {"sigmoid": "#c2410c", "cosine": "#0f766e", "linear": "#4338ca"}  # of the schedules
LINES = {"sigmoid": "-", "cosine": "--", "linear": "-"}
SAMPLER_COLORS = {"ddim": "#4338ca", "dpmpp": "#c2410c"}


def parse_options(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="a: step sweep, b: reverse denoising, c: forward diffusion, d: noise schedules, "
        "e: morph. The constants at the top of the script are made for changing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=list("abcde"), default=list("abcde"), help="parts to run")
    add("--weights", type=Path, default=WEIGHTS, help="weight file (.pt)")
    add("--data", type=Path, default=DATA, help="folder of fabrics, for parts c and d")
    add("--output-dir", type=Path, default=".", help="where figures and measurements go")
    add("--seed", type=whole_number(0), default=RANDOM_SEED, help="of the noise")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the network; auto takes bf16 where the hardware has it")  # fmt: skip
    return parser.parse_args(argv)


# ---- What the parts share ------------------------------------------------------------------------


class Laboratory:
    """The network and a fabric, each made ready when a part first asks for it."""

    def __init__(self, options):
        self.options = options
        self.device = pick_device(options.device)
        self.precision = pick_precision(options.precision, self.device)

    @cached_property
    def diffusion(self):
        """The network of the weight file, on its device."""
        diffusion, facts = load_weights(self.options.weights)
        print(f"{self.options.weights}: {facts['kind']}, {facts['parameters']:,} parameters, "
              f"{facts['objective']}, {facts['beta_schedule']} schedule; on {self.device} in "
              f"{str(self.precision).removeprefix('torch.')}")  # fmt: skip
        prepare_network(diffusion, self.device, self.precision, compiled=False)
        return diffusion

    def noise(self, count):
        """Draw x_T for `count` fabrics."""
        seeds = range(self.options.seed, self.options.seed + count)
        x_T, _ = starting_noise(seeds, (self.diffusion.channels, *self.diffusion.image_size))
        return x_T

    def draw(self, sampler, x_T, steps, callback=None):
        """Draw fabrics [n, c, h, w] in [0, 1] from x_T; the callback is the samplers'."""
        return SAMPLERS[sampler](
            self.diffusion, x_T.to(self.device), steps, callback,
            precision=self.precision, min_signal=MIN_SIGNAL,
        ).cpu()  # fmt: skip

    @cached_property
    def fabric(self):
        """One fabric [c, h, w] in [0, 1] and where it is from: the data, or else the network."""
        suffixes = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}
        folder = self.options.data
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
        if paths:
            path = random.Random(self.options.seed).choice(paths)
            return read_fabric(path), str(path)
        print(f"There are no fabrics in {folder} ('python -m ddpm_basics.fabrics' renders them); "
              "this one is drawn by the network.")  # fmt: skip
        drawn = self.draw("dpmpp", self.noise(1), SAMPLING_STEPS["dpmpp"])
        return drawn[0], f"drawn by the network from seed {self.options.seed}"


def distance(images, others):
    """Root mean square difference of images [n, c, h, w] in [0, 1]."""
    return (images - others).square().mean().sqrt().item()


def save_numbers(lab, path, numbers):
    """Write what was measured, and on what."""
    machine = torch.cuda.get_device_name() if lab.device.type == "cuda" else platform.machine()
    record = {
        "seed": lab.options.seed,
        "device": f"{lab.device.type}: {machine}, {torch.get_num_threads()} threads",
        "precision": str(lab.precision).removeprefix("torch."),
        **numbers,
    }
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


# ---- a: the same noise in more and more steps ----------------------------------------------------


def sweep(lab):
    """Draw the same x_T with both samplers at all step counts; measure time and distance.

    Returns {"ddim": [row, ...], "dpmpp": ...}; a row has steps, seconds per fabric, distance to
    the result of all DDIM steps, and the images.
    """
    x_T = lab.noise(NUM_SAMPLES)
    all_steps = lab.diffusion.num_timesteps
    plan = [("ddim", steps) for steps in STEP_COUNTS]
    plan += [("dpmpp", steps) for steps in FAST_STEP_COUNTS]
    for _, steps in plan:
        check_steps(all_steps, steps)
    lab.draw("ddim", x_T, 1)  # the first call is slow; this one is not counted
    plan = dict.fromkeys([("ddim", all_steps), *plan])  # the reference first, and only once
    with tqdm(total=sum(steps for _, steps in plan), unit="step", desc="a") as bar:
        for sampler, steps in plan:
            started = time.perf_counter()
            images = lab.draw(sampler, x_T, steps, lambda *_: bar.update())
            seconds = (time.perf_counter() - started) / NUM_SAMPLES
            plan[sampler, steps] = {"steps": steps, "seconds": seconds, "images": images}
    reference = plan["ddim", all_steps]["images"]
    for row in plan.values():
        row["distance"] = distance(row["images"], reference)
    return {
        "ddim": [plan["ddim", steps] for steps in STEP_COUNTS],
        "dpmpp": [plan["dpmpp", steps] for steps in FAST_STEP_COUNTS],
    }


def plot_sweep(rows):
    """Draw the pictures of both samplers in two rows, and the distances below them."""
    names = {"ddim": "DDIM", "dpmpp": "DPM-Solver++"}
    columns = max(len(row) for row in rows.values())
    figure = Figure((FIGURE_WIDTH, 7), layout="constrained")
    figure.suptitle("One noise, one pattern: more steps only sharpen it", x=0.01, ha="left")
    grid = figure.add_gridspec(3, columns, height_ratios=(1, 1, 1))
    for i, (sampler, results) in enumerate(rows.items()):
        for j, row in enumerate(results):
            axes = figure.add_subplot(grid[i, j])
            title = f"{names[sampler]}\n" if j == 0 else "\n"
            apart = f"distance {row['distance']:.3f}" if row["distance"] else "the reference"
            caption = f"{row['seconds']:.1f} s\n{apart}"
            show(axes, mosaic(row["images"]), caption, f"{title}{row['steps']} steps")
    axes = figure.add_subplot(grid[2, :])
    for sampler, results in rows.items():
        apart = [row for row in results if row["distance"] > 0]  # all but the reference itself
        axes.loglog([row["steps"] for row in apart], [row["distance"] for row in apart], "o-",
                    color=SAMPLER_COLORS[sampler], label=names[sampler])  # fmt: skip
    axes.set(xlabel="steps", ylabel="distance")
    axes.set_title("Distance to the DDIM result of all steps (pixels from 0 to 1)")
    steps = sorted({row["steps"] for results in rows.values() for row in results})
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.legend()
    return figure


def part_a(lab):
    """Compare step counts."""
    rows = sweep(lab)
    path = lab.options.output_dir / "exercise2_sampling_comparison.png"
    save_figure(plot_sweep(rows), path)
    numbers = {sampler: [{key: row[key] for key in ("steps", "distance", "seconds")}
                         for row in results] for sampler, results in rows.items()}  # fmt: skip
    save_numbers(lab, path.with_suffix(".json"), {"fabrics": NUM_SAMPLES, **numbers})
    return [path]


# ---- b: from noise to a fabric -------------------------------------------------------------------


def record_reverse(lab):
    """Draw one fabric with DDIM and keep (t, x_t, predicted x_0) of every step."""
    frames = []
    steps = min(SAMPLING_STEPS["ddim"], lab.diffusion.num_timesteps)
    with tqdm(total=steps, unit="step", desc="b") as bar:

        def keep(t, x_t, x_0):
            frames.append((t, x_t[0].cpu(), x_0[0].cpu()))
            bar.update()

        lab.draw("ddim", lab.noise(1), steps, keep)
    return frames


def plot_reverse(frames):
    """Draw x_t in the first row and what the network takes for x_0 in the second."""
    figure = Figure((FIGURE_WIDTH, 0.6 + 2 * FIGURE_WIDTH / len(frames)), layout="constrained")
    figure.suptitle("Out of noise: the guess comes first, the details last", x=0.01, ha="left")
    axes = figure.subplots(2, len(frames), squeeze=False)
    for column, (t, x_t, x_0) in enumerate(frames):
        show(axes[0, column], pixels(x_t), title=f"t = {t}")
        show(axes[1, column], pixels(x_0))
    axes[0, 0].set_ylabel("$x_t$")
    axes[1, 0].set_ylabel("predicted $x_0$")
    return figure


def part_b(lab):
    """Watch a fabric come out of noise."""
    frames = record_reverse(lab)
    nearest = {min(frames, key=lambda frame: abs(frame[0] - t))[0] for t in CAPTURE_TIMESTEPS}
    captured = [frame for frame in frames if frame[0] in nearest]
    path = lab.options.output_dir / "reverse_diffusion_demo.png"
    save_figure(plot_reverse(captured), path)

    film = frames[:: max(1, len(frames) // 50)]
    film = film if film[-1] is frames[-1] else [*film, frames[-1]]
    pictures = [panel([pixels(x_t), pixels(x_0)], [f"x_t, t = {t}", "predicted x_0"])
                for t, x_t, x_0 in film]  # fmt: skip
    gif = path.with_suffix(".gif")
    save_gif(pictures, gif, [80] * (len(pictures) - 1) + [2500])

    result = pixels(frames[-1][2])
    numbers = [{"t": t, "distance_of_x_0": distance(pixels(x_0), result),
                "spread_of_x_t": x_t.std().item()} for t, x_t, x_0 in captured]  # fmt: skip
    save_numbers(lab, path.with_suffix(".json"), {"steps": len(frames), "captured": numbers})
    return [path, gif]


# ---- c: from a fabric to noise -------------------------------------------------------------------


def make_process(schedule):
    """Build the diffusion process of a schedule; its network is a small one that stays unused."""
    return build_diffusion(dim=8, dim_mults=(1,), beta_schedule=schedule)


def add_noise(process, fabric, t, noise):
    """Return x_t [c, h, w] of a fabric in [0, 1] by the library's q_sample (Ho 2020, eq. 4)."""
    return process.q_sample(fabric[None] * 2 - 1, torch.tensor([t]), noise[None])[0]


def snr(process, t):
    """Return the signal-to-noise ratio alpha-bar / (1 - alpha-bar) at t."""
    alpha_bar = process.alphas_cumprod[t].item()
    return alpha_bar / (1 - alpha_bar)


def plot_forward(process, fabric, noise):
    """Draw a fabric at FORWARD_TIMESTEPS, with alpha-bar and SNR below."""
    count = len(FORWARD_TIMESTEPS)
    figure = Figure((FIGURE_WIDTH, 0.85 + FIGURE_WIDTH / count), layout="constrained")
    figure.suptitle("A fabric sinks into noise", x=0.01, ha="left")
    for axes, t in zip(figure.subplots(1, count, squeeze=False)[0], FORWARD_TIMESTEPS, strict=True):
        alpha_bar = process.alphas_cumprod[t].item()
        caption = f"$\\bar\\alpha$ = {number(alpha_bar)}\nSNR = {number(snr(process, t))}"
        show(axes, pixels(add_noise(process, fabric, t, noise)), caption, f"t = {t}")
    return figure


def part_c(lab):
    """Watch a fabric drown in noise."""
    fabric, source = lab.fabric
    process = make_process(SCHEDULE)
    noise, _ = starting_noise([lab.options.seed], fabric.shape)
    path = lab.options.output_dir / "forward_diffusion_demo.png"
    save_figure(plot_forward(process, fabric, noise[0]), path)

    times = range(0, process.num_timesteps, 20)
    pictures = [panel([pixels(add_noise(process, fabric, t, noise[0]))],
                      [f"t = {t}, alpha-bar = {number(process.alphas_cumprod[t].item())}"], 256)
                for t in [*times, process.num_timesteps - 1]]  # fmt: skip
    gif = path.with_suffix(".gif")
    save_gif(pictures, gif, [1500] + [80] * (len(pictures) - 2) + [1500])

    numbers = [{"t": t, "alpha_bar": process.alphas_cumprod[t].item(), "snr": snr(process, t)}
               for t in FORWARD_TIMESTEPS]  # fmt: skip
    save_numbers(lab, path.with_suffix(".json"),
                 {"schedule": SCHEDULE, "fabric": source, "captured": numbers})  # fmt: skip
    return [path, gif]


# ---- d: three schedules --------------------------------------------------------------------------


def plot_schedules(processes, fabric, noise):
    """Draw three curves of each schedule, and below them one fabric at equal times."""
    count = len(FORWARD_TIMESTEPS)
    figure = Figure((FIGURE_WIDTH, 2.9 + 3 * FIGURE_WIDTH / (count + 1)), layout="constrained")
    figure.suptitle("Three schedules: how fast the signal goes", x=0.01, ha="left")
    above, below = figure.subfigures(2, 1, height_ratios=(2.4, 0.5 + 3 * FIGURE_WIDTH / count))
    curves = above.subplots(1, 3)
    for name, process in processes.items():
        style = {"color": COLORS[name], "label": name, "linestyle": LINES[name]}
        alpha_bar = process.alphas_cumprod.double()
        curves[0].plot(alpha_bar, **style)
        curves[1].semilogy(process.betas, **style)
        curves[2].plot((alpha_bar / (1 - alpha_bar)).log(), **style)
    for axes, title in zip(curves, ("alpha-bar: signal left", "beta: noise added", "log SNR"),
                           strict=True):  # fmt: skip
        axes.set(title=title, xlabel="t", xticks=(0, 500, 1000))
    above.legend(*curves[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    tiles = below.subplots(len(processes), count, squeeze=False)
    for i, (name, process) in enumerate(processes.items()):
        for axes, t in zip(tiles[i], FORWARD_TIMESTEPS, strict=True):
            title = f"t = {t}" if i == 0 else ""
            show(axes, pixels(add_noise(process, fabric, t, noise)), title=title)
        tiles[i, 0].set_ylabel(name, color=COLORS[name])
    return figure


def part_d(lab):
    """Compare noise schedules."""
    fabric, source = lab.fabric
    noise, _ = starting_noise([lab.options.seed], fabric.shape)
    processes = {name: make_process(name) for name in COLORS}
    path = lab.options.output_dir / "noise_schedule_comparison.png"
    save_figure(plot_schedules(processes, fabric, noise[0]), path)
    numbers = {
        name: [{"t": t, "alpha_bar": process.alphas_cumprod[t].item(),
                "beta": process.betas[t].item(), "snr": snr(process, t)}
               for t in sorted({*FORWARD_TIMESTEPS, 499})]
        for name, process in processes.items()
    }  # fmt: skip
    save_numbers(lab, path.with_suffix(".json"), {"fabric": source, **numbers})
    return [path]


# ---- e: a morph ----------------------------------------------------------------------------------


def slerp(start, end, fraction):
    """Walk the great circle from one noise [c, h, w] to another (Shoemake 1985).

    Noise in d dimensions has a length near sqrt(d). A straight line between two of them passes
    through shorter vectors, which are unlike any noise the network has seen.
    """
    cosine = (start * end).sum() / (start.norm() * end.norm())
    angle = cosine.clamp(-1, 1).acos()
    return (((1 - fraction) * angle).sin() * start + (fraction * angle).sin() * end) / angle.sin()


def draw_places(lab, places, bar):
    """Draw the fabrics at these places of the loop; 1.25 is a quarter of the way from 1 to 2."""
    anchors = lab.noise(MORPH_FABRICS)
    x_T = torch.stack([
        slerp(anchors[int(place)], anchors[(int(place) + 1) % len(anchors)], place % 1)
        for place in places
    ])  # fmt: skip
    images = []
    for batch in x_T.split(BATCH_SIZE[lab.device.type]):
        drawn = len(batch)
        images += lab.draw("dpmpp", batch, MORPH_STEPS, lambda *_: bar.update(drawn))  # noqa: B023
    return images


def changes(images):
    """Return the distance of each image of a loop to the next one, the last one's to the first."""
    return [distance(image, images[(i + 1) % len(images)]) for i, image in enumerate(images)]


def draw_loop(lab):
    """Draw the frames of the loop: evenly first, then more of them where the fabric changes fast.

    Returns the images in order, no two neighbours further apart than MORPH_CHANGE, unless that
    takes more frames than MORPH_FRAMES allows.
    """
    first, most = MORPH_FRAMES
    places = [MORPH_FABRICS * i / first for i in range(first)]
    with tqdm(total=first * MORPH_STEPS, unit="evaluation", desc="e") as bar:
        frames = dict(zip(places, draw_places(lab, places, bar), strict=True))
        while len(frames) < most:
            places = sorted(frames)
            gaps = zip(changes([frames[place] for place in places]), places,
                       [*places[1:], MORPH_FABRICS], strict=True)  # fmt: skip
            wide = sorted((gap for gap in gaps if gap[0] > MORPH_CHANGE), reverse=True)
            if not wide:
                break
            middles = [(start + end) / 2 for _, start, end in wide[: most - len(frames)]]
            bar.total += len(middles) * MORPH_STEPS
            frames |= zip(middles, draw_places(lab, middles, bar), strict=True)
    return [frames[place] for place in sorted(frames)]


def part_e(lab):
    """Draw a loop through five fabrics."""
    started = time.perf_counter()
    images = draw_loop(lab)
    gif = lab.options.output_dir / "ddpm_fabric_morph.gif"
    for side in (256, 192, 128, 64):
        pictures = [to_picture(image).resize((side, side), Image.Resampling.BICUBIC)
                    for image in images]  # fmt: skip
        save_gif(pictures, gif, 60)
        if gif.stat().st_size <= MORPH_BYTES:
            break
    film = gif.with_suffix(".mp4")
    save_film([to_picture(image).resize((256, 256), Image.Resampling.BICUBIC)
               for image in images], film, 60)  # fmt: skip
    steps = changes(images)
    save_numbers(lab, gif.with_suffix(".json"), {
        "fabrics": MORPH_FABRICS,
        "frames": len(images),
        "steps_per_frame": MORPH_STEPS,
        "largest_change": max(steps),
        "mean_change": sum(steps) / len(steps),
        "gif_bytes": gif.stat().st_size,
        "seconds": time.perf_counter() - started,
    })  # fmt: skip
    print(f"The morph has {len(images)} frames; none differs from the next by more than "
          f"{max(steps):.3f} (root mean square, pixels from 0 to 1).")  # fmt: skip
    return [gif, film]


# ---- The exercise --------------------------------------------------------------------------------

PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e}


def explore(options):
    """Run the parts that were asked for."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    lab = Laboratory(options)
    started = time.perf_counter()
    with matplotlib.rc_context(STYLE):
        for part in sorted(set(options.part)):
            begun = time.perf_counter()
            written = PARTS[part](lab)
            files = ", ".join(map(str, [*written, written[0].with_suffix(".json")]))
            print(f"Part {part}: wrote {files} in {time.perf_counter() - begun:.1f} s.")
    print(f"Done in {time.perf_counter() - started:.1f} s.")


def main(argv=None):
    """Run the exercise."""
    options = parse_options(argv)
    return run_and_explain(
        lambda: explore(options), f"The parts that were finished are in {options.output_dir}."
    )


if __name__ == "__main__":
    sys.exit(main())
