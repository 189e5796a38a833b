"""The playground's engine, run by Node: it computes what torch computes with the same weights."""

import base64
import gzip
import json
import re
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT

if not shutil.which("node"):
    pytest.skip("Node is not installed", allow_module_level=True)

sys.path.insert(0, str(ROOT / "docs"))
import make_playground
from make_playground import ASSETS, WEIGHTS, run_engine

from ddpm_basics.files import file_digest
from ddpm_basics.model import label_vectors
from ddpm_basics.sampling import (
    dpmpp_step,
    log_snr_times,
    noise_levels,
    predict_x_0,
    starting_noise,
)
from ddpm_basics.weight_files import load_weights

RECORD = ROOT / "training_results" / "reference" / "playground.json"


@pytest.fixture(scope="module")
def dequantised():
    """The network in torch, with the weights that the page has."""
    diffusion, _ = load_weights(WEIGHTS)
    make_playground.dequantise(diffusion)
    return diffusion.requires_grad_(False)


def channels_last(x):
    """One picture or map [1, c, h, w] as the engine has it."""
    return x[0].permute(1, 2, 0).flatten().numpy()


def loaded(name):
    """What a generated script sets, its bytes unpacked."""
    text = (ASSETS / f"{name}.js").read_text()
    fields = json.loads(re.fullmatch(rf"playground\.{name} = (.*);\n", text)[1])
    return {**fields, "bytes": gzip.decompress(base64.b64decode(fields["bytes"]))}


def test_the_page_has_the_weights_of_the_model():
    diffusion, facts = load_weights(WEIGHTS)
    weights = loaded("weights")
    assert weights["bytes"] == make_playground.pack(diffusion)
    assert tuple(weights["labels"]) == facts.labels
    assert weights["timesteps"] == facts.timesteps


@pytest.mark.parametrize(("t", "label"), [(999, 3), (500, -1), (20, 11)])
def test_every_layer(dequantised, t, label):
    """Each block's output, and v, as torch computes them."""
    x_t, expected, handles = torch.randn(1, 3, 32, 32), [], []
    for name, layer in dequantised.model.named_modules():
        kind = type(layer).__name__
        if kind in ("ResnetBlock", "Attention", "LinearAttention") or name == "init_conv":
            added = "Attention" in kind  # in the engine an attention adds its input itself
            handles.append(layer.register_forward_hook(
                lambda _, x, out, a=added: expected.append(out + x[0] if a else out)
            ))  # fmt: skip
    told = dequantised.label_table[[label]] if label >= 0 else torch.zeros(1, 128)
    expected.append(dequantised.model(x_t, (torch.tensor([t]), told)))
    for handle in handles:
        handle.remove()
    found = run_engine([{"x_t": channels_last(x_t).tolist(), "t": t, "label": label}])
    sizes = np.cumsum([layer.numel() for layer in expected])
    assert len(expected) == 30
    for own, layer in zip(np.split(found, sizes[:-1]), expected, strict=True):
        np.testing.assert_allclose(own, channels_last(layer), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("labels", "guidance", "steps"), [([6], 2.0, 12), ([], 1.0, 6)])
def test_whole_samples(dequantised, labels, guidance, steps):
    """Every x_t and every guess of x_0, from torch's own noise."""
    x_t, past = starting_noise([5], (3, 32, 32))[0], []
    job = {"x_T": channels_last(x_t).tolist(), "label": (labels or [-1])[0], "guidance": guidance,
           "steps": steps, "all": True}  # fmt: skip
    found = run_engine([job]).reshape(steps + 1, 2, -1)
    levels = noise_levels(dequantised)
    names = [dequantised.label_names[i] for i in labels]
    vectors = label_vectors(dequantised, names, [0])
    assert (found[0, 0] == channels_last(x_t)).all()
    for own, (t, s) in zip(found[1:], pairwise(log_snr_times(levels, steps)), strict=True):
        x_0 = predict_x_0(dequantised, levels, x_t, t, vectors, guidance)
        x_t = dpmpp_step(levels, x_t, x_0, t, s, past)
        past = [(x_0, t), *past[:1]]
        np.testing.assert_allclose(own[0], channels_last(x_t), rtol=0, atol=1e-3)
        np.testing.assert_allclose(own[1], channels_last(x_0), rtol=0, atol=1e-3)


def test_times_are_those_of_the_package(dequantised):
    counts = [*range(1, 51), 1000]
    found = run_engine([{"times": steps} for steps in counts]).astype(int).tolist()
    levels = noise_levels(dequantised)
    assert found == [t for steps in counts for t in log_snr_times(levels, steps)]


def test_noise_is_gaussian_and_another_for_each_seed():
    noise = run_engine([{"noise": seed} for seed in [*range(50), 7]]).reshape(51, -1)
    assert (noise[50] == noise[7]).all()
    noise = noise[:50].astype(float)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.005
    alike = np.corrcoef(noise) - np.eye(50)
    assert np.abs(alike).max() < 0.08  # 4.4 standard errors


def test_the_network_draws_what_it_is_asked_for():
    record = json.loads(RECORD.read_text())
    assert record["weights"] == file_digest(WEIGHTS), "run tests/benchmarks/measure_playground.py"
    assert record["images"] == 240
    rows = {row["w"]: row for row in record["rows"]}
    assert rows[2]["recognised"] >= 0.85
    assert record["int8"]["int8"]["median"] < 1.05 * record["int8"]["fp32"]["median"]


@pytest.mark.slow
def test_the_engine_is_what_its_source_compiles_to():
    """The pinned compiler gives the very bytes that the page loads."""
    assert make_playground.compile_engine() == loaded("engine")["bytes"]
