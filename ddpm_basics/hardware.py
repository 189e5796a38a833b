"""Where to compute, in which precision, and memory that is kept."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

import torch

from ddpm_basics.console import UserError


def pick_device(name):
    """Return the torch.device for auto, cpu, cuda or mps; auto takes a GPU where there is one."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"This machine or this build of torch has no {name}: use --device auto.")
    return torch.device(name)


def pick_precision(name, device):
    """Return the dtype the network computes in: auto takes bf16 where the hardware has it.

    Everything outside the network stays in fp32. Without bf16 units a CPU would only emulate it,
    which is slower than fp32, so auto looks for them in the CPU's flags.
    """
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    elif name == "auto":
        flags = Path("/proc/cpuinfo")  # Linux only; elsewhere fp32 is always right
        has_bf16 = device.type == "cpu" and flags.exists() and re.search(
            r"\b(avx512_bf16|amx_bf16|bf16)\b", flags.read_text())  # fmt: skip
        name = "bf16" if has_bf16 else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU: use --precision auto on a CPU.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def keep_freed_memory():
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


def prepare_network(diffusion, device, precision, compiled):
    """Move the network to its device in the memory layout and precision it computes fastest in.

    Autocast alone would convert the weights of the convolutions at every step again, and leave
    the gains of the norms in fp32: their products would be fp32, too, and with them every
    activation up to the next convolution, twice the memory to read and write.
    """
    keep_freed_memory()
    diffusion.to(device, memory_format=torch.channels_last)
    diffusion.model.to(precision)
    if compiled:
        diffusion.model.compile(dynamic=False)


def device_name(device: torch.device) -> str:
    """A name that a person recognises: the GPU's, or the processor's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU ({name}, {torch.get_num_threads()} threads)"


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise the errors of CUDA, of the CPU's allocator and of Python itself."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
