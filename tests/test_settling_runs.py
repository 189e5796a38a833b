"""tests/benchmarks/settling_runs.py, on a network that takes seconds."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_every_run_is_judged_beside_the_plain_one(tmp_path):
    command = [
        sys.executable, str(ROOT / "tests" / "benchmarks" / "settling_runs.py"), "--steps", "4",
        "--batch-size", "8", "--image-size", "32", "--heldout", "300", "--errors", "60",
        "--samples", "60", "--folder", str(tmp_path / "work"),
        "--reference", str(tmp_path / "reference"), "--runs", "plain", "min-SNR",
        "--", "--dim", "8", "--dim-mults", "1", "2", "--precision", "fp32", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "reference" / "settling.json").read_text())
    rows = {(row["run"], row["average"]): row for row in record["rows"]}
    assert set(rows) == {("plain", "ours"), ("plain", "power 3/4"), ("plain", "none"),
                         ("plain", "the library's"), ("min-SNR", "ours")}  # fmt: skip
    plain = rows["plain", "ours"]
    assert plain["difference_to_plain"] == 0
    assert record["heldout_images_for_errors"] == 60
    for row in rows.values():
        assert sum(row["heldout_bins"]) / 10 == pytest.approx(row["heldout_error"])
        assert row["median_ratio"] > 1
    # During the first 100 updates every average is a copy of the weights; another loss is not.
    assert rows["plain", "none"]["heldout_error"] == pytest.approx(plain["heldout_error"])
    assert rows["min-SNR", "ours"]["heldout_error"] != plain["heldout_error"]
    assert (tmp_path / "reference" / "settling.png").stat().st_size > 10_000

    # A second call has nothing left to train or to draw.
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("result_*")}
    assert len(results) == 2
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in results} == results
