"""tests/benchmarks/reference_run.py and bench_training.py, on tiny networks."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_blocks
from ema_pytorch import KarrasEMA

from ddpm_basics.fabrics.drawing import TRADITIONS
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.weight_files import load_weights

BENCHMARKS = ROOT / "tests" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import reference_run  # noqa: E402

TINY = ["--dim", "8", "--dim-mults", "1", "2"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(minutes): the recipe on 108 fabrics and a tiny network; returns its folder."""
    monkeypatch.setattr(reference_run.exercise3, "train", reference_run.exercise3.train)
    monkeypatch.setattr(reference_run, "MOMENTS", (0.5, 1.0))
    folder = tmp_path / "recipe"
    draw_fabrics(folder / "fabrics", count=108, workers=1)
    unseen = write_blocks(tmp_path / "unseen", 24, size=16, seed=1)

    def run(minutes):
        code = reference_run.main([
            "--minutes", str(minutes), "--count", "108", "--every", "2", "--folder", str(folder),
            "--", *TINY, "--heldout", str(unseen), "--batch-size", "8", "--image-size", "16",
            "--compile", "off", "--log-every", "2", "--warmup", "4", "--device", "cpu",
            "--precision", "fp32",
        ])  # fmt: skip
        assert code == 0
        return folder

    return run


def table(path):
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_the_recipe_fills_its_time(recipe):
    folder = recipe(0.1)
    losses, heldout = table(folder / "losses.csv"), table(folder / "heldout.csv")
    assert max(row["lr"] for row in losses) > 2e-4
    assert losses[-1]["lr"] < 7e-5, "the rate does not end with the time"
    assert 6 <= losses[-1]["seconds"] < 20
    assert len(heldout) >= 2
    for row in heldout:
        quarters = [row[f"labelled{i}"] for i in range(4)]
        assert row["labelled"] == pytest.approx(sum(quarters) / 4, rel=1e-4)
    assert max(row["plain"] for row in heldout) < 0.65, "worse than an untrained network"
    weights = folder / "weights.pt"
    facts = load_weights(weights)[1]
    assert facts.labels == tuple(sorted(TRADITIONS))
    assert facts.step == losses[-1]["step"] == heldout[-1]["step"]
    assert (folder / f"sample-{facts.step}.png").exists()
    assert len(list(folder.glob("sample-*.png"))) >= 1

    # Interrupted, it goes on: later steps, no row twice, and the average with it.
    recipe(0.14)
    steps = [row["step"] for row in table(folder / "losses.csv")]
    assert steps == sorted(set(steps))
    assert load_weights(weights)[1].step == steps[-1] > facts.step


def test_its_average_is_a_power_function():
    """With gamma 16 the weights of step i count as (i / n)^16, Karras et al. 2024, equation 125."""
    weight = torch.nn.Linear(1, 1, bias=False)
    ema = KarrasEMA(weight, gamma=reference_run.GAMMA, update_every=1)
    for step in range(1, 1001):
        torch.nn.init.constant_(weight.weight, step)
        ema.update()
    power = [(i / 1000) ** 16 for i in range(1, 1001)]
    expected = sum(i * p for i, p in enumerate(power, 1)) / sum(power)
    assert ema.ema_model.weight.item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_the_training_benchmark_measures_every_variant(tiny_data, tmp_path):
    command = [
        sys.executable, str(BENCHMARKS / "bench_training.py"), "--data", str(tiny_data),
        "--image-size", "8", *TINY, "--batch-size", "16", "--steps", "2", "--rounds", "2",
        "--warm-up", "1", "--device", "cpu",
        "--output", str(tmp_path / "bench.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [record] = json.loads((tmp_path / "bench.json").read_text())["machines"]
    names = {"stock", "ours, fp32", "ours, fp32, freed memory given back"}
    assert names <= record["variants"].keys()
    assert record["variants"]["stock"]["times_stock"] == 1
    for row in record["variants"].values():
        assert row["images_per_second"] == pytest.approx(16 / row["seconds_per_step"])
        assert 1e8 < row["peak_memory_bytes"] < 4e9
