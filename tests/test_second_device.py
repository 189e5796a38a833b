"""The exercises on a device that is not the CPU: nothing of theirs is left behind on the CPU.

Each in a process of its own, as a device stays known.
"""

from multiprocessing import get_context

import pytest
import torch
from conftest import load_script, write_blocks
from test_exercise2 import QUICK
from tiny_networks import SIZE, bundled, make_diffusion
from torch.utils import backend_registration

from ddpm_basics import hardware, steering, training
from ddpm_basics.evaluation import features
from ddpm_basics.fabrics.drawing import TRADITIONS

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices in Python",
)
SHORT = {"STEP_COUNTS": (2,), "FAST_STEP_COUNTS": (2,), "SAMPLING_STEPS": {"dpmpp": 2, "ddim": 2},
         "REGION_STEPS": 2, "REGION_ROUNDS": 2, "SHORT_STEPS": 2}  # fmt: skip


def alone(work, *arguments):
    """Call a function in a process of its own."""
    process = get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture
def weights(tmp_path):
    table = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
    labels = {"names": sorted(TRADITIONS), "embedding": table}
    path = tmp_path / "told.pt"
    torch.save(bundled(make_diffusion(timesteps=10), labels=labels), path)
    return path


def meet():
    from second_device import second_device

    device = second_device()
    here, there = torch.ones(2), torch.ones(2, device=device)
    with pytest.raises(RuntimeError, match="two devices"):
        here + there
    assert (here + there.cpu()).tolist() == (here.to(device) + there).tolist() == [2, 2]


def test_two_devices_do_not_meet():
    alone(meet)


def generate(weights, output):
    from second_device import second_device

    device, exercise1 = second_device(), load_script("exercise1_generate")
    exercise1.pick_device = lambda name: device
    exercise1.BATCH_SIZE[device.type] = 2
    # Inference mode lacks such devices.
    exercise1.draw = torch.no_grad()(exercise1.draw.__wrapped__)
    for sampler in ("dpmpp", "ddim", "ddpm"):
        words = ["--weights", str(weights), "--num-samples", "3", "--precision", "fp32",
                 "--steps", "4", "--sampler", sampler,
                 "--output", str(output / f"{sampler}.png")]  # fmt: skip
        assert exercise1.main(words) == 0


def test_exercise_1(weights, tmp_path):
    alone(generate, weights, tmp_path)


def explore(weights, data, output):
    from second_device import second_device

    device, exercise2 = second_device(), load_script("exercise2_explore")
    vars(exercise2).update(QUICK | SHORT)
    hardware.pick_device = lambda name: device
    exercise2.BATCH_SIZE[device.type] = 3
    steering.CLASSIFIER_FABRICS, features.CLASSIFIER_STEPS = 24, 2
    words = ["--part", *"abefg", "--weights", str(weights), "--data", str(data),
             "--output-dir", str(output), "--precision", "fp32"]  # fmt: skip
    assert exercise2.main(words) == 0


def test_exercise_2(weights, tmp_path):
    """Parts c and d ask no network."""
    alone(explore, weights, write_blocks(tmp_path / "blocks", 100, SIZE), tmp_path / "out")


def train(data, folder):
    from second_device import second_device

    device, exercise3 = second_device(), load_script("exercise3_train")
    exercise3.pick_device = lambda name: device
    exercise3.Accelerator.device = device
    generator = type("Generator", (torch.Generator,), {"device": device})
    training.seeded = lambda words, device: generator().manual_seed(len(words))
    # Inference mode lacks such devices.
    for name in ("draw_samples", "fixed_losses"):
        setattr(exercise3, name, torch.no_grad()(getattr(exercise3, name).__wrapped__))
    words = ["--train", "--data", str(data), "--image-size", "8", "--dim", "8", "--dim-mults", "1",
             "2", "--batch-size", "4", "--precision", "fp32", "--results-dir", str(folder / "run"),
             "--weights-out", str(folder / "run.pt"), "--save-every", "2", "--steps"]  # fmt: skip
    assert exercise3.main([*words, "2"]) == 0
    assert exercise3.main([*words, "3", "--resume"]) == 0


def test_exercise_3(tiny_data, tmp_path):
    alone(train, tiny_data, tmp_path)
