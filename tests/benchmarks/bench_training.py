"""Training speed against the stock library, both timed in turn in one run.

    python tests/benchmarks/bench_training.py                     the real network, batch 32
    python tests/benchmarks/bench_training.py --compile           with the compiler, minutes more
    python tests/benchmarks/bench_training.py --steps 3 --rounds 2    quicker, noisier

Builds the library's own Trainer (same network, data and batch, FID off; on a GPU in fp16, too) and
exercise3_train.py's training step in several ways, each in a process of its own, so that none
inherits another's settings or memory. They take turns, so that whatever else the machine does falls
on all. The figure of a variant is the median over the rounds; the ratio is taken within each round
first. Prints a table, and writes this machine's entry in
training_results/reference/bench_training.json, the slowest machine first.
"""

import contextlib
import ctypes
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from bench_sampling import ROOT, keep, timed
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

import exercise3_train as exercise3
from ddpm_basics import training
from ddpm_basics.console import new_parser
from ddpm_basics.hardware import describe, pick_device, pick_precision
from ddpm_basics.model import LabelledUnet, build_diffusion
from ddpm_basics.options import DEVICES
from ddpm_basics.weight_files import LIBRARY_VERSION


class Variant(NamedTuple):
    """One way to train."""

    precision: str
    is_stock: bool = False
    compiled: bool = False
    keeps_memory: bool = True  # that was freed


def stock_variant(args, variant, folder):
    """The library's Trainer; returns a function that trains so many steps."""
    unet = Unet(dim=args.dim, dim_mults=tuple(args.dim_mults), channels=3, flash_attn=False)
    diffusion = GaussianDiffusion(unet, image_size=args.image_size, timesteps=1000,
                                  objective="pred_v", beta_schedule="sigmoid")  # fmt: skip
    trainer = Trainer(
        diffusion, str(args.data), train_batch_size=args.batch_size, train_lr=2e-4,
        train_num_steps=0, save_and_sample_every=10**9, results_folder=str(folder),
        amp=variant.precision != "fp32", mixed_precision_type=variant.precision,
        calculate_fid=False,
    )  # fmt: skip

    def run(steps):
        trainer.train_num_steps = trainer.step + steps
        trainer.train()

    return run


def our_variant(args, variant, folder):
    """Our training step; returns the same kind of function."""
    network = ["--image-size", args.image_size, "--dim", args.dim, "--dim-mults", *args.dim_mults]
    argv = ["--train", "--data", args.data, *network, "--batch-size", args.batch_size,
            "--results-dir", folder, "--precision", variant.precision]  # fmt: skip
    taken = []
    exercise3.train = taken.append  # the options as the exercise reads them
    assert exercise3.main([*map(str, argv)]) == 0
    exercise3.data.read_heldout = lambda *_: None  # not part of what is timed
    if not variant.keeps_memory:
        exercise3.keep_freed_memory = lambda: None
    state = exercise3.start(taken[0], Accelerator(cpu=pick_device(args.device).type == "cpu"))
    network = LabelledUnet(state.diffusion)
    if variant.compiled:
        rows = slice(0, args.batch_size)
        assert training.compile_checked(
            network, lambda: exercise3.loss_of_rows(state, network, state.numbers(1), rows), print
        )
    network = state.accelerator.prepare_model(network)

    def run(steps):
        losses = []
        for _ in range(steps):
            state.step += 1
            losses.append(exercise3.train_step(state, network, state.step))
        torch.stack(losses).tolist()

    return run


def peak_memory(device):
    """Bytes: of GPU memory where there is a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(pipe, args, variant):
    """What the process of one variant does: take so many steps whenever it is told a number.

    Answers each number with (seconds per step, peak memory so far). Before a turn is a step that is
    not timed; after it memory goes back to the system, where the C library can: the variants
    together would not fit into a small machine.
    """
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        run = (stock_variant if variant.is_stock else our_variant)(args, variant, folder)
        with contextlib.suppress(EOFError):  # the other side is done
            while steps := pipe.recv():
                run(1)
                seconds = timed(lambda: run(steps), device)
                pipe.send((seconds / steps, peak_memory(device)))
                with contextlib.suppress(AttributeError, OSError, TypeError):
                    ctypes.CDLL(None).malloc_trim(0)


def start_variant(args, variant):
    """Start a variant in a process of its own; returns it, and the pipe to tell it numbers by."""
    processes = multiprocessing.get_context("spawn")
    pipe, theirs = processes.Pipe()
    process = processes.Process(target=work, args=(theirs, args, variant))
    process.start()
    theirs.close()  # so that recv() fails, and does not wait, should the process die
    return process, pipe


def take(variant, steps):
    """Have a variant take steps; returns (seconds per step, peak memory in bytes)."""
    _, pipe = variant
    pipe.send(steps)
    return pipe.recv()


def take_turns(args, planned):
    """Time all variants.

    Returns dictionaries: by name, the seconds until the end of the warm-up, the seconds per step
    of each round, and the peak memory in bytes.
    """
    variants, warm_up, seconds, memory = {}, {}, {}, {}
    try:
        for name, variant in planned.items():
            variants[name] = start_variant(args, variant)
            started = time.perf_counter()
            try:
                take(variants[name], args.warm_up)
            except (EOFError, ConnectionError):
                if not variant.compiled:  # a compiler may fail, and has said why
                    raise
                print(f"{name}: left out", flush=True)
                del variants[name]
                continue
            warm_up[name] = time.perf_counter() - started
            print(f"{name}: start and warm-up took {warm_up[name]:.1f} s", flush=True)
        for number in range(args.rounds):
            for name, variant in variants.items():
                took, memory[name] = take(variant, args.steps)
                seconds.setdefault(name, []).append(took)
            latest = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items())
            print(f"round {number + 1} of {args.rounds}: {latest}", flush=True)
    finally:
        for process, pipe in variants.values():
            pipe.close()  # where it would wait for the next number, it stops
            process.join()
    return warm_up, seconds, memory


def plan(args, device):
    """{name: variant} of what is timed on a device."""
    network = build_diffusion(args.dim, args.dim_mults, image_size=args.image_size)
    best = pick_precision("auto", device, network)
    planned = {"stock": Variant("fp32", is_stock=True)}
    if device.type == "cuda":
        planned["stock, fp16"] = Variant("fp16", is_stock=True)
    if sys.platform.startswith("linux") and device.type == "cpu":
        planned["ours, fp32, freed memory given back"] = Variant("fp32", keeps_memory=False)
    for precision in dict.fromkeys(["fp32", best] if device.type == "cpu" else [best]):
        planned[f"ours, {precision}"] = Variant(precision)
    if args.compile:
        planned[f"ours, {best}, compiled"] = Variant(best, compiled=True)
    return planned


def measure(args):
    """Time all variants in turn; returns what goes into the JSON file."""
    device = pick_device(args.device)
    warm_up, seconds, memory = take_turns(args, plan(args, device))
    variants = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        ratios = [a / b for a, b in zip(seconds["stock"], values, strict=True)]
        variants[name] = {
            "seconds_per_step": median, "images_per_second": args.batch_size / median,
            "times_stock": statistics.median(ratios),
            "times_stock_range": [min(ratios), max(ratios)],
            "start_and_warm_up_seconds": warm_up[name], "peak_memory_bytes": memory[name],
        }  # fmt: skip
    return {
        "hardware": describe(device), "torch": str(torch.__version__), "library": LIBRARY_VERSION,
        "network": f"dim {args.dim}, multipliers {args.dim_mults}, {args.image_size} pixels",
        "batch_size": args.batch_size, "steps_per_round": args.steps, "rounds": args.rounds,
        "variants": variants,
    }  # fmt: skip


def speed(record):
    """Images a second of the fastest variant."""
    return max(row["images_per_second"] for row in record["variants"].values())


def main():
    """Measure, print the table, write the file."""
    parser = new_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default="african_fabric_processed", help="training images")
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--image-size", type=int, default=64, help="pixels")
    add("--dim", type=int, default=64, help="channels of the U-Net")
    add("--dim-mults", type=int, nargs="+", default=[1, 2, 4, 8], help="its multipliers")
    add("--steps", type=int, default=10, help="steps per variant and round")
    add("--warm-up", type=int, default=1, help="steps before the first round")
    add("--rounds", type=int, default=3, help="turns that each variant takes")
    add("--compile", action="store_true", help="time a compiled variant, too")
    default = ROOT / "training_results" / "reference" / "bench_training.json"
    add("--output", type=Path, default=default, help="file to write")
    args = parser.parse_args()
    result = measure(args)
    print(f"\n{result['hardware']}, torch {result['torch']}, batch {result['batch_size']}")
    print(f"{'variant':<40}{'s/step':>9}{'images/s':>10}{'x stock':>9}{'GB':>7}")
    for name, row in result["variants"].items():
        print(f"{name:<40}{row['seconds_per_step']:>9.3f}{row['images_per_second']:>10.1f}"
              f"{row['times_stock']:>9.2f}{row['peak_memory_bytes'] / 1e9:>7.1f}")  # fmt: skip
    keep(args.output, result, speed)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    sys.exit(main())
