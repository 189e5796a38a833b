"""hardware.py: the device and precision chosen, networks made ready, memory kept."""

import copy
import ctypes
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tiny_networks import SIZE, make_diffusion

from ddpm_basics import hardware
from ddpm_basics.console import UserError
from ddpm_basics.model import build_diffusion

CPU, GPU = torch.device("cpu"), torch.device("cuda")


# ---- Device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("mps", [True, False])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(hardware, "try_gpu", lambda: "")
    expected = "cuda" if cuda else "mps" if mps else "cpu"
    assert hardware.pick_device("auto").type == expected
    assert hardware.pick_device("cpu") == CPU
    for name, there in (("cuda", cuda), ("mps", mps)):
        if there:
            assert hardware.pick_device(name).type == name
        else:
            with pytest.raises(UserError, match=f"has no {name}: use --device auto"):
                hardware.pick_device(name)


def test_a_gpu_that_this_build_has_no_kernels_for(monkeypatch, capsys):
    def fail(*_, device, **__):
        assert device == "cuda:1", "each process tries its own"
        raise torch.AcceleratorError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "somewhere")  # a launcher has started it
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "ones", fail)
    assert hardware.pick_device("auto") == CPU
    words = "The GPU cannot be used (CUDA error: no kernel image is available)"
    assert capsys.readouterr().out == f"{words}: using the CPU instead.\n"
    with pytest.raises(UserError, match=f"{re.escape(words)}: use --device cpu"):
        hardware.pick_device("cuda")
    assert hardware.pick_device("cpu") == CPU


def test_one_of_several_processes_needs_a_place_to_meet(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="no MASTER_ADDR"):
        hardware.pick_device("cpu")


def test_the_hardware_has_a_name(monkeypatch):
    assert hardware.describe(CPU).startswith("CPU (")
    assert hardware.describe(CPU).endswith(f", {torch.get_num_threads()} threads)")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    assert hardware.describe(GPU) == "NVIDIA H100"
    assert hardware.describe(torch.device("mps")) == f"Apple GPU ({platform.machine()})"


@pytest.mark.parametrize(
    ("flags", "named"),
    [("sse avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "amx_bf16, "),
     ("avx2 avx512f avx512_bf16", "avx512_bf16, "), ("sse avx2 fma", "avx2, "), ("sse", "")],
)  # fmt: skip
def test_the_fastest_units_of_a_processor_are_named(monkeypatch, flags, named):
    info = f"processor : 0\nmodel name\t: Some CPU @ 2.50GHz\nflags\t\t: {flags}\n"
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: info)
    threads = torch.get_num_threads()
    assert hardware.describe(CPU) == f"CPU (Some CPU @ 2.50GHz, {named}{threads} threads)"


# ---- Precision -----------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """pretend(fp32=1.0, bf16=...): how long the trial takes in each precision."""

    def set_times(**seconds):
        def measure(device, diffusion, precision):
            if precision not in seconds:
                raise RuntimeError(f"{precision} is not implemented")
            return seconds[precision]

        monkeypatch.setattr(hardware, "seconds_per_block", measure)

    return set_times


def test_another_precision_has_to_be_worth_it(pretend, monkeypatch):
    def auto(device=CPU, **seconds):
        pretend(**seconds)
        return hardware.pick_precision("auto", device, make_diffusion())

    assert auto(fp32=1.0, bf16=0.5) == "bf16"
    assert auto(fp32=1.0, bf16=0.85) == "bf16"
    assert auto(fp32=1.0, bf16=0.89) == "fp32", "it is not 15 percent faster"
    assert auto(fp32=1.0, bf16=2.0) == "fp32", "emulated"
    assert auto(fp32=1.0) == "fp32", "it cannot be tried"
    for capability, expected in {(7, 5): "fp16", (8, 0): "fp32"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert auto(GPU, fp32=1.0, fp16=0.3) == expected, "fp16 is for GPUs without bf16"


def test_the_trial_is_the_networks_own_work():
    """More of it takes longer; this machine's choice follows from the times."""
    small, large = (build_diffusion(dim, (1, 2), image_size=32) for dim in (8, 64))
    before = {key: value.clone() for key, value in large.state_dict().items()}
    for precision in ("fp32", "bf16"):
        seconds = [hardware.seconds_per_block(CPU, net, precision) for net in (small, large)]
        assert 0 < seconds[0] < seconds[1] < 5
    assert hardware.pick_precision("auto", CPU, large) in ("fp32", "bf16")
    after = large.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_first_process_tries_and_tells_the_others(pretend, monkeypatch):
    pretend(fp32=1.0, bf16=0.1)
    monkeypatch.setattr(
        hardware, "broadcast_object_list", lambda found: found.__setitem__(0, "fp32")
    )
    for first in (True, False):
        team = SimpleNamespace(num_processes=2, is_main_process=first)
        assert hardware.pick_precision("auto", CPU, make_diffusion(), team) == "fp32"


def test_a_precision_that_is_named_is_taken():
    diffusion = make_diffusion()
    for name in ("fp32", "bf16", "fp16"):
        assert hardware.pick_precision(name, GPU, diffusion) == name
    assert hardware.pick_precision("bf16", CPU, diffusion) == "bf16"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        hardware.pick_precision("fp16", CPU, diffusion)


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
