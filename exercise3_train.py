# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.5",
#     "torchvision>=0.20",
#     "denoising-diffusion-pytorch>=2.2.0,<3",
#     "ema-pytorch>=0.7",
#     "accelerate>=1.0",
#     "matplotlib>=3.8",
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "tqdm>=4.66.1",
# ]
# ///
"""Exercise 3 (create): train a denoising diffusion model on African fabrics from scratch.

    python exercise3_train.py --verify            look at the data before you train on it
    python exercise3_train.py --train --quick     coffee break: a small network, two CPU cores
    python exercise3_train.py --train             the real one: 35.7M parameters, 100,000 steps
    python exercise3_train.py --train --resume    go on after Ctrl-C, a crash or a power cut
    accelerate launch exercise3_train.py --train  the same run, shared by several GPUs

One training step is Algorithm 1 of Ho et al. (2020, arXiv 2006.11239): take clean images x_0,
draw a timestep t and noise epsilon for each, mix them to x_t, and let the U-Net guess epsilon.
Everything random about step k follows from (seed, k, position in the batch) alone, so a run that
was interrupted and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion
from ema_pytorch import EMA
from PIL import Image
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, duration, number
from ddpm_basics.figures import plot_losses
from ddpm_basics.hardware import is_out_of_memory, keep_freed_memory, pick_device, pick_precision
from ddpm_basics.images import (
    MIN_IMAGES,
    data_checksum,
    decode_image,
    find_images,
    load_images,
    save_grid,
)
from ddpm_basics.model import build_diffusion, export_weights, exported_step, load_initial_weights
from ddpm_basics.runs import (
    Clock,
    Run,
    StopRequest,
    add_fixed_losses,
    append_losses,
    list_checkpoints,
    look_at_losses,
    make_row,
    print_banner,
    resume,
    save_and_leave,
    save_checkpoint,
    stop_agreed,
    trim_losses,
    write_run_file,
)
from ddpm_basics.sampling import sample_dpmpp, starting_noise
from ddpm_basics.training import (
    BINS,
    FIXED_IMAGES,
    TIMESTEPS,
    Drawer,
    autocast,
    draw_numbers,
    learning_rate,
    spread,
    thrifty_norms,
    weight_by_min_snr,
    weight_by_snr_plus_one,
)

# ---------------------------------------------------------------------------------------------
# Settings. Each is the default of the command-line option of the same name.
# ---------------------------------------------------------------------------------------------
DATA = "african_fabric_processed"  # folder of training images, subfolders included
RESULTS_DIR = "training_results"  # checkpoints, samples, losses.csv
WEIGHTS_OUT = "models/ddpm_african_fabrics.pt"  # EMA weights at the end of the run
RANDOM_SEED = 42  # decides initial weights, data order, t and noise
IMAGE_SIZE = 64  # pixels, both sides
BATCH_SIZE = 32  # images per forward and backward pass, all processes together
GRADIENT_ACCUMULATE = 1  # passes per optimizer step; effective batch = BATCH_SIZE x this
LEARNING_RATE = 2e-4  # Adam's step size
TRAIN_STEPS = 100_000  # optimizer steps
SAVE_EVERY = 1000  # steps between checkpoints, sample grids and held-out losses
LOG_EVERY = 50  # steps between rows of losses.csv and looks at the loss
SAMPLING_STEPS = 15  # of DPM-Solver++, for the progress samples
MIN_SIGNAL = 0.03  # alpha_t below which they are drawn without asking the network

# What the module keeps fixed; --quick and the tests use smaller networks.
DIM = 64  # channels at full resolution
DIM_MULTS = (1, 2, 4, 8)  # channel multipliers, one per resolution
ADAM_BETAS = (0.9, 0.99)  # the library's choice: a shorter memory for the second moment
MAX_GRADIENT_NORM = 1.0  # gradients are scaled down to this L2 norm
EMA_DECAY = 0.9999  # upper bound; the average warms up as 1 - step^(-2/3)
NUM_SAMPLES = 16  # images in a progress grid

# --quick: these settings instead, and output paths of its own. Many small steps of a narrow network
# that predicts v (Salimans & Ho 2022). Side by side, in the same time, multipliers of 1-2-4-8 got
# fewer steps done and made murkier fabrics.
QUICK = {
    "dim": 32,
    "dim_mults": (1, 2, 2, 4),
    "image_size": 32,
    "batch_size": 8,
    "objective": "pred_v",
    "min_snr": True,
    "snr_plus_one": True,
    "lr": 1e-3,
    "lr_final": 5e-5,
    "warmup_steps": 50,
    "steps": 3000,
    "compile": "off",  # it would take longer than it saves
    "save_every": 500,
    "results_dir": "training_results/quick",
    "weights_out": "training_results/quick/ddpm_quick.pt",
}


# Compiling pays only in long runs: `--compile auto` compares the seconds it takes with the share of
# the time that it saves. tests/benchmarks/bench_training.py measured two CPU cores (bf16, 4 %); the
# figures of GPUs are estimates.
COMPILE_SECONDS = {"cpu": 120, "cuda": 120}
COMPILE_GAIN = {"cpu": 0.04, "cuda": 0.15}


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; --quick changes the defaults, not what was typed."""
    count, positive = number(int, 1, "a whole number from 1"), number(float, 1e-12, "above zero")
    parser = argparse.ArgumentParser(
        description="Train a denoising diffusion model on African fabrics.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--verify", action="store_true", help="check the data, draw nine images")
    what.add_argument("--train", action="store_true", help="train the network")
    add("--data", type=Path, default=DATA, help="folder of images, subfolders included")
    add("--heldout", type=Path, default=None,
        help="folder of images that are never trained on, for the held-out loss "
        "(rendered fabrics bring their own)")  # fmt: skip
    add("--results-dir", type=Path, default=RESULTS_DIR, help="checkpoints, samples, losses.csv")
    add("--steps", type=count, default=TRAIN_STEPS, help="optimizer steps in all")
    add("--batch-size", type=count, default=BATCH_SIZE, help="images per pass, all processes")
    add("--gradient-accumulate", type=count, default=GRADIENT_ACCUMULATE, help="passes per step")
    add("--lr", type=positive, default=LEARNING_RATE, help="learning rate of Adam")
    add("--lr-final", type=positive, default=None, help="cosine decay to this; constant if none")
    add("--warmup-steps", type=number(int, 0, "a whole number from 0"), default=0,
        help="steps in which the learning rate rises")  # fmt: skip
    add("--schedule", choices=["sigmoid", "linear", "cosine"], default="sigmoid", help="of noise")
    add("--objective", choices=["pred_noise", "pred_v", "pred_x0"], default="pred_noise",
        help="what the network predicts")  # fmt: skip
    add("--min-snr", action="store_true", help="weight the loss by min(SNR, 5) / SNR")
    add(
        "--snr-plus-one",
        action="store_true",
        help="weight the loss by 1 + 1/SNR: layout and colour settle sooner in short runs",
    )
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of the network; auto takes bf16 where the hardware has it")  # fmt: skip
    add("--compile", choices=["auto", "on", "off"], default="auto",
        help="torch.compile; auto: only when the run is long enough to earn it back")  # fmt: skip
    add("--save-every", type=count, default=SAVE_EVERY, help="steps between checkpoints")
    add("--log-every", type=count, default=LOG_EVERY, help="steps between rows of losses.csv")
    add("--keep", type=number(int, 2, "a whole number from 2 (the newest may be half-written)"),
        default=2, help="checkpoints to keep, 0.57 GB each")  # fmt: skip
    add("--resume", action="store_true", help="go on from the newest good checkpoint")
    add("--init-weights", type=Path, default=None, help="start from the EMA weights in this file")
    add("--weights-out", type=Path, default=WEIGHTS_OUT, help="EMA weights at the end")
    add("--quick", action="store_true", help="a small network at 32x32, minutes on two CPU cores")
    add("--image-size", type=count, default=IMAGE_SIZE, help="pixels, both sides")
    add("--dim", type=count, default=DIM, help="channels of the U-Net at full resolution")
    add("--dim-mults", type=count, nargs="+", default=DIM_MULTS, help="its channel multipliers")
    add("--seed", type=number(int, 0, "a whole number from 0"), default=RANDOM_SEED,
        help="of weights, data order and noise")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="to compute on")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    args.results_dir, args.weights_out = Path(args.results_dir), Path(args.weights_out)
    args.data = Path(args.data)
    factor = 2 ** (len(args.dim_mults) - 1)
    if args.image_size % factor:
        parser.error(f"--image-size must be a multiple of {factor}: the U-Net halves it "
                     f"{len(args.dim_mults) - 1} times")  # fmt: skip
    if args.dim % 4:
        parser.error("--dim must be a multiple of 4")
    return args


# ---------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------
def run_prepare_fabrics(*options: str) -> None:
    """Start the program that renders the fabrics. Raises UserError when it fails."""
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ddpm_basics.fabrics", *options]
    if subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode != 0:
        raise UserError("The fabrics could not be rendered; the message stands above.")


def provide_data(folder: Path) -> None:
    """Render the training fabrics if the default folder is asked for and is not complete."""
    if folder != Path(DATA):
        return
    if not folder.exists():
        print(f"{folder} does not exist yet: rendering the fabrics first.", flush=True)
    elif read_manifest(folder, ["sha256"]) != {"sha256": None}:
        return  # complete, or images of the user's own
    else:
        print(f"{folder} is only half rendered: rendering the rest first.", flush=True)
    run_prepare_fabrics("--output", str(folder))


def read_manifest(folder: Path, keys=("version", "seed", "split")) -> dict:
    """What ddpm_basics.fabrics noted about a folder; empty for anybody else's images."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return {key: manifest[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def provide_heldout(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """The folder of held-out images: the user's, or freshly rendered, or None.

    Only the rendered fabrics have an endless supply of images that the network never sees; for
    photographs the user has to name some with --heldout, or the held-out columns stay empty.
    """
    if args.heldout:
        return args.heldout
    if read_manifest(args.data).get("split") != "train":
        return None
    folder = args.results_dir / "heldout_fabrics"
    if accelerator.is_main_process:
        options = ["--split", "heldout", "--count", str(FIXED_IMAGES), "--output", str(folder)]
        run_prepare_fabrics(*options)
    accelerator.wait_for_everyone()
    return folder


# ---------------------------------------------------------------------------------------------
# --verify
# ---------------------------------------------------------------------------------------------
def verify(args: argparse.Namespace) -> None:
    """Decode every image, report what is there, and write a grid of nine.

    Raises UserError when files are broken or too few images are left.
    """
    started = time.perf_counter()
    provide_data(args.data)
    paths, ignored = find_images(args.data)
    sizes, modes, folders, tiny, broken = {}, {}, {}, [], []
    for path in tqdm(paths, desc="Decoding", unit="image", delay=1):
        try:
            with Image.open(path) as opened:
                size, mode = opened.size, opened.mode
            decode_image(path)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            broken.append((path, "empty file" if path.stat().st_size == 0 else str(error)))
            continue
        sizes[size] = sizes.get(size, 0) + 1
        modes[mode] = modes.get(mode, 0) + 1
        label = path.relative_to(args.data).parent.as_posix()
        folders[label] = folders.get(label, 0) + 1
        if min(size) < args.image_size:
            tiny.append((path, f"only {size[0]}x{size[1]}"))

    print(f"Data folder   {args.data}")
    print("Sizes         " + ", ".join(f"{w}x{h}: {n}" for (w, h), n in sorted(sizes.items())))
    print("Modes         " + ", ".join(f"{mode}: {n}" for mode, n in sorted(modes.items())))
    for label, count in sorted(folders.items()):
        print(f"  {label:<24}{count:>6}")
    foreign = [path for path in ignored if path != args.data / "manifest.json"]
    report_files("Ignored, not an image", [(path, "") for path in foreign])
    report_files("Smaller than the network's images", tiny)
    report_files("BROKEN", broken)

    good = len(paths) - len(broken)
    if good < MIN_IMAGES:
        raise UserError(
            f"{args.data} holds {good} readable images, and training needs at least {MIN_IMAGES}."
        )
    bad = {path for path, _ in broken}
    write_training_grid([path for path in paths if path not in bad], args)
    print(f"Wrote training_samples_grid.png in {time.perf_counter() - started:.1f} s")
    if broken:
        raise UserError(
            f"{len(broken)} of {len(paths)} image files are broken, named above; "
            "remove or replace them before training."
        )
    print(f"Found {good} images in dataset")


def report_files(heading: str, rows: list[tuple[Path, str]]) -> None:
    """Print file names with a remark each; says nothing when there are none."""
    if rows:
        print(f"{heading}: {len(rows)}")
    for path, remark in rows[:20]:
        print(f"  {path}" + (f" ({remark})" if remark else ""))
    if len(rows) > 20:
        print(f"  ... and {len(rows) - 20} more")


def write_training_grid(paths: list[Path], args: argparse.Namespace) -> None:
    """Nine images, evenly spread over the sorted folder so that every tradition has a chance."""
    # Stepping by a little more than a ninth visits different folders and different numbers.
    chosen = [paths[int((i + 0.5) * len(paths) / 9)] for i in range(9)]
    arrays = np.stack([np.asarray(decode_image(path, args.image_size)) for path in chosen])
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    save_grid(images, Path("training_samples_grid.png"), f"9 of {len(paths)} training images")


# ---------------------------------------------------------------------------------------------
# One training step
# ---------------------------------------------------------------------------------------------
def make_batch(images: torch.Tensor, numbers: tuple[np.ndarray, ...]):
    """The examples that `numbers` (of draw_numbers) stand for.

    `images` is the uint8 data set (N, 3, H, W) on the training device. Returns x_0 in [-1, 1]
    (n, 3, H, W), t in 0..T-1 (n,), noise (n, 3, H, W), all on the same device. Nothing here
    waits for the device: a GPU may still work on the batch before.
    """

    def to_device(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if images.is_cuda:
            return tensor.pin_memory().to(images.device, non_blocking=True)
        return tensor.to(images.device)

    index, flip, t, noise = map(to_device, numbers)
    chosen = images[index]
    chosen = torch.where(flip[:, None, None, None], chosen.flip(-1), chosen)
    x_0 = chosen.float() / 127.5 - 1
    return (
        x_0.contiguous(memory_format=torch.channels_last),
        t,
        noise.contiguous(memory_format=torch.channels_last),
    )


def denoising_loss(
    diffusion: GaussianDiffusion,
    network: torch.nn.Module,
    x_0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The simple loss of Ho et al. (2020), equation 14, one value per image, shape (n,).

    `network` is diffusion.model, possibly wrapped for several processes. Equal to the library's
    `GaussianDiffusion.p_losses`, with the weights of its objective and of min-SNR applied.
    """
    x_t = diffusion.q_sample(x_0, t, noise)  # equation 4: any t in one step
    predicted = network(x_t, t)
    if diffusion.objective == "pred_noise":
        target = noise
    elif diffusion.objective == "pred_x0":
        target = x_0
    else:  # pred_v, Salimans & Ho 2022
        target = diffusion.predict_v(x_0, t, noise)
    squared_error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
    weight = diffusion.loss_weight[t]
    if hasattr(diffusion, "noisy_weight"):
        weight = weight * diffusion.noisy_weight[t]
    return squared_error * weight


def train_step(run: Run, step: int) -> torch.Tensor:
    """One optimizer step; returns this process' mean loss, still on the device.

    Each process works on its own positions of each micro-batch, and the sum of all gradients is
    divided by the effective batch: neither the split over processes nor the accumulation shows.
    """
    args, accelerator = run.args, run.accelerator
    effective = args.batch_size * args.gradient_accumulate
    total = torch.zeros((), device=run.device)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, args)
    for micro in range(args.gradient_accumulate):
        x_0, t, noise = make_batch(run.images, run.drawer.take(step, micro))
        is_last = micro == args.gradient_accumulate - 1
        # Gradients of several processes are averaged once per step, not once per micro-batch.
        with nullcontext() if is_last else accelerator.no_sync(run.network):
            with autocast(run):
                losses = denoising_loss(run.diffusion, run.network, x_0, t, noise)
            loss = losses.sum() * accelerator.num_processes / effective
            run.scaler.scale(loss).backward()
        total += loss.detach()
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.diffusion.model.parameters(), MAX_GRADIENT_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update()
    return total


# ---------------------------------------------------------------------------------------------
# What a run consists of
# ---------------------------------------------------------------------------------------------
def start_run(args: argparse.Namespace) -> Run:
    """Read the data, build network, optimizer and EMA, on the device that was asked for."""
    device = pick_device(args.device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    check_split(args, accelerator.num_processes)
    with accelerator.main_process_first():
        provide_data(args.data)
        images, digests = load_images(args.data, args.image_size)
    heldout_folder = provide_heldout(args, accelerator)
    heldout = None
    if heldout_folder is not None:
        images_unseen, _ = load_images(heldout_folder, args.image_size, at_least=BINS)
        heldout = spread(images_unseen).to(accelerator.device)

    torch.manual_seed(args.seed)  # the initial weights
    diffusion = build_diffusion(
        dim=args.dim,
        dim_mults=tuple(args.dim_mults),
        image_size=args.image_size,
        timesteps=TIMESTEPS,
        objective=args.objective,
        beta_schedule=args.schedule,
    )
    if args.min_snr:
        weight_by_min_snr(diffusion)
    if args.snr_plus_one:
        weight_by_snr_plus_one(diffusion)
    if args.init_weights:
        load_initial_weights(diffusion, args.init_weights)
    thrifty_norms(diffusion.model)
    keep_freed_memory()
    diffusion.to(accelerator.device, memory_format=torch.channels_last)
    precision = pick_precision(args.precision, accelerator.device)
    optimizer = torch.optim.Adam(
        diffusion.model.parameters(),
        lr=args.lr,
        betas=ADAM_BETAS,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    # The wrapper's two counters stay on the CPU, so that updating never waits for a GPU.
    ema = EMA(diffusion, beta=EMA_DECAY, update_every=1, use_foreach=True)
    return Run(
        args=args,
        accelerator=accelerator,
        device=accelerator.device,
        precision=precision,
        diffusion=diffusion,
        network=diffusion.model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=precision == torch.float16),
        ema=ema,
        images=images.to(accelerator.device),
        drawer=Drawer(args, images.shape, accelerator.process_index, accelerator.num_processes),
        digests=digests,
        heldout=heldout,
        config=describe_run(args, digests),
    )


def check_split(args: argparse.Namespace, num_processes: int) -> None:
    """Refuse a batch that the processes cannot share equally."""
    if args.batch_size % num_processes:
        raise UserError(
            f"--batch-size {args.batch_size} cannot be shared equally by {num_processes} "
            "processes; choose a multiple."
        )


def describe_run(args: argparse.Namespace, digests: dict[str, str]) -> dict:
    """What a checkpoint says about the run it belongs to: plain numbers and strings only."""
    return {
        "network": {"dim": args.dim, "dim_mults": list(args.dim_mults), "channels": 3},
        "process": {
            "image_size": args.image_size,
            "timesteps": TIMESTEPS,
            "objective": args.objective,
            "beta_schedule": args.schedule,
        },
        "data": {
            "images": len(digests),
            "checksum": data_checksum(digests),
            **{f"fabrics_{key}": value for key, value in read_manifest(args.data).items()},
        },
        "training": {
            "effective_batch": args.batch_size * args.gradient_accumulate,
            "min_snr": args.min_snr,
            "snr_plus_one": args.snr_plus_one,
            "seed": args.seed,
            "lr": args.lr,
            "lr_final": args.lr_final,
            "warmup_steps": args.warmup_steps,
            "steps": args.steps,
            "initial_weights": str(args.init_weights.name) if args.init_weights else None,
        },
    }


# ---------------------------------------------------------------------------------------------
# Fixed losses: is it learning the fabrics, or these 1,059 images?
# ---------------------------------------------------------------------------------------------
# ---------------------------------------------------------------------------------------------
# Checkpoints: a whole file or none
# ---------------------------------------------------------------------------------------------
# ---------------------------------------------------------------------------------------------
# losses.csv and the curve
# ---------------------------------------------------------------------------------------------
# ---------------------------------------------------------------------------------------------
# --train
# ---------------------------------------------------------------------------------------------
def train(args: argparse.Namespace) -> None:
    """Train, log, sample and save until the last step, a signal, or trouble."""
    check_outputs(args)
    run = start_run(args)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    if args.resume:
        resume(run)
    if run.step >= args.steps:
        finish(run, already=True)
        return
    if run.accelerator.is_main_process:
        for stale in args.results_dir.glob(".*.tmp"):  # left by a process that was killed
            stale.unlink()
        trim_losses(args.results_dir / "losses.csv", run.step)
        write_run_file(run)
    stop = StopRequest(shared=run.accelerator.num_processes > 1)
    prepare_network(run)
    stop.install()
    training_loop(run, stop)
    finish(run)


def training_loop(run: Run, stop: StopRequest) -> None:
    """Steps from run.step + 1 to args.steps; between them whatever is due."""
    args = run.args
    bar = tqdm(
        initial=run.step,
        total=args.steps,
        unit="step",
        desc="Training",
        disable=not run.accelerator.is_main_process,
    )
    clock = Clock(run)
    with bar:
        while run.step < args.steps:
            run.pending.append(train_step(run, run.step + 1))
            run.step += 1
            bar.update()
            saving = run.step % args.save_every == 0 or run.step == args.steps
            logging = run.step % args.log_every == 0 or saving
            if logging or run.device.type == "cpu":
                look_at_losses(run, bar, clock)  # the only place that waits for a GPU
            stopping = stop_agreed(run, stop, logging)
            row = make_row(run, clock) if logging else None
            if saving:
                row = add_fixed_losses(run, row)
            if row and run.accelerator.is_main_process:
                append_losses(args.results_dir / "losses.csv", row)
            clock.pause()
            if saving:
                save_progress(run)
            if stopping:
                save_and_leave(run, stop, bar)
            clock.resume()


def save_progress(run: Run) -> None:
    """Checkpoint, sample grid, loss curve: by the main process, while the others wait."""
    if run.accelerator.is_main_process:
        save_checkpoint(run)
        write_run_file(run)
        save_samples(run)
        folder = run.args.results_dir
        plot_losses(folder / "losses.csv", folder / "loss_curve.png")
        gc.collect()  # closed figures refer to themselves in circles and would pile up for long
    run.accelerator.wait_for_everyone()


def save_samples(run: Run) -> None:
    """sample-STEP.png: what the EMA network makes of the same noise at every save."""
    size = run.args.image_size
    model = run.ema.ema_model.eval()
    x_T, _ = starting_noise(range(run.args.seed, run.args.seed + NUM_SAMPLES), (3, size, size))
    x_T = x_T.to(run.device, memory_format=torch.channels_last)
    images = sample_dpmpp(
        model, x_T, SAMPLING_STEPS, precision=run.precision, min_signal=MIN_SIGNAL
    )
    path = run.args.results_dir / f"sample-{run.step}.png"
    save_grid(images.cpu(), path, f"Step {run.step:,}")


def prepare_network(run: Run) -> None:
    """Time the network, decide on compilation, share it between processes, print the banner."""
    per_image = time_per_image(run)
    effective = run.config["training"]["effective_batch"]
    per_step = per_image * effective / run.accelerator.num_processes
    remaining = per_step * (run.args.steps - run.step)
    kind, why = run.device.type, ""
    gain = COMPILE_GAIN.get(kind, 0)
    run.compiled = run.args.compile == "on"
    if run.args.compile == "auto":
        cost = COMPILE_SECONDS.get(kind, math.inf)
        has_compiler = kind == "cuda" or any(map(shutil.which, ("g++", "c++", "clang++")))
        run.compiled = has_compiler and remaining * gain > 2 * cost
        why = " (auto: the run is long enough)" if run.compiled else " (auto: would not pay here)"
    if run.compiled:
        # On a GPU with CUDA graphs: 600 small kernels are then started by one call.
        run.diffusion.model.compile(mode="reduce-overhead" if kind == "cuda" else "default")
        remaining *= 1 - gain
    run.network = run.accelerator.prepare_model(run.diffusion.model)
    if run.accelerator.is_main_process:
        print_banner(run, remaining, ("on" if run.compiled else "off") + why)


def time_per_image(run: Run) -> float:
    """Seconds of one forward and backward pass per image, measured on a small batch."""
    count = min(4 if run.device.type == "cpu" else 32, run.args.batch_size)
    numbers = draw_numbers(run.args.seed, 1, range(count), count, TIMESTEPS, run.images.shape)
    batch = make_batch(run.images, numbers)
    for _ in range(2):  # the first time is slower: memory is taken, kernels are chosen
        started = time.perf_counter()
        with autocast(run):
            loss = denoising_loss(run.diffusion, run.diffusion.model, *batch).mean()
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - started
    run.optimizer.zero_grad(set_to_none=True)
    return seconds / count


def finish(run: Run, already: bool = False) -> None:
    """Export the EMA weights, unless exactly these stand there already, and say what was made."""
    if not run.accelerator.is_main_process:
        return
    out = run.args.weights_out
    if already and exported_step(out, run.config) == run.step:
        print(f"This run is finished: {run.step:,} steps are done and {out} is written. Use a "
              "larger --steps to train on.")  # fmt: skip
        return
    previous = export_weights(run, out)
    if previous:
        print(f"The weights that were at {out} are now {previous}")
    print(
        f"Wrote {out} (EMA weights of step {run.step:,}), samples, losses.csv and loss_curve.png "
        f"in {run.args.results_dir}; training took {duration(run.seconds)}. Draw new fabrics "
        f"with: python exercise1_generate.py --weights {out}"
    )


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse before the first step what would only fail, or destroy something, after hours."""
    if args.results_dir.exists() and not args.results_dir.is_dir():
        raise UserError(f"--results-dir {args.results_dir} is a file; name a folder.")
    if args.weights_out.is_dir():
        raise UserError(f"--weights-out {args.weights_out} is a folder; name a .pt file.")
    kept = [p for p in (args.results_dir / "losses.csv", *list_checkpoints(args.results_dir))
            if p.exists()]  # fmt: skip
    if kept and not args.resume:
        raise UserError(
            f"{args.results_dir} holds another run ({kept[-1].name}): go on with it with --resume, "
            "or name another folder with --results-dir."
        )
    for folder in (args.results_dir, args.weights_out.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".write-test.{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"Cannot write into {folder} ({error.strerror}).") from None


# ---------------------------------------------------------------------------------------------
# Samples on the way: how noise becomes an image is the subject of exercise 1
# ---------------------------------------------------------------------------------------------
# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------
def out_of_memory_message(args: argparse.Namespace) -> str:
    """What to type instead: half the batch, twice the accumulation, and the same run."""
    if args.batch_size == 1:
        return "Out of memory with a single image per pass; use --image-size 32, or --quick."
    half = args.batch_size // 2
    twice = args.gradient_accumulate * args.batch_size // half
    return (
        f"Out of memory; use --batch-size {half} --gradient-accumulate {twice} instead of "
        f"--batch-size {args.batch_size} --gradient-accumulate {args.gradient_accumulate} "
        "(with --resume, if checkpoints were written)."
    )


def main() -> int:
    """Run one command; turn every foreseeable trouble into a sentence and an exit code."""
    args = parse_options()
    try:
        verify(args) if args.verify else train(args)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; everything saved before is intact.", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"Error: {where}{error.strerror or error}.", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"Error: {out_of_memory_message(args)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
