"""trackers.py: what TensorBoard and W&B were told is read back from their own files."""

import csv
import json
import signal
import struct
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_blocks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from wandb.proto.wandb_internal_pb2 import Record

WORDS = ["--train", "--steps", "24", "--save-every", "8", "--log-every", "2", "--results-dir",
         "run", "--weights-out", "run.pt", "--image-size", "8", "--dim", "8", "--dim-mults", "1",
         "2", "--batch-size", "8", "--device", "cpu", "--precision", "fp32"]  # fmt: skip
SETTINGS = {"lr": 2e-4, "dim_mults": "[1, 2]", "results_dir": "run", "flip": "on",
            "heldout": "unseen", "seed": 42}  # fmt: skip


@pytest.fixture
def interrupted(serve, tiny_data, tmp_path):
    """interrupted(tracker, **environment) -> the rows of a run, killed after step 13 of 24."""

    def train(tracker, **environment):
        write_blocks(tmp_path / "unseen", 12, seed=1)
        words = [*WORDS, "--data", tiny_data, "--heldout", "unseen", "--log-with", tracker]
        cli = serve("exercise3_train")
        running = cli.start(*words, cwd=tmp_path, environment=environment)
        running.wait_until(lambda: "| 13/24" in running.output("stderr"))
        running.send(signal.SIGKILL)
        assert running.finish().code == -signal.SIGKILL
        done = cli.run(*words, "--resume", cwd=tmp_path, environment=environment)
        assert done.code == 0, done.stderr
        assert "Resuming run/model-8.pt" in done.stdout
        with (tmp_path / "run/losses.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [*range(2, 25, 2)]
        return rows

    return train


def assert_told(pairs, rows, name):
    """A tracker has a column of losses.csv: one value for each step that has one."""
    expected = {int(row["step"]): float(row[name]) for row in rows if row[name]}
    assert [step for step, _ in pairs] == list(expected), name
    assert dict(pairs) == pytest.approx(expected, rel=1e-4), name


def test_tensorboard_has_one_value_a_step(interrupted, tmp_path):
    rows = interrupted("tensorboard")
    folder = tmp_path / "run/ddpm_basics"
    told = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    for name in ("loss", "learning_rate", "train_fixed", "heldout_fixed", "heldout_quarter3"):
        assert_told([(event.step, event.value) for event in told.Scalars(name)], rows, name)
    assert [event.step for event in told.Images("samples")] == [8, 16, 24]
    assert told.Images("samples")[0].width > 600
    steps = [event.step for path in sorted(folder.glob("events*"))
             for event in EventFileLoader(str(path)).Load()
             if event.summary.value and event.summary.value[0].tag == "loss"]  # fmt: skip
    assert steps.count(10) == 2, "the killed process had told it, too"
    for path in folder.glob("*/hparams.yml"):
        assert yaml.safe_load(path.read_text()).items() >= SETTINGS.items()
    assert len([*folder.glob("*/hparams.yml")]) == 2


def test_tensorboard_is_told_what_came_before_it(train, tiny_data):
    """Rows of a time without a tracker, and each once, whatever was on between."""
    for steps, more in ((2, []), (4, ["--log-with", "tensorboard"]), (6, []),
                        (8, ["--log-with", "tensorboard"])):  # fmt: skip
        words = ["--steps", steps, *more, *["--resume"] * (steps > 2)]
        code, _, complaint = train(tiny_data, *words)
        assert code == 0, complaint
    told = EventAccumulator("run/ddpm_basics").Reload()
    assert [event.step for event in told.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.step for event in told.Images("samples")] == [2, 4, 6, 8]


def records(path):
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB."""
    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_has_one_value_a_step(interrupted, tmp_path):
    """Offline: the newest file holds the whole run, under the name that the first one had."""
    rows = interrupted("wandb", WANDB_MODE="offline")
    killed, newest = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert killed.name == newest.name
    history, settings, start = {}, {}, None
    for record in records(newest):
        for item in record.history.item:
            name = item.key or ".".join(item.nested_key)
            history.setdefault(name, []).append((record.history.step.num, item.value_json))
        if record.HasField("run"):
            start = start or record.run
            settings |= {item.key: item.value_json for item in record.run.config.update}
        settings |= {item.key: item.value_json for item in record.config.update}
    for name in ("loss", "learning_rate", "train_fixed", "heldout_fixed", "heldout_quarter3"):
        assert_told([(step, json.loads(value)) for step, value in history[name]], rows, name)
    assert [step for step, _ in history["samples._type"]] == [8, 16, 24]
    assert len([*newest.parent.glob("files/media/images/*.png")]) == 3
    told = {name: json.loads(settings[name]) for name in SETTINGS}
    assert told == SETTINGS
    assert start.project == "ddpm_basics"


def test_wandb_without_a_key_is_one_sentence(serve, tiny_data, tmp_path):
    bare = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"),
            "WANDB_CONFIG_DIR": str(tmp_path)}  # fmt: skip
    done = serve("exercise3_train").run(*WORDS, "--data", tiny_data, "--log-with", "wandb",
                                        cwd=tmp_path, environment=bare)  # fmt: skip
    assert done.code == 1
    assert "wandb login" in done.sentence
    assert "WANDB_MODE=offline" in done.sentence
    assert not [*Path(tmp_path, "run").iterdir()], "nothing is in the way of the next try"


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_one_sentence(train, tiny_data, monkeypatch, tracker):
    names = {"tensorboard": "tensorboard.backend.event_processing.event_accumulator"}
    monkeypatch.setitem(sys.modules, names.get(tracker, tracker), None)
    code, _, complaint = train(tiny_data, "--log-with", tracker)
    assert code == 1
    assert complaint.strip().endswith("pip install -r requirements-extras.txt")
