"""tests/benchmarks/reference_run.py and bench_training.py, on a network that takes a minute."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_blocks

BENCHMARKS = ROOT / "tests" / "benchmarks"
TINY = ["--dim", "8", "--dim-mults", "1", "2"]


@pytest.mark.slow
def test_the_best_checkpoint_is_shipped_with_its_record(tmp_path):
    write_blocks(tmp_path / "data", 120, size=32)
    write_blocks(tmp_path / "heldout", 240, size=32, seed=1)
    (tmp_path / "reference" / "stage1_8x8").mkdir(parents=True)
    (tmp_path / "reference" / "bench_sampling.json").write_text("{}")
    command = [
        sys.executable, str(BENCHMARKS / "reference_run.py"), "--steps", "40", "--every", "20",
        "--samples", "60", "--device", "cpu", "--skip-measurements",
        "--data", str(tmp_path / "data"), "--heldout", str(tmp_path / "heldout"),
        "--folder", str(tmp_path / "run"), "--weights-out", str(tmp_path / "models" / "w.pt"),
        "--reference", str(tmp_path / "reference"),
        "--", *TINY, "--image-size", "32", "--batch-size", "4", "--precision", "fp32",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    rows = json.loads((tmp_path / "reference" / "checkpoints.json").read_text())
    assert [row["step"] for row in rows] == [20, 40]
    best = min(rows, key=lambda row: row["median_ratio"])
    assert [row["step"] for row in rows if row["shipped"]] == [best["step"]]
    shipped = torch.load(tmp_path / "models" / "w.pt", weights_only=True)
    assert shipped["step"] == best["step"]
    there = {path.name for path in (tmp_path / "reference").iterdir()}
    assert there == {"sample-20.png", "sample-40.png", "losses.csv", "loss_curve.png", "run.json",
                     "evaluation.json", "evaluation_neighbours.png", "checkpoints.json",
                     "bench_sampling.json"}  # fmt: skip

    # Exercise 3 wrote the last step in the same format; what was exported here must equal it.
    sys.path.insert(0, str(BENCHMARKS))
    from reference_run import export

    export(tmp_path / "run" / "model-40.pt", tmp_path / "models" / "w.pt")
    ours = torch.load(tmp_path / "models" / "w.pt", weights_only=True)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert ours.keys() == last.keys()
    assert ours["config"]["training"].pop("seconds") == pytest.approx(
        last["config"]["training"].pop("seconds"), abs=1)  # fmt: skip
    assert ours["config"] == last["config"]
    assert ours["ema"].keys() == last["ema"].keys()
    for key, value in last["ema"].items():
        assert ours["ema"][key].dtype == value.dtype
        assert torch.equal(ours["ema"][key], value)
    assert (tmp_path / "models" / "w.previous.pt").exists()


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
    record = json.loads((tmp_path / "bench.json").read_text())
    assert {"stock", "ours, fp32"} <= record["variants"].keys()
    assert record["variants"]["stock"]["times_stock"] == 1
    for row in record["variants"].values():
        assert row["images_per_second"] == pytest.approx(16 / row["seconds_per_step"])
        assert 1e8 < row["peak_memory_bytes"] < 4e9
