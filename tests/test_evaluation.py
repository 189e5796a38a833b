"""The evaluation: on folders whose answer is known, and on those that cannot be measured."""

import dataclasses
import json
import math
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFilter

from ddpm_basics import data, evaluation
from ddpm_basics.console import UserError
from ddpm_basics.evaluation import distances
from ddpm_basics.evaluation.__main__ import evaluate, main
from ddpm_basics.evaluation.copies import copy_report, find_neighbours, is_copy
from ddpm_basics.evaluation.features import feature_spaces, train_classifier
from ddpm_basics.evaluation.folders import (
    CLASSIFIER_IMAGES,
    DEFAULT_HELDOUT,
    HELDOUT_COUNT,
    HELDOUT_SEED,
    Fabrics,
    leave_out_known,
    read_folders,
    split_heldout,
)
from ddpm_basics.evaluation.intervals import wilson
from ddpm_basics.evaluation.report import DEFINITIONS
from ddpm_basics.evaluation.shares import predict, true_shares
from ddpm_basics.fabrics.drawing import DATA_VERSION
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.fabrics.manifest import Manifest, read_manifest, write_manifest

MODULES = [
    import_module(f"{evaluation.__name__}.{module.name}")
    for module in pkgutil.iter_modules(evaluation.__path__)
]
CPU = torch.device("cpu")
KINDS = ("checks", "discs", "stripes", "waves")
SPACES = ("pixels", "patches", "convolutions", "classifier")
FIFTY = {f"{i}.png": "a" for i in range(50)}  # files of a manifest
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
    return Fabrics(Path(name), labels, as_pixels([draw(label, rng) for label in labels]))


def as_pixels(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def save(images, folder, labelled=True):
    """Write stand-ins as files."""
    for i, (label, image) in enumerate(zip(images.labels, images.pixels, strict=True)):
        path = folder / (label if labelled else "") / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def changed(images, change):
    """Every image (H, W, 3) float in [0, 1] after a change."""
    pictures = [change(p) for p in images.pixels.permute(0, 2, 3, 1).numpy() / 255]
    pixels = [(255 * p.clip(0, 1)).round().astype(np.uint8) for p in pictures]
    return Fabrics(images.folder, images.labels, as_pixels(pixels))


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
    trained = []

    def train_once(*arguments):
        trained[:] = trained or [train_classifier(*arguments)]
        return trained[0]

    def call(samples):
        with pytest.MonkeyPatch.context() as patch:
            replace(patch, "train_classifier", train_once)
            return evaluate(samples, train, heldout, 0, CPU)[0]

    return call


@pytest.fixture(scope="module")
def fresh(quick):
    return fabrics(200, seed=3)


@pytest.fixture(scope="module")
def fresh_report(judge, fresh):
    return judge(fresh)


def every_distance(report):
    """{(space, measure): summary}."""
    found = report["distances"]
    return {(space, measure): found[space][measure] for space in SPACES for measure in MEASURES}


# ---- The distances against closed forms ----------------------------------------------------------


def test_frechet_of_known_gaussians():
    """In two dimensions tr((AB)^½) = √(tr(AB) + 2 √det(AB)), also where A and B do not commute."""
    a = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    b = torch.tensor([[0.7, -0.4], [-0.4, 1.5]], dtype=torch.float64)
    mean_a, mean_b = torch.tensor([[1.0, -2.0], [0.5, 1.0]], dtype=torch.float64)
    assert not torch.allclose(a @ b, b @ a)
    root = torch.sqrt((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt())
    expected = float((mean_a - mean_b).square().sum() + a.trace() + b.trace() - 2 * root)
    found = distances.frechet_distance((mean_a, a), (mean_b, b))
    assert found == pytest.approx(expected, rel=1e-10)
    assert distances.frechet_distance((mean_b, b), (mean_a, a)) == pytest.approx(found)
    assert distances.frechet_distance((mean_a, a), (mean_a, a)) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_in_one_dimension():
    """Between N(0, 1) and N(m, s²) the 2-Wasserstein distance is √(m² + (s - 1)²)."""
    quantiles = torch.special.ndtri((torch.arange(20_000) + 0.5).double() / 20_000)
    x, y = quantiles[:, None], 1.5 + 2 * quantiles.flip(0)[:, None]
    direction = torch.ones(1, 1, dtype=torch.float64)
    found = distances.sliced_wasserstein(x, y, direction)
    assert found == pytest.approx(math.hypot(1.5, 1.0), rel=1e-3)
    assert distances.sliced_wasserstein(x, x.flip(0), direction) == 0


def test_sliced_wasserstein_of_a_shift():
    """Along a random direction in d dimensions a shift v has the mean square |v|²/d."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 5, generator=generator)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0])
    directions = distances.random_directions(5, 20_000, generator)
    assert torch.allclose(directions.norm(dim=0), torch.ones(20_000))
    found = distances.sliced_wasserstein(x, x + shift, directions)
    assert found == pytest.approx(5 / math.sqrt(5), rel=0.02)


def kernels(x, y):
    return [distances.kernel_matrix(a, b) for a, b in ((x, x), (y, y), (x, y))]


def test_kernel_distance_is_unbiased():
    """Over many small draws from one distribution its mean is 0; that of a biased one is chance."""
    generator = torch.Generator().manual_seed(0)
    unbiased, chance = [], []
    for _ in range(800):
        x, y = torch.randn(2, 12, 1, 4, generator=generator)
        k_xx, k_yy, k_xy = kernels(x, y)
        unbiased.append(distances.unbiased_mmd2(k_xx, k_yy, k_xy))
        chance.append(distances.chance_mmd2(k_xx, k_yy))
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
    assert distances.unbiased_mmd2(*kernels(x, y)) == pytest.approx(expected, rel=0.25)


def test_kernel_of_several_points_is_the_mean_over_pairs():
    x, y = torch.randn(2, 7, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(7, 7)
    for i in range(7):
        for j in range(7):
            expected[i, j] = (x[i] @ y[j].T / 5 + 1).pow(3).mean()
    assert torch.allclose(distances.kernel_matrix(x, y), expected, rtol=1e-4)


def test_intervals_cover(quick):
    """Of intervals from many independent worlds about 95 % hold the mean over all of them."""
    found = {measure: [] for measure in MEASURES}
    for world in range(40):
        generator = torch.Generator().manual_seed(world)
        features = {
            name: torch.randn(100, 1, 3, generator=generator) for name in ("samples", "train")
        }
        features["heldout"] = torch.randn(200, 1, 3, generator=generator)
        features["samples"] += 0.4
        rng = np.random.default_rng(world)
        splits = distances.draw_splits({k: len(v) for k, v in features.items()}, 50, rng)
        report = distances.distance_report({"x": features}, splits, 0, CPU)
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
    found = find_neighbours(queries, train, CPU)
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
    found = find_neighbours(samples, train, CPU)
    for flags in is_copy(found):
        assert flags.mean() > 0.97
    assert found.index[:, 0].tolist() == list(range(len(train)))
    if how in ("as they are", "mirrored"):
        assert found.distance[:, 0].abs().max() == 0
        assert is_copy(found)[0].all()


def test_copies_of_an_image_that_is_there_twice(train):
    """Where d1 and d2 are both 0 their ratio says nothing, and near 0 only the crowd does."""
    double = train.at([0, *range(len(train))])
    exact = find_neighbours(train.at([0, 1]), double, CPU)
    assert is_copy(exact)[0].all()
    noisy = changed(train.at([0]), lambda p: p + 0.01)
    near = find_neighbours(noisy, double, CPU)
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


def test_a_few_copies_among_fresh_images(quick, train, fresh, heldout):
    mixed = Fabrics(
        fresh.folder,
        fresh.labels[:190] + train.labels[:10],
        torch.cat([fresh.pixels[:190], train.pixels[:10].flip(-1)]),
    )
    found = [find_neighbours(own, train, CPU) for own in (mixed, heldout)]
    rule = copy_report(*found, np.random.default_rng(0))["ratio_to_second_nearest"]
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


def test_colours_equal_an_independent_computation(fresh, fresh_report):
    pixels = fresh.pixels.permute(0, 2, 3, 1).reshape(200, -1, 3).numpy() / 255
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
def test_distances_rise_with_the_damage(judge, fresh, fresh_report, kind):
    reports = [fresh_report]
    for level in range(2):
        change = DAMAGE[kind](np.random.default_rng(0), level)
        reports.append(judge(changed(fresh, change)))
    columns = [every_distance(report) for report in reports]
    for space, measure in columns[0]:
        values = [column[space, measure]["samples"]["value"] for column in columns]
        over_floor = columns[2][space, measure]["samples_over_floor"]
        low, _ = over_floor["interval_95"]
        if space == "pixels" and kind != "shifted in colour":
            # Averages over an eighth of a side hardly see grain, and should not.
            assert values[1] < 1.1 * values[0], measure
        elif space == "classifier":
            # What it sees hangs on its training, and that on how a processor rounds: over six
            # seeds the ratios lie between 1.49 and 3.99, their intervals' lower ends from 0.37 up.
            assert max(values[:2]) < values[2], measure
            assert over_floor["ratio"] > 1.25, measure
        else:
            assert values[0] < values[1] < values[2], (space, measure)
            # The kernel distance is unbiased and therefore noisy: its interval is wider.
            assert low > (0.5 if measure == "kernel" else 1), (space, measure)
    medians = [report["headline"]["median_ratio"] for report in reports]
    assert medians == sorted(medians)
    assert medians[-1] > 1.8


# ---- What is measured with what ------------------------------------------------------------------


def test_nothing_is_measured_with_images_the_classifier_knows(quick, monkeypatch):
    taught, measured = [], []

    def teach(images, *rest):
        taught.extend(images.fingerprints())
        return train_classifier(images, *rest)

    def spaces(folders, *rest):
        measured.extend(folders["heldout"].fingerprints())
        return feature_spaces(folders, *rest)

    def guess(classifier, images, device):
        measured.extend(images.fingerprints())
        return predict(classifier, images, device)

    replace(monkeypatch, "CLASSIFIER_STEPS", 10)
    replace(monkeypatch, "train_classifier", teach)
    replace(monkeypatch, "feature_spaces", spaces)
    replace(monkeypatch, "predict", guess)
    evaluate(*(fabrics(count, seed=count) for count in (60, 80, 120)), 0, CPU)
    assert len(taught) == 60
    assert len(measured) > 60
    assert not set(taught) & set(measured)


def test_splits_are_disjoint_and_equally_large():
    rng = np.random.default_rng(0)
    for split in distances.draw_splits({"samples": 90, "train": 70, "heldout": 60}, 30, rng):
        assert {len(set(own)) for own in split.values()} == {30}
        assert not set(split["heldout"]) & set(split["floor"])


def test_known_images_are_left_out(train, heldout, capsys):
    mixed = heldout.at([*range(100), 50, 51])
    mixed.pixels[:20] = train.pixels[:20]
    left = leave_out_known(mixed, train)
    assert len(left) == 80
    assert "Left out 22 images" in capsys.readouterr().out
    assert not set(left.fingerprints()) & set(train.fingerprints())
    with pytest.raises(UserError, match="Only 0 of the 200 images"):
        leave_out_known(train, train)


def test_larger_folders_are_split_as_documented():
    labels = [KINDS[i % 3] for i in range(6000)]
    pixels = torch.zeros(6000, 3, 1, 1, dtype=torch.uint8)
    images = Fabrics(Path("x"), labels, pixels)
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
    """Run a command that has to fail with exit code 1 and no output; return what it says."""

    def call(*argv):
        before = set(here.rglob("*"))
        code, _, stderr = run(*argv)
        assert code == 1
        assert set(here.rglob("*")) == before
        return stderr

    return call


def arguments(folders):
    return [folders / "samples", "--train", folders / "train", "--heldout", folders / "heldout"]


def report_without_times(path):
    report = json.loads(path.read_text())
    assert report.pop("seconds") >= 0
    return report


def test_command_writes_numbers_and_figure(run, here, folders):
    """The same ones for the same seed, over its own earlier ones too."""
    outputs = []
    for seed in (5, 5, 6):
        code, stdout, stderr = run(*arguments(folders), "--seed", seed)
        assert code == 0, stderr
        report = report_without_times(here / "evaluation.json")
        outputs.append((report, (here / "evaluation_neighbours.png").read_bytes()))
    assert outputs[0] == outputs[1]
    assert report["distances"] != outputs[0][0]["distances"]
    assert len(list(here.iterdir())) == 2

    assert report["sizes"]["samples"] == report["sizes"]["distinct_samples"] == 60
    assert report["sizes"]["per_side"] == 30
    assert report["sizes"]["heldout_for_classifier"] + report["sizes"]["heldout_measured"] == 120
    with Image.open(here / "evaluation_neighbours.png") as figure:
        assert figure.width > 1000
        assert len(figure.convert("RGB").getcolors(maxcolors=1 << 24)) > 1000
    for part in ("Copies", "Distances", "Traditions", "Colours", "times the floor"):
        assert part in stdout
    assert "\nWrote evaluation.json and evaluation_neighbours.png in " in stdout
    assert all(len(line) <= 120 for line in stdout.splitlines())


def keys(part):
    return {key: keys(own) for key, own in part.items()} if isinstance(part, dict) else None


def test_report_has_the_keys_of_the_reference(fresh_report):
    """What documents cite from the reference run has to stand in every report."""
    reference = json.loads((ROOT / "training_results/reference/evaluation.json").read_text())
    for part in fresh_report:
        assert keys(fresh_report[part]) == keys(reference[part])
    assert keys(DEFINITIONS) == keys(reference["definitions"])


def test_files_of_others_are_not_replaced(refused, here, folders, monkeypatch):
    (here / "notes.json").write_text('{"mine": 1}')
    Image.new("RGB", (8, 8)).save(here / "notes.png")
    assert "exists already" in refused(*arguments(folders), "--output", "notes.json")
    assert "exists already" in refused(*arguments(folders), "--figure", "notes.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # as if it were larger than it can be
    assert "exists already" in refused(*arguments(folders), "--figure", "notes.png")


def test_interrupt_leaves_nothing(run, here, folders, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    replace(monkeypatch, "train_classifier", interrupt)
    code, _, stderr = run(*arguments(folders))
    assert code == 130
    assert "No result was written" in stderr
    assert not list(here.iterdir())


def test_other_sizes_and_no_labels(run, here):
    """Photographs that are not sorted: the other three spaces and the copies remain."""
    for name, seed in (("samples", 3), ("train", 1), ("heldout", 2)):
        folder = save(fabrics(50, seed=seed), here / name, labelled=False)
        for path in folder.iterdir():
            Image.open(path).resize((24, 40)).save(path)
    code, stdout, stderr = run("samples", "--train", "train", "--heldout", "heldout")
    assert code == 0, stderr
    assert "No classifier" in stdout
    report = report_without_times(here / "evaluation.json")
    assert report["traditions"] is None
    assert set(report["distances"]) == set(SPACES) - {"classifier"}


# ---- Held-out fabrics that are drawn -------------------------------------------------------------


def test_draws_what_it_needs(here, folders, monkeypatch):
    """With nothing but samples of another size than usual."""
    calls = []

    def draw(output, **options):
        calls.append((output, options))
        save(fabrics(50, seed=len(calls)), here / output)
        write_manifest(here / output, Manifest(count=50, size=32, version="1", traditions=FIFTY))

    replace(monkeypatch, "draw_fabrics", draw)
    monkeypatch.setattr("ddpm_basics.data.draw_fabrics", draw)
    read = read_folders(folders / "samples", data.DEFAULT, DEFAULT_HELDOUT)
    heldout = Path(f"{DEFAULT_HELDOUT}_32")
    options = {"split": "heldout", "count": HELDOUT_COUNT, "seed": HELDOUT_SEED, "size": 32}
    assert calls == [(data.DEFAULT, {}), (heldout, options)]
    assert read["heldout"].folder == heldout


def test_real_fabrics_are_drawn(here, monkeypatch):
    for constant in ("HELDOUT_COUNT", "MINIMUM_IMAGES"):
        replace(monkeypatch, constant, 12)
    draw_fabrics(data.DEFAULT, count=12)
    manifest = read_manifest(data.DEFAULT)
    write_manifest(data.DEFAULT, dataclasses.replace(manifest, sha256=None, pixels={}))
    next(data.DEFAULT.glob("*/*.png")).unlink()  # half drawn: the rest is drawn first
    draw_fabrics(Path("fresh"), split="heldout", seed=2, count=12)
    read = read_folders(Path("fresh"), data.DEFAULT, DEFAULT_HELDOUT)
    assert [len(images) for images in read.values()] == [12, 12, 12]  # none that are known
    found = read_manifest(DEFAULT_HELDOUT)
    wanted = (DATA_VERSION, "heldout", HELDOUT_SEED, 12, 64)
    assert (found.version, found.split, found.seed, found.count, found.size) == wanted


def test_photographs_need_a_heldout_folder(refused, folders):
    assert "--heldout DIR" in refused(folders / "samples", "--train", folders / "train")


def test_versions_of_the_fabrics_must_agree(refused, here, folders):
    for name, version in (("train", "1"), ("heldout", "2")):
        save(fabrics(50, seed=int(version)), here / name)
        found = Manifest(count=50, size=32, version=version, traditions=FIFTY, sha256="whole")
        write_manifest(here / name, found)
    said = refused(folders / "samples", "--train", "train", "--heldout", "heldout")
    assert "versions 1 and 2" in said


@pytest.mark.slow
def test_fresh_real_fabrics_are_at_the_floor(here, monkeypatch):
    """The whole thing on real fabrics with every setting as it ships."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    draw_fabrics(Path("fresh"), split="heldout", seed=2, count=1000)
    subprocess.run([sys.executable, "-m", evaluation.__name__, "fresh"], check=True)
    report = report_without_times(here / "evaluation.json")
    assert report["sizes"]["per_side"] == 500
    assert report["headline"]["median_ratio"] == pytest.approx(1, abs=0.1)
    assert report["headline"]["worst_ratio"] < 1.25
    assert report["copies"]["ratio_to_second_nearest"]["samples"]["share"] < 0.005
    assert report["traditions"]["classifier_error"] < 0.08
    assert max(report["traditions"]["share_over_fair"]) < 1.3
    assert min(report["traditions"]["share_over_fair"]) > 0.7


# ---- Folders that cannot be measured -------------------------------------------------------------


def test_too_few_images(refused, here):
    save(fabrics(49, seed=3), here / "few")
    assert "49 images" in refused("few")


def test_sizes_must_suit_and_agree(refused, here, folders):
    for size, said in (((64, 64), "only equal sizes can be compared"), ((300, 8), "300x8 pixels")):
        for i in range(50):
            (here / "samples").mkdir(exist_ok=True)
            Image.new("RGB", size, (i, i, i)).save(here / "samples" / f"{i}.png")
        assert said in refused("samples", *arguments(folders)[1:])


def test_the_same_folder_twice(refused, folders):
    same = folders / "heldout"
    said = refused(same, "--train", folders / "train", "--heldout", same)
    assert "--heldout ANOTHER_FOLDER" in said
