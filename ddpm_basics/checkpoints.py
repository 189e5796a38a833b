"""Checkpoints of a training run: written whole or not at all, found again, resumed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch.version import __version__ as LIBRARY_VERSION

from ddpm_basics.console import UserError, one_line, same_letters
from ddpm_basics.files import check_folder, check_output, unused_name, write_atomically
from ddpm_basics.options import LOSSES, PRECISIONS, choose_loss_weight
from ddpm_basics.runs import Run, note_progress, write_run_file
from ddpm_basics.sampling import SCHEDULES
from ddpm_basics.weight_files import (
    UNREADABLE,
    DamagedFile,
    compare_networks,
    config_of,
    differences,
    find_process,
    load_weights,
    peek,
    read_checkpoint,
    shapes_of,
    unet_arguments,
    unwrap_checkpoint,
)

NUMBERED = re.compile("model-[0-9]+")
ENTRIES = {"step": int, "model": dict, "opt": dict, "ema": dict}  # that a checkpoint needs
SINCE = {"loss": "l2", "flip": "on", "data_set": None}  # of runs before these were recorded
FREE_SETTINGS = ("lr", "lr_final", "warmup", "steps", "initial_weights")  # on --resume


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse before the first step what would only fail, or destroy something, after hours."""
    folder, out = options.results_dir, options.weights_out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--results-dir {folder} is a file; name a folder.")
    names = ("run.json", "loss_curve.png", "losses.csv")
    kept = [*folder.glob("sample-*.png"), *(folder / n for n in names if (folder / n).exists())]
    kept += list_checkpoints(folder)
    if kept and not options.resume:
        raise UserError(
            f"{folder} holds another run ({kept[-1].name}): go on with it with --resume, or name "
            "another folder with --results-dir."
        )
    if options.data.is_dir() and folder.resolve().is_relative_to(options.data.resolve()):
        raise UserError(f"--results-dir {folder} lies in the data folder, so its samples would be "
                        "trained on: name another folder.")  # fmt: skip
    check_folder(folder)
    if NUMBERED.fullmatch(out.stem) and out.parent.resolve() == folder.resolve():
        raise UserError(f"--weights-out {out} has the name of a checkpoint: choose another.")
    check_output(out, ".pt", may_replace=True)  # what is there is kept under another name


def save_checkpoint(run: Run) -> Path:
    """Write model-STEP.pt in the format of the library's Trainer, then drop our oldest ones.

    Raises UserError when the weights are not finite: the last good checkpoint stays the newest.
    """
    both = (*run.diffusion.parameters(), *run.ema.ema_model.parameters())
    norms = torch._foreach_norm([p.detach() for p in both])
    if not torch.isfinite(torch.stack(norms)).all():
        raise UserError(not_finite_message(run, f"The weights after step {run.step} are"))
    note_progress(run)
    state = {
        "step": run.step,
        **split_labels(run),
        "scaler": run.scaler.state_dict() if run.scaler.is_enabled() else None,
        "version": LIBRARY_VERSION,
        # From here on for --resume alone; Trainer.load passes it over.
        "config": run.config,
        "images": run.digests,
        "seconds": run.seconds,
        "pending": [float(loss) for loss in run.pending],
    }
    path: Path = run.options.results_dir / f"model-{run.step}.pt"
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    write_run_file(run)
    for old in list_checkpoints(run.options.results_dir, ours=True)[run.options.keep :]:
        old.unlink()  # only now that the new one is safe
    return path


def split_labels(run: Run) -> dict[str, Any]:
    """Return model, opt and ema of the plain network, as the library knows it, and the labels."""
    model, ema = run.diffusion.state_dict(), run.ema.state_dict()
    optimizer = run.optimizer.state_dict()
    found = {"model": model, "opt": optimizer, "ema": ema}
    if run.diffusion.label_names:
        last = optimizer["param_groups"][0]["params"].pop()
        ema.pop("online_model.label_table", None)
        found["labels"] = {
            "names": list(run.diffusion.label_names),
            "embedding": ema.pop("ema_model.label_table"),
            "parameter": model.pop("label_table"),
            **optimizer["state"].pop(last),
        }
    return found


def join_labels(run: Run, state: dict[str, Any]) -> None:
    """Put the labels of a checkpoint back into its model, opt and ema: zeros where it has none.

    Raises UserError where they are other ones than this run's.
    """
    now = run.diffusion.label_names
    labels = state.get("labels")
    then = tuple(map(same_letters, labels["names"])) if labels else now
    if then != now:
        raise UserError(
            f"The checkpoint's labels are {', '.join(then)}, the data's are "
            f"{', '.join(now) or 'none'}: go on with the same folders of images."
        )
    if not now:
        return
    zeros = torch.zeros_like(run.diffusion.label_table)
    table = labels["parameter"] if labels else zeros
    average = labels["embedding"] if labels else zeros
    state["model"]["label_table"] = table
    state["ema"]["ema_model.label_table"] = average
    if "online_model.betas" in state["ema"]:
        state["ema"]["online_model.label_table"] = table
    places = state["opt"]["param_groups"][0]["params"]
    places.append(len(places))
    if labels:
        moments = {key: labels[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        state["opt"]["state"][places[-1]] = moments


def list_checkpoints(folder: Path, ours: bool = False) -> list[Path]:
    """Return all model-NUMBER.pt of a folder, the newest first: the highest step, which is inside.

    The library's Trainer numbers its own otherwise. ours: only those that this script wrote.
    """
    held = {path: peek(path) for path in folder.glob("model-*.pt") if NUMBERED.fullmatch(path.stem)}

    def age(path: Path) -> tuple[int, int]:
        inside, number = held[path].get("step"), int(path.stem.split("-")[1])
        return inside if isinstance(inside, int) else number, number

    return sorted((path for path in held if not ours or "images" in held[path]), key=age)[::-1]


def find_checkpoint(
    options: argparse.Namespace, team: PartialState
) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint that a run goes on from, if any, and let the options follow it.

    Raises UserError, on all machines, where they do not find the same.
    """
    found, problem = None, ""
    with team.main_process_first():
        try:
            found = newest_good_checkpoint(options.results_dir)
        except UserError as error:
            problem = str(error)
    seen = gather_object([(problem, f"step {found[1]['step']:,}" if found else "none")])
    if problems := [text for text, _ in seen if text]:
        raise UserError(problems[0])
    if len(steps := dict.fromkeys(step for _, step in seen)) > 1:
        raise UserError(
            f"The processes find different checkpoints in {options.results_dir} "
            f"({', '.join(steps)}): give each machine a copy of the same folder, or a shared one."
        )
    if found is None:
        if team.is_main_process:
            print(f"Nothing to resume in {options.results_dir}: starting at step 0.", flush=True)
        return None
    path, state = found
    options.init_weights = None  # that run began from them
    config, known = config_of(state), {"loss": LOSSES, "flip": ("on", "off")}
    recorded = {key: config[key] for key in known if config.get(key) in known[key]}
    follow_process(options, path, find_process(state["model"], path) | recorded)
    if options.precision == "auto":
        options.precision = recorded_precision(state)
    return found


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that can be read whole; set damaged ones aside by name.

    Raises UserError for one that is whole, but holds something else, and where there are files
    that might be checkpoints, but not a single good one.
    """
    damaged = []
    for path in list_checkpoints(folder):
        try:
            state = read_checkpoint(path, mapped=False)
        except DamagedFile as error:
            aside = unused_name(path.with_name(path.name + ".damaged"))
            path.rename(aside)
            damaged.append(aside.name)
            print(f"{error} It is set aside as {aside.name}.", flush=True)
            continue
        kind, _ = unwrap_checkpoint(state, path)
        if lacking := [key for key in ENTRIES if not isinstance(state.get(key), ENTRIES[key])]:
            raise UserError(
                f"{path} holds {kind} without {', '.join(lacking)}, so it cannot be resumed: start "
                f"from its weights with --init-weights {path} and another --results-dir."
            )
        if others := other_checkpoints(folder):
            print(
                f"Passed over: {', '.join(others)}, as only model-NUMBER.pt is resumed.", flush=True
            )
        return path, state
    if damaged:
        raise UserError(
            f"No checkpoint in {folder} can be read ({', '.join(damaged)}); choose another "
            "--results-dir for a new run."
        )
    if others := other_checkpoints(folder):
        raise UserError(
            f"{folder} holds no model-STEP.pt, but {', '.join(others)}: rename the one to go on "
            "from to model-NUMBER.pt, or start from its weights with --init-weights and another "
            "--results-dir."
        )
    return None


def other_checkpoints(folder: Path) -> list[str]:
    """Return the names of files in a folder that look like checkpoints, but are not numbered."""
    held = {
        path: {*peek(path)} for path in folder.glob("*.pt") if not NUMBERED.fullmatch(path.stem)
    }
    like = {path for path, keys in held.items() if {"model", "opt"} & keys}
    like |= {path for path, keys in held.items() if path.match("model-*.pt") and "ema" not in keys}
    return sorted(path.name for path in like)


def follow_process(options: argparse.Namespace, path: Path, found: Mapping[str, Any]) -> None:
    """Let the options be what a file says of objective, schedule, timesteps, loss and flips.

    Raises UserError where something else was typed, or what it says cannot be trained here.
    """
    wanted = {key: getattr(options, key) for key in found.keys() & options.typed}
    if wrong := differences(found, wanted):
        raise UserError(f"{path} was trained with other settings ({'; '.join(wrong)}): leave these "
                        "options out to train on as it was.")  # fmt: skip
    if found.get("schedule", SCHEDULES[0]) not in SCHEDULES:
        raise UserError(f"The noise schedule of {path} is none of {', '.join(SCHEDULES)}, so it "
                        "cannot be trained on here.")  # fmt: skip
    vars(options).update(found)
    choose_loss_weight(options)


def recorded_precision(state: Mapping[str, Any]) -> str:
    """Return the precision that a checkpoint's run computed in; auto where it does not say."""
    recorded = config_of(state).get("precision")
    return str(recorded) if recorded in PRECISIONS else "auto"


def restore(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Take up a run where a checkpoint has left it.

    Raises UserError when the run was started with another network, other settings or other data.
    """
    compare_settings(run, path, state)
    now = run.diffusion.state_dict()
    now.pop("label_table", None)
    if wrong := compare_networks(state["model"], now):
        raise UserError(f"{path} holds another network ({'; '.join(wrong)}): train with its "
                        "settings, or name another --results-dir.")  # fmt: skip
    try:
        join_labels(run, state)
        run.diffusion.load_state_dict(state["model"])
        # Adam's settings are this run's: the library's own Trainer leaves `fused` unset, and
        # without it the counters would be put where this run's kernels do not look for them.
        groups = zip(state["opt"]["param_groups"], run.optimizer.param_groups, strict=True)
        state["opt"]["param_groups"] = [dict(new, params=old["params"]) for old, new in groups]
        run.optimizer.load_state_dict(state["opt"])
        check_moments(run.optimizer)
        run.ema.load_state_dict(state["ema"])
        if state.get("scaler") and run.scaler.is_enabled():
            run.scaler.load_state_dict(state["scaler"])
        run.step, run.seconds = state["step"], int(state.get("seconds", 0))  # never NaN
        run.pending = [float(loss) for loss in state.get("pending", [])]
    except UNREADABLE as error:
        raise UserError(
            f"{path} fits this network, but its optimizer, average, labels or losses do not "
            f"({one_line(error)}): start from its weights with --init-weights {path} and another "
            "--results-dir."
        ) from None
    run.say(f"Resuming {path} at step {run.step:,}.")


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for moments of other shapes than the weights: Adam's kernels do not look."""
    for weight in optimizer.param_groups[0]["params"]:
        wanted = {"step": (), "exp_avg": tuple(weight.shape), "exp_avg_sq": tuple(weight.shape)}
        if (known := optimizer.state.get(weight)) and shapes_of(known) != wanted:
            raise ValueError(f"moments of {shapes_of(known)} for weights of {wanted['exp_avg']}")


def read_initial(options: argparse.Namespace) -> GaussianDiffusion | None:
    """Return the network of --init-weights, if any, and let the options follow its process.

    Raises UserError for a file that says otherwise than what was typed.
    """
    if options.init_weights is None:
        return None
    loaded, facts = load_weights(options.init_weights)
    process = {key: getattr(facts, key) for key in ("objective", "schedule", "timesteps")}
    said = {key: value for key, value in process.items() if key not in facts.assumed}
    follow_process(options, options.init_weights, said)
    return loaded


def copy_weights(
    options: argparse.Namespace, loaded: GaussianDiffusion, diffusion: GaussianDiffusion
) -> None:
    """Start from the EMA weights of an earlier run.

    The network has no layer that depends on the image size, so weights trained at 32x32 are a good
    start for 64x64. Labels are matched by name, new ones start at zero. Raises UserError for a
    network that does not fit.
    """
    then, now = (unet_arguments(each.state_dict()) for each in (loaded, diffusion))
    if wrong := differences(then, now):
        raise UserError(f"--init-weights {options.init_weights} holds another network "
                        f"({'; '.join(wrong)}): type what it has, or name another.")  # fmt: skip
    diffusion.model.load_state_dict(loaded.model.state_dict())
    for place, name in enumerate(diffusion.label_names):
        if name in loaded.label_names:
            vector = loaded.label_table[loaded.label_names.index(name)]
            diffusion.label_table.data[place] = vector.detach()


def compare_settings(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse to go on with another network, process, batch or data set than the run's own."""
    old, new = SINCE | config_of(state), run.config
    if not new.keys() <= old.keys():
        run.say(f"{path} does not say its settings, so they cannot be compared.")
        return
    fixed = {key: value for key, value in new.items()
             if key not in FREE_SETTINGS and not key.startswith(("data", "num"))}  # fmt: skip
    wrong = differences(old, fixed)
    if old["data_checksum"] != new["data_checksum"]:
        wrong.append("data: " + compare_data(state.get("images", {}), run.digests))
    if wrong:
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(wrong)}). Use the same ones to "
            "resume it, or another --results-dir for a new run."
        )
    new["initial_weights"] = old["initial_weights"]
    for key in ("lr", "lr_final", "warmup"):
        if old[key] != new[key]:
            run.say(f"Note: {key} was {old[key]}, now {new[key]}.")


def compare_data(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say in a few words which images were added, removed or replaced."""
    changes = {
        "added": sorted(set(now) - set(then)),
        "removed": sorted(set(then) - set(now)),
        "replaced": sorted(name for name in set(then) & set(now) if then[name] != now[name]),
    }
    return ", ".join(
        f"{len(names)} {verb} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for verb, names in changes.items()
        if names
    )


def not_finite_message(run: Run, what: str) -> str:
    """Return one sentence for numbers that ran away, with the way back."""
    checkpoints = list_checkpoints(run.options.results_dir)
    last = f"the last good checkpoint is {checkpoints[0]}" if checkpoints else "none was saved yet"
    return (
        f"{what} not finite, so training stopped; {last}. Try a smaller --lr (now "
        f"{run.options.lr:g}), some --warmup or --precision fp32, and go on with --resume."
    )
