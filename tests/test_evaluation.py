"""The evaluation: on folders whose answer is known, and on those that cannot be measured."""

import errno
import json
import math
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFilter

from ddpm_basics import evaluation
from ddpm_basics.console import UserError
from ddpm_basics.evaluation.__main__ import evaluate, main, parse_options
from ddpm_basics.evaluation.copies import find_neighbours, is_copy
from ddpm_basics.evaluation.distances import (
    chance_mmd2,
    distance_report,
    draw_splits,
    frechet_distance,
    gaussian_of,
    kernel_matrix,
    random_directions,
    sliced_wasserstein,
    unbiased_mmd2,
)
from ddpm_basics.evaluation.features import feature_spaces, train_classifier
from ddpm_basics.evaluation.folders import (
    CLASSIFIER_IMAGES,
    DEFAULT_HELDOUT,
    HELDOUT_COUNT,
    HELDOUT_SEED,
    MINIMUM_IMAGES,
    Fabrics,
    fingerprints,
    leave_out_known,
    procedural_manifest,
    split_heldout,
)
from ddpm_basics.evaluation.intervals import wilson
from ddpm_basics.evaluation.report import DEFINITIONS
from ddpm_basics.evaluation.shares import predict, true_shares

MODULES = [
    import_module(f"{evaluation.__name__}.{module.name}")
    for module in pkgutil.iter_modules(evaluation.__path__)
]

KINDS = ("checks", "discs", "stripes", "waves")
SPACES = ("pixels", "patches", "convolutions", "classifier")
MEASURES = ("sliced_wasserstein", "frechet", "kernel")


# ---- Stand-ins for fabrics -----------------------------------------------------------------------


def draw(kind, rng, size=32):
    """A coloured pattern (size, size, 3) uint8, random in colours, scale, place and grain."""
    axis = np.linspace(-1, 1, size)
    x, y = np.meshgrid(axis + rng.normal(), axis + rng.normal())
    scale = rng.uniform(1.5, 3.5)
    if kind == "checks":
        cover = (np.sin(math.pi * scale * x) * np.sin(math.pi * scale * y)) > 0
    elif kind == "discs":
        cover = np.hypot(*(np.abs((scale * t) % 1 - 0.5) for t in (x, y))) < 0.35
    elif kind == "stripes":
        cover = (scale * x) % 1 < rng.uniform(0.3, 0.7)
    else:
        cover = np.sin(math.pi * scale * (y + 0.3 * np.sin(4 * x))) > 0
    back, front = rng.uniform(0.1, 0.9, (2, 3))
    picture = np.where(cover[..., None], front, back) + rng.normal(0, 0.03, (size, size, 3))
    return (255 * picture.clip(0, 1)).astype(np.uint8)


def fabrics(count, seed, kinds=KINDS, name="folder"):
    """Stand-ins in memory; any two seeds give different images of the same distribution."""
    rng = np.random.default_rng(seed)
    labels = [kinds[i % len(kinds)] for i in range(count)]
    pixels = np.stack([draw(label, rng) for label in labels])
    files = [Path(name, label, f"{i:04d}.png") for i, label in enumerate(labels)]
    return Fabrics(
        Path(name), files, labels, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    )


def save(images, folder, labelled=True):
    """Write stand-ins as files."""
    for i, (label, image) in enumerate(zip(images.labels, images.pixels, strict=True)):
        path = folder / (label if labelled else "") / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def changed(images, change):
    """Every image (H, W, 3) float in [0, 1] after a change."""
    pixels = images.pixels.permute(0, 2, 3, 1).numpy() / 255
    pixels = np.stack([change(p) for p in pixels])
    pixels = torch.from_numpy((255 * pixels.clip(0, 1)).round().astype(np.uint8))
    return Fabrics(
        images.folder, images.files, images.labels, pixels.permute(0, 3, 1, 2).contiguous()
    )


def replace(patch, name, value):
    """Give a name another value in every module that uses it."""
    homes = [module for module in MODULES if hasattr(module, name)]
    assert homes, name
    for module in homes:
        patch.setattr(module, name, value)


@pytest.fixture(scope="module")
def quick():
    """Fewer splits, resamples and steps, for as long as the tests of this file last."""
    with pytest.MonkeyPatch.context() as patch:
        replace(patch, "SPLITS", 8)
        replace(patch, "BOOTSTRAPS", 300)
        replace(patch, "CLASSIFIER_STEPS", 80)
        yield patch


@pytest.fixture(scope="module")
def train(quick):
    return fabrics(200, seed=1, name="train")


@pytest.fixture(scope="module")
def heldout(quick):
    return fabrics(480, seed=2, name="heldout")


@pytest.fixture(scope="module")
def judge(quick, train, heldout):
    """judge(samples) -> report; the classifier, the same for all, is trained once."""
    original, trained = train_classifier, []

    def train_once(*arguments):
        if not trained:
            trained.append(original(*arguments))
        return trained[0]

    def call(samples, train=train, heldout=heldout, seed=0):
        options = parse_options(["unused", "--seed", str(seed)])
        with pytest.MonkeyPatch.context() as patch:
            replace(patch, "train_classifier", train_once)
            return evaluate(samples, train, heldout, options, torch.device("cpu"))

    return call


@pytest.fixture(scope="module")
def fresh_report(judge):
    return judge(fabrics(200, seed=3))


def every_distance(report):
    """{(space, measure): summary}."""
    distances = report["distances"]
    return {(space, measure): distances[space][measure] for space in SPACES for measure in MEASURES}


# ---- The distances against closed forms ----------------------------------------------------------


def test_frechet_of_known_gaussians():
    """In two dimensions tr((AB)^½) = √(tr(AB) + 2 √det(AB)), also where A and B do not commute."""
    a = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    b = torch.tensor([[0.7, -0.4], [-0.4, 1.5]], dtype=torch.float64)
    mean_a, mean_b = torch.tensor([[1.0, -2.0], [0.5, 1.0]], dtype=torch.float64)
    assert not torch.allclose(a @ b, b @ a)
    root = torch.sqrt((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt())
    expected = float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * root)
    found = frechet_distance((mean_a, a), (mean_b, b))
    assert found == pytest.approx(expected, rel=1e-10)
    assert frechet_distance((mean_b, b), (mean_a, a)) == pytest.approx(found)
    assert frechet_distance((mean_a, a), (mean_a, a)) == pytest.approx(0, abs=1e-12)


def test_frechet_of_points():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 3, generator=generator)
    y = 2 * torch.randn(200_000, 3, generator=generator) + torch.tensor([1.0, 0.0, -1.0])
    found = frechet_distance(gaussian_of(x), gaussian_of(y))
    assert found == pytest.approx(2 + 3 * (2 - 1) ** 2, rel=0.02)


def test_frechet_with_fewer_points_than_dimensions():
    generator = torch.Generator().manual_seed(0)
    one, other = (gaussian_of(torch.randn(10, 30, generator=generator)) for _ in range(2))
    assert 0 < frechet_distance(one, other) < math.inf
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_sliced_wasserstein_in_one_dimension():
    """Between N(0, 1) and N(m, s²) the 2-Wasserstein distance is √(m² + (s - 1)²)."""
    quantiles = torch.special.ndtri((torch.arange(20_000) + 0.5).double() / 20_000)
    x, y = quantiles[:, None], 1.5 + 2 * quantiles.flip(0)[:, None]
    direction = torch.ones(1, 1, dtype=torch.float64)
    found = sliced_wasserstein(x, y, direction)
    assert found == pytest.approx(math.hypot(1.5, 1.0), rel=1e-3)
    assert sliced_wasserstein(x, x.flip(0), direction) == 0


def test_sliced_wasserstein_of_a_shift():
    """Along a random direction in d dimensions a shift v has the mean square |v|²/d."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 5, generator=generator)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0])
    directions = random_directions(5, 20_000, generator)
    assert torch.allclose(directions.norm(dim=0), torch.ones(20_000))
    found = sliced_wasserstein(x, x + shift, directions)
    assert found == pytest.approx(5 / math.sqrt(5), rel=0.02)


def kernels(x, y):
    return [kernel_matrix(a, b) for a, b in ((x, x), (y, y), (x, y))]


def test_kernel_distance_is_unbiased():
    """Over many small draws from one distribution its mean is 0; that of a biased one is chance."""
    generator = torch.Generator().manual_seed(0)
    unbiased, chance = [], []
    for _ in range(1500):
        x, y = torch.randn(2, 12, 1, 4, generator=generator)
        k_xx, k_yy, k_xy = kernels(x, y)
        unbiased.append(unbiased_mmd2(k_xx, k_yy, k_xy))
        chance.append(chance_mmd2(k_xx, k_yy))
        biased = float(k_xx.mean() + k_yy.mean() - 2 * k_xy.mean())
        assert unbiased[-1] + chance[-1] == pytest.approx(biased, abs=1e-4)
    error = np.std(unbiased) / math.sqrt(len(unbiased))
    assert abs(np.mean(unbiased)) < 3 * error
    assert np.mean(chance) > 20 * error


def test_kernel_distance_of_known_moments():
    """In one dimension (ab + 1)³ compares three moments: Σ binom(3, j) (E a^j - E b^j)²."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, 1, generator=generator, dtype=torch.float64)
    y = 0.5 + 1.5 * torch.randn(2000, 1, 1, generator=generator, dtype=torch.float64)
    m, s = 0.5, 1.5
    moments = [(0, m), (1, m**2 + s**2), (0, m**3 + 3 * m * s**2)]
    expected = sum(c * (a - b) ** 2 for c, (a, b) in zip((3, 3, 1), moments, strict=True))
    assert unbiased_mmd2(*kernels(x, y)) == pytest.approx(expected, rel=0.25)


def test_kernel_of_several_points_is_the_mean_over_pairs():
    x, y = torch.randn(2, 7, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(7, 7)
    for i in range(7):
        for j in range(7):
            expected[i, j] = (x[i] @ y[j].T / 5 + 1).pow(3).mean()
    assert torch.allclose(kernel_matrix(x, y), expected, rtol=1e-4)


def test_intervals_cover(quick):
    """Of intervals from many independent worlds about 95 % hold the mean over all of them."""
    found = {measure: [] for measure in MEASURES}
    for world in range(50):
        generator = torch.Generator().manual_seed(world)
        features = {
            name: torch.randn(100, 1, 3, generator=generator) for name in ("samples", "train")
        }
        features["heldout"] = torch.randn(200, 1, 3, generator=generator)
        features["samples"] += 0.4
        rng = np.random.default_rng(world)
        splits = draw_splits({k: len(v) for k, v in features.items()}, 50, rng)
        report = distance_report({"x": features}, splits, 0, torch.device("cpu"))
        for measure in MEASURES:
            found[measure].append(report["x"][measure])
    for rows in found.values():
        for key, value in (("samples", "value"), ("samples_over_floor", "ratio")):
            target = np.mean([row[key][value] for row in rows])
            covered = [row[key]["interval_95"] for row in rows]
            assert np.mean([low <= target <= high for low, high in covered]) > 0.85


def test_wilson_interval():
    assert wilson(0, 100) == pytest.approx([0, 0.0370], abs=1e-4)
    assert wilson(50, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)


def test_shares_are_corrected_for_confusion():
    """What a classifier that errs a lot guesses is traced back to the shares behind it."""
    confusion = np.array([[70, 20, 10], [5, 90, 5], [30, 0, 70]])
    shares = np.array([0.6, 0.0, 0.4])
    guessed = shares @ (confusion / 100)
    assert np.abs(guessed - shares).max() > 0.1
    found = true_shares(guessed, confusion, steps=5000)
    assert found == pytest.approx(shares, abs=5e-3)
    batch = true_shares(np.stack([guessed, guessed]), np.stack([confusion, confusion]))
    assert batch.sum(1) == pytest.approx([1, 1])


# ---- Copies --------------------------------------------------------------------------------------


def test_neighbours_equal_brute_force(train):
    queries = fabrics(30, seed=9)
    found = find_neighbours(queries, train, torch.device("cpu"))
    x, bank = queries.pixels.double() / 255, train.pixels.double() / 255
    for i, image in enumerate(x):
        plain = (bank - image).square().mean((1, 2, 3)).sqrt()
        mirrored = (bank.flip(-1) - image).square().mean((1, 2, 3)).sqrt()
        distance, index = torch.minimum(plain, mirrored).sort()
        assert found.distance[i].numpy() == pytest.approx(distance[:4].numpy(), rel=1e-4)
        assert found.index[i].tolist() == index[:4].tolist()
        assert found.mirrored[i, 0] == (mirrored < plain)[index[0]]
        assert float(found.crowd[i]) == pytest.approx(float(distance[:50].mean()), rel=1e-4)


@pytest.mark.parametrize("how", ["as they are", "mirrored", "noisy", "faded"])
def test_training_images_are_copies(train, how):
    rng = np.random.default_rng(0)
    changes = {
        "as they are": lambda p: p,
        "mirrored": lambda p: p[:, ::-1],
        "noisy": lambda p: p + rng.normal(0, 0.02, p.shape),
        "faded": lambda p: 0.95 * p + 0.02,
    }
    samples = changed(train, changes[how])
    found = find_neighbours(samples, train, torch.device("cpu"))
    for flags in is_copy(found):
        assert flags.mean() > 0.97
    assert found.index[:, 0].tolist() == list(range(len(train)))
    if how in ("as they are", "mirrored"):
        assert found.distance[:, 0].abs().max() == 0
        assert is_copy(found)[0].all()


def test_copies_of_an_image_that_is_there_twice(train):
    """Where d1 and d2 are both 0 their ratio says nothing, and near 0 only the crowd does."""
    double = train.at([0, *range(len(train))])
    exact = find_neighbours(train.at([0, 1]), double, torch.device("cpu"))
    assert is_copy(exact)[0].all()
    noisy = changed(train.at([0]), lambda p: p + 0.01)
    near = find_neighbours(noisy, double, torch.device("cpu"))
    by_second, by_crowd = is_copy(near)
    assert not by_second[0]
    assert by_crowd[0]


def test_report_on_training_images(judge, train):
    report = judge(train)
    rule = report["copies"]["ratio_to_second_nearest"]
    assert rule["samples"]["share"] == 1
    assert rule["samples"]["bootstrap_95"] == [1, 1]
    assert rule["heldout"]["share"] < 0.02
    assert rule["difference_bootstrap_95"][0] > 0.9
    assert report["headline"]["more_copies_than_heldout"]
    assert report["copies"]["nearest_distance"]["sample_nearer_than_heldout"] == 1
    # The distances alone do not see it: training images are as good as held-out ones.
    assert report["headline"]["median_ratio"] == pytest.approx(1, abs=0.15)


def test_a_few_copies_among_fresh_images(judge, train):
    fresh = fabrics(190, seed=4)
    mixed = Fabrics(
        fresh.folder,
        fresh.files + train.files[:10],
        fresh.labels + train.labels[:10],
        torch.cat([fresh.pixels, train.pixels[:10].flip(-1)]),
    )
    rule = judge(mixed)["copies"]["ratio_to_second_nearest"]
    assert rule["samples"]["copies"] >= 10
    low, high = rule["samples"]["bootstrap_95"]
    assert low < 10 / 200 < high


# ---- Fresh and damaged fabrics -------------------------------------------------------------------


def test_fresh_fabrics_are_at_the_floor(fresh_report):
    for key, row in every_distance(fresh_report).items():
        for pair in ("samples", "train"):
            low, high = row[f"{pair}_over_floor"]["interval_95"]
            assert low < 1 < high, (key, pair)
            assert row[f"{pair}_over_floor"]["ratio"] == pytest.approx(1, abs=0.35), (key, pair)
    assert fresh_report["headline"]["median_ratio"] == pytest.approx(1, abs=0.12)
    assert fresh_report["copies"]["ratio_to_second_nearest"]["samples"]["share"] < 0.03
    assert not fresh_report["headline"]["more_copies_than_heldout"]
    traditions = fresh_report["traditions"]
    assert traditions["classifier_error"] < 0.15
    assert traditions["unclear_share"] < 0.15
    rows = zip(traditions["share_bootstrap_95"], traditions["fair_share"], strict=True)
    assert all(low <= fair <= high for (low, high), fair in rows)


def test_colours_equal_an_independent_computation(fresh_report):
    pixels = fabrics(200, seed=3).pixels.permute(0, 2, 3, 1).reshape(200, -1, 3).numpy() / 255
    found = fresh_report["colours"]["samples"]
    expected = {
        "mean": pixels.mean((0, 1)),
        "spread": pixels.reshape(-1, 3).std(0),
        "palette": pixels.mean(1).std(0),
        "contrast": np.sqrt(pixels.var(1).mean(0)),
    }
    for key, value in expected.items():
        assert found[key]["rgb"] == pytest.approx(value, rel=1e-6)
        for own, (low, high) in zip(value, found[key]["bootstrap_95"], strict=True):
            assert low < own < high
            assert high - low < 0.2 * own


def test_one_tradition_only(judge):
    report = judge(fabrics(200, seed=5, kinds=["discs"]))
    traditions = report["traditions"]
    shares = dict(zip(traditions["names"], traditions["share"], strict=True))
    assert shares["discs"] > 0.9
    assert report["headline"]["commonest_tradition"][0] == "discs"
    assert report["headline"]["commonest_tradition"][1] > 3.5
    assert report["headline"]["rarest_tradition"][1] < 0.5
    for measure in MEASURES:
        assert report["distances"]["classifier"][measure]["samples_over_floor"]["ratio"] > 1.5


def blur(p, radius):
    image = Image.fromarray((255 * p).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) / 255


DAMAGE = {
    "blurred": lambda rng, level: lambda p: blur(p, (1.5, 3)[level]),
    "noisy": lambda rng, level: lambda p: p + rng.normal(0, (0.16, 0.32)[level], p.shape),
    "shifted in colour": lambda rng, level: lambda p: p + (0.15, 0.4)[level] * np.array([1, 0, -1]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_distances_rise_with_the_damage(judge, fresh_report, kind):
    reports = [fresh_report]
    for level in range(2):
        change = DAMAGE[kind](np.random.default_rng(0), level)
        reports.append(judge(changed(fabrics(200, seed=3), change)))
    columns = [every_distance(report) for report in reports]
    for key in columns[0]:
        values = [column[key]["samples"]["value"] for column in columns]
        if key[0] == "pixels" and kind != "shifted in colour":
            # Averages over an eighth of a side hardly see grain, and should not.
            assert values[1] < 1.1 * values[0], key
        else:
            assert values[0] < values[1] < values[2], key
            # The kernel distance is unbiased and therefore noisy: its interval is wider.
            low, _ = columns[2][key]["samples_over_floor"]["interval_95"]
            assert low > (0.5 if key[1] == "kernel" else 1), key
    medians = [report["headline"]["median_ratio"] for report in reports]
    assert medians == sorted(medians)
    assert medians[-1] > 1.8


def test_confidence_falls_on_noise(judge):
    """Pictures of nothing get a label too; that they are unclear is what gives them away."""
    noise = changed(fabrics(200, seed=3), lambda p: np.random.default_rng(0).uniform(size=p.shape))
    report = judge(noise)
    assert report["headline"]["worst_ratio"] > 5
    assert max(report["traditions"]["share_over_fair"]) > 2


# ---- What is measured with what ------------------------------------------------------------------


def test_nothing_is_measured_with_images_the_classifier_knows(monkeypatch, judge, heldout):
    measured, split = [], split_heldout
    spaces, guess = feature_spaces, predict

    def spy_spaces(folders, *rest):
        measured.extend(fingerprints(folders["heldout"]))
        return spaces(folders, *rest)

    def spy_predict(classifier, images, device):
        measured.extend(fingerprints(images))
        return guess(classifier, images, device)

    taught = []

    def spy_split(*arguments):
        teach, rest = split(*arguments)
        taught.extend(fingerprints(teach))
        return teach, rest

    replace(monkeypatch, "feature_spaces", spy_spaces)
    replace(monkeypatch, "predict", spy_predict)
    replace(monkeypatch, "split_heldout", spy_split)
    judge(fabrics(200, seed=3))
    assert len(taught) == len(heldout) // 2
    assert len(measured) > len(heldout) // 2
    assert not set(taught) & set(measured)


def test_splits_are_disjoint_and_equally_large():
    rng = np.random.default_rng(0)
    for split in draw_splits({"samples": 90, "train": 70, "heldout": 60}, 30, rng):
        assert {len(set(own)) for own in split.values()} == {30}
        assert not set(split["heldout"]) & set(split["floor"])


def test_known_images_are_left_out(train, heldout, capsys):
    mixed = heldout.at([*range(100), 50, 51])
    mixed.pixels[:20] = train.pixels[:20]
    left = leave_out_known(mixed, train)
    assert len(left) == 80
    assert "Left out 22 images" in capsys.readouterr().out
    assert not set(fingerprints(left)) & set(fingerprints(train))
    with pytest.raises(UserError, match="Only 0 of the 200 images"):
        leave_out_known(train, train)


def test_larger_folders_are_split_as_documented():
    labels = [KINDS[i % 3] for i in range(6000)]
    pixels = torch.zeros(6000, 3, 1, 1, dtype=torch.uint8)
    images = Fabrics(Path("x"), [Path("x")] * 6000, labels, pixels)
    teach, rest = split_heldout(images, np.random.default_rng(0))
    assert len(teach) == pytest.approx(CLASSIFIER_IMAGES, abs=3)
    assert len(teach) + len(rest) == 6000
    assert {teach.labels.count(kind) for kind in KINDS[:3]} <= {666, 667}


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, quick):
    """Folders of samples, training and held-out images."""
    home = tmp_path_factory.mktemp("folders")
    save(fabrics(60, seed=3), home / "samples", labelled=False)
    save(fabrics(80, seed=1), home / "train")
    save(fabrics(120, seed=2), home / "heldout")
    return home


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder, with a classifier that learns next to nothing, but at once."""
    replace(monkeypatch, "CLASSIFIER_STEPS", 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Run the command in this process and return (exit code, stdout, stderr)."""

    def call(*argv):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, output.err

    return call


@pytest.fixture
def refused(run, here):
    """Run a command that has to fail with exit code 1, one sentence and no output; return it."""

    def call(*argv):
        before = set(here.rglob("*"))
        code, _, stderr = run(*argv)
        sentences = [line for line in stderr.splitlines() if "Error: " in line]
        assert code == 1
        assert len(sentences) == 1, stderr
        assert sentences[0].endswith(".")
        assert set(here.rglob("*")) == before
        return sentences[0]

    return call


def arguments(folders):
    return [
        folders / "samples",
        *("--train", folders / "train", "--heldout", folders / "heldout"),
    ]


def report_without_times(path):
    report = json.loads(path.read_text())
    assert report.pop("seconds") >= 0
    return report


def test_command_writes_numbers_and_figure(run, here, folders):
    code, stdout, stderr = run(*arguments(folders))
    assert code == 0, stderr
    assert sorted(p.name for p in here.iterdir()) == [
        "evaluation.json",
        "evaluation_neighbours.png",
    ]
    report = report_without_times(here / "evaluation.json")
    assert report["sizes"]["samples"] == report["sizes"]["distinct_samples"] == 60
    assert report["sizes"]["per_side"] == 30
    assert report["sizes"]["heldout_for_classifier"] + report["sizes"]["heldout_measured"] == 120
    assert set(report["distances"]) == set(SPACES)
    words = set(DEFINITIONS)
    assert words >= {"floor", "copy", "ratio", "share", "interval_95", *SPACES, *MEASURES}
    with Image.open(here / "evaluation_neighbours.png") as figure:
        assert figure.width > 1000
        assert len(figure.convert("RGB").getcolors(maxcolors=1 << 24)) > 1000
    for part in ("Copies", "Distances", "Traditions", "Colours", "times the floor"):
        assert part in stdout
    assert re.search(
        r"Wrote evaluation.json and evaluation_neighbours.png in \d+ s\.$", stdout.strip()
    )
    assert "100%" in stderr  # the progress bars
    assert all(len(line) <= 120 for line in stdout.splitlines())


def test_same_seed_same_numbers(run, here, folders):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        outputs = ["--output", f"{name}.json", "--figure", f"{name}.png"]
        code, _, stderr = run(*arguments(folders), "--seed", seed, *outputs)
        assert code == 0, stderr
    a, b, c = (report_without_times(here / f"{name}.json") for name in "abc")
    assert a == b
    assert a["distances"] != c["distances"]
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


def test_own_outputs_are_replaced_and_nothing_else(run, refused, here, folders):
    (here / "notes.json").write_text('{"mine": 1}')
    (here / "notes.png").write_bytes((folders / "train/discs/0001.png").read_bytes())
    assert "did not write it" in refused(*arguments(folders), "--output", "notes.json")
    assert "did not write it" in refused(*arguments(folders), "--figure", "notes.png")
    for _ in range(2):
        code, _, stderr = run(*arguments(folders))
        assert code == 0, stderr
    report = json.loads((here / "evaluation.json").read_text())
    assert report["tool"] == "ddpm_basics.evaluation"
    (here / "evaluation.json").write_text(json.dumps({"tool": "evaluate_fabrics.py"}))
    code, _, stderr = run(*arguments(folders))
    assert code == 0, stderr
    assert json.loads((here / "notes.json").read_text()) == {"mine": 1}


def test_without_labels_there_is_no_classifier(run, here, folders):
    """Photographs that are not sorted: the other three spaces and the copies remain."""
    for name, seed in (("photos", 1), ("others", 2)):
        save(fabrics(60, seed=seed), here / name, labelled=False)
    code, stdout, stderr = run(folders / "samples", "--train", "photos", "--heldout", "others")
    assert code == 0, stderr
    assert "No classifier" in stdout
    report = report_without_times(here / "evaluation.json")
    assert report["traditions"] is None
    assert set(report["distances"]) == set(SPACES) - {"classifier"}


@pytest.mark.parametrize("size", [(24, 24), (40, 56)])
def test_other_sizes(run, here, size):
    for name, seed in (("samples", 3), ("train", 1), ("heldout", 2)):
        folder = save(fabrics(50, seed=seed), here / name)
        for path in folder.rglob("*.png"):
            Image.open(path).resize(size).save(path)
    code, _, stderr = run("samples", "--train", "train", "--heldout", "heldout")
    assert code == 0, stderr


# ---- Held-out fabrics that are rendered ----------------------------------------------------------


STUB = """
import json, pathlib, shutil, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps(options) + "\\n")
out = pathlib.Path(options["--output"])
shutil.copytree(pathlib.Path(SOURCE) / options["--split"], out, dirs_exist_ok=True)
manifest = {"version": "1", "seed": 0, "split": options["--split"]}
(out / "manifest.json").write_text(json.dumps(manifest))
"""


@pytest.fixture
def bundle(here, folders, monkeypatch):
    """A repository with a stand-in for ddpm_basics.fabrics; samples are in 'samples'."""
    shutil.copytree(folders / "samples", here / "samples")
    source = STUB.replace("SOURCE", repr(str(folders)))
    (here / "ddpm_basics").mkdir()
    (here / "ddpm_basics/__init__.py").touch()
    (here / "ddpm_basics/fabrics.py").write_text(source)
    replace(monkeypatch, "ROOT", here)
    return here


def test_renders_what_it_needs(run, bundle):
    code, stdout, stderr = run("samples")
    assert code == 0, stderr
    calls = [json.loads(line) for line in (bundle / "calls.jsonl").read_text().splitlines()]
    assert [call["--split"] for call in calls] == ["train", "heldout"]
    assert calls[1]["--count"] == str(HELDOUT_COUNT)
    assert calls[1]["--size"] == "32"
    assert calls[1]["--output"] == f"{DEFAULT_HELDOUT}_32"
    assert "is missing: rendering it" in stdout
    assert report_without_times(bundle / "evaluation.json")["folders"]["heldout"] == (
        f"{DEFAULT_HELDOUT}_32"
    )


def test_photographs_need_a_heldout_folder(refused, bundle, folders):
    sentence = refused("samples", "--train", folders / "train")
    assert "--heldout DIR" in sentence


def test_versions_of_the_fabrics_must_agree(refused, bundle, folders):
    for name, version in (("train", "1"), ("heldout", "2")):
        shutil.copytree(folders / name, bundle / name)
        manifest = {"version": version, "seed": 0, "split": name}
        (bundle / name / "manifest.json").write_text(json.dumps(manifest))
    sentence = refused("samples", "--train", "train", "--heldout", "heldout")
    assert "version 1" in sentence
    assert "version 2" in sentence


def test_failing_renderer(refused, bundle):
    (bundle / "ddpm_basics/fabrics.py").write_text("raise SystemExit(1)")
    assert "could not render" in refused("samples")


def test_interrupted_renderer(run, bundle):
    (bundle / "ddpm_basics/fabrics.py").write_text("raise SystemExit(130)")
    code, _, stderr = run("samples")
    assert code == 130
    assert "Interrupted" in stderr


def run_module(name, *argv):
    """Run a command of the package in the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", name, *argv]
    subprocess.run(command, check=True, capture_output=True, env=environment)


def test_the_real_renderer_understands(run, here, monkeypatch):
    prepare = ["ddpm_basics.fabrics", "--workers", "1"]
    for output, options in (
        ("african_fabric_processed", ["--count", "50"]),
        ("fresh", ["--split", "heldout", "--seed", "2", "--count", "50"]),
    ):
        run_module(*prepare, "--output", output, *options)
    replace(monkeypatch, "HELDOUT_COUNT", 60)
    code, _, stderr = run("fresh")
    assert code == 0, stderr
    manifest = json.loads((here / DEFAULT_HELDOUT / "manifest.json").read_text())
    wanted = ("heldout", HELDOUT_SEED, 60, 64)
    assert tuple(manifest[key] for key in ("split", "seed", "count", "size")) == wanted
    assert procedural_manifest(Path("african_fabric_processed"))


@pytest.mark.slow
def test_fresh_real_fabrics_are_at_the_floor(here):
    """The whole thing on real fabrics with every setting as it ships."""
    options = ["--split", "heldout", "--seed", "2", "--count", "1000", "--output", "fresh"]
    run_module("ddpm_basics.fabrics", *options)
    run_module("ddpm_basics.evaluation", "fresh")
    report = report_without_times(here / "evaluation.json")
    assert report["sizes"]["per_side"] == 500
    assert report["headline"]["median_ratio"] == pytest.approx(1, abs=0.1)
    assert report["headline"]["worst_ratio"] < 1.25
    assert report["copies"]["ratio_to_second_nearest"]["samples"]["share"] < 0.005
    assert report["traditions"]["classifier_error"] < 0.08
    assert max(report["traditions"]["share_over_fair"]) < 1.3
    assert min(report["traditions"]["share_over_fair"]) > 0.7


# ---- Bad input -----------------------------------------------------------------------------------


def test_missing_and_unsuitable_folders(refused, here, folders):
    heldout = ["--heldout", folders / "heldout"]
    train = ["--train", folders / "train"]
    (here / "empty").mkdir()
    (here / "file.png").write_bytes(b"x")
    assert "does not exist" in refused("nowhere", *train, *heldout)
    assert "is a file" in refused("file.png", *train, *heldout)
    assert "holds no images" in refused("empty", *train, *heldout)
    assert "does not exist" in refused(folders / "samples", "--train", "nowhere", *heldout)
    assert "does not exist" in refused(folders / "samples", *train, "--heldout", "nowhere")
    assert "holds no images" in refused(folders / "samples", *train, "--heldout", "empty")


def test_too_few_images(refused, here):
    save(fabrics(16, seed=3), here / "few")
    sentence = refused("few")
    assert "16 images" in sentence
    assert str(MINIMUM_IMAGES) in sentence


def test_broken_images_are_named(refused, here, folders):
    shutil.copytree(folders / "samples", here / "samples")
    whole = (here / "samples/0002.png").read_bytes()
    for name, content in (
        ("0000.png", b""),
        ("0001.png", b"no picture"),
        ("0002.png", whole[: len(whole) // 2]),
    ):
        (here / "samples" / name).write_bytes(content)
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(here / "samples/0003.png")
    sentence = refused("samples")
    assert "4 of 60" in sentence
    assert "0001.png" in sentence


def test_mixed_sizes(refused, here, folders):
    shutil.copytree(folders / "samples", here / "samples")
    heldout = ["--train", folders / "train", "--heldout", folders / "heldout"]
    Image.new("RGB", (40, 32)).save(here / "samples/grid.png")
    assert "grid.png has 40x32 pixels" in refused("samples", *heldout)
    for path in (here / "samples").iterdir():
        Image.open(path).resize((64, 64)).save(path)
    assert "only equal sizes can be compared" in refused("samples", *heldout)
    for path in (here / "samples").iterdir():
        Image.open(path).resize((300, 8)).save(path)
    assert "300x8 pixels" in refused("samples", *heldout)


def test_the_same_folder_twice(refused, folders):
    same = folders / "heldout"
    sentence = refused(same, "--train", folders / "train", "--heldout", same)
    assert "--seed" in sentence
    assert "--heldout ANOTHER_FOLDER" in sentence


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder(refused, here, folders):
    shutil.copytree(folders / "samples", here / "samples")
    (here / "samples").chmod(0)
    try:
        assert "cannot be read" in refused("samples")
    finally:
        (here / "samples").chmod(0o700)


def test_unusable_outputs(refused, here, folders):
    (here / "folder.json").mkdir()
    (here / "folder.png").mkdir()
    command = arguments(folders)
    assert "is a folder" in refused(*command, "--output", "folder.json")
    assert "is a folder" in refused(*command, "--figure", "folder.png")
    assert "has to end in .json" in refused(*command, "--output", "numbers.txt")
    assert "has to end in .png" in refused(*command, "--figure", "picture.bmp")
    assert "cannot be written" in refused(*command, "--output", "nowhere/numbers.json")
    assert "cannot be written" in refused(*command, "--output", "/proc/numbers.json")


def test_full_disk(run, here, folders, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "evaluation.json")

    monkeypatch.setattr(os, "replace", full)
    code, _, stderr = run(*arguments(folders))
    assert code == 1
    assert "Error: evaluation" in stderr
    assert os.strerror(errno.ENOSPC) in stderr
    assert not list(here.iterdir())


def test_wrong_usage(run, folders):
    for wrong in (
        [],
        [*arguments(folders), "--device", "abacus"],
        [*arguments(folders), "--seed", "-1"],
        [*arguments(folders), "--seed", "many"],
        [*arguments(folders), "--no-such-option"],
    ):
        code, _, stderr = run(*wrong)
        assert code == 2
        assert "usage:" in stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_missing_gpu(refused, folders):
    assert "--device auto" in refused(*arguments(folders), "--device", "cuda")


def test_help_shows_defaults(run):
    code, stdout, _ = run("--help")
    assert code == 0
    for word in (
        "african_fabric_processed",
        "evaluation.json",
        "evaluation_neighbours.png",
        "auto",
    ):
        assert word in stdout
    assert "default: 0" in stdout


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted(serve, here, folders):
    command = serve("ddpm_basics.evaluation.__main__").start(*arguments(folders), cwd=here)
    command.wait_until(lambda: "Training the classifier" in command.output("stderr"))
    command.send(signal.SIGINT)
    done = command.finish()
    assert done.code == 130
    assert "Interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(here.iterdir())
