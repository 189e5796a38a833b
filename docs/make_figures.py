"""Make every figure and every number of the lesson again, from the weights that ship.

    python docs/make_figures.py                      all of it (about an hour on two CPU cores)
    python docs/make_figures.py --only facts forward some parts; --help lists them
    python docs/make_figures.py --check              says what is missing or out of date

Starts the exercise scripts as a reader would, keeps what they print, shrinks what they draw to
docs/images/, builds the strips behind the sliders, and notes in docs/images/figures.json from
which files each figure was made, so that the build refuses one that is out of date.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
REFERENCE = ROOT / "training_results" / "reference"
QUICK = REFERENCE / "quick"  # what exercise 3 leaves after --train --quick
MANIFEST = IMAGES / "figures.json"
WEIGHTS = ROOT / "models" / "ddpm_african_fabrics.pt"
DATA = ROOT / "african_fabric_processed"

MAX_WIDTH = 1050  # pixels: figures are shown 700 wide, many screens have 1.5 to 2 pixels per point
SLIDER_FABRICS = 3  # fabrics side by side in the reverse slider
FORWARD_FABRIC = 5  # which training image the forward slider takes apart, counted over all folders
FORWARD_FRAMES = 41  # frames of the forward slider
REVERSE_STEPS = 200  # DDIM steps behind the reverse slider
REVERSE_EVERY = 8  # of which every eighth is a frame
SWEEP_FABRICS = 2  # the same in the sweep slider, whose reference alone takes minutes
SWEEP_COUNTS = (5, 10, 20, 50, 100)  # steps in the sweep slider
SWEEP_REFERENCE = 1000  # DDIM steps of the picture that the others are compared with
SWEEP_SEED = 42  # the seed of the first fabric in the sliders
NOISY_TIMES = (999, 998, 997, 996, 990, 980, 950, 900, 800)  # where the guessed colour is judged
NOISY_FABRICS = 120  # held-out fabrics that it is judged by
NOISY_SEEDS = range(42, 50)  # drawn with and without the network's guess in nearly pure noise
FILM_BYTES = 280_000  # of the morph on the page
GAP = 4  # white pixels between the images of a frame

sys.path.insert(0, str(ROOT))  # the sliders use the samplers of exercise 1, as they are


# ---- Bookkeeping ---------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: dict) -> None:
    """Write through a temporary name, so that there is a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def note(path: Path, made_from: list[Path]) -> None:
    """Enter a figure in the list: its own checksum and those of what it was made from."""
    record = read_json(MANIFEST)
    record[path.relative_to(ROOT).as_posix()] = {
        "sha256": sha256(path),
        "made_from": {f.relative_to(ROOT).as_posix(): sha256(f) for f in made_from},
    }
    write_json(MANIFEST, dict(sorted(record.items())))


def publish(
    source: Path | Image.Image, name: str, made_from: list[Path], quality: int = 58
) -> None:
    """Shrink a picture to the lesson's width and keep it as docs/images/NAME."""
    picture = source if isinstance(source, Image.Image) else Image.open(source)
    picture = picture.convert("RGB")
    if picture.width > MAX_WIDTH:
        height = round(picture.height * MAX_WIDTH / picture.width)
        picture = picture.resize((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    IMAGES.mkdir(exist_ok=True)
    picture.save(IMAGES / name, quality=quality, method=6)
    note(IMAGES / name, made_from)
    print(f"  wrote docs/images/{name} ({(IMAGES / name).stat().st_size / 1000:.0f} kB)")


def hardware() -> str:
    """Name the machine in words, as the lesson prints it."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*: (.+)", cpuinfo.read_text())
        name = match.group(1).strip() if match else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cores} cores of an {name}{gpu}" if name[0] in "AEIOU" else f"{cores} cores, {name}{gpu}"
    )


def run_script(name: str, arguments: list[str], folder: Path, shown: str) -> dict:
    """Run a script of the bundle in a folder; return what a reader sees: command and output."""
    print(f"  $ {shown}")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *arguments], cwd=folder, text=True, encoding="utf-8",
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"Error: '{shown}' ended with {done.returncode}: {done.stderr[-2000:]}")
    return {
        "command": shown,
        "output": done.stdout.rstrip() + "\n",
        "seconds": round(time.perf_counter() - started, 2),
        "hardware": hardware(),
    }


def keep_transcript(key: str, run: dict) -> None:
    """Add what a command printed to training_results/reference/transcripts.json."""
    transcripts = read_json(REFERENCE / "transcripts.json")
    write_json(REFERENCE / "transcripts.json", dict(sorted({**transcripts, key: run}.items())))


def workspace(folder: str) -> Path:
    """Make a folder that looks like a fresh clone after --verify: weights and data by link."""
    place = Path(folder)
    for original in (WEIGHTS.parent, DATA):
        if original.exists():
            (place / original.name).symlink_to(original)
    return place


# ---- The parts -----------------------------------------------------------------------------------


def make_facts() -> None:
    """Count and weigh what the text states about the network, the process and the files."""
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
    from torch.utils.flop_counter import FlopCounterMode

    from exercise1_generate import build_diffusion

    torch.manual_seed(0)
    diffusion = build_diffusion()
    layers = []

    def watch(name, module):
        kind = {"ResnetBlock": "residual block", "LinearAttention": "linear attention",
                "Attention": "full attention", "Conv2d": "convolution"}  # fmt: skip

        def hook(_, inputs, output):
            layers.append({
                "name": name, "kind": kind.get(type(module).__name__, "resampling"),
                "channels_in": inputs[0].shape[1], "channels_out": output.shape[1],
                "size_in": inputs[0].shape[-1], "size_out": output.shape[-1],
            })  # fmt: skip

        module.register_forward_hook(hook)

    kinds = (library.ResnetBlock, library.LinearAttention, library.Attention)
    for name, module in diffusion.model.named_modules():
        if isinstance(module, kinds) or re.fullmatch(
            r"init_conv|final_conv|(up|down)s\.\d\.3", name
        ):
            watch(name, module)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        diffusion.model(torch.zeros(1, 3, 64, 64), torch.tensor([0]))
    modules = list(diffusion.model.modules())
    parameters = sum(weight.numel() for weight in diffusion.model.parameters())

    rows, at_500 = [], {}
    for t in (0, 100, 250, 499, 750, 999):
        row = {"t": t}
        for name in ("linear", "cosine", "sigmoid"):
            betas = getattr(library, f"{name}_beta_schedule")(1000)
            row[name] = torch.cumprod(1 - betas, 0)[t].item()
            if t == 499:
                at_500[name] = row[name]
        row["snr"] = row["sigmoid"] / (1 - row["sigmoid"])
        rows.append(row)

    # Equation 12 of Ho et al. with sigma^2 = beta-tilde; index 0 has no variance and no factor.
    a, b, v = (x.double() for x in (diffusion.alphas_cumprod, diffusion.betas,
                                    diffusion.posterior_variance))  # fmt: skip
    factors = b**2 / (2 * v * (1 - b) * (1 - a))

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(32, 3, 64, 64, generator=generator)
        untrained = float(diffusion(images))

    write_json(REFERENCE / "lesson_facts.json", {
        "library": library.__version__,
        "network": {
            "parameters": parameters,
            "gflop_forward": counter.get_total_flops() / 1e9,
            "rms_norms": sum(isinstance(m, library.RMSNorm) for m in modules),
            "group_norms": sum(isinstance(m, torch.nn.GroupNorm) for m in modules),
            "layers": layers,
        },
        "work": network_work(diffusion.model),
        "schedules": rows,
        "alpha_bar_at_499": at_500,
        "elbo_weights": [{"t": t, "weight": factors[t].item()} for t in (1, 10, 100, 500, 900)],
        "posterior_variance_at_0": float(diffusion.posterior_variance[0]),
        "sqrt_alpha_bar_at_T": float(diffusion.sqrt_alphas_cumprod[-1]),
        "untrained_loss": untrained,
        "files": file_sizes(diffusion),
        "all_timesteps_mib": 16 * 1001 * 3 * 64 * 64 * 4 / 2**20,
        "training": {"images": 1059, "batch": 32, "steps": 100_000,
                     "passes": 100_000 * 32 / 1059,
                     "data_mb_uint8": 1059 * 3 * 64 * 64 / 1e6},
    })  # fmt: skip
    print("  wrote training_results/reference/lesson_facts.json")


def network_work(unet) -> dict:
    """What one forward pass of one 64x64 picture computes, moves and starts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class CountKernels(TorchDispatchMode):
        """Counts operations that do something; views and reshapes only relabel memory."""

        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            idle = ("view", "permute", "transpose", "expand", "slice", "split", "select", "detach",
                    "unsqueeze", "squeeze", "as_strided", "alias", "t.default")  # fmt: skip
            self.count += not any(word in str(function) for word in idle)
            return result

    by_size: dict[int, float] = {}
    activations = []

    def watch(module, inputs, output):
        activations.append(output.numel())
        if isinstance(module, torch.nn.Conv2d):
            flop = 2 * module.weight.numel() * output.shape[-1] * output.shape[-2]
            size = output.shape[-1]
            by_size[size] = by_size.get(size, 0) + flop

    hooks = [m.register_forward_hook(watch) for m in unet.modules() if not list(m.children())]
    with torch.no_grad(), CountKernels() as kernels:
        unet(torch.zeros(1, 3, 64, 64), torch.tensor([0]))
    for hook in hooks:
        hook.remove()
    total = sum(by_size.values())
    parameters = sum(weight.numel() for weight in unet.parameters())
    return {
        "kernels": kernels.count,
        "conv_share_by_size": [
            {"size": size, "gflop": by_size[size] / 1e9, "share": by_size[size] / total}
            for size in sorted(by_size, reverse=True)
        ],
        "activation_mb_fp32": 4 * sum(activations) / 1e6,
        "weight_mb_fp32": 4 * parameters / 1e6,
        "adam_mb": 4 * 4 * parameters / 1e6,  # weights, gradients and two moments
    }


def file_sizes(diffusion) -> dict:
    """Write each kind of weight file once and weigh it, in units of 10^6 bytes."""
    import copy

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4)
    for weight in diffusion.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = diffusion.state_dict()
    half = {
        key: value.half() if key.startswith("model.") else value for key, value in state.items()
    }
    checkpoint = {"step": 1, "model": state, "opt": optimizer.state_dict(),
                  "ema": {"ema_model": copy.deepcopy(state)}}  # fmt: skip
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("fp32", state), ("fp16", half), ("checkpoint", checkpoint)):
            torch.save(content, Path(folder) / "file.pt")
            sizes[f"{name}_mb"] = (Path(folder) / "file.pt").stat().st_size / 1e6
    return sizes


def strip_of(frames: list[torch.Tensor]) -> Image.Image:
    """Lay frames [rows, columns, 3, h, w] in [0, 1] side by side, with gaps inside each."""
    pictures = []
    for frame in frames:
        rows, columns, _, height, width = frame.shape
        sheet = torch.ones(3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
        for i in range(rows):
            for j in range(columns):
                y, x = i * (height + GAP), j * (width + GAP)
                sheet[:, y : y + height, x : x + width] = frame[i, j]
        pictures.append(sheet)
    levels = (torch.cat(pictures, dim=2).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def publish_strip(
    name: str, frames: list[torch.Tensor], made_from: list[Path], quality: int
) -> None:
    strip = strip_of(frames)
    if strip.width > 16383:
        raise SystemExit(
            f"Error: the strip of {name} is {strip.width} pixels wide, WebP ends at 16383."
        )
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"slider_{name}.webp"
    strip.save(path, quality=quality, method=6)
    note(path, made_from)
    print(f"  wrote docs/images/{path.name} ({path.stat().st_size / 1000:.0f} kB)")


def training_image(index: int) -> torch.Tensor:
    """Return training image number `index` as [3, 64, 64] in [0, 1]."""
    files = sorted(DATA.rglob("*.png"))
    if not files:
        raise SystemExit("Error: there are no fabrics: run python -m ddpm_basics.fabrics first.")
    pixels = np.array(Image.open(files[index]).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def make_forward() -> None:
    """The forward slider: one fabric and one noise, mixed for each t."""
    from exercise1_generate import build_diffusion, starting_noise

    diffusion = build_diffusion(dim=8, dim_mults=(1, 2))  # only its schedule is used
    x_0 = training_image(FORWARD_FABRIC)[None] * 2 - 1
    noise, _ = starting_noise([SWEEP_SEED], (3, 64, 64))
    frames, facts = [], []
    for t in np.linspace(0, 999, FORWARD_FRAMES).round().astype(int).tolist():
        x_t = diffusion.q_sample(x_0, torch.tensor([t]), noise)
        frames.append(((x_t + 1) / 2)[None])
        a = diffusion.alphas_cumprod[t].item()
        facts.append({"t": t, "alpha_bar": a, "signal": math.sqrt(a),
                      "noise": math.sqrt(1 - a), "snr": a / (1 - a)})  # fmt: skip
    write_json(REFERENCE / "slider_forward.json", {"frames": facts})
    publish_strip("forward", frames, [REFERENCE / "slider_forward.json"], quality=80)


def load_network():
    """Load the shipped weights as exercise 1 does; returns them and the precision to use."""
    from exercise1_generate import load_weights, pick_precision, prepare_network

    if not WEIGHTS.is_file():
        raise SystemExit(f"Error: {WEIGHTS.relative_to(ROOT)} is missing: train it first.")
    diffusion, _ = load_weights(WEIGHTS)
    device = torch.device("cpu")
    precision = pick_precision("auto", device)
    prepare_network(diffusion, device, precision, compiled=False)
    return diffusion, precision


def make_reverse() -> None:
    """The reverse slider: x_t above the predicted x_0, by DDIM from three noises."""
    from exercise1_generate import MIN_SIGNAL, sample_ddim, starting_noise

    diffusion, precision = load_network()
    x_T, _ = starting_noise(range(SWEEP_SEED, SWEEP_SEED + SLIDER_FABRICS), (3, 64, 64))
    frames, facts = [], []

    def keep(t, x_t, x_0):
        if len(seen) % REVERSE_EVERY == 0 or len(seen) == REVERSE_STEPS - 1:
            frames.append((torch.stack((x_t, x_0)) + 1) / 2)
            a = diffusion.alphas_cumprod[t].item()
            facts.append({"t": t, "alpha_bar": a, "snr": a / (1 - a)})
        seen.append(t)

    seen: list[int] = []
    sample_ddim(diffusion, x_T, REVERSE_STEPS, keep, precision=precision, min_signal=MIN_SIGNAL)
    write_json(REFERENCE / "slider_reverse.json", {"steps": REVERSE_STEPS, "frames": facts})
    publish_strip("reverse", frames, [REFERENCE / "slider_reverse.json", WEIGHTS], quality=48)


def make_sweep() -> None:
    """The sweep slider: DDIM above DPM-Solver++ above the 1000-step result, from one x_T."""
    from exercise1_generate import MIN_SIGNAL, sample_ddim, sample_dpmpp, starting_noise

    diffusion, precision = load_network()
    x_T, _ = starting_noise(range(SWEEP_SEED, SWEEP_SEED + SWEEP_FABRICS), (3, 64, 64))

    def timed(sampler, steps):
        started = time.perf_counter()
        images = sampler(diffusion, x_T, steps, precision=precision, min_signal=MIN_SIGNAL)
        print(f"  {sampler.__name__}, {steps} steps: {time.perf_counter() - started:.0f} s")
        return images, (time.perf_counter() - started) / len(x_T)

    target, longest = timed(sample_ddim, SWEEP_REFERENCE)
    frames, facts = [], []
    for steps in SWEEP_COUNTS:
        ddim, seconds = timed(sample_ddim, steps)
        dpmpp, _ = timed(sample_dpmpp, steps)
        frames.append(torch.stack((ddim, dpmpp, target)))
        distance = [float((images - target).square().mean().sqrt()) for images in (ddim, dpmpp)]
        facts.append({"steps": steps, "seconds_per_image": seconds,
                      "ddim_rmse": distance[0], "dpmpp_rmse": distance[1]})  # fmt: skip
    write_json(REFERENCE / "slider_sweep.json", {
        "hardware": hardware(), "reference_steps": SWEEP_REFERENCE,
        "reference_seconds_per_image": longest, "frames": facts,
    })  # fmt: skip
    publish_strip("sweep", frames, [REFERENCE / "slider_sweep.json", WEIGHTS], quality=86)


def make_noisy_end() -> None:
    """What guesses in nearly pure noise are worth, and what comes of following them."""
    from exercise1_generate import MIN_SIGNAL, SAMPLING_STEPS, sample_dpmpp, starting_noise

    diffusion, precision = load_network()
    write_json(REFERENCE / "noisy_end.json", {
        "hardware": hardware(), "fabrics": NOISY_FABRICS, "min_signal": MIN_SIGNAL,
        "rows": judge_colours(diffusion, precision),
    })  # fmt: skip
    note(REFERENCE / "noisy_end.json", [WEIGHTS])
    x_T, _ = starting_noise(NOISY_SEEDS, (3, 64, 64))
    steps = SAMPLING_STEPS["dpmpp"]
    rows = {
        "the network's guess followed at every t":
            sample_dpmpp(diffusion, x_T, steps, precision=precision),
        "its guesses in nearly pure noise left out":
            sample_dpmpp(diffusion, x_T, steps, precision=precision, min_signal=MIN_SIGNAL),
    }  # fmt: skip
    publish(labelled_rows(rows), "noisy_end.webp", [WEIGHTS], quality=50)


def judge_colours(diffusion, precision) -> list[dict]:
    """How far the guessed mean colour of held-out fabrics is off, and that of plain grey."""
    from exercise1_generate import noise_levels, predict_x_0, read_image

    with tempfile.TemporaryDirectory() as folder:
        run_script("prepare_fabrics.py", ["--split", "heldout", "--count", str(NOISY_FABRICS),
                   "--output", "fabrics"], Path(folder), "python prepare_fabrics.py")  # fmt: skip
        paths = sorted(Path(folder).rglob("*.png"))
        x_0 = torch.stack([read_image(path) for path in paths]) * 2 - 1
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    (alpha, sigma), mean = noise_levels(diffusion), x_0.mean((2, 3))

    def off(guess):
        """Root mean square, over fabrics and channels, on pixels from 0 to 1."""
        return float((guess - mean).square().mean().sqrt()) / 2

    rows = []
    for t in NOISY_TIMES:
        x_t = (alpha[t] * x_0 + sigma[t] * noise).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            guess = torch.cat([predict_x_0(diffusion, part, t, precision)
                               for part in x_t.split(12)])  # fmt: skip
        rows.append({
            "t": t, "alpha": alpha[t], "enlarged": sigma[t] / alpha[t],
            "network": off(guess.mean((2, 3))), "grey": off(torch.zeros_like(mean)),
        })  # fmt: skip
    return rows


def labelled_rows(rows: dict[str, torch.Tensor], cell: int = 124) -> Image.Image:
    """Put rows of images [n, 3, h, w] in [0, 1] below each other, a line of text above each."""
    from PIL import ImageDraw, ImageFont

    from exercise1_generate import to_picture

    head, count = 40, max(len(images) for images in rows.values())
    sheet = Image.new("RGB", (count * (cell + 4), len(rows) * (head + cell + 8)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(24)
    for i, (label, images) in enumerate(rows.items()):
        top = i * (head + cell + 8)
        draw.text((2, top + head / 2), label, "black", font, anchor="lm")
        for j, image in enumerate(images):
            large = to_picture(image).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(large, (j * (cell + 4), top + head))
    return sheet


def make_data() -> None:
    """Exercise 3's first look: --verify, its nine images, its output."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_script("exercise3_train.py", ["--verify"], workspace(folder),
                         "python exercise3_train.py --verify")  # fmt: skip
        publish(Path(folder) / "training_samples_grid.png", "training_samples_grid.webp", [])
    keep_transcript("verify", run)


def make_exercise1() -> None:
    """Exercise 1 as a reader runs it."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_script("exercise1_generate.py", [], workspace(folder),
                         "python exercise1_generate.py")  # fmt: skip
        publish(Path(folder) / "exercise1_output.png", "exercise1_output.webp", [WEIGHTS])
    keep_transcript("exercise1", run)


def make_weights() -> None:
    """Name the shipped weights: size, checksum, step; and what the page's snippet prints."""
    digest, size = sha256(WEIGHTS), WEIGHTS.stat().st_size / 1e6
    step = torch.load(WEIGHTS, map_location="cpu", weights_only=True, mmap=True)["step"]
    write_json(REFERENCE / "weights.json", {"mb": size, "sha256": digest, "step": step})
    note(REFERENCE / "weights.json", [WEIGHTS])
    printed = f"{size:.1f} MB, sha256 {digest[:16]}...\n"
    keep_transcript("checksum", {"command": "", "output": printed})


def make_schedules() -> None:
    """The figures of exercise 2 that need no network: forward diffusion and the schedules."""
    with tempfile.TemporaryDirectory() as folder:
        run_script("exercise2_explore.py", ["--part", "c", "d"], workspace(folder),
                   "python exercise2_explore.py --part c d")  # fmt: skip
        keep_exercise2(Path(folder), ("forward_diffusion_demo", "noise_schedule_comparison"), [])


def make_exercise2() -> None:
    """Exercise 2 as a reader runs it: five parts, their figures, their measurements, the morph."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_script("exercise2_explore.py", [], workspace(folder),
                         "python exercise2_explore.py")  # fmt: skip
        keep_exercise2(Path(folder), ("forward_diffusion_demo", "noise_schedule_comparison"), [])
        keep_exercise2(
            Path(folder), ("exercise2_sampling_comparison", "reverse_diffusion_demo"), [WEIGHTS]
        )
        shutil.copy(Path(folder) / "ddpm_fabric_morph.json", REFERENCE)
        keep_film(Path(folder) / "ddpm_fabric_morph.mp4")
    keep_transcript("exercise2", run)


def keep_exercise2(folder: Path, names: tuple[str, ...], made_from: list[Path]) -> None:
    """Keep figures of exercise 2 and the measurements beside them."""
    for name in names:
        publish(folder / f"{name}.png", f"{name}.webp", made_from, quality=35)
        shutil.copy(folder / f"{name}.json", REFERENCE)


def keep_film(film: Path) -> None:
    """Keep the morph, small enough for a page, and its first frame."""
    import imageio.v2 as imageio

    frames = imageio.mimread(film, memtest=False)
    with tempfile.TemporaryDirectory() as folder:
        for quality in (7, 6, 5, 4, 3, 2):
            small = Path(folder) / "film.mp4"
            imageio.mimwrite(small, frames, fps=1000 / 60, codec="libx264", quality=quality,
                             pixelformat="yuv420p", macro_block_size=2)  # fmt: skip
            if small.stat().st_size <= FILM_BYTES:
                break
        shutil.copy(small, IMAGES / "ddpm_fabric_morph.mp4")
    note(IMAGES / "ddpm_fabric_morph.mp4", [WEIGHTS])
    publish(Image.fromarray(frames[0]), "ddpm_fabric_morph_still.webp", [WEIGHTS])


def stages() -> list[dict]:
    """Find the runs that led to the shipped weights, in their order.

    A run is a folder with run.json, losses.csv and sample-STEP.png: training_results/reference/
    itself, or folders in it, stage1_... and so on, where one run went on from another's weights.
    """
    found = []
    for path in sorted(set(REFERENCE.rglob("run.json")) - {QUICK / "run.json"}):
        run, training = read_json(path), read_json(path)["training"]
        found.append({
            "name": "" if path.parent == REFERENCE else path.parent.name,
            "image_size": run["process"]["image_size"], "steps": training["steps_done"],
            "batch": training["effective_batch"], "seconds": training["seconds"],
            "passes": training["steps_done"] * training["effective_batch"] / run["data"]["images"],
            "learning_rate": training["lr"],
            "last_learning_rate": training["lr_final"] or training["lr"],
            "precision": training["precision"], "hardware": training["hardware"],
            "weighting": ", ".join(
                name for key, name in (("min_snr", "min-SNR"), ("snr_plus_one", "1 + 1/SNR"))
                if training.get(key)
            ) or "none",
        })  # fmt: skip
    if not found:
        raise SystemExit("Error: training_results/reference/ holds no run.json.")
    return sorted(found, key=lambda stage: stage["name"])


def read_losses(stage: dict) -> dict[str, list[tuple[int, float]]]:
    """Read the columns of a run's losses.csv: {column: [(step, value), ...]}."""
    columns: dict[str, list[tuple[int, float]]] = {}
    with (REFERENCE / stage["name"] / "losses.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step":
                    columns.setdefault(name, []).append((int(row["step"]), float(value)))
    return columns


def make_training() -> None:
    """What the reference run left: its settings, its curve, its samples as time went on."""
    runs = stages()
    logs = [read_losses(stage) for stage in runs]
    write_json(REFERENCE / "training.json", {
        "stages": runs,
        "steps": sum(stage["steps"] for stage in runs),
        "hours": sum(stage["seconds"] for stage in runs) / 3600,
        "passes": sum(stage["passes"] for stage in runs),
        "hardware": runs[-1]["hardware"],
        "first_loss": {"step": logs[0]["loss"][0][0], "loss": logs[0]["loss"][0][1]},
        "fixed": [
            {"stage": number, "step": step, "train": train, "heldout": heldout}
            for number, log in enumerate(logs, 1)
            for (step, train), (_, heldout) in zip(
                log["train_fixed"], log["heldout_fixed"], strict=True)
        ],
        "bins": [
            {"bin": f"{100 * i} to {100 * i + 99}", "train": logs[-1][f"train_bin{i}"][-1][1],
             "heldout": logs[-1][f"heldout_bin{i}"][-1][1]}
            for i in range(10)
        ],
    })  # fmt: skip
    sources = [REFERENCE / stage["name"] / "losses.csv" for stage in runs]
    publish(plot_losses(runs, logs), "loss_curve.webp", sources, quality=90)
    grids = {
        (number, step_of(path)): path
        for number, stage in enumerate(runs)
        for path in (REFERENCE / stage["name"]).glob("sample-*.png")
    }
    if not grids:
        raise SystemExit("Error: training_results/reference/ holds no sample-STEP.png.")
    publish(progression(grids, runs), "progression.webp", sorted(grids.values()), quality=45)


def plot_losses(runs: list[dict], logs: list[dict]) -> Image.Image:
    """Draw the losses of all stages one after the other, with a line where the next one begins."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    before = 0
    for number, (stage, log) in enumerate(zip(runs, logs, strict=True)):
        for name, label, style in (
            ("loss", "what the training minimises", {"color": "0.6", "lw": 0.9}),
            ("train_fixed", "EMA, fixed training fabrics", {"color": "C0", "marker": "o", "ms": 4}),
            ("heldout_fixed", "EMA, held-out fabrics", {"color": "C1", "marker": "s", "ms": 4}),
        ):
            steps, values = zip(*log[name], strict=True)
            axes.plot([before + step for step in steps], values, **style,
                      label=label if number == 0 else None)  # fmt: skip
        if number:
            axes.axvline(before, color="0.3", lw=0.8, ls=":")
        size = f"{stage['image_size']}x{stage['image_size']}"
        axes.annotate(size, (before, 1), (4, -4), textcoords="offset points", va="top",
                      xycoords=("data", "axes fraction"), fontsize=8)  # fmt: skip
        before += stage["steps"]
    axes.set(xlabel="step, all stages", ylabel="mean squared error of the noise", yscale="log")
    axes.minorticks_off()
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.93))
    return picture_of(figure)


def picture_of(figure) -> Image.Image:
    """Turn a matplotlib figure into a picture, 200 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, format="png")
    return Image.open(buffer).convert("RGB")


def progression(grids: dict[tuple[int, int], Path], runs: list[dict]) -> Image.Image:
    """Set the sample grids of up to six moments side by side, each under its step."""
    from PIL import ImageDraw, ImageFont

    moments = sorted(grids)
    if len(moments) > 6:  # spread evenly, first and last included
        moments = [moments[round(i * (len(moments) - 1) / 5)] for i in range(6)]
    columns, cell, head = 3, 440, 40
    rows = math.ceil(len(moments) / columns)
    sheet = Image.new("RGB", (columns * (cell + 16) - 16, rows * (cell + head + 12)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(24)
    for i, (number, step) in enumerate(moments):
        x, y = i % columns * (cell + 16), i // columns * (cell + head + 12)
        grid = without_title(Image.open(grids[number, step]).convert("RGB"))
        sheet.paste(grid.resize((cell, cell), Image.Resampling.LANCZOS), (x, y + head))
        size = f" at {runs[number]['image_size']}x{runs[number]['image_size']}"
        label = f"step {step:,}" + (size if len(runs) > 1 else "")
        draw.text((x + cell / 2, y + head / 2), label, "black", font, anchor="mm")
    return sheet


def without_title(grid: Image.Image) -> Image.Image:
    """Cut the title line off a grid of save_grid."""
    return grid.crop((0, 44, grid.width, grid.height))


def make_quick() -> None:
    """The last samples of exercise 3's short run, which is done now unless its record is there."""
    if not (QUICK / "run.json").is_file():
        with tempfile.TemporaryDirectory() as folder:
            run_script("exercise3_train.py", ["--train", "--quick"], workspace(folder),
                       "python exercise3_train.py --train --quick")  # fmt: skip
            QUICK.mkdir(parents=True, exist_ok=True)
            made = Path(folder) / "training_results" / "quick"
            last = max(made.glob("sample-*.png"), key=step_of)
            for path in (made / "run.json", made / "losses.csv", last):
                shutil.copy(path, QUICK)
    last = max(QUICK.glob("sample-*.png"), key=step_of)
    publish(last, "quick.webp", [last])


def step_of(path: Path) -> int:
    """Read the step in the name sample-STEP.png."""
    return int(path.stem.split("-")[1])


def make_comparison() -> None:
    """Training images beside generated ones, 16 each."""
    from PIL import ImageDraw, ImageFont

    with tempfile.TemporaryDirectory() as folder:
        run_script("exercise1_generate.py", ["--seed", "100"], workspace(folder),
                   "python exercise1_generate.py --seed 100")  # fmt: skip
        made = sorted((Path(folder) / "generated_samples").glob("*.png"))
        drawn = [Image.open(path).convert("RGB") for path in made]
    files = sorted(DATA.rglob("*.png"))
    real = [Image.open(files[int((i + 0.5) * len(files) / 16)]).convert("RGB") for i in range(16)]
    cell, head = 168, 44
    side = 4 * (cell + 4)
    sheet = Image.new("RGB", (2 * side + 24, side + head), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)
    for k, (title, pictures) in enumerate((("training images", real), ("generated", drawn))):
        draw.text((k * (side + 24) + side / 2, head / 2), title, "black", font, anchor="mm")
        for i, picture in enumerate(pictures):
            place = (k * (side + 24) + i % 4 * (cell + 4), head + i // 4 * (cell + 4))
            sheet.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), place)
    publish(sheet, "training_vs_generated.webp", [WEIGHTS], quality=45)


def make_neighbours() -> None:
    """The figure that evaluate_fabrics.py left beside its numbers."""
    publish(REFERENCE / "evaluation_neighbours.png", "nearest_neighbours.webp",
            [REFERENCE / "evaluation.json"], quality=45)  # fmt: skip


def make_settling() -> None:
    """The samples of the short runs, which tests/benchmarks/settling_runs.py left."""
    publish(REFERENCE / "settling.png", "settling.webp", [REFERENCE / "settling.json"], quality=30)


def make_from_scratch() -> None:
    """Train docs/ddpm_from_scratch.py as a reader would, and keep its curve and its fabrics."""
    script = ROOT / "docs" / "ddpm_from_scratch.py"
    with tempfile.TemporaryDirectory() as folder:
        run = run_script("docs/ddpm_from_scratch.py", [], workspace(folder),
                         "python ddpm_from_scratch.py")  # fmt: skip
        facts = read_json(Path(folder) / "from_scratch.json")
        losses = facts.pop("losses")
        every = 25
        facts["curve"] = [
            {"step": i + every, "loss": float(np.mean(losses[i : i + every]))}
            for i in range(0, len(losses) - every + 1, every)
        ]
        facts["hardware"] = hardware()
        write_json(REFERENCE / "from_scratch.json", facts)
        publish(Path(folder) / "from_scratch.png", "from_scratch.webp", [])
    publish(plot_curve(facts["curve"]), "from_scratch_loss.webp",
            [REFERENCE / "from_scratch.json"], quality=92)  # fmt: skip
    keep_transcript("from_scratch", run)
    assert script.is_file()


def plot_curve(curve: list[dict]) -> Image.Image:
    """Draw loss against step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([row["step"] for row in curve], [row["loss"] for row in curve], color="#0b6e75")
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axes.set_title("Loss of the network from scratch, means of 25 steps")
    axes.grid(alpha=0.3, which="both")
    return picture_of(figure)


def make_notebook() -> None:
    """docs/ddpm_from_scratch.ipynb: the script, cut at its `# %%` lines."""
    source = (ROOT / "docs" / "ddpm_from_scratch.py").read_text(encoding="utf-8")
    path = ROOT / "docs" / "ddpm_from_scratch.ipynb"
    path.write_text(notebook_of(source), encoding="utf-8")
    print(f"  wrote {path.relative_to(ROOT)}")


def notebook_of(source: str) -> str:
    """Turn a script with `# %%` marks into a notebook (format 4.5), without any output."""
    cells = []
    for mark, body in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, re.M | re.S):
        text = re.sub(r"^# ?", "", body, flags=re.M) if mark else body
        text = text.strip("\n")
        if "__main__" in text:  # a notebook has no command line
            text = text.replace('if __name__ == "__main__":\n    main()', "main([])")
        cells.append({
            "cell_type": "markdown" if mark else "code",
            "id": f"cell-{len(cells):02d}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        } | ({} if mark else {"execution_count": None, "outputs": []}))  # fmt: skip
    notebook = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


PARTS = {
    "facts": make_facts,
    "notebook": make_notebook,
    "forward": make_forward,
    "data": make_data,
    "weights": make_weights,
    "exercise1": make_exercise1,
    "reverse": make_reverse,
    "sweep": make_sweep,
    "noisy_end": make_noisy_end,
    "schedules": make_schedules,
    "exercise2": make_exercise2,
    "training": make_training,
    "quick": make_quick,
    "comparison": make_comparison,
    "neighbours": make_neighbours,
    "settling": make_settling,
    "from_scratch": make_from_scratch,
}


def main(argv: list[str] | None = None) -> int:
    """Make the parts that were asked for, or only look at what is there."""
    global DATA
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Parts: " + "; ".join(f"{name}: {part.__doc__}" for name, part in PARTS.items()),
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--data", type=Path, default=DATA, help="the training fabrics")
    parser.add_argument("--check", action="store_true", help="make nothing, say what is amiss")
    options = parser.parse_args(argv)
    DATA = options.data.resolve()
    if options.check:
        return check()
    started = time.perf_counter()
    for name in options.only:
        print(f"{name}: {PARTS[name].__doc__.splitlines()[0]}")
        PARTS[name]()
    print(f"Made {len(options.only)} parts in {time.perf_counter() - started:.0f} s.")
    return 0


def check() -> int:
    """Say which made files are missing or older than what they were made from."""
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    from measured import figure_faults

    wanted = set(read_json(MANIFEST))
    for page in sorted((ROOT / "docs").glob("*.rst")):
        wanted |= {f"docs/{p}" for p in re.findall(r"images/\S+\.(?:webp|mp4)", page.read_text())}
    faults = [fault for name in sorted(wanted) for fault in figure_faults(name)]
    print("\n".join(faults) or "Every figure is there and up to date.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
