"""models/ddpm_african_fabrics.pt: the file that ships is whole, fits its card, and works."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from PIL import Image

WEIGHTS = ROOT / "models" / "ddpm_african_fabrics.pt"

# Mean squared error of the predicted noise on held-out fabrics, mean over t. An untrained network
# has about 1, and so has the answer "no noise at all".
ERROR_BOUND = 0.25


@pytest.fixture(scope="module")
def exercise1():
    return load_script("exercise1_generate")


@pytest.fixture(scope="module")
def loaded(exercise1):
    return exercise1.load_weights(WEIGHTS)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """24 fabrics that no training run has seen, two of each tradition, in [-1, 1]."""
    folder = tmp_path_factory.mktemp("heldout") / "fabrics"
    command = [sys.executable, str(ROOT / "prepare_fabrics.py"), "--split", "heldout"]
    subprocess.run([*command, "--count", "24", "--output", str(folder)], check=True)
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*/*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_the_card_names_this_file():
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert digest in (ROOT / "models" / "README.rst").read_text()
    assert WEIGHTS.stat().st_size < 75e6


def test_it_is_the_courses_network(loaded):
    _, facts = loaded
    assert facts["parameters"] == 35_711_491
    assert facts["objective"] == "pred_noise"
    assert facts["beta_schedule"] == "sigmoid"
    assert facts["timesteps"] == 1000
    assert facts["image_size"] == 64


def test_it_says_how_it_was_made():
    checkpoint = torch.load(WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
    training = checkpoint["config"]["training"]
    for key in ("effective_batch", "seed", "lr", "hardware", "seconds", "steps_done"):
        assert training[key] is not None
    assert checkpoint["config"]["data"]["images"] == 1059
    assert {v.dtype for k, v in checkpoint["ema"].items() if ".model." in k} == {torch.float16}


def test_it_predicts_the_noise_in_unseen_fabrics(loaded, heldout):
    diffusion, _ = loaded
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(heldout.shape, generator=generator)
    t = torch.arange(len(heldout)) * 1000 // len(heldout) + 20
    with torch.inference_mode():
        x_t = diffusion.q_sample(heldout, t, noise)
        error = (diffusion.model(x_t, t) - noise).square().mean()
    assert error < ERROR_BOUND
    assert (x_t - noise).square().mean() > ERROR_BOUND  # the bound is not for nothing


def test_its_fabrics_have_the_colours_of_fabrics(exercise1, loaded, heldout):
    """Mean brightness and contrast of four samples lie in the range of real ones."""
    diffusion, _ = loaded
    x_T, _ = exercise1.starting_noise(range(4), (3, 64, 64))
    images = exercise1.sample_dpmpp(diffusion, x_T, 10)
    real = (heldout + 1) / 2
    contrast, means = real.std(dim=(1, 2, 3)), real.mean(dim=(1, 2, 3))
    assert contrast.min() * 0.8 < images.std(dim=(1, 2, 3)).mean() < contrast.max()
    assert means.min() < images.mean() < means.max()
    assert images.min() >= 0
    assert images.max() <= 1


def test_readmes_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    """Only with fewer steps and images, which change nothing but the time."""
    text = (ROOT / "README.rst").read_text()
    block = re.search(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text)[1]
    code = "\n".join(line[4:] for line in block.splitlines())
    assert "sampling_timesteps=250" in code
    assert "batch_size=4" in code
    code = code.replace("sampling_timesteps=250", "sampling_timesteps=2")
    code = code.replace("batch_size=4", "batch_size=1")
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    assert names["images"].shape == (1, 3, 64, 64)
    assert 0 <= names["images"].min() <= names["images"].max() <= 1
