"""Weights for other tools: what stands in them, and that it computes the same."""

import json
import subprocess
import sys

import pytest
import safetensors
import torch
from conftest import ROOT
from tiny_networks import SIZE, bundled, labelled, make_diffusion

from ddpm_basics.model.__main__ import main
from ddpm_basics.weight_files import load_weights

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A bundled file with labels, of drawn fabrics."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    state = labelled(bundled(make_diffusion()))
    state["config"] |= {"data_version": "1", "data_seed": 0, "trained": "in no time"}
    torch.save(state, path)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = main(["export", *map(str, argv)])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def answers(diffusion, x_t, t, label):
    """What the network says to labels, -1 for none."""
    table = torch.cat([diffusion.label_table, torch.zeros(1, 32)])
    with torch.no_grad():
        return diffusion.model(x_t, (t, table[label]))


def check_facts(metadata, objective="pred_v"):
    assert metadata["objective"] == objective
    assert (metadata["schedule"], metadata["timesteps"]) == ("sigmoid", "1000")
    assert (metadata["image_size"], metadata["channels"]) == (str(SIZE), "3")
    assert "-1 to 1" in metadata["clipping"]
    assert json.loads(metadata["assumed"]) == []


def test_safetensors_there_and_back(run, weights, tmp_path):
    """The same network to the last bit, for whoever reads safetensors, and for exercise 1."""
    code, stdout, stderr = run(weights, "--to", "safetensors")
    assert code == 0, stderr
    assert "Wrote tiny.safetensors" in stdout
    with safetensors.safe_open(tmp_path / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    check_facts(metadata)
    assert json.loads(metadata["labels"]) == ["a", "b", "c/d"]
    assert metadata["licence"] == "MIT"
    source = json.loads(metadata["provenance"])
    assert (source["file"], source["step"], source["trained"]) == ("tiny.pt", 1234, "in no time")

    before, facts = load_weights(weights)
    plain = make_diffusion()
    assert torch.equal(state.pop("label_table"), before.label_table)
    plain.load_state_dict(state)
    x_t, t, label = torch.randn(2, 3, SIZE, SIZE), torch.tensor([5, 900]), torch.tensor([2, -1])
    with torch.no_grad():
        assert torch.equal(plain.eval().model(x_t, t), before.model(x_t, t))
    after, found = load_weights(tmp_path / "tiny.safetensors")
    assert vars(found) == vars(facts)
    assert torch.equal(answers(after, x_t, t, label), answers(before, x_t, t, label))
    assert (tmp_path / "tiny.safetensors").stat().st_size < 1.1 * weights.stat().st_size


def test_from_a_checkpoint_in_channels_last(run, tmp_path):
    """As one that is trained here lies in memory; without labels, and not in half precision."""
    diffusion = make_diffusion().to(memory_format=torch.channels_last)
    torch.save(diffusion.state_dict(), tmp_path / "bare.pt")
    code, _, stderr = run("bare.pt", "--to", "safetensors", "--output", "here.safetensors")
    assert code == 0, stderr
    after, facts = load_weights(tmp_path / "here.safetensors", image_size=None)
    assert facts.labels == ()
    for name, tensor in diffusion.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name


def test_what_others_trained(run, tmp_path):
    """Nobody here knows its licence, and what was assumed is called so."""
    torch.save(make_diffusion("pred_noise").state_dict(), tmp_path / "bare.pt")
    assert run("bare.pt", "--to", "safetensors")[0] == 0
    with safetensors.safe_open(tmp_path / "bare.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["objective"] == "pred_noise"
    assert metadata["licence"].startswith("not stated")
    assert json.loads(metadata["assumed"]) == ["image_size"]
    _, facts = load_weights(tmp_path / "bare.safetensors", image_size=2 * SIZE)
    assert (facts.image_size, facts.assumed) == (2 * SIZE, ())
    said = ("--objective", "pred_noise", "--schedule", "linear", "--image-size", SIZE)
    # Of a U-Net alone nothing is known, unless somebody says it.
    torch.save(make_diffusion("pred_noise").model.state_dict(), tmp_path / "unet.pt")
    assert run("unet.pt", "--to", "safetensors")[0] == 0
    _, facts = load_weights(tmp_path / "unet.safetensors", objective="pred_noise")
    assert facts.objective == "pred_noise"
    assert facts.assumed == ("schedule", "timesteps", "image_size")
    assert run("unet.pt", "--to", "safetensors", "--output", "half.safetensors", *said[:2])[0] == 0
    _, facts = load_weights(tmp_path / "half.safetensors")
    assert (facts.objective, facts.assumed[0]) == ("pred_noise", "schedule")
    assert run("unet.pt", "--to", "safetensors", "--output", "said.safetensors", *said)[0] == 0
    _, facts = load_weights(tmp_path / "said.safetensors")
    assert (facts.objective, facts.schedule, facts.image_size) == ("pred_noise", "linear", SIZE)
    assert facts.assumed == ("timesteps",)


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """The ONNX file, alone in another folder than it was written to."""
    folder = tmp_path_factory.mktemp("onnx")
    assert main(["export", str(weights), "--to", "onnx", "--output", str(folder / "a.onnx")]) == 0
    assert [path.name for path in folder.iterdir()] == ["a.onnx"]
    moved = tmp_path_factory.mktemp("elsewhere") / "b.onnx"
    return (folder / "a.onnx").rename(moved)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_agrees(weights, exported, count):
    diffusion, _ = load_weights(weights)
    session = onnxruntime.InferenceSession(exported)
    x_t = torch.randn(count, 3, SIZE, SIZE)
    t, label = torch.randint(0, 1000, (count,)), torch.arange(count) % 4 - 1
    inputs = {"x_t": x_t.numpy(), "t": t.numpy(), "label": label.numpy()}
    found = torch.from_numpy(session.run(None, inputs)[0])
    expected = answers(diffusion, x_t, t, label)
    assert torch.allclose(found, expected, atol=1e-4)
    assert expected.abs().max() > 0.1
    if count > 1:
        assert not torch.allclose(found, answers(diffusion, x_t, t, label.flip(0)), atol=1e-3)


def test_onnx_holds_its_facts_and_no_more(weights, exported):
    """Its weights in half precision, and nothing of the machine it was written on."""
    check_facts({entry.key: entry.value for entry in onnx.load(exported).metadata_props})
    content = exported.read_bytes()
    assert b"site-packages" not in content
    assert str(ROOT).encode() not in content
    parameters = sum(p.numel() for p in load_weights(weights)[0].model.parameters())
    assert sum(initializer.data_type == onnx.TensorProto.FLOAT16
               for initializer in onnx.load(exported).graph.initializer) > 10  # fmt: skip
    assert len(content) < 2.2 * parameters + 300_000  # the graph itself, whatever the width


def test_onnx_without_labels_or_halves(run, tmp_path):
    diffusion = make_diffusion().eval()
    state = bundled(diffusion)
    state["ema"] = {f"ema_model.{name}": value for name, value in diffusion.state_dict().items()}
    torch.save(state, tmp_path / "exact.pt")
    code, _, stderr = run("exact.pt", "--to", "onnx")
    assert code == 0, stderr
    session = onnxruntime.InferenceSession(tmp_path / "exact.onnx")
    x_t, t = torch.randn(3, 3, SIZE, SIZE), torch.tensor([0, 500, 999])
    found = session.run(None, {"x_t": x_t.numpy(), "t": t.numpy()})[0]
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), diffusion.model(x_t, t), atol=1e-4)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package(run, weights, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, stderr = run(weights, "--to", "onnx")
    assert code == 1
    assert "pip install -r requirements-extras.txt" in stderr
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(run, weights, tmp_path):
    (tmp_path / "tiny.onnx").write_text("mine")
    code, _, stderr = run(weights, "--to", "onnx")
    assert (code, (tmp_path / "tiny.onnx").read_text()) == (1, "mine")
    assert "exists already" in stderr


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 50])
def test_damaged_safetensors(run, tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    code, _, stderr = run("bad.safetensors", "--to", "onnx")
    assert code == 1
    assert stderr.count("\n") == 1
    assert "bad.safetensors" in stderr


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "ddpm_basics.model", "export", "none.pt", "--to", "onnx"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "none.pt does not exist" in done.stderr
