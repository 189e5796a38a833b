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
SAMPLES = 64
MEAN_BAND = 0.12  # of a channel's mean, on pixels from 0 to 1
SPREAD_BAND = 1.35  # factor between the spreads of samples and fabrics, either way
DISTANCE_BOUND = {"patches": 2.0, "convolutions": 2.0}  # of 64 samples, in units of the floor


@pytest.fixture(scope="module")
def exercise1():
    return load_script("exercise1_generate")


@pytest.fixture(scope="module")
def loaded(exercise1):
    return exercise1.load_weights(WEIGHTS)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """240 fabrics that no training run has seen, the traditions in turn, in [0, 1]."""
    folder = tmp_path_factory.mktemp("heldout") / "fabrics"
    command = [sys.executable, str(ROOT / "prepare_fabrics.py"), "--split", "heldout"]
    subprocess.run([*command, "--count", "240", "--output", str(folder)], check=True)
    order = sorted(folder.glob("*/*.png"), key=lambda path: (path.stem, path.parent.name))
    pictures = [np.asarray(Image.open(path)) for path in order]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def heldout(unseen):
    """24 of them, two of each tradition, in [-1, 1]."""
    return unseen[:24] * 2 - 1


@pytest.fixture(scope="module")
def drawn(exercise1, loaded):
    """64 fabrics that the weights draw, in [0, 1]."""
    diffusion, _ = loaded
    precision = exercise1.pick_precision("auto", torch.device("cpu"))
    x_T, _ = exercise1.starting_noise(range(SAMPLES), (3, 64, 64))
    parts = [exercise1.sample_dpmpp(diffusion, part, 8, precision=precision)
             for part in x_T.to(memory_format=torch.channels_last).split(4)]  # fmt: skip
    return torch.cat(parts)


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


def test_its_fabrics_have_the_colours_of_fabrics(drawn, unseen):
    """Means and spreads of the three channels, over 64 samples, against unseen fabrics."""
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    for channel in range(3):
        ours, real = drawn[:, channel], unseen[:, channel]
        assert abs(ours.mean() - real.mean()) < MEAN_BAND, channel
        assert 1 / SPREAD_BAND < ours.std() / real.std() < SPREAD_BAND, channel
        within = ours.std(dim=(1, 2)).mean() / real.std(dim=(1, 2)).mean()
        assert 1 / SPREAD_BAND < within < SPREAD_BAND, f"contrast inside a fabric, {channel}"


def distance(evaluation, images, unseen, space):
    """Sliced Wasserstein distance of 64 images to unseen fabrics, by evaluate_fabrics.py."""
    places = torch.rand(SAMPLES, 8, 2, generator=torch.Generator().manual_seed(0))
    features = {
        name: evaluation.patch_features(x, places)
        if space == "patches" else evaluation.RandomConvolutions()(x)
        for name, x in {"samples": images, "heldout": unseen}.items()
    }  # fmt: skip
    points = {name: own.flatten(0, 1) for name, own in evaluation.standardise(features).items()}
    generator = torch.Generator().manual_seed(1)
    directions = evaluation.random_directions(points["heldout"].shape[1], 128, generator)
    return evaluation.sliced_wasserstein(points["samples"], points["heldout"], directions)


@pytest.mark.parametrize("space", ["patches", "convolutions"])
def test_its_fabrics_are_near_unseen_ones(drawn, unseen, space):
    """64 samples against 64 unseen fabrics, in units of the distance between 64 and 64 of those.

    That a bad file cannot pass is seen with three bad sets: noise, blurred fabrics, flat colours.
    """
    evaluation = load_script("evaluate_fabrics")
    reference, others = unseen[:SAMPLES], unseen[SAMPLES : 2 * SAMPLES]
    floor = distance(evaluation, others, reference, space)
    assert distance(evaluation, drawn, reference, space) < DISTANCE_BOUND[space] * floor
    blurred = torch.nn.functional.avg_pool2d(others, 9, 1, 4, count_include_pad=False)
    flat = others.mean(dim=(2, 3), keepdim=True).expand_as(others)
    for bad in (torch.rand_like(others), blurred, flat):
        assert distance(evaluation, bad, reference, space) > DISTANCE_BOUND[space] * floor


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
