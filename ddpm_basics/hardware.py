"""Where to compute, in which precision, and memory that is kept."""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from denoising_diffusion_pytorch import GaussianDiffusion

from ddpm_basics.console import UserError

PROBE_IMAGES, PROBE_RUNS = 4, 3  # of a trial of a precision: tens of milliseconds
WORTHWHILE = 1.15  # speed-up over fp32 that another precision has to reach
UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # of processors, the fastest first
FORGOTTEN = ("ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP",
             "ACCELERATE_USE_MEGATRON_LM")  # fmt: skip
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def forget_environment() -> None:
    """Forget what the environment says against the command line, since accelerate follows it.

    That is a device, other ways of training (DeepSpeed and the like), and the rank of a process
    that no launcher has started. Raises UserError where that would be one of several.
    """
    unlaunched = () if "MASTER_ADDR" in os.environ else ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if unlaunched and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("WORLD_SIZE speaks of several processes, but there is no MASTER_ADDR where "
                        "they meet: start them by torchrun or accelerate launch.")  # fmt: skip
    for name in (*FORGOTTEN, *unlaunched):
        os.environ.pop(name, None)


def pick_device(name: str) -> torch.device:
    """Return the device for auto, cpu, cuda or mps; auto takes a GPU where there is one that works.

    From now on the environment has no say in it. Raises UserError for one that this machine or this
    build of torch does not have.
    """
    forget_environment()
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name in ("auto", "cuda") and available["cuda"] and (trouble := try_gpu()):
        if name == "cuda":
            raise UserError(f"The GPU cannot be used ({trouble}): use --device cpu.")
        print(f"The GPU cannot be used ({trouble}): using the CPU instead.", flush=True)
        available["cuda"] = False
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"This machine or this build of torch has no {name}: use --device auto.")
    return torch.device(name)


def try_gpu() -> str:
    """Compute something on the GPU, this process' own one; return what is wrong, or ""."""
    place = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    try:
        torch.ones(1, device=f"cuda:{place}").add(1).item()
    except RuntimeError as error:  # a build of torch may have no kernels for it
        return str(error).splitlines()[0]
    return ""


def pick_precision(
    name: str,
    device: torch.device,
    diffusion: GaussianDiffusion,
    team: PartialState | None = None,
) -> str:
    """Return the precision, fp32, bf16 or fp16, that the network computes in.

    auto takes what is fastest here, in a trial of the network's first block; of several processes
    the first one tries, and tells the others. Raises UserError for fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU: on a CPU choose fp32 or bf16.")
    if name != "auto":
        return name
    chosen = [fastest_precision(device, diffusion) if not team or team.is_main_process else ""]
    if team and team.num_processes > 1:
        broadcast_object_list(chosen)
    return chosen[0]


def fastest_precision(device: torch.device, diffusion: GaussianDiffusion) -> str:
    """Return the faster of fp32 and bf16, or fp16 on a GPU without bf16 units.

    What the hardware promises does not tell: of two Xeons with instructions for bf16, one convolves
    in it three times as fast as in fp32, the other half as fast.
    """
    old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    reduced = "fp16" if old_gpu else "bf16"
    try:
        exact = seconds_per_block(device, diffusion, "fp32")
        faster = exact > WORTHWHILE * seconds_per_block(device, diffusion, reduced)
    except RuntimeError:  # of a device that does not know the precision
        return "fp32"
    return reduced if faster else "fp32"


@torch.inference_mode()
def seconds_per_block(device: torch.device, diffusion: GaussianDiffusion, precision: str) -> float:
    """Time the first residual block of the U-Net on PROBE_IMAGES images; the best of a few runs."""
    wait: dict[str, Callable[[], None]] = {
        "cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}  # fmt: skip
    block = copy.deepcopy(diffusion.model.downs[0][0]).to(device, PRECISIONS[precision])
    block.to(memory_format=torch.channels_last)
    x = torch.randn(PROBE_IMAGES, block.block1.proj.in_channels, *diffusion.image_size)
    x = x.to(device, PRECISIONS[precision], memory_format=torch.channels_last)
    seconds = []
    for _ in range(PROBE_RUNS + 1):  # the first one warms up
        started = time.perf_counter()
        with autocast(device, precision):
            block(x)
        wait.get(device.type, lambda: None)()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which networks compute in a precision; sums outside stay in fp32."""
    reduced = precision != "fp32"
    dtype = PRECISIONS[precision] if reduced else None
    return torch.autocast(device.type, dtype=dtype, enabled=reduced)


def prepare_to_sample(diffusion: GaussianDiffusion, device: torch.device, precision: str) -> None:
    """Move a network to its device in the memory layout and precision it computes fastest in.

    Autocast alone would convert the weights of the convolutions at every step again, and leave
    the gains of the norms in fp32: their products would be fp32, too, and with them every
    activation up to the next convolution, twice the memory to read and write.
    """
    keep_freed_memory()
    diffusion.to(device, memory_format=torch.channels_last)
    diffusion.model.to(PRECISIONS[precision])


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor (glibc, that is, most Linux).

    By default it returns every block above 32 MB to the kernel and asks for a new one, which the
    kernel fills with zeros page by page: a third of a training step with 32 images. Elsewhere
    this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    no_mapped_blocks, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    mallopt(no_mapped_blocks, 0)
    mallopt(trim_threshold, -1)


def describe(device: torch.device) -> str:
    """Name the hardware so that a person recognises it: the GPU, or the processor.

    Of a processor's units, the fastest is named: it decides more than the model does.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    name = found[1] if found else platform.processor() or platform.machine()
    units = [f"{unit}, " for unit in UNITS if unit in text.split()]
    return f"CPU ({name}, {''.join(units[:1])}{torch.get_num_threads()} threads)"
