"""Weight files read and written: what they must contain, and what they turn out to hold.

A weight file is one of five, all of them opened as data only: a checkpoint of the library's
Trainer (its EMA weights count), the bundled file (the same `ema` entry, parameters in fp16, a flat
`config` and the table of `labels`), the state dict of a GaussianDiffusion, that of a Unet alone, or
safetensors, which say as much as the bundled file if ddpm_basics.export wrote them.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from denoising_diffusion_pytorch.version import __version__ as LIBRARY_VERSION
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ddpm_basics.console import UserError, one_line, same_letters
from ddpm_basics.files import unused_name, write_atomically
from ddpm_basics.model import build_diffusion
from ddpm_basics.sampling import SCHEDULES

NETWORK_OUTPUT = {"pred_noise": "the noise", "pred_x0": "x_0", "pred_v": "v"}
ASSUMED: dict[str, Any] = {
    "objective": "pred_v",
    "schedule": "sigmoid",
    "timesteps": 1000,
    "image_size": 64,
}
UNREADABLE = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError,
              RuntimeError)  # fmt: skip  # what nonsense in a file may raise
LARGEST = 65_504  # of half precision: sums of larger weights overflow inside the network


class DamagedFile(UserError):
    """A file that is not what was written: cut off, or with other bytes in it."""


# ---- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a weight file turned out to hold."""

    kind: str
    step: int | None
    version: str | None  # of the library that wrote it
    dim: int
    dim_mults: tuple[int, ...]
    channels: int
    image_size: int
    timesteps: int
    objective: str
    schedule: str
    labels: tuple[str, ...]  # what the network can be told to draw
    assumed: tuple[str, ...]  # which of these the file does not say, and nobody else has
    parameters: int
    subject: str  # what it draws: fabrics, unless it says otherwise

    def describe(self, path: Path) -> str:
        """Say all of it in one line."""
        step = "" if self.step is None else f", step {self.step:,}"
        version = f", library {self.version}" if self.version else ""
        assumed = ", ".join(self.assumed).replace("_", " ")
        assumed = f" (assumed: {assumed})" if assumed else ""
        labels = f", {len(self.labels)} labels" if self.labels else ""
        return (
            f"{path}: {self.kind}{step}{version}; {self.parameters:,} parameters "
            f"(width {self.dim} x {'-'.join(map(str, self.dim_mults))}, {self.channels} channels); "
            f"predicts {NETWORK_OUTPUT[self.objective]} ({self.objective}), {self.schedule} "
            f"schedule, {self.timesteps} timesteps, {self.image_size} pixels{labels}{assumed}"
        )


def load_weights(
    path: Path,
    image_size: int | None = None,
    objective: str | None = None,
    schedule: str | None = None,
) -> tuple[GaussianDiffusion, Facts]:
    """Load any of the five kinds of weight file into a network that fits it.

    The arguments are for what a file does not say, see ASSUMED: only what we wrote knows its
    image size, and a Unet alone nothing of the process. Returns the diffusion in eval mode on the
    CPU, in fp32, and what was found. Raises UserError for everything that is no such file, and
    for one that says otherwise.
    """
    checkpoint = read_checkpoint(path)
    kind, state = unwrap_checkpoint(checkpoint, path)
    config = config_of(checkpoint)
    try:
        network = unet_arguments(state)
        stated = dict(checkpoint.get("stated") or {}) | find_process(state, path)
        if "image_size" in config:
            size = config["image_size"]
            square = isinstance(size, (list, tuple)) and len({*size}) == 1
            stated["image_size"] = size[0] if square else size
        typed = {"image_size": image_size, "objective": objective, "schedule": schedule}
        typed = {name: value for name, value in typed.items() if value is not None}
        if wrong := differences(typed | stated, typed):
            raise UserError(f"{path} says otherwise ({'; '.join(wrong)}): leave it to the file.")
        process = ASSUMED | typed | stated
        shape = {name: network[name] for name in ("dim", "dim_mults", "channels")}
        check_size(process["image_size"], len(network["dim_mults"]) - 1, path)
        table = table if isinstance(table := checkpoint.get("labels"), dict) else {}
        if labels := tuple(same_letters(str(name)) for name in table.get("names", ())):
            state["label_table"] = table.get("embedding")
        diffusion = fill_diffusion(shape, process, state, labels, path)
    except UNREADABLE as error:
        raise UserError(
            f"{path} holds no U-Net of denoising-diffusion-pytorch 2.x, or one that was changed "
            f"({one_line(error)})."
        ) from error
    data_set = config.get("data_set")
    facts = Facts(
        kind=kind,
        step=step if isinstance(step := checkpoint.get("step"), int) else None,
        version=checkpoint.get("version"),
        labels=labels,
        assumed=tuple(name for name in ASSUMED if name not in typed | stated),
        parameters=sum(weight.numel() for weight in diffusion.model.parameters()),
        subject=f"images of {one_line(data_set, 40)}" if data_set else "fabrics",
        **shape,
        **process,
    )
    return diffusion.eval(), facts


def check_size(size: Any, halvings: int, path: Path) -> None:
    """Raise UserError for an image size that the network in a file cannot draw."""
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path} states an image size of {size}: only square images can be drawn, "
                        "of a whole number of pixels.")  # fmt: skip
    if size % 2**halvings:
        raise UserError(f"The image size must be a multiple of {2**halvings}: the U-Net in {path} "
                        f"halves it {halvings} times.")  # fmt: skip


def read_checkpoint(path: Path, mapped: bool = True) -> Any:
    """Read a weight file as data only: nothing in it is ever executed.

    mapped: its tensors stay in the file until they are used. What a compiler or a wrapper for
    several processes has left in the names of weights is taken off. Raises UserError: DamagedFile
    where the bytes are others than those written.
    """
    if not path.exists():
        raise UserError(
            f"The weight file {path} does not exist: fetch the whole bundle, name another file, "
            "or make one with 'python exercise3_train.py --train'."
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a weight file (.pt).")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise DamagedFile(f"{path} is damaged, as it is empty: fetch or copy it again.")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is only a Git LFS pointer: run 'git lfs pull' to get the weights.")
    if path.suffix.lower() == ".safetensors":
        return read_safetensors(path)
    is_zip = zipfile.is_zipfile(path)
    if start.startswith(b"PK") and not is_zip:
        raise DamagedFile(f"{path} is damaged, as it is cut off: fetch or copy it again.")
    if is_zip:
        check_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mmap = mapped and is_zip and can_be_mapped(path)
            return strip_wrappers(torch.load(path, "cpu", weights_only=True, mmap=mmap))
    except OSError:
        raise
    except Exception as error:  # torch.load has no error of its own, it raises a dozen kinds
        named = r"(?:GLOBAL\s+|Unsupported (?:global|class)\W+(?!GLOBAL))([\w.]+)"
        forbidden = re.search(named, str(error))
        if forbidden and isinstance(error, pickle.UnpicklingError):
            name = forbidden.group(1)
            entry = key_before(path, name) if is_zip else ""
            where = f" in its entry '{one_line(entry, 40)}'" if entry else ""
            raise UserError(
                f"{path} wants to run code ({name}{where}) when it is opened, so it was "
                "refused: use a file that holds tensors only."
            ) from error
        raise (UserError if is_zip else DamagedFile)(
            f"{path} is damaged or no PyTorch weight file (one that holds nothing but tensors): "
            "fetch it again, or name another one."
        ) from error


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read what ddpm_basics.export wrote, or bare weights, in the form of a checkpoint.

    Raises DamagedFile.
    """
    content = path.read_bytes()  # safetensors opens no file whose name is no text
    try:
        tensors = safetensors.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = header.get("__metadata__", {})
        state = {f"ema_model.{name.removeprefix('ema_model.')}": tensors[name] for name in tensors}
        config = dict(json.loads(facts.get("provenance", "{}")))
        known = facts.keys() - {*json.loads(facts.get("assumed", "[]"))}
        stated = {name: facts[name] for name in ("objective", "schedule") if name in known}
        stated |= {name: int(facts[name]) for name in ("timesteps", "image_size") if name in known}
        names = json.loads(facts.get("labels", "[]"))
    except (SafetensorError, *UNREADABLE) as error:
        raise DamagedFile(f"{path} is damaged or no safetensors file ({one_line(error)}): fetch it "
                          "again, or name another one.") from error  # fmt: skip
    table = {"names": names, "embedding": state.pop("ema_model.label_table", None)}
    found = {"step": config.get("step"), "version": config.get("library"), "stated": stated}
    return {"ema": state, "labels": table, "config": config, **found}


def key_before(path: Path, name: str) -> str:
    """Return the last word before a global in a checkpoint, the key of the entry that it stands in.

    The pickle is only looked through, never executed.
    """
    word = ""
    with zipfile.ZipFile(path) as archive, suppress(*UNREADABLE):
        data = [archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")]
        for opcode, argument, _ in pickletools.genops(data[0]):
            if opcode.name == "GLOBAL" and str(argument).replace(" ", ".") == name:
                break
            if opcode.name == "BINUNICODE":
                word = str(argument)
    return word


def check_bytes(path: Path) -> None:
    """Compare a file with its own checksums, which torch.load passes over. Raises DamagedFile."""
    try:
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
    except (OSError, MemoryError):  # the machine is in trouble, the file may be good
        raise
    except Exception:  # a damaged archive raises many kinds
        whole = False
    if not whole:
        raise DamagedFile(f"{path} is damaged, as its bytes do not fit its checksums: fetch or "
                          "copy it again.")  # fmt: skip


def can_be_mapped(path: Path) -> bool:
    """Tell whether torch can map a file: not one whose name is no text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def strip_wrappers(content: Any) -> Any:
    """Take the names of torch.compile and DistributedDataParallel out of the names of tensors."""
    if not isinstance(content, dict):
        return content
    return {
        re.sub(r"_orig_mod\.|module\.", "", key)
        if isinstance(key, str) and isinstance(value, Tensor)
        else key: strip_wrappers(value)
        for key, value in content.items()
    }


def peek(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, its tensors unread; nothing where it cannot be read."""
    try:
        mmap = can_be_mapped(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:  # absent, damaged or somebody else's: all the same here
        return {}
    return content if isinstance(content, dict) else {}


def config_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint states; none where others have written it."""
    config = checkpoint.get("config")
    return config if isinstance(config, dict) else {}


def unwrap_checkpoint(checkpoint: Any, path: Path) -> tuple[str, dict[str, Any]]:
    """Return (kind, state of the GaussianDiffusion or of the Unet in it) of a checkpoint."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds no weights but a {type(checkpoint).__name__}.")
    version = str(checkpoint.get("version", ""))
    if version.startswith(("0.", "1.")):
        raise UserError(
            f"{path} was written by denoising-diffusion-pytorch {version}, whose network differs: "
            "train again with version 2, or draw with the old one."
        )
    kind, state = "bare weights", checkpoint
    if any(str(key).startswith("ema_model.") for key in checkpoint):  # of the library's EMA alone
        checkpoint = {"ema": checkpoint}
    if isinstance(checkpoint.get("ema"), dict):
        kind = "EMA weights of a training checkpoint" if "model" in checkpoint else "EMA weights"
        state = {
            key.removeprefix("ema_model."): value
            for key, value in checkpoint["ema"].items()
            if str(key).startswith("ema_model.")
        }
    state = {str(key): value for key, value in state.items()}
    if "init_conv.weight" in state:  # a Unet alone
        kind = "bare U-Net weights"
        state = {f"model.{key}": value for key, value in state.items()}
    if not isinstance(state.get("model.init_conv.weight"), Tensor):
        inside = [str(key) for key, value in checkpoint.items() if holds_unet(value)]
        what = "no U-Net of denoising-diffusion-pytorch 2.x"
        if inside:
            what = (
                f"weights in an entry '{one_line(inside[0], 40)}' and no EMA: save that entry alone"
            )
        raise UserError(f"{path} holds {what}.")
    if "model.mid_attn.mem_kv" not in state:
        kind = (
            "its network with classes" if "model.classes_emb.weight" in state else "its version 1"
        )
        raise UserError(f"{path} holds no plain U-Net of denoising-diffusion-pytorch 2.x, but one "
                        f"of {kind}.")  # fmt: skip
    return kind, state


def holds_unet(content: Any) -> bool:
    """Tell whether an entry of a checkpoint holds the weights of a U-Net."""
    names = map(str, content) if isinstance(content, dict) else ()
    return any(name.endswith("init_conv.weight") for name in names)


def unet_arguments(state: Mapping[str, Any]) -> dict[str, Any]:
    """Read how a Unet was built from the shapes of its weights, in the library's own words.

    state: {"model.NAME": weight}. Raises KeyError for a weight that every Unet has.
    """
    shapes = shapes_of(state)
    dim = shapes["model.time_mlp.3.weight"][0] // 4
    stages = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("model.downs."))
    # The last layer of each stage sets its width; only the last stage does not halve the image.
    last = [f"model.downs.{i}.3.1.weight" for i in range(stages - 1)]
    last.append(f"model.downs.{stages - 1}.3.weight")
    attention = [f"model.downs.{i}.2" for i in range(stages)]
    heads = [shapes[f"{name}.mem_kv"][1] for name in attention]
    inner = [shapes[f"{name}.to_qkv.weight"][0] // 3 for name in attention]
    init_dim, channels_in = shapes["model.init_conv.weight"][:2]
    channels_out = shapes["model.final_conv.weight"][0]
    full = [f"{name}.to_out.weight" in shapes for name in attention]
    return {
        "dim": dim,
        "dim_mults": tuple(shapes[key][0] // dim for key in last),
        "channels": min(channels_in, channels_out),
        "init_dim": "dim" if init_dim == dim else init_dim,
        "self_condition": channels_in > channels_out,
        "learned_variance": channels_in < channels_out,
        "learned_sinusoidal_cond": "model.time_mlp.0.weights" in shapes,
        "attn_heads": one_or_all(heads),
        "attn_dim_head": one_or_all([size // n for size, n in zip(inner, heads, strict=True)]),
        "full_attn": "the last" if full == [*[False] * (stages - 1), True] else full,
    }


def one_or_all(values: list[Any]) -> Any:
    """Return the value that all of them are, or all where they differ."""
    return values[0] if len(set(values)) == 1 else values


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is a tensor, and no sparse one."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {key: tuple(t.shape) for key, t in tensors.items() if t.layout is torch.strided}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say which of the settings wanted a file does not have."""
    return [
        f"{name}: {found.get(name, 'none')} in the file, {value} here"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def compare_networks(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say in what weights differ from those wanted: in how their network was built, or by name."""
    try:
        said = differences(unet_arguments(found), unet_arguments(wanted))
    except UNREADABLE:  # not even the beginnings of a Unet
        said = []
    names = dict.fromkeys(shapes_of(found), "none") | shapes_of(wanted)
    said = said or differences(shapes_of(found), names)
    return [*said[:4], f"and {len(said) - 4} more"] if len(said) > 4 else said


def find_process(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read objective, schedule and timesteps from the buffers, which compute; {} without them.

    Raises UserError for buffers that are none of the library's.
    """
    if "betas" not in state:
        return {}
    try:
        return {
            "objective": objective_name(
                state["loss_weight"].float(), state["alphas_cumprod"].float()
            ),
            "schedule": schedule_name(state["betas"]),
            "timesteps": len(state["betas"]),
        }
    except UNREADABLE as error:
        raise UserError(f"The diffusion process in {path} is none of the library's "
                        f"({one_line(error)}).") from error  # fmt: skip


def schedule_name(betas: Tensor) -> str:
    """Name the library's schedule that has these betas [T], or 'custom'."""
    for name in SCHEDULES:
        expected = getattr(library, f"{name}_beta_schedule")(len(betas))
        if torch.allclose(betas.double(), expected, rtol=1e-3, atol=1e-7):
            return name
    return "custom"


def objective_name(loss_weight: Tensor, alphas_cumprod: Tensor) -> str:
    """Tell what the network predicts from the loss weight [T], the only trace the file has of it.

    The weight is 1 for the noise, SNR for x_0 and SNR / (SNR + 1) for v. Min-SNR weighting
    (Hang 2023) clamps the SNR at 5 or so; the noisy half, where it is below 1, stays as it is.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    expected = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}
    noisy = (snr < 1) & loss_weight.isfinite()  # 0 / 0 where no signal at all is left
    for name, weight in expected.items():
        if torch.allclose(loss_weight[noisy], weight[noisy], rtol=1e-2):
            return name
    raise ValueError("its loss weight fits no objective")


def fill_diffusion(
    shape: Mapping[str, Any],
    process: Mapping[str, Any],
    state: Mapping[str, Any],
    labels: tuple[str, ...],
    path: Path,
) -> GaussianDiffusion:
    """Build a diffusion of this shape and process, and put the weights of a file into it.

    Raises UserError that names what differs, or weights that are not finite.
    """
    # A custom schedule comes in with the file's buffers, which replace those just built.
    known = process["schedule"] if process["schedule"] in SCHEDULES else "sigmoid"
    diffusion = build_diffusion(
        **shape, image_size=process["image_size"], timesteps=process["timesteps"],
        objective=process["objective"], beta_schedule=known, labels=labels, weights_on="meta",
    )  # fmt: skip
    wanted = diffusion.state_dict()
    if "betas" not in state:  # a U-Net alone: the process is the one just built
        state = {
            **{name: wanted[name] for name in wanted if not name.startswith("model.")},
            **state,
        }
    if wrong := compare_networks(state, wanted):
        raise UserError(f"The weights in {path} belong to another network ({'; '.join(wrong)}).")
    diffusion.load_state_dict(
        {name: value.to(torch.float32, copy=True) for name, value in state.items()}, assign=True
    )
    if not diffusion.sqrt_alphas_cumprod.isfinite().all():
        raise UserError(f"The noise schedule in {path} is not finite: its betas go beyond 1.")
    if not all(weight.abs().max() <= LARGEST for weight in diffusion.parameters()):
        raise UserError(f"The weights in {path} are not all finite, or beyond {LARGEST:,}: its "
                        "training diverged.")  # fmt: skip
    return diffusion


# ---- Writing -------------------------------------------------------------------------------------


def export_weights(
    ema_model: GaussianDiffusion, path: Path, step: int, config: Mapping[str, Any]
) -> Path | None:
    """Write the bundled format: EMA parameters in fp16, buffers in fp32, labels, step, settings.

    fp16 halves the file and rounds a weight by at most 1 part in 2,000. A file already there is
    kept under another name, which is returned.
    """
    parameters = {name for name, _ in ema_model.named_parameters()}
    ema = {
        f"ema_model.{name}": (tensor.half() if name in parameters else tensor).contiguous().cpu()
        for name, tensor in ema_model.state_dict().items()
        if name != "label_table"
    }
    state = {"step": step, "version": LIBRARY_VERSION, "ema": ema, "config": dict(config)}
    if ema_model.label_names:
        table = ema_model.label_table.detach().float().cpu()
        state["labels"] = {"names": list(ema_model.label_names), "embedding": table}
    path.parent.mkdir(parents=True, exist_ok=True)
    previous = None
    if path.exists():
        previous = unused_name(path.with_name(f"{path.stem}.previous{path.suffix}"))
        shutil.copy2(path, previous)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    return previous
