"""hardware.py: the device and precision chosen, networks made ready, memory kept."""

import copy
import ctypes
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny_networks import SIZE, make_diffusion

from ddpm_basics import hardware
from ddpm_basics.console import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


# ---- Device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("mps", [True, False])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    expected = "cuda" if cuda else "mps" if mps else "cpu"
    assert hardware.pick_device("auto").type == expected
    assert hardware.pick_device("cpu") == CPU
    for name, there in (("cuda", cuda), ("mps", mps)):
        if there:
            assert hardware.pick_device(name).type == name
        else:
            with pytest.raises(UserError, match=f"has no {name}: use --device auto"):
                hardware.pick_device(name)


def test_the_hardware_has_a_name(monkeypatch):
    assert hardware.describe(CPU).startswith("CPU (")
    assert hardware.describe(CPU).endswith(f", {torch.get_num_threads()} threads)")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    assert hardware.describe(GPU) == "NVIDIA H100"
    assert hardware.describe(torch.device("mps")) == f"Apple GPU ({platform.machine()})"


# ---- Precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512f avx512_bf16", "bf16"), ("fpu amx_bf16 amx_tile", "bf16"),
     ("fp asimd bf16 i8mm", "bf16"), ("fpu avx2 avx512f", "fp32"), (None, "fp32")],
)  # fmt: skip
def test_auto_is_what_a_cpu_computes_fast(monkeypatch, tmp_path, flags, expected):
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert hardware.pick_precision("auto", CPU) == ("bf16" if native else "fp32")
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(hardware, "Path", lambda _: info)
    assert hardware.pick_precision("auto", CPU) == expected
    assert hardware.pick_precision("auto", torch.device("mps")) == "fp32"


def test_auto_is_what_a_gpu_computes_fast(monkeypatch):
    for capability, expected in {(7, 5): "fp32", (8, 0): "bf16", (9, 0): "bf16"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert hardware.pick_precision("auto", GPU) == expected


def test_a_precision_that_is_named_is_taken():
    for name in ("fp32", "bf16", "fp16"):
        assert hardware.pick_precision(name, GPU) == name
    assert hardware.pick_precision("bf16", CPU) == "bf16"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        hardware.pick_precision("fp16", CPU)


@pytest.mark.parametrize(("precision", "dtype"), list(hardware.PRECISIONS.items()))
def test_networks_compute_in_it_and_sums_outside_do_not(precision, dtype):
    x = torch.rand(4, 4)
    with hardware.autocast(CPU, precision):
        assert (x @ x).dtype == dtype
        assert (x + x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_made_ready_to_sample(precision):
    """Every activation is of the precision, the process stays as exact as it was."""
    diffusion, others = make_diffusion().eval(), set()
    ready = copy.deepcopy(diffusion)
    hardware.prepare_to_sample(ready, CPU, precision)
    dtype = hardware.PRECISIONS[precision]
    assert {p.dtype for p in ready.model.parameters()} == {dtype}
    assert torch.equal(ready.alphas_cumprod, diffusion.alphas_cumprod)
    kernels = [p for p in ready.model.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    for layer in ready.model.modules():
        layer.register_forward_hook(
            lambda layer, _, y: others.update({type(layer).__name__} if y.dtype != dtype else ())
        )
    x_t, t = torch.randn(1, 3, SIZE, SIZE), torch.tensor([500])
    with torch.inference_mode(), hardware.autocast(CPU, precision):
        output = ready.model(x_t, t)
    assert output.dtype == dtype
    assert others <= {"SinusoidalPosEmb"}, "of t, before the first weights"
    with torch.inference_mode():
        expected = diffusion.model(x_t, t)
    assert (output - expected).abs().max() < (0.1 if precision == "bf16" else 1e-5)


# ---- Memory that is kept -------------------------------------------------------------------------


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_kept():
    """Tensors of 64 MB cost their page faults once, and then no more.

    Up to a few times more: a small allocation may settle in the block that was freed, which the
    next tensor then no longer fits into.
    """
    script = """
import resource, torch
from ddpm_basics.hardware import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(16 << 20).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
keep_freed_memory()
print(before, min(faults() for _ in range(5)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after < before / 10


def test_elsewhere_memory_is_left_alone(monkeypatch):
    def load(_):
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # a C library without mallopt
    hardware.keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", load)
    hardware.keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    hardware.keep_freed_memory()
