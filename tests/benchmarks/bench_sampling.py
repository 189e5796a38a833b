"""How fast sixteen fabrics are drawn: the library as the course used it, against exercise 1.

    python tests/benchmarks/bench_sampling.py                         everything, in full
    python tests/benchmarks/bench_sampling.py --stock-evaluations 5   stock from 5 of its 250 steps

Stock is sample() of denoising-diffusion-pytorch in fp32 with 250 DDIM steps. Ours is timed in two
ways: drawing alone, after a warm-up, and the whole command in a process of its own, with its
imports and files. Stock takes minutes, in which a machine shared with others can become slower or
faster, so the command runs twice before it and three times after, drawing three times after; the
middle one counts, and all are kept. Writes a table and
training_results/reference/bench_sampling.json.

The unit is one evaluation of the network for one image; its arithmetic is counted by torch. The
share of the machine's matrix-product rate compares that with a product of two 2048 x 2048
matrices in the same precision. Without a weight file an untrained network of the module's size
is timed: speed does not depend on the weights' values.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from denoising_diffusion_pytorch import GaussianDiffusion  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import exercise1_generate as exercise1  # noqa: E402
from ddpm_basics.files import write_atomically  # noqa: E402
from ddpm_basics.hardware import pick_device, pick_precision, prepare_network  # noqa: E402
from ddpm_basics.model import build_diffusion, load_weights  # noqa: E402
from ddpm_basics.sampling import asinh_times, asked_timesteps, choose_times, noise_levels  # noqa: E402

STOCK_STEPS = 250
RUNS_BEFORE, RUNS_AFTER = 2, 3  # of ours; of stock there is one


def parse_options(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", type=Path, default=ROOT / exercise1.WEIGHTS)
    add("--images", type=int, default=16, help="how many to draw")
    add("--stock-evaluations", type=int, default=STOCK_STEPS,
        help="time so many of stock's DDIM steps and scale up to 250")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of ours")
    add("--output", type=Path,
        default=ROOT / "training_results" / "reference" / "bench_sampling.json")  # fmt: skip
    return parser.parse_args(argv)


def wait_for(device):
    """Let a GPU finish what it was given, so that the clock sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(work, device):
    """Run work() once; return the seconds it took."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def matrix_rate(device, precision, side=2048):
    """Measure the products of two square matrices: operations per second, the best of five."""
    left = torch.randn(side, side, device=device, dtype=precision)
    right = torch.randn(side, side, device=device, dtype=precision)
    return 2 * side**3 / min(timed(lambda: left @ right, device) for _ in range(5))


def operations_per_image(diffusion):
    """Count the multiplications and additions of the network for one image."""
    x_t = torch.zeros(1, diffusion.channels, *diffusion.image_size, device=diffusion.betas.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        diffusion.model(x_t, torch.zeros(1, dtype=torch.long, device=x_t.device))
    return counter.get_total_flops()


def time_stock(weights, device, options):
    """Seconds of the library's own sample(), fp32, from fewer steps scaled up if asked for."""
    _, facts = load_weights(weights)
    diffusion, _ = load_weights(weights)
    stock = GaussianDiffusion(
        diffusion.model, image_size=diffusion.image_size, timesteps=facts["timesteps"],
        objective=facts["objective"], beta_schedule=facts["beta_schedule"],
        sampling_timesteps=options.stock_evaluations,
    ).to(device)  # fmt: skip
    if device.type == "cuda":
        stock.sample(batch_size=options.images)  # warm-up
    seconds = timed(lambda: stock.sample(batch_size=options.images), device)
    return seconds * STOCK_STEPS / options.stock_evaluations


def time_drawing(weights, device, precision, options):
    """Seconds of exercise 1's drawing, files included, imports and loading left out."""
    diffusion, _ = load_weights(weights)
    prepare_network(diffusion, device, precision, compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        ours = SimpleNamespace(seed=0, sampler="dpmpp", compile="off", samples_dir=Path(folder),
                               min_signal=exercise1.MIN_SIGNAL)  # fmt: skip

        def draw(steps):
            ours.steps = steps
            exercise1.draw_fabrics(diffusion, range(options.images), ours, precision, True)

        draw(2)  # warm-up
        return timed(lambda: draw(exercise1.SAMPLING_STEPS["dpmpp"]), device)


def default_evaluations(diffusion):
    """Count how often exercise 1 asks the network for an image, with its default sampler."""
    asked = asked_timesteps(diffusion, exercise1.MIN_SIGNAL)
    levels, steps = noise_levels(diffusion), exercise1.SAMPLING_STEPS["dpmpp"]
    times = choose_times(levels, steps, asked, asinh_times)
    return sum(0 <= t < asked for t in times)


def time_command(weights, options):
    """Seconds of the whole command in a process of its own, from its start to its end."""
    command = [sys.executable, str(ROOT / "exercise1_generate.py"), "--weights", str(weights),
               "--num-samples", str(options.images), "--device", options.device,
               "--precision", options.precision]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True)
        return time.perf_counter() - started


def hardware(device):
    """Name what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = found[1]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__,
    }


def random_weights(folder):
    """Save an untrained network of the module's size."""
    path = Path(folder) / "untrained.pt"
    torch.save(build_diffusion().state_dict(), path)
    return path


def measure(options, weights):
    """Time everything; return the record that goes into the file."""
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    diffusion, facts = load_weights(weights)
    operations = operations_per_image(diffusion.to(device))
    count = default_evaluations(diffusion)
    rates = {name: matrix_rate(device, name) for name in {torch.float32, precision}}
    record = {
        "hardware": hardware(device),
        "images": options.images,
        "image_size": facts["image_size"],
        "parameters": facts["parameters"],
        "gflop_per_evaluation": operations / 1e9,
        "stock_evaluations_timed": options.stock_evaluations,
        "matrix_gflops": {str(name)[6:]: rate / 1e9 for name, rate in rates.items()},
        "rows": [],
    }
    command = [time_command(weights, options) for _ in range(RUNS_BEFORE)]
    stock_seconds = time_stock(weights, device, options)
    command += [time_command(weights, options) for _ in range(RUNS_AFTER)]
    # Not before stock: drawing tells the C library to keep freed memory, which helps stock, too.
    drawing = [time_drawing(weights, device, precision, options) for _ in range(RUNS_AFTER)]
    for name, per_image, dtype, runs in (
        ("stock: sample(), DDIM", STOCK_STEPS, torch.float32, [stock_seconds]),
        ("ours: drawing", count, precision, drawing),
        ("ours: whole command", count, precision, command),
    ):
        evaluations, seconds = per_image * options.images, statistics.median(runs)
        record["rows"].append({
            "what": name,
            "precision": str(dtype).removeprefix("torch."),
            "seconds": seconds,
            "runs": runs,
            "evaluations": evaluations,
            "seconds_per_evaluation": seconds / evaluations,
            "times_faster": stock_seconds / seconds,
            "share_of_matrix_rate": operations * evaluations / seconds / rates[dtype],
        })  # fmt: skip
    return record


def show(record):
    """Print the table."""
    machine = record["hardware"]
    print(f"\n{record['images']} images of {record['image_size']} pixels, "
          f"{record['parameters']:,} parameters, {record['gflop_per_evaluation']:.2f} GFLOP each "
          f"evaluation, on {machine['gpu'] or machine['cpu']} ({machine['threads']} threads, load "
          f"{machine['load']:.1f}), torch {machine['torch']}")  # fmt: skip
    if record["stock_evaluations_timed"] < STOCK_STEPS:
        print(f"Stock was timed over {record['stock_evaluations_timed']} steps and scaled to 250.")
    print(f"{'':24}{'precision':>10}{'seconds':>10}{'evaluations':>13}{'s each':>10}"
          f"{'faster':>9}{'of matmul':>11}")  # fmt: skip
    for row in record["rows"]:
        print(f"{row['what']:24}{row['precision']:>10}{row['seconds']:>10.2f}"
              f"{row['evaluations']:>13}{row['seconds_per_evaluation']:>10.5f}"
              f"{row['times_faster']:>8.1f}x{row['share_of_matrix_rate']:>10.0%}")  # fmt: skip


def main(argv=None):
    options = parse_options(argv)
    with tempfile.TemporaryDirectory() as folder:
        trained = options.weights.exists()
        weights = options.weights.resolve() if trained else random_weights(folder)
        if not trained:
            print(f"{options.weights} does not exist; an untrained network is timed instead.")
        record = measure(options, weights)
    show(record)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(options.output) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
