"""FID, KID and Inception Score: the figures of torch-fidelity, on the same files, every time."""

import json
import sys
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import CPU, as_pixels, changed, fabrics, replace, save

from ddpm_basics.console import UserError
from ddpm_basics.evaluation import distances, folders, inception
from ddpm_basics.evaluation.__main__ import evaluate, main
from ddpm_basics.evaluation.folders import read_fabrics

torch_fidelity = pytest.importorskip("torch_fidelity")
from torch_fidelity import metric_fid, metric_kid  # noqa: E402
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402

REAL = inception.EXTRACTOR
KINDS = "png,jpg,jpeg,webp"


class Tiny(FeatureExtractorBase):
    """A stand-in for Inception: 24 features and 6 classes, from the weights of a file."""

    def __init__(self, name, layers, feature_extractor_weights_path=None, **_):
        super().__init__(name, layers)
        self.filters = torch.nn.Conv2d(3, 24, 5, stride=3)
        self.classes = torch.nn.Linear(24, 6)
        self.load_state_dict(torch.load(feature_extractor_weights_path))
        self.requires_grad_(False)

    @staticmethod
    def get_provided_features_list():
        return "24", "classes"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"isc": "classes", "fid": "24", "kid": "24"}[metric]

    def forward(self, x):
        assert x.dtype == torch.uint8
        features = self.filters(x / 255).relu().mean((2, 3))
        found = {"24": features, "classes": self.classes(features)}
        return tuple(found[layer] for layer in self.features_list)


torch_fidelity.register_feature_extractor("tiny", Tiny)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(0)
    state = {"filters.weight": torch.randn(24, 3, 5, 5), "filters.bias": torch.randn(24),
             "classes.weight": torch.randn(6, 24), "classes.bias": torch.randn(6)}  # fmt: skip
    torch.save(state, path)
    return path


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """The stand-in's name, few splits, an empty place for downloads and caches."""
    monkeypatch.setattr(inception, "EXTRACTOR", "tiny")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    for name, value in (("SPLITS", 8), ("BOOTSTRAPS", 100), ("CLASSIFIER_STEPS", 10)):
        replace(monkeypatch, name, value)


# ---- The same figures ----------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Folders with subfolders, of PNG, JPEG, WebP and grey pictures."""
    for name, count, seed in (("samples", 70, 3), ("train", 50, 1), ("heldout", 90, 2)):
        folder = save(fabrics(count, seed=seed), tmp_path / name, labelled=False)
        for i, path in enumerate(sorted(folder.iterdir())):
            picture = Image.open(path).convert("L" if i % 5 == 0 else "RGB")
            path.unlink()
            new = folder / ("deep/er" if i % 7 == 0 or name == "heldout" else "") / path.name
            new.parent.mkdir(parents=True, exist_ok=True)
            picture.save(new.with_suffix((".png", ".jpg", ".webp")[i % 3]))
    return tmp_path


def measure(home, weights, *more):
    argv = [home / "samples", "--train", home / "train", "--heldout", home / "heldout",
            "--output", home / "e.json", "--figure", home / "e.png", *more]  # fmt: skip
    assert main([*map(str, argv), "--inception", str(weights)]) == 0
    return json.loads((home / "e.json").read_text())["inception"]


def theirs(home, weights):
    """What torch-fidelity says when it reads the folders itself."""
    return torch_fidelity.calculate_metrics(
        input1=str(home / "samples"), input2=str(home / "heldout"), samples_find_deep=True,
        samples_find_ext=KINDS, feature_extractor="tiny", feature_extractor_weights_path=weights,
        isc=True, fid=True, kid=True, kid_subset_size=70, cache=False, cuda=False, verbose=False,
        save_cpu_ram=True,
    )  # fmt: skip


def test_equal_to_torch_fidelity_on_the_same_files(mixed, weights, capsys):
    """Again after the pictures have changed under the same names: nothing comes from a cache."""
    seen = []
    for _ in range(2):
        ours, expected = measure(mixed, weights)["all"], theirs(mixed, weights)
        assert (ours["samples"], ours["heldout"], ours["kid_subset"]) == (70, 90, 70)
        for name, key in (
            ("fid", "frechet_inception_distance"),
            ("kid", "kernel_inception_distance_mean"),
            ("kid_spread", "kernel_inception_distance_std"),
            ("inception_score", "inception_score_mean"),
            ("inception_score_spread", "inception_score_std"),
        ):
            assert ours[name] == pytest.approx(expected[key], rel=1e-4), name
        seen.append(ours)
        for path in (mixed / "samples").glob("*.png"):
            Image.open(path).point(lambda level: 255 - level).save(path)
    assert seen[0]["fid"] != pytest.approx(seen[1]["fid"], rel=0.01)
    assert not list(mixed.glob("torch_home/*"))
    printed = capsys.readouterr().out
    assert f"FID {seen[0]['fid']:.4g}" in printed
    ours = printed.split("By Inception")[1].split("\n\n")[0]
    assert all(len(line) <= 120 for line in ours.splitlines())


@pytest.mark.parametrize("count", [20, 300])
def test_our_distances_are_theirs(count):
    """Fréchet and kernel distance of the same features, before ours are standardised."""
    generator = torch.Generator().manual_seed(count)
    x = torch.rand(count, 40, generator=generator).square()
    y = torch.rand(count, 40, generator=generator) @ torch.rand(40, 40, generator=generator) / 20
    statistics = [metric_fid.fid_features_to_statistics(own.double()) for own in (x, y)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    found = distances.frechet_distance(distances.gaussian_of(x), distances.gaussian_of(y))
    assert found == pytest.approx(expected, rel=1e-4)
    assert distances.frechet_of_points(x, y) == pytest.approx(expected, rel=1e-4)
    kernels = [distances.kernel_matrix(a[:, None], b[:, None]) for a, b in ((x, x), (y, y), (x, y))]
    theirs = metric_kid.kernel_mmd(x.double().numpy(), y.double().numpy())
    assert distances.unbiased_mmd2(*kernels) == pytest.approx(theirs, rel=1e-3)


def test_floors_and_intervals(weights):
    """Fresh pictures are at the floor, damaged ones above it."""
    extractor = inception.load_inception(str(weights), CPU)
    fresh, train, heldout = (fabrics(200, seed=seed) for seed in (3, 1, 2))
    rng = np.random.default_rng(0)
    splits = distances.draw_splits({"samples": 200, "train": 200, "heldout": 200}, 100, rng)
    every = np.arange(200)
    known = {name: inception.look(extractor, own, every, CPU)
             for name, own in (("train", train), ("heldout", heldout))}  # fmt: skip
    redder = changed(fresh, lambda p: p + 0.4 * np.array([1, 0, -1]))
    for samples, good in ((fresh, True), (redder, False)):
        seen = {**known, "samples": inception.look(extractor, samples, every, CPU)}
        report = inception.inception_report(seen, splits, CPU)
        for name, row in report["distances"].items():
            ratio = row["samples_over_floor"]["ratio"]
            assert ratio == pytest.approx(1, abs=0.4) if good else ratio > 2, name
            assert row["train_over_floor"]["ratio"] == pytest.approx(1, abs=0.4), name
        for row in report["inception_score"].values():
            low, high = row["interval_95"]
            assert low < row["value"] < high


# ---- Folders of many images ----------------------------------------------------------------------


def test_large_folders_stay_on_the_disk(tmp_path, weights, monkeypatch):
    """The report is the same, and no more than a batch of pictures is ever asked for."""
    for name, count, seed in (("samples", 75, 3), ("train", 90, 1), ("heldout", 100, 2)):
        save(fabrics(count, seed=seed), tmp_path / name)
    extractor = inception.load_inception(str(weights), CPU)

    def report():
        own = {name: read_fabrics(tmp_path / name) for name in ("samples", "train", "heldout")}
        return own, *evaluate(**own, seed=0, device=CPU, extractor=extractor)

    _, before, near = report()
    asked = []

    def watch(folder, files, *more):
        asked.append(len(files))
        return decode_all(folder, files, *more)

    decode_all = folders.decode_all
    monkeypatch.setattr(folders, "decode_all", watch)
    replace(monkeypatch, "IN_MEMORY", 0)
    replace(monkeypatch, "BANK", 40)  # images: train is looked through in three parts
    replace(monkeypatch, "BATCH", 32)
    replace(monkeypatch, "SHOWN", 16)
    own, after, found = report()
    assert isinstance(own["samples"].pixels, folders.PixelsOnDisk)
    assert asked[:3] == [75, 90, 100], "all are looked at once, one by one"
    assert max(asked[3:]) <= 64
    assert torch.equal(found.index, near.index)
    assert found.distance.numpy() == pytest.approx(near.distance.numpy(), rel=1e-5)
    assert found.crowd.numpy() == pytest.approx(near.crowd.numpy(), rel=1e-4)
    assert after["inception"]["all"] == pytest.approx(before["inception"]["all"], rel=1e-4)
    for part in ("mean", "contrast"):
        then, now = (r["colours"]["samples"][part]["rgb"] for r in (before, after))
        assert now == pytest.approx(then, rel=1e-9)
    assert after["sizes"] == before["sizes"]


# ---- Weights -------------------------------------------------------------------------------------


def test_the_real_network(tmp_path, monkeypatch):
    """Inception itself, with random weights in a file as torch-fidelity loads it."""
    path = tmp_path / "inception.pth"
    torch.save({}, path)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        real = FeatureExtractorInceptionV3(REAL, ["2048", "logits_unbiased"], path)
    torch.save(real.state_dict(), path)
    monkeypatch.setattr(inception, "EXTRACTOR", REAL)
    extractor = inception.load_inception(str(path), CPU)
    pictures = as_pixels([np.full((32, 32, 3), 90, np.uint8)])
    for ours, theirs in zip(extractor(pictures), real(pictures), strict=True):
        assert torch.equal(ours, theirs)
    assert ours.shape == (1, 1008)


class Code:
    def __reduce__(self):
        return print, ("!",)


@pytest.mark.parametrize("content", [None, {"other": torch.zeros(3)}, {"x": Code()}])
def test_other_files(tmp_path, content, capsys):
    path = tmp_path / "file.pth"
    if content:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"is no file|holds other weights|wants to run code"):
        inception.load_inception(str(path), CPU)
    assert "!" not in capsys.readouterr().out


def test_offline(monkeypatch):
    def fetch(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(inception, "EXTRACTOR", REAL)
    module = sys.modules[FeatureExtractorInceptionV3.__module__]
    monkeypatch.setattr(module, "load_state_dict_from_url", fetch)
    with pytest.raises(UserError, match=r"cannot be fetched .*no route.* with --inception FILE"):
        inception.load_inception("", CPU)


def test_without_torch_fidelity(monkeypatch, tmp_path, capsys):
    """One sentence, before anything is read."""
    for name in list(sys.modules):
        if name.split(".")[0] == "torch_fidelity":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    assert main(["nowhere", "--inception"]) == 1
    assert "pip install -r requirements-extras.txt" in capsys.readouterr().err
