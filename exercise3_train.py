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
#     "numpy>=1.26",
#     "pillow>=10.1",
#     "safetensors>=0.4.3",
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
draw a timestep t and noise epsilon for each, mix them to x_t, and let the U-Net guess what is in
it: by default v, a mixture of both (Salimans & Ho 2022, arXiv 2202.00512).
Everything random about step k follows from (seed, k) alone, so a run that was interrupted and
resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor

from ddpm_basics import checkpoints, data, losses, runs, trackers, training
from ddpm_basics.console import UserError, duration, run_command
from ddpm_basics.hardware import autocast, keep_freed_memory, pick_device, pick_precision
from ddpm_basics.images import save_picture, tile
from ddpm_basics.interrupts import StopRequest
from ddpm_basics.model import LabelledUnet, build_diffusion, label_vectors
from ddpm_basics.options import train_options
from ddpm_basics.runs import Run
from ddpm_basics.sampling import (
    dpmpp_step,
    log_snr_times,
    noise_levels,
    predict_x_0,
    starting_noise,
)

# Settings. Each is the default of the command-line option of the same name.
RANDOM_SEED = 42  # decides initial weights, data order, t and noise
IMAGE_SIZE = 64  # pixels, both sides
BATCH_SIZE = 32  # images per forward and backward pass, all processes together
GRADIENT_ACCUMULATE = 1  # passes per optimizer step; effective batch = BATCH_SIZE x this
LEARNING_RATE = 2e-4  # Adam's step size
TRAIN_STEPS = 100_000  # optimizer steps
SAVE_EVERY = 1000  # steps between checkpoints, sample grids and held-out losses
LOG_EVERY = 10  # steps between rows of losses.csv and looks at the loss
RESULTS_DIR = "training_results"  # checkpoints, samples, losses.csv
WEIGHTS_OUT = "models/ddpm_african_fabrics.pt"  # EMA weights at the end of the run

# The network and its training, as the course has them.
DIM = 64  # channels at full resolution
DIM_MULTS = (1, 2, 4, 8)  # channel multipliers, one per resolution
TIMESTEPS = 1000  # T, length of the diffusion process
ADAM_BETAS = (0.9, 0.99)  # the library's choice: a shorter memory for the second moment
PENALTIES = {  # --loss: what an error of the prediction costs, pixel by pixel
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,  # half the square up to an error of 1; straight beyond (Huber 1964)
}
MAX_GRADIENT_NORM = 1.0  # gradients are scaled down to this L2 norm
EMA_DECAY = 0.9999  # upper bound of 1 - step^(-2/3), reached after a million steps
NUM_SAMPLES = 16  # images in a progress sample
SAMPLING_STEPS = 15  # of DPM-Solver++, for those

# --quick: these instead: many small steps of a narrow network, and output paths of its own.
QUICK = {
    "dim": 32,
    "dim_mults": (1, 2, 2, 4),
    "image_size": 32,
    "batch_size": 8,
    "lr": 1e-3,
    "lr_final": 5e-5,
    "warmup": 50,
    "steps": 3000,
    "save_every": 500,
    "results_dir": Path("training_results/quick"),
    "weights_out": Path("training_results/quick/ddpm_quick.pt"),
}


def verify(options: argparse.Namespace) -> None:
    """Decode every image, report what is there, and write a grid of nine."""
    started = time.perf_counter()
    data.provide(options.data)
    nine, count, broken = data.survey(options.data, options.image_size, options.channels)
    title = f"9 of {count} training images"
    save_picture(tile(nine, cell=160, title=title), Path("training_samples_grid.png"))
    print(f"Wrote training_samples_grid.png in {duration(time.perf_counter() - started)}.")
    if broken:
        raise UserError(
            f"{len(broken)} of {count + len(broken)} image files are broken, named above; "
            "remove or replace them before training."
        )
    print(f"Found {count} images in dataset")


def make_batch(
    pictures: data.Pictures, numbers: training.StepNumbers, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make x_0 in [-1, 1] (n, c, H, W), labels (n,), t (n,) and noise of some rows of a step.

    Nothing here waits for the device: a GPU may still work on the batch before.
    """
    picked, corner, flip, drop, t, noise = (column[rows] for column in numbers)
    labels = pictures.labels[picked].masked_fill(drop, -1)
    chosen = training.cut_squares(pictures.images, picked, corner, noise.shape[-1])
    chosen = torch.where(flip[:, None, None, None], chosen.flip(-1), chosen)
    x_0 = chosen.float() / 127.5 - 1
    layout = torch.channels_last
    return x_0.contiguous(memory_format=layout), labels, t, noise.contiguous(memory_format=layout)


def denoising_loss(
    diffusion: GaussianDiffusion, network: torch.nn.Module, weight: Tensor, x_0: Tensor,
    labels: Tensor, t: Tensor, noise: Tensor, loss: str = "l2",
) -> Tensor:  # fmt: skip
    """Return what the error of the network's prediction costs, weighted, per image: (n,).

    With pred_noise and a weight of 1 it is the simple loss of Ho et al. (2020), equation 14;
    training.loss_weights has the other weights (T,), PENALTIES other losses than the square.
    `network` is diffusion.model with its labels, possibly wrapped for several processes.
    """
    # Ho 2020, equation 4: root(alpha-bar) x_0 + root(1 - alpha-bar) noise, at any t in one step.
    x_t = diffusion.q_sample(x_0, t, noise)
    predicted = network(x_t, t, labels)
    if diffusion.objective == "pred_v":  # root(alpha-bar) noise - root(1 - alpha-bar) x_0
        target = diffusion.predict_v(x_0, t, noise)
    else:
        target = noise if diffusion.objective == "pred_noise" else x_0
    errors = PENALTIES[loss](predicted.float(), target, reduction="none")
    return errors.mean(dim=(1, 2, 3)) * weight[t]


def loss_of_rows(
    run: Run, network: torch.nn.Module, numbers: training.StepNumbers, rows: slice
) -> Tensor:
    """Return what some rows of a step add to its mean loss."""
    batch = make_batch(run.data, numbers, rows)
    with autocast(run.device, run.precision):
        errors = denoising_loss(run.diffusion, network, run.loss_weights, *batch, run.options.loss)
    # Processes exchange the mean of their gradients: times their number, that is a sum.
    return errors.sum() * run.accelerator.num_processes / run.effective_batch


def train_step(run: Run, network: torch.nn.Module, step: int) -> Tensor:
    """Take one optimizer step; return this process' mean loss, still on the device.

    Each process works on its own rows of each pass, and the sum of all gradients is divided by
    the effective batch: a split over processes or passes changes nothing but the rounding.
    """
    options, team = run.options, run.accelerator
    # Of the whole effective batch, from (seed, step) alone: which image, mirrored or not, t, noise.
    numbers = run.numbers(step)
    total = torch.zeros((), device=run.device)
    for pass_index in range(options.gradient_accumulate):
        first = pass_index * options.batch_size + team.process_index * run.share
        is_last = pass_index == options.gradient_accumulate - 1
        with nullcontext() if is_last else team.no_sync(network):  # one exchange a step
            loss = loss_of_rows(run, network, numbers, slice(first, first + run.share))
            run.scaler.scale(loss).backward()
        total += loss.detach()
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.diffusion.parameters(), MAX_GRADIENT_NORM)
    for group in run.optimizer.param_groups:
        group["lr"] = training.learning_rate(step, options)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update()  # average = d average + (1 - d) weights
    return total


@torch.inference_mode()
def draw_samples(run: Run) -> None:
    """Draw sample-STEP.png: what the EMA network makes of the same noise at every save."""
    model = run.ema.ema_model.eval()
    levels, drawn = noise_levels(model), []
    times = log_snr_times(levels, min(SAMPLING_STEPS, model.num_timesteps))
    for indices in torch.arange(NUM_SAMPLES).split(run.share):
        labels = label_vectors(model, model.label_names, indices.tolist())
        seeds = (run.options.seed + indices).tolist()
        x_T, _ = starting_noise(seeds, (model.channels, *model.image_size))
        x_t, past = x_T.to(run.device, memory_format=torch.channels_last), []
        for t, s in pairwise(times):
            with autocast(run.device, run.precision):
                x_0 = predict_x_0(model, levels, x_t, t, labels)
            x_t = dpmpp_step(levels, x_t, x_0, t, s, past)
            past = [(x_0, t), *past[:1]]
        drawn.append(x_t.cpu())
    sheet = tile((torch.cat(drawn) + 1) / 2, cell=160, title=f"Step {run.step:,}")
    save_picture(sheet, run.options.results_dir / f"sample-{run.step}.png")


@torch.inference_mode()
def fixed_losses(run: Run, pictures: data.Pictures, told: bool = True) -> Tensor:
    """Return the EMA network's losses on fixed images, t and noise, sorted by t: (n,)."""
    model, size = run.ema.ema_model.eval(), run.share
    network, numbers = LabelledUnet(model), run.fixed_numbers(pictures, told)
    rows = [slice(i, i + size) for i in range(0, len(numbers.t), size)]
    batches = [make_batch(pictures, numbers, some) for some in rows]
    with autocast(run.device, run.precision):
        return torch.cat([denoising_loss(model, network, run.loss_weights, *batch, run.options.loss)
                          for batch in batches])  # fmt: skip


def start(options: argparse.Namespace, team: Accelerator) -> Run:
    """Read the data; build network, optimizer and average on the device."""
    with team.main_process_first():
        data.provide(options.data)
        pictures, names, digests = data.read_images(options.data, options.image_size,
                                                   options.channels)  # fmt: skip
    heldout = data.read_heldout(options, names, team)
    initial = checkpoints.read_initial(options)  # an objective of its own goes first
    torch.manual_seed(options.seed)  # the initial weights
    diffusion = build_diffusion(
        options.dim, options.dim_mults, options.channels, options.crop or options.image_size,
        options.timesteps, options.objective, options.schedule, names,
    )  # fmt: skip
    if initial:
        checkpoints.copy_weights(options, initial, diffusion)
    precision = pick_precision(options.precision, team.device, diffusion, team)
    training.thrifty_norms(diffusion.model)
    keep_freed_memory()
    diffusion.to(team.device, memory_format=torch.channels_last)
    fused = team.device.type in ("cpu", "cuda")
    weights = [*diffusion.model.parameters()]
    if names:
        weights.append(diffusion.label_table)  # last, where a checkpoint can do without it
    optimizer = torch.optim.Adam(weights, options.lr, ADAM_BETAS, fused=fused)
    return Run(
        options=options,
        accelerator=team,
        device=team.device,
        precision=precision,
        diffusion=diffusion,
        loss_weights=training.loss_weights(diffusion, options.loss_weight),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(team.device.type, enabled=precision == "fp16"),
        ema=training.weight_average(diffusion, EMA_DECAY),
        data=pictures.to(team.device),
        heldout=heldout.to(team.device) if heldout else None,
        digests=digests,
        config=runs.describe_run(options, digests),
    )  # fmt: skip


def train(options: argparse.Namespace) -> None:
    """Train, log, sample and save until the last step, a signal, or trouble."""
    checkpoints.check_outputs(options)
    trackers.check_tracker(options.log_with)
    device = pick_device(options.device)
    # Ignore what the environment and `accelerate config` say of precision and compiler.
    team = Accelerator(cpu=device.type == "cpu", mixed_precision="no", dynamo_backend="no",
                       log_with=options.log_with, project_dir=options.results_dir)  # fmt: skip
    if options.batch_size % team.num_processes:
        raise UserError(f"--batch-size {options.batch_size} cannot be shared equally by "
                        f"{team.num_processes} processes; choose a multiple.")  # fmt: skip
    found = checkpoints.find_checkpoint(options, team) if options.resume else None
    run = start(options, team)
    if found:
        checkpoints.restore(run, *found)

    network = LabelledUnet(run.diffusion)
    wanted = options.compile == "on" or (options.compile is None and device.type == "cuda")
    compiled = wanted and training.compile_checked(
        network, lambda: loss_of_rows(run, network, run.numbers(1), slice(0, run.share)), run.say
    )
    network = team.prepare_model(network)
    runs.start_records(run, compiled)
    meter, began = losses.Meter(run), run.step
    with meter, trackers.tracking(run), StopRequest(run) as stop:
        for step in range(run.step + 1, options.steps + 1):
            loss = train_step(run, network, step)
            run.step = step
            save_due = step % options.save_every == 0 or step == options.steps
            row_due = save_due or step % options.log_every == 0
            meter.add(loss, read=row_due)  # ends the run at a loss that is not finite
            stopping = stop.agreed(may_wait=row_due)  # after Ctrl-C: first what is due, then leave
            if row_due:
                sets = {"train": run.data, "heldout": run.heldout} if save_due else {}
                meter.write_row({name: fixed_losses(run, own) for name, own in sets.items() if own})
            if save_due:
                if team.is_main_process:
                    checkpoints.save_checkpoint(run)
                    draw_samples(run)
                    trackers.show_samples(run, run.step)
                    losses.draw_curve(run)
                team.wait_for_everyone()
            if stopping:
                stop.save_and_leave()  # does not come back
            if row_due:
                meter.restart()  # the pace in the next row leaves out samples and checkpoints
    runs.finish(run, began)


def main(argv: list[str] | None = None) -> int:
    """Run the exercise; return the exit code."""
    defaults = {
        "data": data.DEFAULT, "seed": RANDOM_SEED, "image_size": IMAGE_SIZE, "dim": DIM,
        "dim_mults": DIM_MULTS, "steps": TRAIN_STEPS, "batch_size": BATCH_SIZE,
        "gradient_accumulate": GRADIENT_ACCUMULATE, "lr": LEARNING_RATE,
        "results_dir": Path(RESULTS_DIR), "save_every": SAVE_EVERY, "log_every": LOG_EVERY,
        "timesteps": TIMESTEPS, "weights_out": Path(WEIGHTS_OUT),
    }  # fmt: skip
    options = train_options(argv, __doc__, defaults=defaults, quick=QUICK)
    return run_command(
        lambda: verify(options) if options.verify else train(options),
        after_interrupt="Everything saved before is intact.",
        if_memory_ends=runs.memory_advice(options),
    )


if __name__ == "__main__":
    sys.exit(main())
