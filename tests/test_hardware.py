"""hardware.py: what can be computed where, and memory that is kept."""

import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from ddpm_basics.console import UserError
from ddpm_basics.hardware import PRECISIONS, autocast, pick_device, pick_precision

CPU = torch.device("cpu")


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"has no {name}: use --device auto"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_precisions(monkeypatch):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        pick_precision("fp16", CPU)
    assert pick_precision("bf16", CPU) == "bf16"
    assert pick_precision("auto", CPU) in ("fp32", "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert pick_precision("auto", torch.device("cuda")) == "fp32", "bf16 is slow there"
    assert pick_precision("fp16", torch.device("cuda")) == "fp16"
    for name in ("fp32", "bf16"):
        with autocast(CPU, name):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == PRECISIONS[name]


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
