"""models/ddpm_african_fabrics.pt: the file that ships is whole, fits its card, and works."""

import csv
import hashlib
import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from PIL import Image

from ddpm_basics.evaluation.distances import random_directions, sliced_wasserstein
from ddpm_basics.evaluation.features import RandomConvolutions, patch_features, standardise
from ddpm_basics.fabrics.folder import TRADITIONS
from ddpm_basics.hardware import prepare_to_sample
from ddpm_basics.images import from_picture
from ddpm_basics.model import LabelledUnet
from ddpm_basics.training import loss_weights
from ddpm_basics.weight_files import load_weights

WEIGHTS = ROOT / "models" / "ddpm_african_fabrics.pt"

# The training loss on held-out fabrics, without and with labels; untrained it is about 0.6.
ERROR_BOUNDS = {"none": 0.112, "labels": 0.108}
SAMPLES = 64
# What 64 of its fabrics may be off by, drawn in few steps, with the labels in turn at w = 1.
BANDS = {
    "mean of a channel, difference": (-0.06, 0.06),  # on pixels from 0 to 1
    "contrast inside a fabric, ratio": (0.78, 1.1),
    "spread of the fabrics' mean colours, ratio": (0.8, 1.25),
    "patches, distance over floor": (0, 1.7),
    "convolutions, distance over floor": (0, 1.8),
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
    diffusion, facts = load_weights(WEIGHTS)
    prepare_to_sample(diffusion, torch.device("cpu"), "fp32")
    options = Namespace(seed=0, sampler="dpmpp", steps=8, batch_size=8, samples_dir=None,
                        labels=facts.labels, guidance=1.0)  # fmt: skip
    shown = exercise1.draw_all(diffusion, list(range(SAMPLES)), options, "fp32", False)
    return torch.stack([torch.from_numpy(from_picture(picture)) for picture in shown.values()])


def test_the_card_names_this_file():
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert digest in (ROOT / "models" / "README.md").read_text()
    assert WEIGHTS.stat().st_size < 75e6


def test_it_is_the_courses_network(loaded):
    _, facts = loaded
    assert facts.parameters == 35_711_491
    assert (facts.dim, facts.dim_mults, facts.channels) == (64, (1, 2, 4, 8), 3)
    assert (facts.objective, facts.schedule) == ("pred_v", "sigmoid")
    assert (facts.timesteps, facts.image_size) == (1000, 64)
    assert facts.assumed == ()
    assert facts.labels == tuple(sorted(TRADITIONS))


def test_it_says_how_it_was_made():
    checkpoint = torch.load(WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
    config = checkpoint["config"]
    record = json.loads((ROOT / "training_results/reference/run.json").read_text())
    for key in ("objective", "schedule", "timesteps", "image_size", "channels", "dim", "dim_mults",
                "data_version", "data_seed", "num_images"):  # fmt: skip
        assert config[key] == record[key], key
    assert checkpoint["step"] == record["steps_done"]
    assert {v.dtype for k, v in checkpoint["ema"].items() if ".model." in k} == {torch.float16}


def test_the_card_tells_its_record():
    """The numbers in the card's text are those of the run."""
    reference, card = ROOT / "training_results/reference", (ROOT / "models/README.md").read_text()
    run = json.loads((reference / "run.json").read_text())
    told = [f"{run[key]:,}" for key in ("steps_done", "num_images", "seconds", "warmup")]
    with (reference / "heldout.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told += [f"{float(rows[i][key]):.4f}" for i in (0, -1) for key in ("labelled", "plain")]
    assert [number for number in told if number not in card] == []


def test_it_predicts_v_of_unseen_fabrics(loaded, heldout):
    """With its label better than without one, and with a wrong one worse."""
    diffusion, _ = loaded
    network, weight = LabelledUnet(diffusion), loss_weights(diffusion, "min5")
    noise = torch.randn(heldout.shape, generator=torch.Generator().manual_seed(0))
    t = torch.arange(24) % 12 * 80 + torch.arange(24) // 12 * 40 + 20  # each label early and late
    labels = torch.arange(24) % 12
    losses = {}
    with torch.inference_mode():
        x_t, v = diffusion.q_sample(heldout, t, noise), diffusion.predict_v(heldout, t, noise)
        for name, told in {"none": torch.tensor(-1), "labels": labels,
                           "wrong": labels.roll(1)}.items():  # fmt: skip
            errors = (network(x_t, t, told.expand(24)) - v).square().mean(dim=(1, 2, 3))
            losses[name] = (errors * weight[t]).mean().item()
    assert losses["labels"] < losses["none"] < losses["wrong"], losses
    assert all(losses[name] < bound for name, bound in ERROR_BOUNDS.items()), losses


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


COURSE = """
model = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=3)
diffusion = GaussianDiffusion(model, image_size=64, timesteps=1000, sampling_timesteps=250)
checkpoint = torch.load('models/ddpm_african_fabrics.pt', map_location='cpu')
ema_state = checkpoint['ema']
state_dict = {k.replace('ema_model.', ''): v for k, v in ema_state.items()\
 if k.startswith('ema_model.')}
diffusion.load_state_dict(state_dict)
"""


def test_the_courses_quick_start_runs_word_for_word(loaded, monkeypatch):
    """Also where README and the model card show it. What it loads is the network that ours is."""
    for page in ("README.rst", "models/README.md"):
        text = "\n".join(line.strip() for line in (ROOT / page).read_text().splitlines())
        assert COURSE in f"\n{text}", page
    monkeypatch.chdir(ROOT)
    names = {"torch": torch, "Unet": Unet, "GaussianDiffusion": GaussianDiffusion}
    exec(COURSE, names)
    theirs, ours = names["diffusion"], loaded[0]
    assert (theirs.objective, theirs.sampling_timesteps) == ("pred_v", 250)
    state = ours.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    monkeypatch.setattr(theirs, "sampling_timesteps", 3)
    images = theirs.sample(batch_size=1)
    assert images.shape == (1, 3, 64, 64)
    assert 0 <= images.min() <= images.max() <= 1
    assert images.std() > 0.05
