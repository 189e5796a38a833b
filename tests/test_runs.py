"""Nothing that happens overnight loses work; each trouble is caused for real."""

import csv
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, write_blocks
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from denoising_diffusion_pytorch.denoising_diffusion_pytorch import linear_beta_schedule
from ema_pytorch import EMA
from PIL import Image

from ddpm_basics.checkpoints import save_checkpoint
from ddpm_basics.console import UserError
from ddpm_basics.losses import CSV_COLUMNS
from ddpm_basics.model import build_diffusion

KILLS = 16  # measure_robustness.py asks for more
SMALL = ["--image-size", "8", "--dim", "8", "--dim-mults", "1", "2", "--batch-size", "8",
         "--device", "cpu", "--precision", "fp32", "--log-every", "4"]  # fmt: skip


@pytest.fixture(scope="session")
def cli(serve):
    return serve("exercise3_train")


def words(data, *more, steps=16, save_every=8, results="run"):
    return ["--train", "--data", data, "--steps", steps, "--save-every", save_every,
            "--results-dir", results, "--weights-out", f"{results}.pt", *SMALL, *more]  # fmt: skip


def tiny_diffusion():
    return build_diffusion(dim=8, dim_mults=(1, 2), image_size=8)


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def checkpoints(folder):
    return sorted(folder.glob("model-*.pt"), key=lambda p: int(p.stem.split("-")[1]))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def logged(path, columns=("step", "loss", "learning_rate", "train_fixed", "train_quarter3")):
    """The rows of losses.csv without their times, which no two runs share."""
    return [tuple(row[column] for column in columns) for row in rows_of(path)]


def steps_logged(path):
    return [int(row["step"]) for row in rows_of(path)]


def steps_done(running):
    """The last step that the progress bar of a command showed."""
    bars = running.output("stderr").replace("\r", "\n").split("\n")
    for line in reversed(bars):
        if "/100000 " in line and line.count("|") >= 2:
            return int(line.rsplit("|", 1)[1].split("/")[0])
    return 0


def assert_equal_state(a, b, path=""):
    """Every tensor and number of two checkpoints is the same, bit for bit, but for the times."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "seconds":
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
def whole(tiny_data, tmp_path_factory):
    """The command of a run of 24 steps that is saved at 8, 16 and 24."""
    unseen = write_blocks(tmp_path_factory.mktemp("unseen"), 12, seed=1)
    return words(tiny_data, "--heldout", unseen, "--lr", "5e-3", steps=24)


@pytest.fixture(scope="session")
def whole_run(cli, whole, tmp_path_factory):
    """That run, uninterrupted, which interrupted ones must equal: (folder, Finished)."""
    folder = tmp_path_factory.mktemp("whole")
    done = cli.run(*whole, cwd=folder)
    assert done.code == 0, done.stderr
    return folder, done


@pytest.fixture
def resume(cli, tmp_path, whole, whole_run):
    """run(steps, ...) -> Finished, in a copy of the whole run: (the function, the copy)."""
    folder = shutil.copytree(whole_run[0], tmp_path / "copy")

    def run(steps, *more, **limits):
        return cli.run(*whole, "--resume", "--steps", steps, *more, cwd=folder, **limits)

    return run, folder


# ---- What a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(whole_run):
    folder, done = whole_run
    assert {path.name for path in folder.iterdir()} == {"run", "run.pt"}
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {"losses.csv", "loss_curve.png", "run.json", "model-16.pt", "model-24.pt",
                     "sample-8.png", "sample-16.png", "sample-24.png"}  # fmt: skip
    assert "Wrote run.pt (EMA weights of step 24)" in done.stdout
    assert "python exercise1_generate.py --weights run.pt" in done.stdout


def test_losses_fall_and_stand_in_a_table(whole_run):
    rows = rows_of(whole_run[0] / "run/losses.csv")
    assert list(rows[0]) == CSV_COLUMNS
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24]
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    for row in rows:
        assert float(row["images_per_second"]) > 0
        for kind in ("train", "heldout"):
            quarters = [row[f"{kind}_quarter{i}"] for i in range(4)]
            if int(row["step"]) % 8:
                assert {*quarters, row[f"{kind}_fixed"]} == {""}, "only at a save"
            else:
                mean = np.mean([float(value) for value in quarters])
                assert float(row[f"{kind}_fixed"]) == pytest.approx(mean, rel=1e-4)


def test_run_json_says_how_it_was_made(whole_run):
    facts = json.loads((whole_run[0] / "run/run.json").read_text())
    assert facts["command"].startswith("python ")
    assert "--heldout" in facts["command"]
    expected = {"dim": 8, "dim_mults": [1, 2], "channels": 3, "image_size": 8, "timesteps": 1000,
                "objective": "pred_v", "schedule": "sigmoid", "loss_weight": "min5",
                "num_images": 120, "effective_batch": 8, "seed": 42, "lr": 5e-3, "steps": 24,
                "steps_done": 24,
                "precision": "fp32", "compiled": False, "processes": 1}  # fmt: skip
    assert facts.items() >= expected.items()
    assert facts["seconds"] > 0
    assert facts["hardware"].startswith("CPU (")


def test_the_banner_says_what_one_must_know(whole_run):
    said = whole_run[1].stdout
    for text in ("Device      CPU (", "fp32, compiled: no", "parameters, 8x8 images, pred_v",
                 "120 images from", "with 2 labels, 12 held-out ones", "8 x 1 (accumulation) = 8",
                 "0 to 24: 1.6 passes over the data", "run/ every 8 steps, then run.pt", "Ctrl-C",
                 "--steps 24 --save-every 8", " --resume\n"):  # fmt: skip
        assert text in said, text


def test_exported_weights_are_the_ema_in_fp16(whole_run):
    weights, checkpoint = load(whole_run[0] / "run.pt"), load(whole_run[0] / "run/model-24.pt")
    assert weights["step"] == 24
    assert weights["config"] == checkpoint["config"]
    diffusion = tiny_diffusion()
    parameters = dict(diffusion.named_parameters())
    differs = False
    for name, value in weights["ema"].items():
        bare = name.removeprefix("ema_model.")
        assert value.dtype == (torch.float16 if bare in parameters else torch.float32)
        assert torch.allclose(value.float(), checkpoint["ema"][name], rtol=1e-3, atol=1e-6)
        differs |= not torch.allclose(value.float(), checkpoint["model"][bare], rtol=1e-3)
    assert differs, "the EMA, not the raw network"
    # The snippet that README and lesson show.
    state = {k.removeprefix("ema_model."): v for k, v in weights["ema"].items()
             if k.startswith("ema_model.")}  # fmt: skip
    diffusion.load_state_dict(state)


# ---- Exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [6, 8, 19])
def test_interrupted_and_resumed_equals_uninterrupted(cli, tmp_path, whole, whole_run, stop_at):
    """Ctrl-C between two log rows, at a save, and after one; then --resume to the end."""
    running = cli.start(*whole, cwd=tmp_path)
    running.wait_until(lambda: f"| {stop_at}/24" in running.output("stderr"))
    running.send(signal.SIGINT)
    assert running.finish().code == 130
    done = cli.run(*whole, "--resume", cwd=tmp_path)
    assert done.code == 0, done.stderr
    a, b = tmp_path, whole_run[0]
    assert_equal_state(load(a / "run/model-24.pt"), load(b / "run/model-24.pt"))
    assert_equal_state(load(a / "run.pt")["ema"], load(b / "run.pt")["ema"])
    assert logged(a / "run/losses.csv") == logged(b / "run/losses.csv")
    assert (a / "run/sample-24.png").read_bytes() == (b / "run/sample-24.png").read_bytes()


def assert_close_runs(a, b):
    """Within the rounding of floating-point sums that are taken in another order."""
    one, two = (load(folder / "model-16.pt")["model"] for folder in (a, b))
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-3, atol=2e-4), name
    labels, others = (load(folder / "model-16.pt")["labels"] for folder in (a, b))
    for name in ("embedding", "parameter", "exp_avg", "exp_avg_sq", "step"):
        assert torch.allclose(labels[name], others[name], rtol=1e-3, atol=1e-5), name
    for row, other in zip(logged(a / "losses.csv"), logged(b / "losses.csv"), strict=True):
        assert float(row[1]) == pytest.approx(float(other[1]), rel=1e-4)


def test_accumulation_equals_a_larger_batch(cli, tiny_data, tmp_path):
    halves = ["--batch-size", 4, "--gradient-accumulate", 2]
    for results, more in {"one": [], "two": halves}.items():
        done = cli.run(*words(tiny_data, *more, save_every=16, results=results), cwd=tmp_path)
        assert done.code == 0, done.stderr
    assert "4 x 2 (accumulation) = 8" in done.stdout
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    # And such a run may go on undivided.
    done = cli.run(*words(tiny_data, "--resume", results="two", steps=18), cwd=tmp_path)
    assert done.code == 0, done.stderr


def test_two_processes_equal_one(cli, tiny_data, tmp_path):
    """`accelerate launch` with gloo on the CPU: the same run, and only one process writes."""
    track = ["--log-with", "tensorboard"]
    done = cli.run(*words(tiny_data, *track, save_every=16, results="one"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    two = [sys.executable, "-m", *launch, "--main_process_port", "0", ROOT / "exercise3_train.py"]
    done = subprocess.run(
        [*map(str, two), *map(str, words(tiny_data, *track, save_every=16, results="two"))],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Wrote two.pt") == 1
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "two").iterdir()
    }
    for results in ("one", "two"):
        assert len([*(tmp_path / results).rglob("*.tfevents.*")]) == 2, "a log, and its settings"


def test_labels_are_clipped_with_the_rest(cli, tiny_data, tmp_path):
    """Adam's mean of the gradients is a tenth of the first one, whose length is at most one."""
    done = cli.run(*words(tiny_data, steps=1), cwd=tmp_path)
    assert done.code == 0, done.stderr
    state = load(tmp_path / "run/model-1.pt")
    means = [moments["exp_avg"] for moments in state["opt"]["state"].values()]
    lengths = torch.stack([mean.norm() for mean in [*means, state["labels"]["exp_avg"]]])
    assert lengths.norm() == pytest.approx(0.1, rel=1e-3)
    assert lengths[-1] > 1e-5


MACHINE = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1",
           "MASTER_ADDR": "127.0.0.1"}  # fmt: skip


def test_two_machines_of_which_one_holds_a_checkpoint(resume, tiny_data, tmp_path):
    """What torchrun --nnodes 2 starts on each; one goes on alone in none of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "other").mkdir()
    command = [sys.executable, str(ROOT / "exercise3_train.py")]
    command += map(str, words(tiny_data, "--resume", steps=26))
    machines = [
        subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True,
                         env=os.environ | MACHINE | {"RANK": rank, "MASTER_PORT": port})
        for rank, folder in (("0", resume[1]), ("1", tmp_path / "other"))
    ]  # fmt: skip
    for machine in machines:
        _, said = machine.communicate(timeout=60)
        assert machine.returncode == 1
        assert "different checkpoints in run (step 24, none)" in said
        assert "Traceback" not in said
    assert not list((tmp_path / "other").rglob("*.pt"))


def test_start_does_not_depend_on_the_step_resumed_at(resume):
    """A checkpoint that claims step 10,000,000 resumes at once: nothing is replayed."""
    run, folder = resume
    state = load(folder / "run/model-24.pt")
    state["step"] = 10_000_000
    torch.save(state, folder / "run/model-10000000.pt")
    done = run(10_000_002)
    assert done.code == 0, done.stderr
    assert load(folder / "run.pt")["step"] == 10_000_002


# ---- Never loses work ----------------------------------------------------------------------------


def test_survives_kills(cli, tiny_data, tmp_path):
    """kill -9 at random moments, every second one while a checkpoint is being written.

    After each kill the newest checkpoint is whole and at most --save-every steps old, and in the
    end the run equals one that was never touched. Larger --steps for each attempt keeps it going.
    """
    rng = random.Random(0)
    run, save_every = tmp_path / "run", 4
    newest, during_save = 0, 0
    kills = int(os.environ.get("KILLS", KILLS))
    for kill in range(kills):
        command = words(tiny_data, "--resume", steps=100_000, save_every=save_every)
        running = cli.start(*command, cwd=tmp_path)
        if kill % 2:
            running.wait_until(lambda: list(run.glob(".model-*.tmp.pt")))
        else:
            target = newest + rng.randint(0, 2 * save_every)
            running.wait_until(lambda target=target, r=running: steps_done(r) >= target)
        running.send(signal.SIGKILL)
        finished = running.finish()
        assert finished.code == -signal.SIGKILL, finished.stderr
        during_save += bool(list(run.glob(".model-*.tmp.pt")))
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
    assert steps_logged(run / "losses.csv") == [*range(4, newest + 1, 4), steps]
    record(kills=kills, kills_during_a_save=during_save, steps_reached=newest)

    untouched = cli.run(
        *words(tiny_data, steps=steps, save_every=save_every, results="clean"), cwd=tmp_path
    )
    assert untouched.code == 0
    name = f"model-{steps}.pt"
    a, b = load(run / name), load(tmp_path / "clean" / name)
    for part in ("model", "opt", "ema"):
        assert_equal_state(a[part], b[part])


def record(**figures):
    """Leave the measured figures where tests/benchmarks/measure_robustness.py picks them up."""
    target = os.environ.get("ROBUSTNESS_RECORD")
    if target:
        with open(target, "a") as file:
            file.writelines(f"{key}={value}\n" for key, value in figures.items())


@pytest.mark.parametrize("damage", ["truncated", "emptied", "zeros", "random", "flipped"])
def test_a_damaged_checkpoint_is_set_aside(resume, damage):
    run, folder = resume
    newest = folder / "run/model-24.pt"
    whole = newest.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "truncated": whole[:middle],
        "emptied": b"",
        "zeros": bytes(len(whole)),
        "random": random.Random(0).randbytes(len(whole)),
        "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
    }[damage]
    newest.write_bytes(damaged)
    done = run(18)
    assert done.code == 0, done.stderr
    assert "model-24.pt is damaged" in done.stdout
    assert "Resuming run/model-16.pt at step 16" in done.stdout
    assert (folder / "run/model-24.pt.damaged").read_bytes() == damaged
    assert steps_logged(folder / "run/losses.csv") == [4, 8, 12, 16, 18]


def trainer_state(step, dim=8, **choices):
    """A checkpoint of the library's Trainer, put together of what it puts into one."""
    torch.manual_seed(0)
    unet = Unet(dim=dim, dim_mults=(1, 2))
    model = GaussianDiffusion(unet, image_size=8, **choices)
    opt, ema = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99)), EMA(model)
    return {"step": step, "model": model.state_dict(), "opt": opt.state_dict(),
            "ema": ema.state_dict(), "scaler": None, "version": "2.3.4"}  # fmt: skip


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


def with_moment(state, value):
    """Adam's kernels would write beyond one of another shape."""
    state["opt"]["state"][3]["exp_avg"] = value
    return state


def test_other_checkpoints_beside_the_newest_are_named(resume):
    run, folder = resume
    shutil.copy(folder / "run/model-24.pt", folder / "run/model-latest.pt")
    shutil.copy(folder / "run/model-24.pt", folder / "run/ckpt_4000.pt")
    torch.save({"ema": {}}, folder / "run/weights.pt")
    torch.save({"ema": {}}, folder / "run/model-final.pt")
    said = run(25).stdout
    assert "Passed over: ckpt_4000.pt, model-latest.pt, as only model-NUMBER.pt is resumed." in said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(lambda state: state | {"notes": SimpleNamespace()}, "(types.SimpleNamespace in its entry "),
     (lambda state: without(state, "opt"), "EMA weights of a training checkpoint without opt"),
     (lambda state: without(state, "opt", "model"), "holds EMA weights without model, opt"),
     (lambda state: state["model"], "holds bare weights without step, model, opt, ema"),
     (lambda _: trainer_state(25, dim=16), "(dim: 16 in the file, 8 here)"),
     (lambda state: state | {"model": state["model"] | {"loss_weight": torch.arange(1e3)}},
      "its loss weight fits no objective"),
     (lambda state: state | {"opt": {}}, "its optimizer, average, labels or losses do not"),
     (lambda state: state | {"labels": {"names": ["a", "b"]}}, "labels or losses do not"),
     (lambda state: state | {"seconds": None}, "labels or losses do not (int() argument"),
     (lambda state: state | {"pending": ["a"]}, "(could not convert string to float: 'a')"),
     (lambda state: with_moment(state, torch.zeros(9, 9)), "(moments of"),
     (lambda state: with_moment(state, torch.zeros(64).to_sparse()), "(moments of"),
     (lambda state: with_moment(state, [0.0]), "(moments of")],
)  # fmt: skip
def test_a_whole_file_that_cannot_be_resumed_keeps_its_name(resume, change, sentence):
    run, folder = resume
    path = folder / "run/model-25.pt"
    torch.save(change(load(folder / "run/model-24.pt") | {"step": 25}), path)
    before = path.read_bytes()
    done = run(26)
    assert done.code == 1
    assert sentence in done.sentence
    assert "run/model-25.pt" in done.sentence
    assert path.read_bytes() == before
    assert [p.name for p in checkpoints(folder / "run")][1:] == ["model-24.pt", "model-25.pt"]


def test_files_that_are_not_numbered_are_named(cli, tiny_data, tmp_path):
    """Without a numbered one beside them there is nothing to go on from."""
    (tmp_path / "run").mkdir()
    for name in ("model-latest.pt", "model-best.pt"):
        torch.save(trainer_state(7), tmp_path / "run" / name)
    done = cli.run(*words(tiny_data, "--resume"), cwd=tmp_path)
    assert done.code == 1
    for text in ("run holds no model-STEP.pt, but model-best.pt, model-latest.pt", "rename the one",
                 "--init-weights"):  # fmt: skip
        assert text in done.sentence


def test_a_file_decides_what_the_network_predicts(cli, tiny_data, tmp_path):
    """Resumed or begun from; what was typed must agree. The library's own files stay, too."""
    (tmp_path / "run").mkdir()
    process = {"objective": "pred_noise", "beta_schedule": "linear", "timesteps": 100}
    for name, step in {"model-1.pt": 40, "model-2.pt": 10, "model-3.pt": 20}.items():
        torch.save(trainer_state(step, **process), tmp_path / "run" / name)
    shutil.copy(tmp_path / "run/model-1.pt", tmp_path / "theirs.pt")
    for results, step, more, typed, sentence in (
        ("run", 43, ["--resume"], ["--objective", "pred_v"],
         "objective: pred_noise in the file, pred_v here"),
        ("new", 3, ["--init-weights", "theirs.pt"], ["--schedule", "cosine"],
         "schedule: linear in the file, cosine here"),
    ):  # fmt: skip
        done = cli.run(*words(tiny_data, *more, *typed, results=results), cwd=tmp_path)
        assert done.code == 1
        assert sentence in done.sentence
        command = words(tiny_data, *more, steps=step, save_every=1, results=results)
        done = cli.run(*command, cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert "pred_noise, linear schedule" in done.stdout
        state = load(tmp_path / f"{results}/model-{step}.pt")
        assert torch.equal(state["model"]["betas"], linear_beta_schedule(100).float())
        said = {key: state["config"][key] for key in ("objective", "schedule", "timesteps")}
        assert said == {"objective": "pred_noise", "schedule": "linear", "timesteps": 100}
        made = [f"model-{step - 1}.pt", f"model-{step}.pt"]
        theirs = ["model-1.pt", "model-2.pt", "model-3.pt"] if results == "run" else []
        assert [p.name for p in checkpoints(tmp_path / results)] == theirs + made


def test_the_names_of_a_compiler_are_taken_off(resume):
    """On the way in, so that what is saved next is as the library knows it."""
    run, folder = resume
    state = load(folder / "run/model-24.pt")
    whole = {part: state[part].keys() for part in ("model", "ema")}
    for part in whole:
        state[part] = {key.replace("model.init", "model._orig_mod.init").replace(
            "downs.", "_orig_mod.downs."): value for key, value in state[part].items()}  # fmt: skip
        assert state[part].keys() != whole[part]
    torch.save(state, folder / "run/model-24.pt")
    assert run(26).code == 0
    resumed = load(folder / "run/model-26.pt")
    assert {part: resumed[part].keys() for part in whole} == whole


def test_a_bad_label_table_is_not_written(tmp_path):
    diffusion = build_diffusion(8, (1, 2), labels=("a", "b"))
    diffusion.label_table.data[1] = math.nan
    options = SimpleNamespace(results_dir=tmp_path, lr=1e-3)
    with pytest.raises(UserError, match="weights after step 7 are not finite"):
        save_checkpoint(
            SimpleNamespace(diffusion=diffusion, step=7, options=options, ema=EMA(diffusion))
        )
    assert list(tmp_path.iterdir()) == []


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
        os.mkfifo(run / f".model-{ahead}.{running.pid}.tmp.pt")
    running.send(signal.SIGINT)
    running.wait_until(lambda: "Ctrl-C again" in running.output("stderr"))
    time.sleep(0.5)  # opening a pipe without a reader blocks for ever, as a hung disk would
    running.send(signal.SIGINT)
    killer = threading.Timer(60, lambda: running.send(signal.SIGKILL))
    killer.start()
    done = running.finish()
    killer.cancel()
    assert done.code == 130
    assert not checkpoints(run)


def test_interrupt_before_training_begins(cli, tmp_path):
    data = write_blocks(tmp_path / "many", 3000)
    running = cli.start(*words(data), cwd=tmp_path)
    running.wait_until((tmp_path / "run").exists)  # it reads images next, and for a while
    running.send(signal.SIGINT)
    done = running.finish()
    assert done.code == 130
    assert "Interrupted. Everything saved before is intact." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("room", [0.5, 0.02])
def test_no_space_left_while_saving(resume, room):
    """Files may grow to a part of a checkpoint's size: the write fails as on a full disk."""
    run, folder = resume
    size = (folder / "run/model-24.pt").stat().st_size
    done = run(26, limit_file_size=int(size * room))
    assert done.code == 1
    assert "free some space and run the same command again" in done.sentence
    assert "model-26" in done.sentence
    assert [p.name for p in checkpoints(folder / "run")] == ["model-16.pt", "model-24.pt"]
    assert load(folder / "run/model-24.pt")["step"] == 24
    assert not list((folder / "run").glob(".*tmp*"))
    assert run(26).code == 0


@pytest.mark.parametrize(
    ("what", "save_every"), [("loss of step 26", 8), ("weights after step 25", 1)]
)
def test_numbers_that_are_not_finite_stop_the_run(resume, what, save_every):
    """A learning rate of 1e30 blows the weights up at the first step after the resume."""
    run, folder = resume
    done = run(40, "--lr", "1e30", "--save-every", save_every)
    assert done.code == 1
    for text in (what, "not finite", "model-24.pt", "--lr"):
        assert text in done.sentence
    assert [p.name for p in checkpoints(folder / "run")] == ["model-16.pt", "model-24.pt"]
    done = run(26)
    assert done.code == 0, done.stderr
    assert steps_logged(folder / "run/losses.csv") == [4, 8, 12, 16, 20, 24, 26]


def test_disk_use_is_bounded(cli, tiny_data, tmp_path):
    done = cli.run(*words(tiny_data, "--keep", 3, steps=8, save_every=2), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert [p.name for p in checkpoints(tmp_path / "run")] == [
        "model-4.pt", "model-6.pt", "model-8.pt"]  # fmt: skip


def test_what_a_user_keeps_beside_checkpoints_stays(cli, tiny_data, whole_run, tmp_path):
    folder = shutil.copytree(whole_run[0], tmp_path / "copy")
    mine = ["model-2-best.pt", "model-latest.pt", "model-\u00b2.pt", ".notes.tmp.txt"]
    for name in mine:
        (folder / "run" / name).write_text("mine")
    done = cli.run(*words(tiny_data, "--resume", steps=44), cwd=folder)
    assert done.code == 0, done.stderr
    assert all((folder / "run" / name).read_text() == "mine" for name in mine)


# ---- What may and may not change on --resume -----------------------------------------------------


def test_other_settings_are_refused(resume):
    run, folder = resume
    for more, named in (
        (["--dim", 16], "dim: 8 in the file, 16 here"),
        (["--batch-size", 16], "effective_batch: 8 in the file, 16 here"),
        (["--schedule", "linear"], "schedule: sigmoid in the file, linear here"),
        (["--objective", "pred_noise"], "objective: pred_v in the file, pred_noise here"),
        (["--loss-weight", "simple"], "loss_weight: min5 in the file, simple here"),
        (["--image-size", 16], "image_size: 8 in the file, 16 here"),
        (["--seed", 1], "seed: 42 in the file, 1 here"),
    ):
        done = run(40, *more)
        assert done.code == 1
        assert named in done.sentence
    assert [p.name for p in checkpoints(folder / "run")] == ["model-16.pt", "model-24.pt"]


def test_labels_stay_what_they_are(resume, cli, tiny_data, tmp_path):
    """Averaged and exported like all weights; other names are refused."""
    run, folder = resume
    labels, exported = load(folder / "run/model-24.pt")["labels"], load(folder / "run.pt")["labels"]
    assert labels["names"] == exported["names"] == ["a", "b"]
    assert torch.equal(labels["embedding"], exported["embedding"])
    state = load(folder / "run/model-24.pt")
    state["labels"]["names"] = ["a", "z"]
    state["step"] = 25
    torch.save(state, folder / "run/model-25.pt")
    assert "labels are a, z, the data's are a, b" in run(26).sentence
    # New weights take rows over by name; what was not known before starts at zero.
    shutil.copytree(tiny_data / "b", tmp_path / "other/b")
    shutil.copytree(tiny_data / "a", tmp_path / "other/c")
    start = ["--init-weights", folder / "run.pt", "--lr", "1e-12"]
    done = cli.run(*words(tmp_path / "other", *start, steps=2), cwd=tmp_path)
    assert done.code == 0, done.stderr
    table = load(tmp_path / "run.pt")["labels"]
    assert table["names"] == ["b", "c"]
    assert torch.allclose(table["embedding"][0], exported["embedding"][1], atol=1e-9)
    assert table["embedding"][1].abs().max() < 1e-9


def test_pictures_without_folders_have_no_labels(cli, tiny_data, tmp_path):
    shutil.copytree(tiny_data / "a", tmp_path / "flat")
    shutil.copytree(tiny_data / "b", tmp_path / "flat", dirs_exist_ok=True)
    done = cli.run(*words(tmp_path / "flat", steps=2), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "labels" not in done.stdout
    for path in (tmp_path / "run.pt", tmp_path / "run/model-2.pt"):
        assert "labels" not in load(path)
    assert cli.run(*words(tmp_path / "flat", "--resume", steps=3), cwd=tmp_path).code == 0


def test_changed_data_is_noticed(resume, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copy(data / "a/0000.png", data / "a/new.png")
    (data / "b/0001.png").unlink()
    shutil.copy(data / "a/0000.png", data / "a/0002.png")
    done = resume[0](40, "--data", data)
    assert done.code == 1
    for text in ("1 added (a/new.png)", "1 removed (b/0001.png)", "1 replaced (a/0002.png)"):
        assert text in done.sentence


def test_a_resumed_run_adopts_the_recorded_precision(cli, tiny_data, tmp_path):
    """Whatever auto would take on this machine: one of the two is not it."""
    for name in ("fp32", "bf16"):
        for more in (["--precision", name], ["--precision", "auto", "--resume"]):
            steps = 4 if "--resume" in more else 2
            done = cli.run(*words(tiny_data, *more, steps=steps, results=name), cwd=tmp_path)
            assert done.code == 0, done.stderr
            assert f"Precision   {name}, compiled: no" in done.stdout


def test_a_finished_run_has_nothing_to_do(resume):
    run, folder = resume
    weights, before = (folder / "run.pt").read_bytes(), load(folder / "run.pt")["ema"]
    done = run(24)
    assert done.code == 0
    assert "This run is finished: 24 steps are done and run.pt is written" in done.stdout
    assert (folder / "run.pt").read_bytes() == weights
    (folder / "run.pt").unlink()  # as if it had been killed just before the export
    assert run(24).code == 0
    assert_equal_state(load(folder / "run.pt")["ema"], before)


def test_a_second_run_on_top_stops(cli, tiny_data, whole_run, tmp_path):
    folder = shutil.copytree(whole_run[0], tmp_path / "copy")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = cli.run(*words(tiny_data, steps=50), cwd=folder)
    assert done.code == 1
    assert "run holds another run" in done.sentence
    assert "--resume" in done.sentence
    assert "--results-dir" in done.sentence
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (folder / "other").mkdir()
    (folder / "other/sample-2.png").write_text("a picture of mine")
    done = cli.run(*words(tiny_data, steps=50, results="other"), cwd=folder)
    assert "other holds another run (sample-2.png)" in done.sentence


# ---- Weights in and out --------------------------------------------------------------------------


def test_weights_of_an_earlier_run_are_kept(cli, tiny_data, tmp_path):
    (tmp_path / "run.pt").write_bytes(b"precious")
    (tmp_path / "run.previous.pt").write_bytes(b"more precious")
    done = cli.run(*words(tiny_data, "--resume", steps=2), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "Nothing to resume in run: starting at step 0." in done.stdout
    assert "are now run.previous-2.pt" in done.stdout
    assert (tmp_path / "run.previous-2.pt").read_bytes() == b"precious"
    assert (tmp_path / "run.previous.pt").read_bytes() == b"more precious"
    assert load(tmp_path / "run.pt")["step"] == 2


def test_outputs_that_cannot_be_written_are_refused_at_once(cli, tiny_data, tmp_path):
    (tmp_path / "run").touch()
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    for results, words_of_it in (("run", "--results-dir run is a file"),
                                 ("pipe", "pipe.pt is a folder or a device"),
                                 ("folder", "folder.pt is a folder")):  # fmt: skip
        done = cli.run(*words(tiny_data, results=results), cwd=tmp_path)
        assert done.code == 1
        assert words_of_it in done.sentence
    more = ("--weights-out", "run.safetensors")
    done = cli.run(*words(tiny_data, *more, results="fresh"), cwd=tmp_path)
    assert (done.code, "run.safetensors has to end in .pt" in done.sentence) == (1, True)
    more = ("--weights-out", "fresh/model-9.pt")
    done = cli.run(*words(tiny_data, *more, results="fresh"), cwd=tmp_path)
    assert "model-9.pt has the name of a checkpoint" in done.sentence
    inside = cli.run(*words(".", results="mine"), cwd=tiny_data)
    assert "--results-dir mine lies in the data folder" in inside.sentence


def test_checkpoints_load_into_the_librarys_trainer_and_back(cli, tiny_data, whole_run, tmp_path):
    trainer = Trainer(tiny_diffusion(), str(tiny_data), train_batch_size=16, train_num_steps=26,
                      results_folder=str(whole_run[0] / "run"), calculate_fid=False)  # fmt: skip
    trainer.load(24)
    ours = load(whole_run[0] / "run/model-24.pt")
    assert trainer.step == 24
    for name, value in trainer.ema.ema_model.state_dict().items():
        assert torch.equal(value, ours["ema"][f"ema_model.{name}"])
    assert ours["labels"]["names"] == ["a", "b"]
    trainer.results_folder = tmp_path / "run"
    trainer.results_folder.mkdir()
    trainer.step = 25
    trainer.save(1)
    done = cli.run(*words(tiny_data, "--resume", steps=27), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "does not say its settings" in done.stdout
    assert steps_logged(tmp_path / "run/losses.csv") == [27]
    resumed = load(tmp_path / "run/model-27.pt")
    assert torch.equal(resumed["labels"]["step"], torch.tensor(2.0)), "its table began at zero"
    # Adam's first two steps are of about the size of the learning rate.
    assert 0 < resumed["labels"]["parameter"].abs().max() < 2.1 * 2e-4


def test_initial_weights_start_another_size(cli, tiny_data, whole_run, tmp_path):
    weights = whole_run[0] / "run.pt"
    larger = ["--init-weights", weights, "--image-size", 16, "--lr", "1e-12"]
    done = cli.run(*words(tiny_data, *larger, steps=2), cwd=tmp_path)
    assert done.code == 0, done.stderr
    trained, started = load(tmp_path / "run/model-2.pt"), load(weights)
    assert trained["config"]["initial_weights"] == "run.pt"
    name = "model.init_conv.weight"
    difference = trained["model"][name] - started["ema"][f"ema_model.{name}"].float()
    assert difference.abs().max() < 1e-6


def test_crops_are_trained_and_carried_into_the_full_size(cli, tmp_path):
    """All about a cropped run is of the crops' size; its weights start a run of whole images."""
    data = write_blocks(tmp_path / "data", 120, size=16)
    size = ["--image-size", 16, "--crop", 8, "--heldout", data]
    done = cli.run(*words(data, *size, steps=8, results="crops"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "8x8 squares of 16x16, pred_v" in done.stdout
    config = load(tmp_path / "crops.pt")["config"]
    assert (config["image_size"], config["cropped_from"]) == (8, 16)
    with Image.open(tmp_path / "crops/sample-8.png") as sheet:
        assert sheet.width < 16 * 160
    assert float(rows_of(tmp_path / "crops/losses.csv")[-1]["heldout_fixed"]) > 0
    done = cli.run(*words(data, *size, "--resume", steps=9, results="crops"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    done = cli.run(
        *words(data, "--image-size", 16, "--resume", steps=12, results="crops"), cwd=tmp_path
    )
    assert "image_size: 8 in the file, 16 here" in done.sentence
    whole = ["--image-size", 16, "--init-weights", "crops.pt"]
    done = cli.run(*words(data, *whole, steps=4, results="whole"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert load(tmp_path / "whole.pt")["config"]["image_size"] == 16
    first = [
        float(rows_of(tmp_path / f"{name}/losses.csv")[0]["loss"]) for name in ("whole", "crops")
    ]
    assert first[0] < first[1], "it did not go on from what the crops had taught"


def test_initial_weights_of_another_width_are_refused(cli, tiny_data, whole_run, tmp_path):
    weights = whole_run[0] / "run.pt"
    for name, state, words_of_it in (
        ("run.pt", load(weights), "dim: 8 in the file, 16 here"),
        ("grey.pt", build_diffusion(8, (1, 2), 1).state_dict(), "channels: 1 in the file, 3 here"),
        ("self.pt", Unet(8, dim_mults=(1, 2), self_condition=True).state_dict(),
         "self_condition: True in the file, False here"),
    ):  # fmt: skip
        torch.save(state, tmp_path / name)
        dim = 16 if name == "run.pt" else 8
        done = cli.run(*words(tiny_data, "--init-weights", name, "--dim", dim), cwd=tmp_path)
        assert done.code == 1
        assert f"{name} holds another network ({words_of_it})" in done.sentence.replace(
            f"The weights in {name} belong to", f"{name} holds"
        )


# ---- Slow ----------------------------------------------------------------------------------------


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
    record(memory_growth_bytes=sizes[1] - sizes[0])
    assert sizes[1] - sizes[0] < 20e6


@pytest.mark.slow
def test_compiled_bf16_follows_eager_fp32(tmp_path):
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
