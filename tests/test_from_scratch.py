"""docs/ddpm_from_scratch.py: each function against the library's own numbers, and a whole run."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_blocks
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library

SCRIPT = ROOT / "docs" / "ddpm_from_scratch.py"


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ours():
    return load(SCRIPT, "ddpm_from_scratch")


@pytest.fixture(scope="module")
def theirs():
    """The library's process around a tiny network of its own."""
    torch.manual_seed(0)
    unet = Unet(dim=8, dim_mults=(1, 2), flash_attn=False)
    return GaussianDiffusion(
        unet, image_size=16, timesteps=1000, objective="pred_noise", beta_schedule="sigmoid"
    ).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1
    return x_0, torch.tensor([0, 400, 999]), torch.randn(x_0.shape, generator=generator)


def test_schedule(ours, theirs):
    betas, alphas_cumprod = ours.sigmoid_schedule(1000)
    torch.testing.assert_close(betas, theirs.betas, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-9)


def test_q_sample(ours, theirs, batch):
    x_0, t, noise = batch
    expected = theirs.q_sample(x_0, t, noise)
    torch.testing.assert_close(ours.q_sample(x_0, t, noise, theirs.alphas_cumprod), expected)


def test_loss(ours, theirs, batch):
    x_0, t, noise = batch
    expected = theirs.p_losses(x_0, t, noise)
    actual = ours.simple_loss(theirs.model, x_0, t, noise, theirs.alphas_cumprod)
    torch.testing.assert_close(actual, expected)


def test_predict_x_0(ours, theirs, batch):
    x_t, t, _ = batch
    with torch.no_grad():
        expected = theirs.model_predictions(x_t, t, clip_x_start=True).pred_x_start
        actual = ours.predict_x_0(theirs.model, x_t, t, theirs.alphas_cumprod)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [0, 1, 400, 999])
def test_p_sample(ours, theirs, batch, t, monkeypatch):
    x_t, _, noise = batch
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    expected, _ = theirs.p_sample(x_t, t)
    times = torch.full((3,), t)
    with torch.no_grad():
        actual = ours.p_sample(theirs.model, x_t, times, noise, theirs.betas, theirs.alphas_cumprod)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_ddim(ours, theirs, batch, monkeypatch):
    _, _, noise = batch
    steps = 12
    monkeypatch.setattr(theirs, "sampling_timesteps", steps)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    expected = theirs.ddim_sample(noise.shape) * 2 - 1  # the library maps to [0, 1] at the end
    actual = ours.ddim_sample(theirs.model, noise, steps, theirs.alphas_cumprod)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_timestep_embedding(ours):
    t = torch.tensor([0, 1, 500, 999])
    expected = library.SinusoidalPosEmb(48)(t)
    torch.testing.assert_close(ours.timestep_embedding(t, 48), expected)


@pytest.mark.parametrize("width_out", [8, 12])
def test_residual_block(ours, width_out):
    """The same weights in the library's ResnetBlock give the same answer; RMSNorm is in it."""
    torch.manual_seed(0)
    expected = library.ResnetBlock(8, width_out, time_emb_dim=16)
    for name, weight in expected.named_parameters():
        if name.endswith("g"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    names = {"time": "mlp", "conv1": "block1.proj", "norm1": "block1.norm",
             "conv2": "block2.proj", "norm2": "block2.norm", "shortcut": "res_conv"}  # fmt: skip
    block = ours.ResBlock(8, width_out, 16)
    source = expected.state_dict()
    block.load_state_dict({
        key: source[key.replace(part, names[part], 1)]
        for key in block.state_dict() for part in [key.split(".")[0]]
    })  # fmt: skip
    x, embedding = torch.randn(2, 8, 5, 5), torch.randn(2, 16)
    torch.testing.assert_close(block(x, embedding), expected(x, embedding))


def test_unet_keeps_the_size_and_hears_the_time(ours):
    torch.manual_seed(0)
    unet, x = ours.UNet(8), torch.randn(2, 3, 16, 16)
    early, late = (unet(x, torch.full((2,), t)) for t in (0, 900))
    assert early.shape == x.shape
    assert (early - late).abs().max() > 1e-3
    early.square().mean().backward()
    silent = [n for n, w in unet.named_parameters() if w.grad is None or not w.grad.any()]
    assert not silent


def test_training_learns_one_picture(ours):
    """Shown one picture only, the network has to beat the answer 'no noise' (loss 1) by far."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16).repeat(4, 1, 1, 1) * 2 - 1
    average, losses = ours.train(ours.UNet(8), image, steps=120, batch_size=8, learning_rate=4e-3)
    assert np.mean(losses[:3]) > 0.8
    assert np.mean(losses[-20:]) < 0.5
    changed = {n for n, w in average.named_parameters() if w.isfinite().all()}
    assert len(changed) == len(list(average.parameters()))


def test_whole_script(tmp_path):
    """Alone in an empty folder, with data by path, as a reader who downloaded it runs it."""
    data = write_blocks(tmp_path / "data", 20)
    copy = tmp_path / "ddpm_from_scratch.py"
    copy.write_bytes(SCRIPT.read_bytes())
    subprocess.run(
        [sys.executable, copy, "--data", data, "--steps", "3", "--dim", "8"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    facts = json.loads((tmp_path / "from_scratch.json").read_text())
    assert len(facts["losses"]) == facts["steps"] == 3
    assert (tmp_path / "from_scratch.png").stat().st_size > 1000
    assert (tmp_path / "from_scratch.pt").exists()


def test_no_pictures_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--data", tmp_path],
        cwd=tmp_path, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: no pictures in")
    assert "Traceback" not in done.stderr


def test_notebook_runs(tmp_path, monkeypatch):
    """All its cells in order, as a notebook would run them, on a small network and few steps."""
    cells = json.loads((ROOT / "docs" / "ddpm_from_scratch.ipynb").read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert [c for c in cells if c["cell_type"] == "markdown"]
    write_blocks(tmp_path / "african_fabric_processed", 20)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for cell in code:
        text = "".join(cell["source"]).replace("WIDTH = 48", "WIDTH = 8")
        exec(text.replace("TRAIN_STEPS = 2000", "TRAIN_STEPS = 2"), names)
    assert (tmp_path / "from_scratch.png").exists()
    assert len(json.loads((tmp_path / "from_scratch.json").read_text())["losses"]) == 2
