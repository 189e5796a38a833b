"""Checkpoints of a training run: whole files or none, found again, taken up where they ended."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch.version import __version__ as LIBRARY_VERSION

from ddpm_basics.console import UserError
from ddpm_basics.files import check_folder, unused_name, write_atomically
from ddpm_basics.runs import Run, note_progress, write_run_file
from ddpm_basics.weight_files import load_weights

FREE_SETTINGS = ("lr", "lr_final", "warmup", "steps", "initial_weights")  # on --resume


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse before the first step what would only fail, or destroy something, after hours."""
    folder, out = options.results_dir, options.weights_out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--results-dir {folder} is a file; name a folder.")
    if out.is_dir():
        raise UserError(f"--weights-out {out} is a folder; name a .pt file.")
    names = ("run.json", "loss_curve.png", "losses.csv")
    kept = [*folder.glob("sample-*.png"), *(folder / n for n in names if (folder / n).exists())]
    kept += list_checkpoints(folder)
    if kept and not options.resume:
        raise UserError(
            f"{folder} holds another run ({kept[-1].name}): go on with it with --resume, or name "
            "another folder with --results-dir."
        )
    check_folder(folder)
    check_folder(out.parent)


def save_checkpoint(run: Run) -> Path:
    """Write model-STEP.pt in the format of the library's Trainer, then drop the oldest ones.

    Raises UserError when the weights are not finite: the last good checkpoint stays the newest.
    """
    norms = torch._foreach_norm([p.detach() for p in run.diffusion.model.parameters()])
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
    for old in list_checkpoints(run.options.results_dir)[run.options.keep :]:
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
    then = tuple(labels["names"]) if labels else now
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


def list_checkpoints(folder: Path) -> list[Path]:
    """Return all model-NUMBER.pt of a folder, the newest (highest step) first."""
    found = [p for p in folder.glob("model-*.pt") if re.fullmatch(r"model-[0-9]+", p.stem)]
    return sorted(found, key=lambda p: int(p.stem.split("-")[1]), reverse=True)


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that can be read whole; set damaged ones aside by name.

    Raises UserError when there are checkpoints, but not a single good one.
    """
    damaged = []
    for path in list_checkpoints(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
                if archive.testzip():
                    raise ValueError("wrong checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            missing = {"step", "model", "opt", "ema"} - set(state)
            if missing:
                raise ValueError(f"no entry {sorted(missing)[0]!r}")
            return path, state
        except (OSError, MemoryError):  # the machine is in trouble, the file may be good
            raise
        except Exception as error:  # a damaged archive raises many kinds
            aside = unused_name(path.with_name(path.name + ".damaged"))
            path.rename(aside)
            damaged.append(aside.name)
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            print(f"{path} is damaged ({reason}); set aside as {aside.name}.", flush=True)
    if damaged:
        raise UserError(
            f"No checkpoint in {folder} can be read ({', '.join(damaged)}); choose another "
            "--results-dir for a new run."
        )
    return None


def recorded_precision(state: Mapping[str, Any]) -> str:
    """Return the precision that a checkpoint's run computed in; auto where it does not say."""
    return str(state.get("config", {}).get("precision", "auto"))


def restore(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Take up a run where a checkpoint has left it.

    Raises UserError when the run was started with other settings or other data.
    """
    compare_settings(run, path, state)
    join_labels(run, state)
    try:
        run.diffusion.load_state_dict(state["model"])
        # The library's own Trainer leaves `fused` unset; without it Adam's counters would be
        # put where this run's kernels do not look for them.
        groups = zip(state["opt"]["param_groups"], run.optimizer.param_groups, strict=True)
        state["opt"]["param_groups"] = [dict(old, fused=new["fused"]) for old, new in groups]
        run.optimizer.load_state_dict(state["opt"])
        run.ema.load_state_dict(state["ema"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not belong to this network ({reason}).") from None
    if state.get("scaler") and run.scaler.is_enabled():
        run.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]
    run.seconds = state.get("seconds", 0.0)
    run.pending = list(state.get("pending", []))
    run.say(f"Resuming {path} at step {run.step:,}.")


def copy_weights(options: argparse.Namespace, diffusion: GaussianDiffusion) -> None:
    """Start from the EMA weights of an earlier run; the noise schedule stays this run's own.

    The network has no layer that depends on the image size, so weights trained at 32x32 are a good
    start for 64x64. Labels are matched by name, new ones start at zero. Raises UserError for a file
    that does not fit.
    """
    loaded, facts = load_weights(options.init_weights)
    then = f"{facts.dim} x {facts.dim_mults} with {facts.channels} channels"
    now = f"{options.dim} x {tuple(options.dim_mults)} with 3 channels"
    if then != now:
        raise UserError(f"--init-weights {options.init_weights} holds a network of width {then}, "
                        f"this run's is {now}: name another file, or type --dim and "
                        "--dim-mults.")  # fmt: skip
    diffusion.model.load_state_dict(loaded.model.state_dict())
    for place, name in enumerate(diffusion.label_names):
        if name in facts.labels:
            vector = loaded.label_table[facts.labels.index(name)]
            diffusion.label_table.data[place] = vector.detach()


def compare_settings(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse to go on with another network, process, batch or data set than the run's own."""
    old, new = state.get("config", {}), run.config
    if not new.keys() <= old.keys():
        run.say(f"{path} does not say its settings, so they cannot be compared.")
        return
    changed = [key for key in new if old[key] != new[key]]
    differences = [
        f"{key.replace('_', ' ')}: {old[key]} then, {new[key]} now"
        for key in changed
        if key not in FREE_SETTINGS and not key.startswith(("data", "num"))
    ]
    if "data_checksum" in changed:
        differences.append("data: " + compare_data(state.get("images", {}), run.digests))
    if differences:
        raise UserError(
            f"{path} was trained with other settings ({'; '.join(differences)}). Use the same "
            "ones to resume it, or another --results-dir for a new run."
        )
    new["initial_weights"] = old["initial_weights"]
    for key in ("lr", "lr_final", "warmup"):
        if key in changed:
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
