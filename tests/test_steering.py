"""steering.py, and the parts of exercise 2 that steer: against what is known exactly."""

import json
import subprocess
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from PIL import Image
from tiny_networks import SIZE, make_diffusion, teach

from ddpm_basics import sampling, steering
from ddpm_basics.console import UserError
from ddpm_basics.evaluation.features import train_classifier
from ddpm_basics.files import file_digest
from ddpm_basics.options import WEIGHTS

exercise2 = load_script("exercise2_explore")
REFERENCE = ROOT / "training_results" / "reference"


def lab(diffusion, **options):
    """What exercise 2's parts are given, without a network file."""
    shape = (diffusion.channels, *diffusion.image_size)
    return exercise2.Lab(
        Namespace(seed=0, **options), diffusion, torch.device("cpu"), "fp32",
        sampling.noise_levels(diffusion), sampling.starting_noise(range(4), shape)[0], None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def network():
    """A tiny network, whose images differ."""
    torch.manual_seed(0)
    return teach(make_diffusion(timesteps=100))


# ---- A kept region, where the exact answer is known ----------------------------------------------

MIDDLE, SPREAD = 0.6, 0.1


def exact_x_0(levels, x_t, t):
    """E[x_0 | x_t] of images whose pixels all lie near 0.6, or all near -0.6."""
    alpha, sigma = levels.alpha[t], levels.sigma[t]
    variance = (alpha * SPREAD) ** 2 + sigma**2
    flat = x_t.flatten(1)
    upper = (2 * alpha * MIDDLE * flat.sum(1, keepdim=True) / variance).sigmoid()
    middle = MIDDLE * (2 * upper - 1)
    return ((middle * sigma**2 + alpha * SPREAD**2 * flat) / variance).view_as(x_t)


def test_going_back_draws_what_belongs_to_the_kept_pixel():
    """Given one pixel, the two others are near it; steps taken once often miss that."""
    own = lab(make_diffusion())
    pictures = torch.full((400, 1, 1, 3), MIDDLE)
    mask = (torch.arange(3) == 0).view(1, 1, 1, 3)
    ask = partial(exact_x_0, own.levels)
    wrong = {}
    for rounds in (1, exercise2.REGION_ROUNDS):
        drawn = exercise2.draw_around(own, pictures, mask, ask, rounds)
        assert torch.equal(drawn[..., 0], pictures[..., 0]), "not bit for bit"
        new = drawn[..., 1:]
        wrong[rounds] = (new < 0).float().mean().item()
        close = new[new > 0]
        # Known exactly: normal about 0.6 with a spread of 0.1, of which few steps lose a part.
        assert close.mean().item() == pytest.approx(MIDDLE, abs=0.03)
        assert 0.4 * SPREAD < close.std().item() < 1.2 * SPREAD
    assert wrong[1] > 0.05, wrong
    assert wrong[exercise2.REGION_ROUNDS] < wrong[1] / 3, wrong


def test_noise_again_has_the_right_amount():
    levels = sampling.noise_levels(make_diffusion())
    _, generators = sampling.starting_noise(range(2000), (1, 1, 1))
    x_s = steering.noised(levels, torch.tensor(0.5), 300, torch.randn(2000, 1, 1, 1))
    x_t = steering.noise_again(levels, x_s, 300, 600, generators)
    assert x_t.mean().item() == pytest.approx(0.5 * levels.alpha[600], abs=0.06)
    assert x_t.std().item() == pytest.approx(levels.sigma[600], abs=0.04)


def test_what_is_kept_is_as_noisy_as_the_rest():
    levels = sampling.noise_levels(make_diffusion())
    _, generators = sampling.starting_noise(range(2000), (1, 1, 2))
    picture, mask = torch.full((2000, 1, 1, 2), 0.5), torch.tensor([True, False]).view(1, 1, 1, 2)
    x_s = torch.zeros(2000, 1, 1, 2)
    kept, new = steering.keep_region(levels, x_s, picture, mask, 400, generators).unbind(-1)
    assert kept.mean().item() == pytest.approx(0.5 * levels.alpha[400], abs=0.06)
    assert kept.std().item() == pytest.approx(levels.sigma[400], abs=0.04)
    assert not new.any()


# ---- Masks and pictures --------------------------------------------------------------------------


def paint(path, kept):
    Image.fromarray(np.uint8(kept) * 255).save(path)
    return path


def test_masks(tmp_path):
    kept = np.zeros((30, 40), bool)
    kept[:, :20] = True  # of a picture that is wider than high
    path = paint(tmp_path / "mine.png", kept)
    own, usual = steering.read_masks(10, path), steering.read_masks(10, None)
    assert (list(own), list(usual)) == (["mine.png"], ["half", "frame"])
    assert torch.equal(own["mine.png"], usual["half"]), "cut to its central square"
    assert usual["frame"][0, 0].sum().item() == 100 - 6 * 6
    assert {mask.shape for mask in usual.values()} == {(1, 1, 10, 10)}


@pytest.mark.parametrize(("kept", "word"), [(True, "all"), (False, "nothing")])
def test_masks_that_leave_no_choice(tmp_path, kept, word):
    path = paint(tmp_path / "mine.png", np.full((8, 8), kept))
    with pytest.raises(UserError, match=rf"mine\.png keeps {word}: "):
        steering.read_masks(8, path)


def test_strength_zero_is_the_picture_itself(network):
    own = lab(network)
    x_0 = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    x_t = steering.noised(own.levels, x_0, -1, own.noise[:1])
    drawn = exercise2.draw(own, x_t, None, 0, start=-1)
    assert torch.equal(drawn, (x_0 + 1) / 2)


def test_a_picture_fades_with_its_strength(network):
    own = lab(network)
    x_0 = torch.full((1, 3, SIZE, SIZE), 0.4)
    ask = own.ask(None)
    apart = []
    for start in (5, 30, 60, 95):
        x_t = steering.noised(own.levels, x_0, start, own.noise[:1])
        drawn = exercise2.draw(own, x_t, ask, 6, start=start)
        apart.append((drawn * 2 - 1 - x_0).square().mean().item())
    assert apart == sorted(apart)
    assert apart[0] < apart[-1] / 4


# ---- Pulls ---------------------------------------------------------------------------------------


def test_the_pull_is_the_gradient_through_the_network(network):
    own = lab(network)
    t, weight = 60, 1e-3
    ask = own.ask(None)
    score = partial(steering.colour_log_p, torch.tensor([0.5, 0.0, -0.5]))
    x_t = own.noise[:2]
    with torch.no_grad():
        pulled = steering.pull(ask, score, weight, own.levels, x_t, t)
        x_0 = ask(x_t, t)
    inside = x_0.abs() < 0.99
    assert inside.float().mean() > 0.9
    shift = (pulled - x_0) / (weight * own.levels.sigma[t] ** 2 / own.levels.alpha[t])
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        way = torch.randn(x_t.shape, generator=generator) * inside
        ahead, behind = (score(x, ask(x, t)).sum().item()
                         for x in (x_t + 0.01 * way, x_t - 0.01 * way))  # fmt: skip
        assert (shift * way).sum().item() == pytest.approx((ahead - behind) / 0.02, rel=0.02)


def test_the_colour_comes_nearer_as_it_weighs_more(network):
    own = lab(network)
    ask = own.ask(None)
    score = partial(steering.colour_log_p, torch.tensor([0.6, -0.6, 0.2]))
    errors = []
    for weight in (0, 1, 3, 10):
        pulled = partial(steering.pull, ask, score, weight, own.levels)
        drawn = exercise2.draw(own, own.noise, pulled, 20)
        errors.append(-score(None, drawn * 2 - 1).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75 * errors[0]


def test_classifiers_are_trained_once(tmp_path, monkeypatch):
    """One of noised fabrics and one that judges; what they were trained to stays in the cache."""
    monkeypatch.setattr(steering, "CLASSIFIER_FABRICS", 24)
    monkeypatch.setattr("ddpm_basics.evaluation.features.CLASSIFIER_STEPS", 2)
    trained_on = []

    def train(fabrics, seed, device, spoil):
        trained_on.append((fabrics.folder.name, seed, spoil is not None))
        return train_classifier(fabrics, seed, device, spoil)

    monkeypatch.setattr(steering, "train_classifier", train)
    levels = sampling.noise_levels(make_diffusion())
    find = partial(steering.tradition_classifiers, tmp_path, levels, SIZE, torch.device("cpu"))
    first = find()
    judge = (f"heldout_{SIZE}", 1, False)
    assert trained_on == [(f"train_{SIZE}", 0, True), judge]
    x, wanted = torch.rand(3, 3, SIZE, SIZE), torch.tensor([0, 5, 11])
    for trained, kept in zip(first, find(), strict=True):
        assert torch.allclose(trained(x), kept(x), atol=1e-6)
    assert len(trained_on) == 2
    log_p = steering.label_log_p(first[0], wanted, 2 * x - 1, None)
    assert torch.equal(log_p, first[0](x).log_softmax(1)[range(3), wanted])
    assert not torch.equal(first[0](x), first[1](x))
    # Another schedule has its own, and one that cannot be read is trained anew.
    for damage in (b"", b"none of it", (tmp_path / f"judge_{SIZE}.pt").read_bytes()[:-1000]):
        (tmp_path / f"judge_{SIZE}.pt").write_bytes(damage)
        find()
        assert trained_on.pop() == judge
    other = sampling.noise_levels(make_diffusion(beta_schedule="linear"))
    steering.tradition_classifiers(tmp_path, other, SIZE, torch.device("cpu"))
    assert trained_on[2:] == [(f"train_{SIZE}", 0, True)]


def test_noise_at_random_is_that_of_the_process():
    levels = sampling.noise_levels(make_diffusion())
    images = torch.full((3000, 1, 1, 1), 0.75)
    x_t = 2 * steering.noised_at_random(levels, torch.Generator().manual_seed(0), images) - 1
    alpha, sigma = (torch.tensor(level[:-1]) for level in levels)
    assert x_t.mean().item() == pytest.approx(0.5 * alpha.mean().item(), abs=0.04)
    second = (0.25 * alpha**2 + sigma**2).mean().item()
    assert x_t.square().mean().item() == pytest.approx(second, abs=0.05)


# ---- Cloth without seams -------------------------------------------------------------------------


def test_rolled_asks_everywhere_and_rolls_back():
    marks = []

    def ask(x_t, t):
        marks.append(x_t.flatten().argmax().item())
        return x_t * t

    x_t = torch.zeros(1, 1, 4, 4)
    x_t[..., 0, 0] = 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        assert torch.equal(steering.rolled(ask, generator, x_t, 3), 3 * x_t)
    assert len(set(marks)) > 12, "the picture stays where it is"


def test_contrast_at_seams_and_borders():
    specks = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    assert steering.seam_contrast(specks) == pytest.approx(1, abs=0.15)
    assert steering.seam_contrast(ramp) > 10
    half = steering.read_masks(32, None)["half"]
    assert steering.seam_contrast(ramp.mT) > 10
    assert steering.border_contrast(half.float(), half) is None, "nothing elsewhere"
    assert steering.border_contrast(specks, torch.ones_like(half)) is None, "no border"
    assert steering.border_contrast(ramp, half) == pytest.approx(2, rel=0.1)  # none downwards


# ---- The perfect memory --------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 50, 300, 600, 900, 999])
def test_ideal_denoiser_is_the_posterior_mean(t):
    """By the formula, image by image, in double precision."""
    levels = sampling.noise_levels(make_diffusion())
    images = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x_t = steering.noised(levels, images[:5], t, torch.randn(5, 3, 16, 16))
    found = steering.ideal_x_0(images, levels, x_t, t)
    for one, guess in zip(x_t.double(), found, strict=True):
        log_p = [-(one - levels.alpha[t] * x.double()).square().sum() / (2 * levels.sigma[t] ** 2)
                 for x in images]  # fmt: skip
        p = torch.stack(log_p).softmax(0)
        exact = (p[:, None, None, None] * images.double()).sum(0)
        assert (guess - exact).abs().max() < 1e-4


def test_perfect_memory_draws_training_images_only():
    own = lab(make_diffusion())
    images = torch.randint(256, (150, 3, SIZE, SIZE), dtype=torch.uint8)
    known = images.float() / 127.5 - 1
    drawn = exercise2.draw(own, own.noise, partial(steering.ideal_x_0, known, own.levels), 20)
    nearest, copied = steering.nearest(drawn, images)
    assert copied.all()
    assert (drawn - nearest).abs().max() < 1 / 255
    assert torch.equal(steering.nearest(nearest.flip(-1), images)[0], nearest.flip(-1))


def check_memory(rows):
    """No guess is better on the training images; on others it is far worse where t is small."""
    for row in rows:
        assert row["memory"]["train"] < row["network"]["train"], row["t"]
        if row["t"] <= 300:
            assert row["memory"]["heldout"] > 5 * row["network"]["heldout"], row["t"]


def test_memory_wins_on_what_it_knows_and_fails_on_the_rest():
    record = json.loads((REFERENCE / "ideal_denoiser.json").read_text(encoding="utf-8"))
    shipped = file_digest(ROOT / WEIGHTS)
    assert record["weights"] == shipped, "other weights: run tests/benchmarks/measure_ideal.py"
    assert (record["images"], len(record["rows"])) == (1059, 10)
    check_memory(record["rows"])


@pytest.mark.slow
def test_the_losses_of_memory_and_network_again(tmp_path):
    script = ROOT / "tests" / "benchmarks" / "measure_ideal.py"
    output = tmp_path / "ideal.json"
    command = [sys.executable, script, "--images", 96, "--times", 100, 500, "--output", output]
    subprocess.run([*map(str, command)], check=True)
    check_memory(json.loads(output.read_text())["rows"])
