"""losses.py: what is logged survives spreadsheets, and training survives what cannot be logged."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ddpm_basics import losses
from ddpm_basics.losses import CSV_COLUMNS, append_losses, read_losses, trim_losses


@pytest.fixture
def log(tmp_path):
    """losses.csv of four rows."""
    path = tmp_path / "losses.csv"
    trim_losses(path, 0)  # makes it, with nothing but the heads of its columns
    row = {"learning_rate": 1e-5, "train_quarter0": math.inf}
    append_losses(path, [{"step": step, "loss": 1 / step, **row} for step in (3, 6, 9, 12)])
    return path


def test_only_rows_of_later_steps_are_removed(log):
    before = log.read_text()
    log.write_text(before + "15,0.0")  # torn
    trim_losses(log, 12)
    assert log.read_text() == before
    trim_losses(log, 8)
    assert log.read_text() == "".join(before.splitlines(keepends=True)[:3])
    assert [row["step"] for row in read_losses(log)] == [3, 6]
    assert read_losses(log)[0]["train_quarter0"] == math.inf
    assert math.isnan(read_losses(log)[0]["heldout_fixed"])
    assert os.listdir(log.parent) == ["losses.csv"]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda text: text.encode("utf-8-sig").replace(b"\n", b"\r\n"), 4),
        (lambda text: text.replace("1e-05", "1.00E-05").encode(), 4),
        (lambda text: text.replace(",", ";").replace("0.", "0,").encode(), 0),
        (lambda text: text.encode("utf-16"), 0),
        (lambda text: (text + "6,0.7" + "," * 12 + "\nthe lamp was on,,\n").encode(), 4),
        (lambda text: text.replace("loss,", "Verlust,", 1).encode(), 0),
        (lambda text: b"\x00\xff" * 200_000 + b"\n" + text.encode(), 0),
        (lambda text: text.rstrip("\n").encode(), 4),
        (lambda text: b"one line of notes", 0),
    ],
    ids=[
        "Excel",
        "another format",
        "decimal commas",
        "UTF-16",
        "a note",
        "a name",
        "no text",
        "no last line break",
        "notes",
    ],
)
def test_what_a_spreadsheet_saved_is_not_lost(log, capsys, change, rows):
    """Its rows go on in losses.csv, or the file is set aside by name; most often both."""
    before, saved = read_losses(log), change(log.read_text())
    log.write_bytes(saved)
    trim_losses(log, 12)
    kept = read_losses(log)
    assert [row["step"] for row in kept] == [row["step"] for row in before][:rows]
    aside = log.with_name("losses.previous.csv")
    if aside.exists():
        assert aside.read_bytes() == saved
        assert f"it is {aside} now, and {rows} rows of it could be read" in capsys.readouterr().out
    else:
        assert str(kept) == str(before)
    found = sorted(os.listdir(log.parent))
    trim_losses(log, 12)
    assert sorted(os.listdir(log.parent)) == found


def test_a_log_that_cannot_be_written_waits(train, tiny_data, tmp_path, monkeypatch):
    """For a while a folder of that name stands in its way; the rows come after it."""
    path, calls = tmp_path / "run" / "losses.csv", []

    def append(*args):
        calls.append(args)
        if len(calls) == 2:
            path.rename(tmp_path / "away")
            path.mkdir()
        if len(calls) == 4:
            path.rmdir()
            (tmp_path / "away").rename(path)
        append_losses(*args)

    monkeypatch.setattr(losses, "append_losses", append)
    code, said, complaint = train(tiny_data, "--save-every", 4, "--steps", 8)
    assert code == 0, complaint
    assert "Not written yet: 2 rows of run/losses.csv (Is a directory)" in said
    assert "run/loss_curve.png cannot be drawn" in said
    assert [row["step"] for row in read_losses(path)] == [2, 4, 6, 8]
    assert {"model-4.pt", "model-8.pt", "loss_curve.png"} <= set(os.listdir("run"))


def test_a_log_that_cannot_be_written_at_all(train, tiny_data, monkeypatch):
    """Its rows are in another file, and nobody says that they are in this one."""

    def fail(path, rows):
        path.unlink(missing_ok=True)
        path.mkdir(exist_ok=True)
        append_losses(path, rows)

    monkeypatch.setattr(losses, "append_losses", fail)
    code, said, complaint = train(tiny_data)
    assert code == 0, complaint
    assert "The last 2 rows of run/losses.csv are in run/losses-2.csv." in said
    assert [row["step"] for row in read_losses(Path("run/losses-2.csv"))] == [2, 4]
    assert "samples in run; " in said


def test_a_curve_that_cannot_be_drawn_stops_no_training(train, tiny_data, monkeypatch):
    def fail(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(losses, "plot_losses", fail)
    code, said, _ = train(tiny_data)
    assert code == 0
    assert "run/loss_curve.png cannot be drawn (no fonts)." in said
    assert os.path.exists("run.pt")


def test_figures_need_no_settings_of_the_users(tmp_path):
    """In a notebook's shell, with LaTeX asked for that is not there; the settings stay."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.format: pgf\n")
    backend = "module://matplotlib_inline.backend_inline"
    code = (
        "from pathlib import Path; from ddpm_basics.losses import *; import matplotlib\n"
        "before = dict(matplotlib.rcParams.copy())\n"
        f"row = dict.fromkeys({CSV_COLUMNS}, 0.5)\n"
        f"plot_losses(Path({str(tmp_path / 'a.png')!r}), [row])\n"
        "assert dict(matplotlib.rcParams.copy()) == before\n"
        "print(matplotlib.rcParams['text.usetex'])"
    )
    environment = {**os.environ, "MPLBACKEND": backend, "PATH": "/nowhere",
                   "MATPLOTLIBRC": str(tmp_path)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.stdout == "True\n", done.stderr
    assert (tmp_path / "a.png").stat().st_size > 5000
