"""What surrounds a command: names of files, the terminal, a notebook, environment variables."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT, load_script, write_blocks

from ddpm_basics.checkpoints import list_checkpoints
from ddpm_basics.images import read_folder
from ddpm_basics.interrupts import StopRequest
from ddpm_basics.losses import read_losses
from ddpm_basics.model.__main__ import main

# ---- Names that are no text, terminals that cannot show them -------------------------------------


@pytest.fixture
def odd_names(tmp_path, tiny_data):
    """120 pictures in folders whose names are Chinese and no text at all, b'caf\\xe9'."""
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    (folder / "a").rename(folder / "布")
    (folder / "b").rename(folder / os.fsdecode(b"caf\xe9"))
    (folder / os.fsdecode(b"notes\xe9.txt")).touch()
    return folder


def test_any_name_from_the_picture_to_the_caption(odd_names, train):
    code, said, complaint = train(odd_names)
    assert code == 0, complaint
    assert r"caf\udce9, 布" in said
    assert train(odd_names, "--resume", "--steps", 6)[0] == 0
    assert json.loads(Path("run/run.json").read_text())["steps_done"] == 6
    assert main(["export", "run.pt", "--to", "safetensors"]) == 0
    weights = Path("run.safetensors").rename(os.fsdecode(b"caf\xe9.safetensors"))
    exercise = load_script("exercise1_generate")
    words = ["--num-samples", "2", "--steps", "2", "--device", "cpu"]
    for path in (weights, Path("run.pt").rename(os.fsdecode(b"caf\xe9.pt"))):
        own = ["--weights", str(path), "--label", os.fsdecode(b"caf\xe9")]
        assert exercise.main([*words, *own]) == 0
    assert Path("exercise1_output.png").exists()


def test_checkpoints_below_a_name_that_is_no_text(tiny_data, train):
    folder = Path(os.fsdecode(b"caf\xe9"), "run")
    words = ("--results-dir", folder, "--save-every", 1, "--keep", 2)
    assert train(tiny_data, *words)[0] == 0
    assert [path.name for path in list_checkpoints(folder)] == ["model-4.pt", "model-3.pt"]
    code, said, _ = train(tiny_data, *words, "--resume", "--steps", 5)
    assert (code, "at step 4" in said) == (0, True)


def test_an_accent_is_a_part_of_its_letter(tmp_path):
    """As a Mac's disk has it, and as people type it."""
    folder = write_blocks(tmp_path / "data", 2)
    (folder / "a").rename(folder / "cafe\u0301")
    assert read_folder(folder).labels == ["b", "caf\u00e9"]


def test_a_terminal_that_cannot_show_it(odd_names, tmp_path):
    command = [sys.executable, "-m", "ddpm_basics.fabrics", "--photos", odd_names, "--size", "8",
               "--output", tmp_path / "out"]  # fmt: skip
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    for _ in range(2):  # the second time it finds the folder complete
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert rb"data/notes\udce9.txt (none of " in done.stdout
    assert b"120 images, 0 of them new" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "布", os.fsdecode(b"caf\xe9"), "manifest.json"}  # fmt: skip
    (odd_names / "布" / "0000.png").write_bytes(b"no picture")
    done = subprocess.run([*command, "--force"], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 1
    assert rb"\u5e03/0000.png cannot be read as an image" in done.stderr


# ---- A notebook --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exercise1_generate", ["--num-samples", "1", "--steps", "1", "--weights"]),
        ("exercise2_explore", ["--part", "d", "--weights"]),
        ("exercise3_train", ["--train", "--steps", "2", "--dim", "8", "--dim-mults", "1", "2",
                             "--image-size", "8", "--batch-size", "2", "--data"]),
    ],
)  # fmt: skip
def test_percent_run_returns_to_the_prompt(
    name, words, tiny_weights, tiny_data, tmp_path, monkeypatch
):
    """IPython takes SystemExit for the end of a script; after it, all is as it was."""
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM)
    good = {"--weights": tiny_weights, "--data": tiny_data}[words[-1]]
    for given, code in {good: 0, "nowhere": 1}.items():
        before = [signal.getsignal(number) for number in numbers]
        argv = [f"{name}.py", *words, str(given), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        assert end.value.code == code
        assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_ctrl_c_leaves_the_script_and_not_the_notebook(capfd):
    before = signal.getsignal(signal.SIGINT)
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    with StopRequest(run) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed(may_wait=True)
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGINT)
    assert end.value.code == 130
    assert capfd.readouterr().err.count("Ctrl-C again: leave now") == 1
    assert signal.getsignal(signal.SIGINT) == before


# ---- What the environment says -------------------------------------------------------------------


def test_what_was_typed_counts_whatever_accelerate_is_told(train, tiny_data, tmp_path, monkeypatch):
    losses = []
    told_otherwise = {
        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "eager",
        "ACCELERATE_TORCH_DEVICE": "meta", "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_USE_MEGATRON_LM": "true", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    for told in ({}, told_otherwise):
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        assert train(tiny_data, "--results-dir", f"run{len(told)}")[0] == 0
        losses.append([row["loss"] for row in read_losses(tmp_path / f"run{len(told)}/losses.csv")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["exercise1_generate", "exercise2_explore", "exercise3_train"])
def test_python_without_docstrings(name):
    command = [sys.executable, "-OO", ROOT / f"{name}.py", "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0
