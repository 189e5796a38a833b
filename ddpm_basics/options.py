"""The options of the three exercises, a table each; defaults come from the scripts' constants."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_basics.console import UserError, new_parser, real_number, same_letters, whole_number
from ddpm_basics.datasets import CACHE, DATA_SETS, find_data_set, usual_size
from ddpm_basics.sampling import SCHEDULES

OBJECTIVES = ("pred_v", "pred_noise", "pred_x0")
LOSSES = ("l2", "l1", "huber")
LOSS_WEIGHTS = ("min5", "simple")
TRACKERS = ("tensorboard", "wandb")
FOLLOWING = ("image_size", "channels", "results_dir", "weights_out")  # the data, if not typed
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
WEIGHTS = Path("models/ddpm_african_fabrics.pt")


def default_weights() -> Path:
    """Return the weights of the current folder, or else those that stand beside the scripts."""
    beside = Path(__file__).resolve().parent.parent / WEIGHTS
    return beside if beside.exists() and not WEIGHTS.exists() else WEIGHTS


def add_common(parser: argparse._ActionsContainer, seed: int) -> None:
    """Add what every exercise has."""
    add = parser.add_argument
    add("--device", choices=DEVICES, default="auto", help="where to compute")
    add("--precision", choices=PRECISIONS, default="auto",
        help="of the network; auto tries which is fastest here")  # fmt: skip
    add("--seed", type=whole_number(0), default=seed, help="of all random numbers")


def add_process(parser: argparse.ArgumentParser) -> None:
    """Add what some weight files do not say; see process_of."""
    add = parser.add_argument
    add("--image-size", type=whole_number(1),
        help="pixels per side, for weights that do not say it (default: 64)")  # fmt: skip
    add("--objective", choices=OBJECTIVES,
        help="what the network predicts, for such weights (default: pred_v)")  # fmt: skip
    add("--schedule", choices=SCHEDULES,
        help="noise schedule, for such weights (default: sigmoid)")  # fmt: skip


def process_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was typed of add_process, as load_weights takes it."""
    return {name: getattr(options, name) for name in ("image_size", "objective", "schedule")}


def generate_options(
    argv: Sequence[str] | None,
    description: str | None,
    *,
    seed: int,
    num_samples: int,
    label: str,
    guidance: float,
    steps: Mapping[str, int],
    batch_size: Mapping[str, int],
    output: str,
) -> argparse.Namespace:
    """Read the command line of exercise 1; what follows the device or the weights is None."""
    parser = new_parser(
        description,
        epilog="Image i depends on seed + i and its label alone. With a samples folder the same "
        "command draws only what is missing there.",
    )
    add = parser.add_argument
    add("--weights", type=Path, default=default_weights(), help="weight file (.pt or .safetensors)")
    add("--num-samples", type=whole_number(1), default=num_samples, help="images to draw")
    add("--label", type=same_letters,
        help="what to draw: a tradition, such as kente (an unknown name lists them), all of them "
        f"in turn, or none (default: {label}, where the weights know any)")  # fmt: skip
    add(
        "--guidance",
        type=real_number(0, 100),
        help=f"how much of it: 0 nothing, 1 as trained, more exaggerated (default: {guidance:g})",
    )
    add("--sampler", choices=steps, default="dpmpp", help="how to walk from noise to x_0")
    defaults = ", ".join(f"{count} for {name}" for name, count in steps.items())
    add("--steps", type=whole_number(1),
        help=f"steps from noise to image (default: {defaults})")  # fmt: skip
    add("--output", type=Path, default=output, help="the grid of images (.png)")
    add("--samples-dir", type=Path,
        help="folder for single images as well (default: none are written)")  # fmt: skip
    add_process(parser)
    batches = ", ".join(f"{count} on {device}" for device, count in batch_size.items())
    add("--batch-size", type=whole_number(1),
        help=f"images at once; changes speed and memory only (default: {batches})")  # fmt: skip
    add_common(parser, seed)
    return parser.parse_args(argv)


def choose_labels(
    options: argparse.Namespace, known: Sequence[str], label: str, guidance: float
) -> None:
    """Set options.labels, which images take in turn, and options.guidance.

    What was not typed follows the weights: `label` and `guidance` where they know labels, else none
    and 1. Raises UserError for what they cannot be told.
    """
    typed = [name for name in ("label", "guidance") if getattr(options, name) not in (None, "none")]
    if typed and not known:
        raise UserError(f"{options.weights} knows no labels: leave out --{typed[0]}.")
    wanted = (options.label or label) if known else "none"
    if wanted == "none" and options.guidance is not None:
        raise UserError("--guidance strengthens a label: name one with --label, or leave it out.")
    if wanted not in ("all", "none", *known):
        raise UserError(f"{options.weights} knows no {wanted}, but {', '.join(known)}.")
    options.labels = {"all": [*known], "none": []}.get(wanted, [wanted])
    if options.guidance == 0:
        options.labels = []  # what is not asked for should not stand below the pictures either
    if not options.labels:
        options.guidance = 1.0
    elif options.guidance is None:
        options.guidance = guidance


def explore_options(
    argv: Sequence[str] | None,
    description: str | None,
    *,
    parts: Mapping[str, str],
    seed: int,
    data: str,
) -> argparse.Namespace:
    """Read the command line of exercise 2; `parts` holds {name of a figure: its part}."""
    parser = new_parser(description)
    add = parser.add_argument
    letters = sorted({*parts.values()})
    add("--part", nargs="+", choices=[*letters, *parts], default=letters, metavar="PART",
        help="a steps, b from noise, c to noise, d schedules, e morph, f steering, g memory; or a "
        "figure, such as sdedit_demo (default: all)")  # fmt: skip
    add("--weights", type=Path, default=default_weights(), help="weight file (.pt or .safetensors)")
    add("--data", type=Path, default=data, help="folder of fabrics, for parts c, d, f and g")
    add("--picture", type=Path, metavar="FILE",
        help="picture for parts c and d, and for sdedit_demo and inpainting_demo of part f "
        "(default: one of the data)")  # fmt: skip
    add("--mask", type=Path, metavar="FILE",
        help="for inpainting_demo: white stays, black is new (default: two shapes)")  # fmt: skip
    add("--label", nargs="+", type=same_letters,
        help="for part f: what to draw (default: four of the weights' labels; around a region, "
        "that of the picture's folder)")  # fmt: skip
    add("--output-dir", type=Path, default=".", help="where figures and measurements go")
    add_process(parser)
    add_common(parser, seed)
    return parser.parse_args(argv)


def choose_shown(
    options: argparse.Namespace, known: Sequence[str], usual: Sequence[str]
) -> list[str]:
    """Return the labels that are shown: those that were typed, or some that the weights know.

    Raises UserError for one that they do not.
    """
    for name in options.label or ():
        if name not in known:
            among = f", but {', '.join(known)}" if known else ""
            raise UserError(f"{options.weights} knows no {name}{among}.")
    typed = [*dict.fromkeys(options.label or ())]
    return typed or [name for name in usual if name in known] or [*known[:4]]


def train_options(
    argv: Sequence[str] | None,
    description: str | None,
    *,
    defaults: Mapping[str, Any],
    quick: Mapping[str, Any],
) -> argparse.Namespace:
    """Read the command line of exercise 3; `quick` holds other defaults, for --quick."""
    argv = sys.argv[1:] if argv is None else argv
    usual = {**defaults, **quick} if "--quick" in argv else dict(defaults)
    parser = training_parser(description, usual)
    parser.set_defaults(**{key: usual[key] for key in usual if key not in FOLLOWING})
    options = parser.parse_args(argv)
    # What was not typed may follow the weights that a run goes on from, or the data.
    options.typed = {"objective", "schedule", "loss_weight", "loss", "flip"} & vars(options).keys()
    plain = {"objective": "pred_v", "schedule": "sigmoid", "loss": "l2"}
    plain |= follow_data(options, usual)
    options = argparse.Namespace(**{**plain, **vars(options)})
    try:
        choose_loss_weight(options)
    except UserError as error:
        parser.error(str(error))
    halvings = len(options.dim_mults) - 1
    name, side = ("--crop", options.crop) if options.crop else ("--image-size", options.image_size)
    if side % 2**halvings:
        parser.error(f"{name} must be a multiple of {2**halvings}: the U-Net halves it "
                     f"{halvings} times")  # fmt: skip
    if side > options.image_size:
        parser.error(f"--crop {side} is larger than the images: --image-size {options.image_size}")
    if options.dim % 4:
        parser.error("--dim must be a multiple of 4")
    return options


def follow_data(options: argparse.Namespace, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the data decides where it was not typed: FOLLOWING and flip."""
    chosen = {key: usual[key] for key in FOLLOWING if key != "channels"}
    known = find_data_set(options.data)
    if known is None:
        return {**chosen, "channels": 3, "flip": "on"}
    name, multiple = str(options.data), 2 ** (len(options.dim_mults) - 1)
    return {
        "image_size": usual_size(known, chosen["image_size"], multiple),
        "channels": known.channels,
        "flip": "on" if known.mirrored else "off",
        "results_dir": chosen["results_dir"] / name,
        "weights_out": chosen["weights_out"].with_name(f"ddpm_{name}.pt"),
    }


def choose_loss_weight(options: argparse.Namespace) -> None:
    """Set options.loss_weight: min5 for v, simple for others, where it was not typed.

    Raises UserError for a weight of another objective.
    """
    is_v = options.objective == "pred_v"
    if "loss_weight" not in options.typed:
        options.loss_weight = "min5" if is_v else "simple"
    elif options.loss_weight == "min5" and not is_v:
        raise UserError("--loss-weight min5 weights the error of v: use it with --objective pred_v "
                        f"or --loss-weight simple with {options.objective}.")  # fmt: skip


def training_parser(description: str | None, usual: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Return the table of exercise 3's options, in four groups; `usual` are their defaults."""
    parser = new_parser(description)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--verify", action="store_true", help="check the data, draw nine images")
    what.add_argument("--train", action="store_true", help="train the network")
    add_data_and_network(parser, usual)
    count, rate = whole_number(1), real_number(1e-12)

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--steps", type=count, help="optimizer steps in all")
    add("--batch-size", type=count, help="images per pass, all processes together")
    add("--gradient-accumulate", type=count, help="passes per step")
    add("--lr", type=rate, help="learning rate of Adam")
    add("--lr-final", type=rate, help="cosine decay to this; constant if none")
    add("--warmup", type=whole_number(0), default=0, help="steps in which the rate rises")
    add("--compile", choices=["on", "off"],
        help="torch.compile the network: minutes that a long run earns back (default: on for a "
        "GPU, off for a CPU)")  # fmt: skip
    add("--quick", action="store_true", help="a small network at 32x32, minutes on two CPU cores")
    add_common(training, usual["seed"])

    add = parser.add_argument_group("the run").add_argument
    add("--results-dir", type=Path, default=argparse.SUPPRESS,
        help="checkpoints, samples, losses.csv (default: "
        f"{usual['results_dir']}, for a data set {usual['results_dir']}/NAME)")  # fmt: skip
    add("--save-every", type=count, help="steps between checkpoints")
    add("--log-every", type=count, help="steps between rows of losses.csv")
    add("--keep", type=whole_number(2), default=2,
        help="checkpoints to keep, 0.57 GB each; two, as the newest may be damaged")  # fmt: skip
    add("--resume", action="store_true", help="go on from the newest good checkpoint")
    add("--init-weights", type=Path, help="start from the weights in this file")
    weights = usual["weights_out"]
    add("--weights-out", type=Path, default=argparse.SUPPRESS, help="EMA weights at the end "
        f"(default: {weights}, for a data set {weights.with_name('ddpm_NAME.pt')})")  # fmt: skip
    add("--log-with", choices=TRACKERS,
        help="tell the rows of losses.csv and the samples to TensorBoard (in the results folder) "
        "or to Weights & Biases, too (default: to neither)")  # fmt: skip
    return parser


def add_data_and_network(parser: argparse.ArgumentParser, usual: Mapping[str, Any]) -> None:
    """Add the first two groups of exercise 3's options."""
    count = whole_number(1)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="folder of images, subfolders included; or, where no folder has "
        f"that name, {', '.join(DATA_SETS)}: fetched into {CACHE}/ once (celeba: 1.4 GB, and 2 GB "
        "of memory at 64 pixels)")  # fmt: skip
    add("--crop", type=count, help="train on random squares of this many pixels; half the size "
        "costs a quarter (default: on whole images)")  # fmt: skip
    add("--channels", type=int, choices=(1, 3), default=argparse.SUPPRESS,
        help="1 trains on grey images (default: 3, or what the data set has)")  # fmt: skip
    add("--flip", choices=["on", "off"], default=argparse.SUPPRESS,
        help="mirror images at random (default: on, but off for mnist and digits, where a mirror "
        "image means something else)")  # fmt: skip
    add("--heldout", type=Path, help="folder of images that are never trained on, for the "
        "held-out loss (drawn fabrics and data sets bring their own)")  # fmt: skip

    add = parser.add_argument_group("network and loss").add_argument
    add("--image-size", type=count, default=argparse.SUPPRESS,
        help=f"pixels, both sides (default: {usual['image_size']}, or what the data set has, up to "
        "a multiple that the U-Net can halve)")  # fmt: skip
    add("--dim", type=count, help="channels of the U-Net at full resolution")
    add("--dim-mults", type=count, nargs="+", help="its channel multipliers")
    add("--schedule", choices=SCHEDULES, default=argparse.SUPPRESS,
        help="of noise (default: sigmoid, or that of the weights it goes on from)")  # fmt: skip
    add("--objective", choices=OBJECTIVES, default=argparse.SUPPRESS,
        help="what the network predicts (default: pred_v, or that of those weights)")  # fmt: skip
    add("--loss", choices=LOSSES, default=argparse.SUPPRESS,
        help="what an error of the prediction costs in each pixel: its square, its size, or half "
        "its square up to 1 and straight beyond; the fixed losses in losses.csv follow, so compare "
        "runs of one loss only (default: l2, or that of the run that it goes on with)")  # fmt: skip
    add("--loss-weight", choices=LOSS_WEIGHTS, default=argparse.SUPPRESS,
        help="min5: error of v times min(1, 5/SNR); simple: the library's own, error of the noise "
        "at every t alike (default: min5 for pred_v, simple for the others)")  # fmt: skip
