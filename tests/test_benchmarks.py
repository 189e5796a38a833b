"""tests/benchmarks: what the measurements count, on a tiny network."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from tqdm.auto import tqdm

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import bench_sampling
import measure_copies
import measure_labels
import measure_more_fabrics
import measure_samplers

from ddpm_basics.fabrics.drawing import render
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.files import file_digest
from ddpm_basics.model import label_vectors
from ddpm_basics.options import WEIGHTS
from ddpm_basics.weight_files import load_weights

exercise1 = load_script("exercise1_generate")


def draw(diffusion, sampler, steps, seeds, guidance=None):
    """Draw images as exercise 1 does."""
    options = Namespace(sampler=sampler, steps=steps, guidance=guidance or 1.0)
    labels = label_vectors(diffusion, diffusion.label_names, seeds) if guidance else None
    return exercise1.draw(diffusion, list(seeds), labels, options, tqdm(disable=True))


@pytest.fixture
def measure(monkeypatch, labelled_weights, tmp_path):
    """measure(images): tests/benchmarks/measure_samplers.py with fewer runs; returns its record."""
    monkeypatch.setattr(measure_samplers, "REFERENCE", ("ddim", 40))
    monkeypatch.setattr(measure_samplers, "RUNS", [("ddim", 30), ("dpmpp", 4), ("dpmpp", 20)])
    monkeypatch.setattr(measure_samplers, "COURSE", ("ddim", 30))

    def run(images, *more):
        output = tmp_path / "samplers.json"
        measure_samplers.main(["--weights", str(labelled_weights), "--images", str(images),
                               "--device", "cpu", "--precision", "fp32", "--seed", "0",
                               "--output", str(output), *more])  # fmt: skip
        return json.loads(output.read_text())

    return run


@pytest.mark.parametrize("guided", [False, True])
def test_measured_distances(measure, labelled_weights, guided):
    """Each figure again, from exercise 1's own loop; a second run adds what is missing."""
    more = ["--guided"] if guided else []
    first, record = measure(1, *more), measure(3, *more)
    guidance = exercise1.GUIDANCE if guided else None
    assert record["guidance"] == guidance
    assert first["rows"][0]["standard_error"] is None, "one image has no spread"
    assert list(record["distances"]) == ["0", "1", "2"]
    assert record["distances"]["0"] == first["distances"]["0"]
    diffusion, _ = load_weights(labelled_weights)
    reference = draw(diffusion, "ddim", 40, range(3), guidance)
    for row, (sampler, steps) in zip(record["rows"], measure_samplers.RUNS, strict=True):
        images = draw(diffusion, sampler, steps, range(3), guidance)
        expected = (images - reference).square().mean((1, 2, 3)).sqrt()
        assert row["distance"] == pytest.approx(expected.mean().item(), abs=1e-4)
        assert row["standard_error"] == pytest.approx(expected.std().item() / 3**0.5, abs=1e-4)
    assert record["rows"][0]["as_near_as_ddim_250"] == 1
    near = [row["steps"] for row in record["rows"][1:]
            if row["distance"] <= record["rows"][0]["distance"]]  # fmt: skip
    assert record["enough_steps"] == min(near, default=None)


def test_the_benchmark_counts_the_middle_run(monkeypatch, tiny_weights, tmp_path, capsys):
    """bench_sampling.py with two of stock's steps, and a command that takes 5, 2 and 9 seconds."""
    monkeypatch.setattr(bench_sampling, "RUNS_BEFORE", 1)
    monkeypatch.setattr(bench_sampling, "RUNS_AFTER", 2)
    one_run = bench_sampling.time_command
    real, told = [], iter([(5.0, 1.0), (2.0, 0.5), (9.0, 3.0)])

    def time_command(*arguments):
        if not real:  # the command itself; once is enough
            real.append(one_run(*arguments))
        return next(told)

    monkeypatch.setattr(bench_sampling, "time_command", time_command)
    output = tmp_path / "bench" / "bench_sampling.json"
    bench_sampling.main(["--weights", str(tiny_weights), "--images", "2", "--device", "cpu",
                         "--precision", "bf16", "--stock-evaluations", "2",
                         "--output", str(output)])  # fmt: skip
    [record] = json.loads(output.read_text())["machines"]
    stock, drawing, command = record["rows"]
    assert (len(stock["runs"]), len(drawing["runs"]), len(command["runs"])) == (1, 2, 3)
    assert command["seconds"] == 5
    assert set(record["convolution_gflops"]) == {"fp32", "bf16"}
    assert command["times_faster"] == pytest.approx(stock["seconds"] / 5)
    assert record["seconds_to_first_bar"] == 1
    seconds, first_bar = real[0]
    assert seconds - first_bar > sum(drawing["runs"]) / 4
    assert seconds > sum(drawing["runs"]) / 2, "the command draws, and starts and writes besides"
    steps = exercise1.SAMPLING_STEPS["dpmpp"]
    assert stock["evaluations"] == 2 * 250
    assert drawing["evaluations"] == command["evaluations"] == 2 * steps
    assert "Stock was timed over 2 steps and scaled to 250." in capsys.readouterr().out


def test_random_weights_are_as_large(tmp_path):
    diffusion, facts = load_weights(bench_sampling.make_random(tmp_path / "random.pt"))
    _, shipped = load_weights(ROOT / WEIGHTS)
    assert facts.parameters == shipped.parameters
    assert (facts.objective, facts.image_size) == (shipped.objective, shipped.image_size)
    assert diffusion.label_names


def test_an_entry_for_each_machine(tmp_path):
    """Measured again, a machine's entry is replaced; the slowest comes first."""
    path = tmp_path / "speed.json"
    for name, rate in (("new", 5), ("old", 1), ("middle", 3), ("new", 7)):
        bench_sampling.keep(path, {"hardware": name, "rate": rate}, lambda record: record["rate"])
    machines = json.loads(path.read_text())["machines"]
    assert [(one["hardware"], one["rate"]) for one in machines] == [
        ("old", 1), ("middle", 3), ("new", 7)]  # fmt: skip


def test_engines_beside_ours(monkeypatch, tiny_weights):
    """Each is timed on the same batch, and one that computes something else is noticed."""
    diffusion, _ = load_weights(tiny_weights)
    off = 0.0
    monkeypatch.setattr(bench_sampling, "start_engines", lambda network, x_t, t, folder: {
        "engine": lambda: diffusion.model.eval()(x_t, t) + off})  # fmt: skip
    rows = bench_sampling.time_engines(tiny_weights)
    assert [row["engine"] for row in rows] == ["stock", "engine", "ours"]
    first = rows[0]["seconds_per_evaluation"]
    for row in rows:
        assert row["times_stock"] == pytest.approx(first / row["seconds_per_evaluation"])
    off = 0.01
    with pytest.raises(AssertionError, match="engine computes something else"):
        bench_sampling.time_engines(tiny_weights)


# ---- Labels, more fabrics ------------------------------------------------------------------------


def test_recognised_and_spread(monkeypatch):
    """Of four fabrics three are taken for what they are; a spread is that of each label alone."""
    guesses = np.array([0, 0, 1, 0])
    monkeypatch.setattr(measure_labels, "predict", lambda *_: (guesses, None))
    classifier, fabrics = Namespace(names=["a", "b"]), Namespace(labels=["a", "a", "b", "b"])
    found = measure_labels.recognised(classifier, fabrics)
    assert found["recognised"] == 0.75
    assert found["by_label"] == {"a": 1.0, "b": 0.5}
    assert found["wilson_95"][0] < 0.75 < found["wilson_95"][1]
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [100.0, 0.0], [100.0, 4.0]])
    expected = (2**0.5 + 8**0.5) / 2
    assert measure_labels.spreads(points, fabrics.labels) == pytest.approx(expected)


def test_the_shipped_weights_draw_what_they_are_asked_for():
    record = json.loads((ROOT / "training_results/reference/labels.json").read_text())
    shipped = file_digest(ROOT / WEIGHTS)
    assert record["weights"] == shipped, "other weights: run tests/benchmarks/measure_labels.py"
    assert record["images"] == 240
    rows = {row["w"]: row for row in record["rows"]}
    assert set(rows) == {1, 2, 3}
    assert rows[2]["recognised"] >= 0.93
    assert rows[1]["recognised"] < rows[2]["recognised"]
    assert rows[1]["diversity"] > rows[2]["diversity"] > rows[3]["diversity"]


def test_copies_are_searched_for_in_every_fabric(tmp_path):
    """Of the samples one is the last fabric of the run, which the lesson's own folder lacks."""
    samples = tmp_path / "judged"
    draw_fabrics(samples, split="heldout", count=12, size=64)
    copied = next(samples.rglob("*.png"))
    render(0, 39).save(copied)
    output = tmp_path / "copies.json"
    measure_copies.main([*map(str, [samples, "--count", 40, "--heldout", 12, "--folder",
                                    tmp_path / "copies", "--output", output])])  # fmt: skip
    record = json.loads(output.read_text())
    assert record["train"] == 40
    assert [(row["what"], row["copies"], row["of"]) for row in record["rows"]] == [
        ("judged", 1, 12), ("heldout", 0, 12)]  # fmt: skip
    assert record["rows"][0]["lowest_ratio"] == 0
    assert record["rows"][1]["lowest_ratio"] > 1 / 3


@pytest.mark.slow
def test_more_fabrics(tmp_path):
    """The whole study on a tiny network: two sets, their losses, their copies."""
    output = tmp_path / "more.json"
    options = ["--counts", 100, 120, "--images", 24, "--heldout", 24, "--folder", tmp_path,
               "--output", output, "--steps", 500, "--dim", 8, "--dim-mults", 1, 2,
               "--image-size", 16]  # fmt: skip
    measure_more_fabrics.main([*map(str, options)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["count"] for row in rows] == [100, 120]
    for row in rows:
        assert row["passes"] == 500 * 8 / row["count"]
        assert [point["step"] for point in row["curve"]] == [250, 500]
        assert row["curve"][1]["train"] < row["curve"][0]["train"]
        assert (row["samples"]["of"], row["heldout"]["of"]) == (24, 24)
    measure_more_fabrics.main([*map(str, options)])  # finds all of it there
    assert json.loads(output.read_text())["rows"] == rows
