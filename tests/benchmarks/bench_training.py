"""Training speed against the stock library, both timed in turn in one run.

    python tests/benchmarks/bench_training.py                     the real network, batch 32
    python tests/benchmarks/bench_training.py --steps 3 --rounds 2    quicker, noisier

Builds the library's own Trainer (same network, data and batch; mixed precision on a GPU, FID off)
and exercise3_train.py's training step, each in a process of its own, so that neither inherits the
other's settings or memory. They take turns, so that whatever else the machine does falls on all.
The figure of a variant is the median over the rounds; the ratio is taken within each round first.
Writes training_results/reference/bench_training.json and prints a table.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

from ddpm_basics.hardware import device_name, pick_device, pick_precision

ROOT = Path(__file__).resolve().parents[2]
FLOP_PER_IMAGE = 44e9  # forward and backward of one 64x64 image through the 35.7M U-Net


def load_exercise3():
    """Import exercise3_train.py by its path."""
    spec = importlib.util.spec_from_file_location("exercise3_train", ROOT / "exercise3_train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["exercise3_train"] = module
    spec.loader.exec_module(module)
    return module


def synchronize(device):
    """Wait until a GPU has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def stock_variant(args, device, folder):
    """The library's Trainer; returns a function that trains so many steps."""
    unet = Unet(dim=args.dim, dim_mults=tuple(args.dim_mults), channels=3, flash_attn=False)
    diffusion = GaussianDiffusion(unet, image_size=args.image_size, timesteps=1000,
                                  objective="pred_noise", beta_schedule="sigmoid")  # fmt: skip
    trainer = Trainer(
        diffusion,
        str(args.data),
        train_batch_size=args.batch_size,
        train_lr=2e-4,
        train_num_steps=0,
        save_and_sample_every=10**9,
        results_folder=str(folder),
        amp=device.type == "cuda",
        mixed_precision_type="bf16",
        calculate_fid=False,
    )

    def run(steps):
        trainer.train_num_steps = trainer.step + steps
        trainer.train()

    return run


def our_variant(ex3, args, device, precision, compiled):
    """Our training step in one precision, eager or compiled; returns the same kind of function."""
    options = ex3.parse_options(
        ["--train", "--data", str(args.data), "--batch-size", str(args.batch_size),
         "--image-size", str(args.image_size), "--dim", str(args.dim), "--device", device.type,
         "--precision", precision, "--dim-mults", *map(str, args.dim_mults)]
    )  # fmt: skip
    options.heldout = None
    ex3.provide_heldout = lambda *_: None  # not part of what is timed
    run_state = ex3.start_run(options)
    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        run_state.diffusion.model.compile(mode=mode)

    def run(steps):
        losses = []
        for _ in range(steps):
            run_state.step += 1
            losses.append(ex3.train_step(run_state, run_state.step))
        torch.stack(losses).tolist()

    return run


def matmul_rate(device, dtype):
    """The machine's own rate of matrix products, FLOP per second, best of twenty."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(20):
        synchronize(device)
        started = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def time_round(run, steps, device):
    """Seconds per step."""
    synchronize(device)
    started = time.perf_counter()
    run(steps)
    synchronize(device)
    return (time.perf_counter() - started) / steps


def peak_memory(device):
    """Bytes: of GPU memory where there is a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(pipe, args, precision, compiled):
    """What the process of one variant does: take so many steps whenever it is told a number.

    precision None means stock. Answers each number with (seconds per step, peak memory so far).
    Before a turn is one more step that is not timed, and after it memory goes back to the system:
    the variants together would not fit into a small machine.
    """
    ex3 = load_exercise3()
    device = pick_device(args.device)
    if precision is None:
        run = stock_variant(args, device, Path(args.scratch))
    else:
        run = our_variant(ex3, args, device, precision, compiled)
    while True:
        try:
            steps = pipe.recv()
        except EOFError:  # the other side is done
            return
        run(1)
        pipe.send((time_round(run, steps, device), peak_memory(device)))
        give_memory_back()


def give_memory_back():
    """Return what is free to the system, where the C library can."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Variant:
    """One variant, waiting in a process of its own."""

    def __init__(self, args, precision=None, compiled=False):
        processes = multiprocessing.get_context("spawn")
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=work, args=(theirs, args, precision, compiled))
        self.process.start()
        theirs.close()  # so that recv() below fails, and does not wait, should the process die

    def take(self, steps):
        """Take steps; returns (seconds per step, peak memory in bytes)."""
        self.pipe.send(steps)
        return self.pipe.recv()

    def close(self):
        """End the process, which stops where it would wait for the next number."""
        self.pipe.close()
        self.process.join()


def plan(args, device, ex3):
    """{name: (precision, whether to compile)} of the variants; precision None is stock."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    best = names[pick_precision("auto", device)]
    found = {"stock": (None, False)}
    for precision in dict.fromkeys(("fp32", best) if device.type == "cpu" else (best,)):
        found[f"ours, {precision}"] = (precision, False)
    if args.compile:
        found[f"ours, {best}, compiled"] = (best, True)
    return found


def take_turns(args, planned, device):
    """Time all variants, and in every round the machine's matrix products as well.

    Returns {name: seconds from the start of its process to the end of its warm-up},
    {name: seconds per step of each round}, {name: peak memory in bytes} and {precision: the best
    rate of matrix products, FLOP per second}.
    """
    variants, warm_up, seconds, memory, rates = {}, {}, {}, {}, {}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    try:
        for name, how in planned.items():
            variants[name] = Variant(args, *how)
            started = time.perf_counter()
            variants[name].take(args.warm_up)
            warm_up[name] = time.perf_counter() - started
            print(f"{name}: start and warm-up took {warm_up[name]:.1f} s", flush=True)
        for number in range(args.rounds):
            for name, variant in variants.items():
                took, memory[name] = variant.take(args.steps)
                seconds.setdefault(name, []).append(took)
            for precision in dict.fromkeys(precision for precision, _ in planned.values()):
                if precision:
                    rate = matmul_rate(device, dtypes[precision])
                    rates[precision] = max(rate, rates.get(precision, 0))
            latest = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items())
            print(f"round {number + 1} of {args.rounds}: {latest}", flush=True)
    finally:
        for variant in variants.values():
            variant.close()
    return warm_up, seconds, memory, rates


def measure(args):
    """Time all variants in turn; returns what goes into the JSON file."""
    ex3 = load_exercise3()
    device = pick_device(args.device)
    planned = plan(args, device, ex3)
    warm_up, seconds, memory, rates = take_turns(args, planned, device)
    return {
        "hardware": device_name(device),
        "torch": str(torch.__version__),
        "library": ex3.LIBRARY_VERSION,
        "network": f"dim {args.dim}, multipliers {args.dim_mults}, {args.image_size}x"
        f"{args.image_size} pixels",
        "batch_size": args.batch_size,
        "steps_per_round": args.steps,
        "rounds": args.rounds,
        "matmul_gflops": {precision: rate / 1e9 for precision, rate in sorted(rates.items())},
        "variants": {
            name: summary(args, values, seconds["stock"], warm_up[name], memory[name])
            | {"share_of_matmul_rate": share(args, values, rates, planned[name][0], device)}
            for name, values in seconds.items()
        },
    }


def summary(args, values, stock, warm_up, memory):
    """The figures of one variant."""
    median = statistics.median(values)
    ratios = [a / b for a, b in zip(stock, values, strict=True)]
    return {
        "seconds_per_step": median,
        "images_per_second": args.batch_size / median,
        "times_stock": statistics.median(ratios),
        "times_stock_range": [min(ratios), max(ratios)],
        "start_and_warm_up_seconds": warm_up,
        "peak_memory_bytes": memory,
    }


def share(args, values, rates, precision, device):
    """The share of the machine's matrix rate that is reached; None for another network."""
    if (args.dim, tuple(args.dim_mults)) != (64, (1, 2, 4, 8)):
        return None
    stock = "fp32" if device.type == "cpu" else next(iter(rates))  # what the Trainer computes in
    flop = FLOP_PER_IMAGE * (args.image_size / 64) ** 2 * args.batch_size
    return flop / statistics.median(values) / rates[precision or stock]


def main():
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default="african_fabric_processed", help="training images")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--image-size", type=int, default=64, help="pixels")
    add("--dim", type=int, default=64, help="channels of the U-Net")
    add("--dim-mults", type=int, nargs="+", default=[1, 2, 4, 8], help="its multipliers")
    add("--steps", type=int, default=10, help="steps per variant and round")
    add("--warm-up", type=int, default=1, help="steps before the first round")
    add("--rounds", type=int, default=3, help="turns that each variant takes")
    add("--compile", action="store_true", help="time a compiled variant, too")
    add("--scratch", default="training_results/bench", help="folder that the Trainer wants")
    default = ROOT / "training_results" / "reference" / "bench_training.json"
    add("--output", type=Path, default=default, help="file to write")
    args = parser.parse_args()
    Path(args.scratch).mkdir(parents=True, exist_ok=True)
    result = measure(args)
    print(f"\n{result['hardware']}, torch {result['torch']}, batch {result['batch_size']}")
    print(f"{'variant':<24}{'s/step':>9}{'images/s':>10}{'x stock':>9}{'of matmul':>11}{'GB':>7}")
    for name, row in result["variants"].items():
        reached = row["share_of_matmul_rate"]
        print(f"{name:<24}{row['seconds_per_step']:>9.3f}{row['images_per_second']:>10.1f}"
              f"{row['times_stock']:>9.2f}{f'{reached:.0%}' if reached else '-':>11}"
              f"{row['peak_memory_bytes'] / 1e9:>7.1f}")  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
