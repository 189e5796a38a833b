"""The exercises on a device that is not the CPU: nothing is left behind there."""

import pytest
import torch
from conftest import load_script, write_blocks
from second_device import registered, second  # noqa: F401
from test_exercise2 import QUICK
from tiny_networks import SIZE, bundled, make_diffusion

from ddpm_basics import hardware
from ddpm_basics.fabrics.drawing import TRADITIONS

exercise1, exercise2 = load_script("exercise1_generate"), load_script("exercise2_explore")

SHORT = {"STEP_COUNTS": (2,), "FAST_STEP_COUNTS": (2,), "SAMPLING_STEPS": {"dpmpp": 2, "ddim": 2},
         "REGION_STEPS": 2, "REGION_ROUNDS": 2, "SHORT_STEPS": 2}  # fmt: skip
PARTS = "abefg"  # c and d ask no network, or only for a fabric


@pytest.fixture
def weights(tmp_path):
    table = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
    labels = {"names": sorted(TRADITIONS), "embedding": table}
    path = tmp_path / "told.pt"
    torch.save(bundled(make_diffusion(timesteps=10), labels=labels), path)
    return path


def test_two_devices_do_not_meet(second):  # noqa: F811
    here, there = torch.ones(2), torch.ones(2, device=second)
    with pytest.raises(RuntimeError, match="two devices"):
        here + there
    assert (here + there.cpu()).tolist() == (here.to(second) + there).tolist() == [2, 2]


@pytest.mark.parametrize("sampler", ["dpmpp", "ddim", "ddpm"])
def test_exercise_1(second, weights, tmp_path, monkeypatch, sampler):  # noqa: F811
    monkeypatch.setattr(exercise1, "pick_device", lambda name: second)
    # Inference mode knows no devices in Python.
    monkeypatch.setattr(exercise1, "draw", torch.no_grad()(exercise1.draw.__wrapped__))
    monkeypatch.setitem(exercise1.BATCH_SIZE, second.type, 2)
    words = ["--weights", str(weights), "--num-samples", "3", "--precision", "fp32", "--steps", "4",
             "--sampler", sampler, "--output", str(tmp_path / "drawn.png")]  # fmt: skip
    assert exercise1.main(words) == 0


def test_exercise_2(second, weights, tmp_path, monkeypatch):  # noqa: F811
    for name, value in {**QUICK, **SHORT}.items():
        monkeypatch.setattr(exercise2, name, value)
    monkeypatch.setattr(hardware, "pick_device", lambda name: second)
    monkeypatch.setitem(exercise2.BATCH_SIZE, second.type, 3)
    monkeypatch.setattr("ddpm_basics.steering.CLASSIFIER_FABRICS", 24)
    monkeypatch.setattr("ddpm_basics.evaluation.features.CLASSIFIER_STEPS", 2)
    data = write_blocks(tmp_path / "blocks", 100, SIZE)
    assert exercise2.main(["--part", *PARTS, "--weights", str(weights), "--data", str(data), "--precision", "fp32",
                           "--output-dir", str(tmp_path / "out")]) == 0  # fmt: skip
