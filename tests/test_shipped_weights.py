"""models/ddpm_african_fabrics.pt: the file that ships is whole, fits its card, and works."""

import hashlib
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from PIL import Image

from ddpm_basics.evaluation.distances import random_directions, sliced_wasserstein
from ddpm_basics.evaluation.features import RandomConvolutions, patch_features, standardise
from ddpm_basics.hardware import pick_precision, prepare_to_sample
from ddpm_basics.images import from_picture
from ddpm_basics.weight_files import load_weights

WEIGHTS = ROOT / "models" / "ddpm_african_fabrics.pt"

# Mean squared error of the predicted noise on held-out fabrics, mean over t. An untrained network
# has about 1, and so has the answer "no noise at all".
ERROR_BOUND = 0.25
SAMPLES = 64
# What 64 of its fabrics may be off by. First weights of a long road (models/README.rst): the bounds
# keep out a bad file, and ought to be drawn tighter with better weights.
BANDS = {
    "mean of a channel, difference": (-0.12, 0.12),  # on pixels from 0 to 1
    "contrast inside a fabric, ratio": (0.75, 1.25),
    "spread of the fabrics' mean colours, ratio": (0.75, 1.4),
    "patches, distance over floor": (0, 2.2),
    "convolutions, distance over floor": (0, 2.7),
}


@pytest.fixture(scope="module")
def exercise1():
    return load_script("exercise1_generate")


@pytest.fixture(scope="module")
def loaded():
    return load_weights(WEIGHTS)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """240 fabrics that no training run has seen, the traditions in turn, in [0, 1]."""
    folder = tmp_path_factory.mktemp("heldout") / "fabrics"
    command = [sys.executable, "-m", "ddpm_basics.fabrics", "--split", "heldout"]
    subprocess.run([*command, "--count", "240", "--output", str(folder)], check=True, cwd=ROOT)
    order = sorted(folder.glob("*/*.png"), key=lambda path: (path.stem, path.parent.name))
    pictures = [np.asarray(Image.open(path)) for path in order]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def heldout(unseen):
    """24 of them, two of each tradition, in [-1, 1]."""
    return unseen[:24] * 2 - 1


@pytest.fixture(scope="module")
def drawn(exercise1):
    """64 fabrics in [0, 1], as exercise 1 draws them from the weights, but in fewer steps."""
    diffusion, _ = load_weights(WEIGHTS)
    device = torch.device("cpu")
    precision = pick_precision("auto", device)
    prepare_to_sample(diffusion, device, precision)
    options = Namespace(seed=0, sampler="dpmpp", steps=8, batch_size=8, samples_dir=None)
    shown = exercise1.draw_all(diffusion, list(range(SAMPLES)), options, precision, False)
    return torch.stack([torch.from_numpy(from_picture(picture)) for picture in shown.values()])


def test_the_card_names_this_file():
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert digest in (ROOT / "models" / "README.rst").read_text()
    assert WEIGHTS.stat().st_size < 75e6


def test_it_is_the_courses_network(loaded):
    _, facts = loaded
    assert facts.parameters == 35_711_491
    assert (facts.dim, facts.dim_mults, facts.channels) == (64, (1, 2, 4, 8), 3)
    assert (facts.objective, facts.beta_schedule) == ("pred_noise", "sigmoid")
    assert (facts.timesteps, facts.image_size) == (1000, 64)
    assert facts.assumed == ()


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


def distance(images, unseen, space):
    """Sliced Wasserstein distance of 64 images to unseen fabrics, by ddpm_basics.evaluation."""
    places = torch.rand(SAMPLES, 8, 2, generator=torch.Generator().manual_seed(0))
    features = {
        name: patch_features(x, places)
        if space == "patches" else RandomConvolutions()(x)
        for name, x in {"samples": images, "heldout": unseen}.items()
    }  # fmt: skip
    points = {name: own.flatten(0, 1) for name, own in standardise(features).items()}
    generator = torch.Generator().manual_seed(1)
    directions = random_directions(points["heldout"].shape[1], 128, generator)
    return sliced_wasserstein(points["samples"], points["heldout"], directions)


def faults(images, unseen):
    """The bands that 64 images leave, against unseen fabrics: {what: values}."""
    reference, others = unseen[:SAMPLES], unseen[SAMPLES : 2 * SAMPLES]
    inside = images.std(dim=(2, 3)).mean(0) / unseen.std(dim=(2, 3)).mean(0)
    palette = images.mean(dim=(2, 3)).std(0) / unseen.mean(dim=(2, 3)).std(0)
    measured = {
        "mean of a channel, difference": (images - unseen.mean(dim=(0, 2, 3), keepdim=True))
        .mean(dim=(0, 2, 3)).tolist(),
        "contrast inside a fabric, ratio": inside.tolist(),
        "spread of the fabrics' mean colours, ratio": palette.tolist(),
    }  # fmt: skip
    for space in ("patches", "convolutions"):
        floor = distance(others, reference, space)
        measured[f"{space}, distance over floor"] = [distance(images, reference, space) / floor]
    return {
        what: values
        for what, values in measured.items()
        if not all(BANDS[what][0] < value < BANDS[what][1] for value in values)
    }


def test_its_fabrics_are_near_unseen_ones(drawn, unseen):
    """64 samples against 64 unseen fabrics, in units of the distance between 64 and 64 of those."""
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert faults(drawn, unseen) == {}


def test_no_bad_file_gets_through(unseen):
    """What untrained, broken and half-trained networks draw: noise, flat colours, a blur."""
    others = unseen[SAMPLES : 2 * SAMPLES]
    noise = torch.rand(others.shape, generator=torch.Generator().manual_seed(2))
    bad = {
        "noise": noise,
        "flat": others.mean(dim=(2, 3), keepdim=True).expand_as(others),
        "blurred": torch.nn.functional.avg_pool2d(others, 9, 1, 4, count_include_pad=False),
        "washed out": (others + 1) / 2,
        "one fabric": others[:1].expand_as(others),
    }
    passed = [name for name, images in bad.items() if not faults(images, unseen)]
    assert passed == []
    assert faults(others, unseen) == {}, "and the real ones pass"


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
