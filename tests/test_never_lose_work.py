"""Training survives what happens overnight: each trouble is caused for real on a small network."""

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_blocks

KILLS = 50
SMALL = ["--image-size", "8", "--dim", "8", "--dim-mults", "1", "2", "--batch-size", "8",
         "--device", "cpu", "--precision", "fp32", "--compile", "off",
         "--log-every", "5"]  # fmt: skip


@pytest.fixture(scope="session")
def cli(serve):
    return serve("exercise3_train")


def words(data, *more, steps=20, save_every=10, results="run"):
    return ["--train", "--data", data, "--steps", steps, "--save-every", save_every,
            "--results-dir", results, "--weights-out", f"{results}.pt", *SMALL, *more]  # fmt: skip


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def checkpoints(folder):
    return sorted(folder.glob("model-*.pt"), key=lambda p: int(p.stem.split("-")[1]))


def logged(path, columns=("step", "loss", "learning_rate", "train_fixed", "train_bin3")):
    """The rows of losses.csv without their times, which no two runs share."""
    with open(path, newline="") as file:
        return [tuple(row[c] for c in columns) for row in csv.DictReader(file)]


def assert_equal_state(a, b, path=""):
    """Every tensor and number of two checkpoints is the same, bit for bit, but for the times."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "initial_weights"):
                assert_equal_state(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_state(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="session")
def whole_run(cli, tiny_data, tmp_path_factory):
    """Forty uninterrupted steps, which interrupted runs must equal."""
    folder = tmp_path_factory.mktemp("whole")
    done = cli.run(*words(tiny_data, steps=40), cwd=folder)
    assert done.code == 0, done.stderr
    return folder


# ---- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [7, 10, 23])
def test_interrupted_and_resumed_equals_uninterrupted(cli, tiny_data, tmp_path, whole_run, stop_at):
    """Ctrl-C between two log rows, at a save, and after one; then --resume to the end."""
    running = cli.start(*words(tiny_data, steps=40), cwd=tmp_path)
    running.wait_until(lambda: f"| {stop_at}/40" in running.output("stderr"))
    running.send(signal.SIGINT)
    assert running.finish().code == 130
    done = cli.run(*words(tiny_data, "--resume", steps=40), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert_equal_state(load(tmp_path / "run/model-40.pt"), load(whole_run / "run/model-40.pt"))
    assert_equal_state(load(tmp_path / "run.pt")["ema"], load(whole_run / "run.pt")["ema"])
    assert logged(tmp_path / "run/losses.csv") == logged(whole_run / "run/losses.csv")
    assert (tmp_path / "run/sample-40.png").read_bytes() == (
        whole_run / "run/sample-40.png"
    ).read_bytes()


def test_accumulation_equals_a_larger_batch(cli, tiny_data, tmp_path):
    done = cli.run(*words(tiny_data, results="one"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    halves = ["--batch-size", 4, "--gradient-accumulate", 2]
    done = cli.run(*words(tiny_data, *halves, results="two"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "4 x 2 (accumulation) = 8" in done.stdout
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def assert_close_runs(a, b):
    """Within the rounding of floating-point sums that are taken in another order."""
    for name, value in load(a / "model-20.pt")["model"].items():
        other = load(b / "model-20.pt")["model"][name]
        assert torch.allclose(value, other, rtol=1e-3, atol=2e-4), name
    for row, other in zip(logged(a / "losses.csv"), logged(b / "losses.csv"), strict=True):
        assert float(row[1]) == pytest.approx(float(other[1]), rel=1e-4)


def test_two_processes_equal_one(tiny_data, tmp_path):
    """`accelerate launch` with gloo on the CPU: the same run, and only one process writes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = str(ROOT / "exercise3_train.py")
    one = [sys.executable, script, *map(str, words(tiny_data, results="one"))]
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    two = [sys.executable, "-m", *launch, "--main_process_port", "0", script]
    two += map(str, words(tiny_data, results="two"))
    for command in (one, two):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Wrote two.pt") == 1
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "two").iterdir()
    }


# ---- never loses work ----------------------------------------------------------------------------


def test_survives_fifty_kills(cli, tiny_data, tmp_path, whole_run):
    """kill -9 at 50 random moments, every second one while a checkpoint is being written.

    After each kill the newest checkpoint is whole and at most --save-every steps old, and in the
    end the run equals one that was never touched. Larger --steps for each attempt keeps it going.
    """
    rng = random.Random(0)
    run, save_every = tmp_path / "run", 5
    newest, during_save = 0, 0
    kills = int(os.environ.get("KILLS", KILLS))
    for kill in range(kills):
        command = words(tiny_data, "--resume", steps=100_000, save_every=save_every)
        running = cli.start(*command, cwd=tmp_path)
        if kill % 2:
            running.wait_until(lambda: list(run.glob(".model-*.tmp")))
        else:
            target = newest + rng.randint(0, 2 * save_every)
            running.wait_until(lambda target=target, r=running: steps_done(r) >= target)
        running.send(signal.SIGKILL)
        finished = running.finish()
        assert finished.code == -signal.SIGKILL, finished.stderr
        during_save += bool(list(run.glob(".model-*.tmp")))
        found = checkpoints(run)
        for path in found:
            assert load(path)["step"] == int(path.stem.split("-")[1])
        reached = int(found[-1].stem.split("-")[1]) if found else 0
        assert steps_done(running) - reached <= save_every
        assert reached >= newest
        newest = reached
        assert len(found) <= 3  # --keep 2, and one more while the oldest is not yet gone
    assert during_save >= kills // 4
    steps = newest + 3
    done = cli.run(*words(tiny_data, "--resume", steps=steps, save_every=save_every), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert not list(run.glob(".*tmp*"))
    rows = [int(row[0]) for row in logged(run / "losses.csv")]
    assert rows == [*range(5, newest + 1, 5), steps]
    record(tmp_path, kills=kills, kills_during_a_save=during_save, steps_reached=newest)

    untouched = cli.run(
        *words(tiny_data, steps=steps, save_every=save_every, results="clean"), cwd=tmp_path
    )
    assert untouched.code == 0
    name = f"model-{steps}.pt"
    a, b = load(run / name), load(tmp_path / "clean" / name)
    for part in ("model", "opt", "ema"):
        assert_equal_state(a[part], b[part])


def steps_done(running):
    """The last step that the progress bar of a command showed."""
    bars = running.output("stderr").replace("\r", "\n").split("\n")
    for line in reversed(bars):
        if "/100000 " in line and line.count("|") >= 2:
            return int(line.rsplit("|", 1)[1].split("/")[0])
    return 0


def record(folder, **figures):
    """Leave the measured figures where tests/benchmarks/measure_robustness.py picks them up."""
    target = os.environ.get("ROBUSTNESS_RECORD")
    if target:
        with open(target, "a") as file:
            file.writelines(f"{key}={value}\n" for key, value in figures.items())


@pytest.mark.parametrize("damage", ["truncated", "emptied", "zeros", "random", "flipped"])
def test_a_damaged_checkpoint_is_set_aside(cli, tiny_data, tmp_path, whole_run, damage):
    folder = shutil.copytree(whole_run, tmp_path / "copy")
    newest = folder / "run/model-40.pt"
    whole = newest.read_bytes()
    middle = len(whole) // 2
    newest.write_bytes(
        {
            "truncated": whole[:middle],
            "emptied": b"",
            "zeros": bytes(len(whole)),
            "random": random.Random(0).randbytes(len(whole)),
            "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
        }[damage]
    )
    done = cli.run(*words(tiny_data, "--resume", steps=45), cwd=folder)
    assert done.code == 0, done.stderr
    assert "model-40.pt is damaged" in done.stdout
    assert "Resuming run/model-30.pt at step 30" in done.stdout
    assert (folder / "run/model-40.pt.damaged").exists()
    assert [int(row[0]) for row in logged(folder / "run/losses.csv")] == list(range(5, 46, 5))


def test_no_good_checkpoint_is_one_sentence(cli, tiny_data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model-10.pt").write_bytes(b"nothing")
    done = cli.run(*words(tiny_data, "--resume"), cwd=tmp_path)
    assert done.code == 1
    assert "model-10.pt.damaged" in done.sentence


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_current_step(cli, tiny_data, tmp_path, number, code):
    running = cli.start(*words(tiny_data, steps=100_000, save_every=50_000), cwd=tmp_path)
    running.wait_until(lambda: steps_done(running) >= 3)
    running.send(number)
    done = running.finish()
    assert done.code == code
    assert "Traceback" not in done.stderr
    path = checkpoints(tmp_path / "run")[-1]
    step = load(path)["step"]
    assert step >= 3
    assert f"Stopped after step {step:,}; saved {path.relative_to(tmp_path)}" in done.stdout
    assert "--resume" in done.stdout


def test_a_second_interrupt_leaves_at_once(cli, tiny_data, tmp_path):
    """The first is still being answered: its checkpoint goes to a pipe that nobody empties."""
    run = tmp_path / "run"
    running = cli.start(*words(tiny_data, steps=100_000, save_every=50_000), cwd=tmp_path)
    running.wait_until(lambda: steps_done(running) >= 3)
    step = steps_done(running)
    for ahead in range(step, step + 400):
        os.mkfifo(run / f".model-{ahead}.pt.tmp")
    running.send(signal.SIGINT)
    running.wait_until(lambda: "Ctrl-C again" in running.output("stderr"))
    running.send(signal.SIGINT)
    # A write into a full pipe would block for ever; so would opening one without a reader.
    killer = threading.Timer(60, lambda: running.send(signal.SIGKILL))
    killer.start()
    done = running.finish()
    killer.cancel()
    assert done.code == 130
    assert not checkpoints(run)


def test_interrupt_before_training_begins(cli, tiny_data, tmp_path):
    data = write_blocks(tmp_path / "many", 3000)
    running = cli.start(*words(data), cwd=tmp_path)
    running.wait_until(lambda: os.readlink(f"/proc/{running.pid}/cwd") == str(tmp_path))
    time.sleep(0.2)  # it reads images now, and will for a while
    running.send(signal.SIGINT)
    done = running.finish()
    assert done.code == 130
    assert "Interrupted" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("room", [0.5, 0.02])
def test_no_space_left_while_saving(cli, tiny_data, tmp_path, whole_run, room):
    """Files may grow to a part of a checkpoint's size: the write fails as on a full disk."""
    folder = shutil.copytree(whole_run, tmp_path / "copy")
    size = (folder / "run/model-40.pt").stat().st_size
    done = cli.run(
        *words(tiny_data, "--resume", steps=60), cwd=folder, limit_file_size=int(size * room)
    )
    assert done.code == 1
    assert "No space left" in done.sentence
    assert "--resume" in done.sentence
    assert [p.name for p in checkpoints(folder / "run")] == ["model-30.pt", "model-40.pt"]
    assert load(folder / "run/model-40.pt")["step"] == 40
    assert not list((folder / "run").glob(".*tmp*"))
    assert cli.run(*words(tiny_data, "--resume", steps=60), cwd=folder).code == 0


def test_a_loss_that_is_not_finite_stops_the_run(cli, tiny_data, tmp_path, whole_run):
    """A learning rate of 1e30 blows the weights up at the first step after the resume."""
    folder = shutil.copytree(whole_run, tmp_path / "copy")
    done = cli.run(*words(tiny_data, "--resume", "--lr", "1e30", steps=80), cwd=folder)
    assert done.code == 1
    assert "The loss of step 4" in done.sentence
    assert "not finite" in done.sentence
    assert "model-40.pt" in done.sentence
    assert "--lr" in done.sentence
    assert [p.name for p in checkpoints(folder / "run")] == ["model-30.pt", "model-40.pt"]
    done = cli.run(*words(tiny_data, "--resume", steps=50), cwd=folder)
    assert done.code == 0, done.stderr
    assert [int(row[0]) for row in logged(folder / "run/losses.csv")] == list(range(5, 51, 5))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--dim", 16], "network.dim: 8 then, 16 now"),
        (["--batch-size", 16], "training.effective_batch: 8 then, 16 now"),
        (["--schedule", "linear"], "process.beta_schedule: sigmoid then, linear now"),
        (["--objective", "pred_v"], "process.objective: pred_noise then, pred_v now"),
        (["--image-size", 16], "process.image_size: 8 then, 16 now"),
        (["--seed", 1], "training.seed: 42 then, 1 now"),
    ],
)
def test_other_settings_are_refused(cli, tiny_data, tmp_path, whole_run, more, named):
    folder = shutil.copytree(whole_run, tmp_path / "copy")
    done = cli.run(*words(tiny_data, "--resume", *more, steps=60), cwd=folder)
    assert done.code == 1
    assert named in done.sentence
    assert load(folder / "run/model-40.pt")["step"] == 40


def test_the_same_effective_batch_may_be_split_otherwise(cli, tiny_data, tmp_path, whole_run):
    folder = shutil.copytree(whole_run, tmp_path / "copy")
    halves = ["--batch-size", 4, "--gradient-accumulate", 2]
    done = cli.run(*words(tiny_data, "--resume", *halves, steps=45), cwd=folder)
    assert done.code == 0, done.stderr


def test_changed_data_is_noticed(cli, tiny_data, tmp_path, whole_run):
    folder = shutil.copytree(whole_run, tmp_path / "copy")
    data = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copy(data / "a/0000.png", data / "a/new.png")
    (data / "b/0001.png").unlink()
    shutil.copy(data / "a/0000.png", data / "a/0002.png")
    done = cli.run(*words(data, "--resume", steps=60), cwd=folder)
    assert done.code == 1
    for text in ("1 added (a/new.png)", "1 removed (b/0001.png)", "1 replaced (a/0002.png)"):
        assert text in done.sentence


def test_disk_use_is_bounded(cli, tiny_data, tmp_path):
    done = cli.run(*words(tiny_data, "--keep", 3, steps=30, save_every=5), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert [p.name for p in checkpoints(tmp_path / "run")] == [
        "model-20.pt", "model-25.pt", "model-30.pt"]  # fmt: skip


def test_start_does_not_depend_on_the_step_resumed_at(cli, tiny_data, tmp_path, whole_run):
    """A checkpoint that claims step 10,000,000 resumes at once: nothing is replayed."""
    folder = shutil.copytree(whole_run, tmp_path / "copy")
    state = load(folder / "run/model-40.pt")
    state["step"] = 10_000_000
    torch.save(state, folder / "run/model-10000000.pt")
    done = cli.run(*words(tiny_data, "--resume", steps=10_000_003), cwd=folder)
    assert done.code == 0, done.stderr
    assert load(folder / "run.pt")["step"] == 10_000_003


@pytest.mark.slow
def test_memory_stays_flat(cli, tiny_data, tmp_path):
    """Resident memory after 6,000 steps is what it was after 1,000.

    The first save, at step 500, loads matplotlib and the sampler's kernels, which stay.
    """
    command = words(tiny_data, steps=6_500, save_every=500)
    running = cli.start(*command, cwd=tmp_path)
    sizes = []
    for step in (1_000, 6_000):
        running.wait_until((tmp_path / f"run/model-{step}.pt").exists, 900)
        pages = int(Path(f"/proc/{running.pid}/statm").read_text().split()[1])
        sizes.append(pages * resource.getpagesize())
    done = running.finish()
    assert done.code == 0, done.stderr
    record(tmp_path, memory_growth_bytes=sizes[1] - sizes[0])
    assert sizes[1] - sizes[0] < 20e6


@pytest.mark.slow
def test_compiled_bf16_follows_eager_fp32(cli, tmp_path):
    """500 steps of both: smoothed losses stay within five percent of each other."""
    data = write_blocks(tmp_path / "data", 120, size=16)
    more = ["--image-size", 16, "--dim", 16, "--lr", "1e-3"]
    for name, how in (
        ("eager", ["--precision", "fp32"]),
        ("compiled", ["--precision", "bf16", "--compile", "on"]),
    ):
        script = [sys.executable, str(ROOT / "exercise3_train.py")]
        command = words(data, *more, *how, steps=500, save_every=500, results=name)
        done = subprocess.run(
            [*script, *map(str, command)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    pairs = zip(logged(tmp_path / "eager/losses.csv"), logged(tmp_path / "compiled/losses.csv"),
                strict=True)  # fmt: skip
    for eager, compiled in pairs:
        assert float(compiled[1]) == pytest.approx(float(eager[1]), rel=0.05)
