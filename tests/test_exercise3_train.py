"""exercise3_train.py: the data check, the training step, and runs from end to end."""

import copy
import csv
import math
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script, write_blocks
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from PIL import Image

from ddpm_basics.images import decode_image
from ddpm_basics.model import build_diffusion
from ddpm_basics.training import (
    FIXED_IMAGES,
    MAX_NOISY_WEIGHT,
    Drawer,
    draw_numbers,
    fixed_timestep,
    learning_rate,
    spread,
    thrifty_norms,
    weight_by_min_snr,
    weight_by_snr_plus_one,
)

ex3 = load_script("exercise3_train")

SMALL = ["--image-size", "8", "--dim", "8", "--dim-mults", "1", "2", "--batch-size", "8",
         "--device", "cpu", "--log-every", "5"]  # fmt: skip


@pytest.fixture(scope="session")
def cli(serve):
    return serve("exercise3_train")


def train(cli, cwd, data, *more, steps=20, save_every=10):
    return cli.run("--train", "--data", data, "--steps", steps, "--save-every", save_every,
                   "--weights-out", "weights.pt", "--results-dir", "run", *SMALL, *more,
                   cwd=cwd)  # fmt: skip


def draw_batch(images, seed, step, positions, batch, timesteps):
    """x_0, t and noise of some positions in the effective batch of a step."""
    numbers = draw_numbers(seed, step, positions, batch, timesteps, images.shape)
    return ex3.make_batch(images, numbers)


def tiny_diffusion(**choices):
    torch.manual_seed(0)
    return build_diffusion(dim=8, dim_mults=(1, 2), image_size=8, **choices)


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- --verify ------------------------------------------------------------------------------------


def test_verify_reports_and_draws(cli, tiny_data, tmp_path):
    done = cli.run("--verify", "--data", tiny_data, "--image-size", 8, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Found 120 images in dataset"
    assert "8x8: 120" in done.stdout
    assert "RGB: 120" in done.stdout
    assert [line.split() for line in done.stdout.splitlines() if line.startswith("  ")] == [
        ["a", "60"], ["b", "60"]]  # fmt: skip
    with Image.open(tmp_path / "training_samples_grid.png") as grid:
        assert grid.width > 3 * 8


def test_verify_names_every_bad_file(cli, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "a" / "empty.png").touch()
    (data / "a" / "noise.JPG").write_bytes(b"no image at all")
    whole = (data / "a" / "0000.png").read_bytes()
    (data / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "notes.txt").write_text("hello")
    Image.new("RGB", (5, 9)).save(data / "b" / "small.png")
    Image.new("RGBA", (9, 9)).save(data / "b" / "clear.png")
    done = cli.run("--verify", "--data", data, "--image-size", 8, cwd=tmp_path)
    assert done.code == 1
    assert "3 of 125 image files are broken" in done.sentence
    for text in ("empty.png (empty file)", "noise.JPG", "cut.png", "notes.txt", "RGBA: 1",
                 "small.png (only 5x9)"):  # fmt: skip
        assert text in done.stdout
    assert "Found" not in done.stdout


@pytest.mark.parametrize("command", ["--verify", "--train"])
def test_bad_data_folders_get_one_sentence(cli, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_blocks(tmp_path / "few", 30)
    broken = tmp_path / "broken"
    broken.mkdir()
    for i in range(120):
        (broken / f"{i}.png").write_bytes(b"\x89PNG not really")
    for name, words in {
        "missing": "does not exist",
        "empty": "holds 0",
        "file": "is a file",
        "few": "holds 30",
        "broken": "readable images" if command == "--verify" else "cannot be read as an image",
    }.items():
        done = cli.run(command, "--data", name, *SMALL, cwd=tmp_path)
        assert done.code == 1
        assert words in done.sentence, name


@pytest.mark.skipif("os.geteuid() == 0", reason="root may read everything")
def test_an_unreadable_folder_is_named(cli, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "a").chmod(0)
    done = cli.run("--verify", "--data", data, cwd=tmp_path)
    (data / "a").chmod(0o755)
    assert done.code == 1
    assert "cannot be read" in done.sentence


def test_decode_image_kinds(tmp_path):
    """16 bits are scaled, transparency is white, sideways photographs are turned upright."""
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "16bit.png")
    decoded = np.asarray(decode_image(tmp_path / "16bit.png"))
    assert np.abs(decoded[..., 0] - grey / 257).max() <= 1

    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(decode_image(tmp_path / "clear.png")) == 255).all()

    photo = Image.fromarray(np.repeat(np.uint8([[255] * 4 + [0] * 4]), 8, 0)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = np.asarray(decode_image(tmp_path / "turned.jpg")).astype(int)
    assert upright[0].mean() > 200 > 50 > upright[-1].mean()

    wide = Image.fromarray(np.hstack([np.zeros((8, 8)), np.full((8, 8), 255)]).astype(np.uint8))
    wide.save(tmp_path / "wide.png")
    square = np.asarray(decode_image(tmp_path / "wide.png", 8)).astype(int)
    assert square.shape == (8, 8, 3)
    assert square[:, :3].max() < 60  # cropped to the middle, not squeezed
    assert square[:, 5:].min() > 195


# ---- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v", "pred_x0"])
@pytest.mark.parametrize("min_snr", [False, True])
def test_loss_and_gradients_equal_the_library(objective, min_snr):
    torch.manual_seed(0)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=3, flash_attn=False)
    stock = GaussianDiffusion(unet, image_size=8, timesteps=1000, objective=objective,
                              beta_schedule="sigmoid", min_snr_loss_weight=min_snr)  # fmt: skip
    images = torch.rand(16, 3, 8, 8)
    noise, t = torch.randn(16, 3, 8, 8), torch.randint(1000, (16,))
    expected_loss = stock.p_losses(stock.normalize(images), t, noise=noise)
    expected_loss.backward()
    expected = [p.grad.clone() for p in unet.parameters()]

    ours = build_diffusion(dim=8, dim_mults=(1, 2), image_size=8, objective=objective)
    if min_snr:
        weight_by_min_snr(ours)
    ours.model.load_state_dict(unet.state_dict())
    ours.to(memory_format=torch.channels_last)
    losses = ex3.denoising_loss(ours, ours.model, images * 2 - 1, t, noise)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for gradient, parameter in zip(expected, ours.model.parameters(), strict=True):
        error = (gradient - parameter.grad).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-4


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_snr_plus_one_makes_it_the_error_of_v(objective):
    """Whatever the network predicts: the loss is the squared error of v that the library finds."""
    diffusion = tiny_diffusion(objective=objective)
    weight_by_snr_plus_one(diffusion)
    x_0, noise, t = torch.rand(32, 3, 8, 8), torch.randn(32, 3, 8, 8), torch.arange(32) * 30
    with torch.no_grad():
        losses = ex3.denoising_loss(diffusion, diffusion.model, x_0, t, noise)
        x_t = diffusion.q_sample(x_0, t, noise)
        guess = diffusion.model_predictions(x_t, t)
        v = diffusion.predict_v(guess.pred_x_start, t, guess.pred_noise)
        error = (v - diffusion.predict_v(x_0, t, noise)).square().mean(dim=(1, 2, 3))
    assert losses.tolist() == pytest.approx(error.tolist(), rel=2e-3)
    assert diffusion.noisy_weight.max() == MAX_NOISY_WEIGHT
    assert "noisy_weight" not in diffusion.state_dict(), "other programs could not load it"


def test_bf16_loss_is_within_two_percent():
    diffusion = tiny_diffusion()
    x_0, noise, t = torch.rand(32, 3, 8, 8), torch.randn(32, 3, 8, 8), torch.arange(32) * 31
    exact = ex3.denoising_loss(diffusion, diffusion.model, x_0, t, noise).mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = ex3.denoising_loss(diffusion, diffusion.model, x_0, t, noise).mean()
    assert reduced.dtype == torch.float32
    assert reduced.item() == pytest.approx(exact.item(), rel=0.02)


def test_thrifty_norms_change_the_dtype_and_nothing_else():
    theirs, ours = tiny_diffusion().model, tiny_diffusion().model
    thrifty_norms(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for parameter in ours.parameters():  # gains that are not all one
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    x_t, t = torch.randn(4, 3, 8, 8), torch.arange(4) * 300
    assert torch.allclose(ours(x_t, t), theirs(x_t, t), rtol=1e-5, atol=1e-6)

    found = {}
    for name, unet in (("theirs", theirs), ("ours", ours)):
        unet = copy.deepcopy(unet)  # as the EMA does it
        seen = found[name] = set()
        for module in unet.modules():
            if isinstance(module, library.RMSNorm):
                module.register_forward_hook(lambda m, x, y, seen=seen: seen.add(y.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unet(x_t, t)
    assert found == {"theirs": {torch.float32}, "ours": {torch.bfloat16}}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_kept():
    """Tensors of 64 MB cost their page faults once, and then no more.

    Up to a few times more: a small allocation may settle in the block that was freed, which the
    next tensor then no longer fits into.
    """
    script = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from ddpm_basics.hardware import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(16 << 20).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
keep_freed_memory()
print(before, min(faults() for _ in range(5)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after < before / 10


def test_every_image_comes_once_per_pass():
    images = torch.arange(120, dtype=torch.uint8).reshape(120, 1, 1, 1).expand(-1, 3, 4, 4)
    seen = []
    for step in range(1, 31):  # 30 x 8 = two passes over 120 images
        x_0, t, noise = draw_batch(images, 7, step, range(8), 8, 1000)
        seen += ((x_0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert x_0.min() >= -1
        assert x_0.max() <= 1
        assert t.min() >= 0
        assert t.max() < 1000
        assert noise.shape == x_0.shape
    assert sorted(seen[:120]) == sorted(seen[120:]) == list(range(120))
    assert seen[:120] != seen[120:]


def test_draws_have_the_right_distributions():
    images = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    images[..., :4] = 255  # a flipped image starts dark
    batches = [draw_batch(images, 1, step, range(100), 100, 1000) for step in range(1, 11)]
    x_0, t, noise = (torch.cat(column) for column in zip(*batches, strict=True))
    assert 0.45 < (x_0[:, 0, 0, 0] < 0).float().mean() < 0.55
    assert 450 < t.float().mean() < 550
    assert t.float().std() == pytest.approx(1000 / math.sqrt(12), rel=0.1)
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    flat = noise.flatten(1)
    correlation = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0).abs().max()
    assert correlation < 0.5  # no two examples share their noise


def test_a_batch_does_not_depend_on_how_it_is_split():
    images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8)
    whole = draw_batch(images, 3, 5, range(8), 8, 1000)
    parts = [draw_batch(images, 3, 5, range(a, a + 2), 8, 1000) for a in (0, 2, 4, 6)]
    for column, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(column), expected)


def test_drawing_ahead_changes_nothing():
    args = ex3.parse_options(["--train", "--batch-size", "4", "--gradient-accumulate", "2"])
    shape = torch.Size((100, 3, 8, 8))
    drawer = Drawer(args, shape, process=1, processes=2)
    # In order, then a jump as after --resume, then one step twice.
    for step, micro in [(1, 0), (1, 1), (2, 0), (7, 0), (7, 1), (7, 1), (8, 0)]:
        first = 4 * micro + 2  # the second half of each micro-batch is this process'
        wanted = draw_numbers(args.seed, step, range(first, first + 2), 8, 1000, shape)
        for ours, expected in zip(drawer.take(step, micro), wanted, strict=True):
            np.testing.assert_array_equal(ours, expected)
    assert list(drawer.ahead) == [(8, 1)]
    ahead = drawer.ahead[8, 1].result()
    assert drawer.take(8, 1) is ahead


def test_fixed_images_come_from_every_folder():
    images = torch.arange(1059)
    chosen = spread(images)
    assert len(chosen) == FIXED_IMAGES
    counts = torch.bincount(chosen * 12 // 1059, minlength=12)  # twelve traditions in a row
    assert counts.min() >= 8
    assert counts.max() <= 9


def test_fixed_timesteps_fill_their_bins():
    t = [fixed_timestep(place, 1000) for place in range(100)]
    for b in range(10):
        assert all(100 * b <= x < 100 * (b + 1) for x in t[b::10])
        assert len(set(t[b::10])) == 10


def test_learning_rate_schedule():
    args = ex3.parse_options(
        ["--train", "--lr", "1e-3", "--lr-final", "1e-4", "--warmup-steps", "10", "--steps", "110"]
    )
    assert learning_rate(5, args) == pytest.approx(5e-4)
    assert learning_rate(10, args) == pytest.approx(1e-3)
    assert learning_rate(60, args) == pytest.approx(5.5e-4)
    assert learning_rate(110, args) == pytest.approx(1e-4)
    assert learning_rate(500, ex3.parse_options(["--train"])) == 2e-4


def test_network_and_process_are_the_courses():
    args = ex3.parse_options(["--train"])
    assert (args.batch_size, args.steps, args.schedule, args.objective) == (
        32, 100_000, "sigmoid", "pred_noise")  # fmt: skip
    diffusion = build_diffusion(dim=args.dim, dim_mults=args.dim_mults)
    assert sum(p.numel() for p in diffusion.model.parameters()) == 35_711_491


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished_run(cli, tiny_data, tmp_path_factory):
    """A run of 40 steps; the loss falls, so that something was learnt."""
    folder = tmp_path_factory.mktemp("finished")
    done = train(cli, folder, tiny_data, "--heldout", tiny_data, "--lr", "5e-3", steps=40)
    assert done.code == 0, done.stderr
    return folder, done


def test_a_run_leaves_what_it_promises(finished_run):
    folder, done = finished_run
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {"losses.csv", "loss_curve.png", "run.json", "model-30.pt", "model-40.pt",
                     *(f"sample-{k}.png" for k in (10, 20, 30, 40))}  # fmt: skip
    rows = rows_of(folder / "run" / "losses.csv")
    assert [int(row["step"]) for row in rows] == list(range(5, 41, 5))
    assert float(rows[-1]["loss"]) < 0.95 * float(rows[0]["loss"])
    for row in rows:
        assert bool(row["heldout_bin9"]) == (int(row["step"]) % 10 == 0)
    last = rows[-1]
    bins = [float(last[f"heldout_bin{i}"]) for i in range(10)]
    assert float(last["heldout_fixed"]) == pytest.approx(np.mean(bins), rel=1e-4)
    assert "Wrote weights.pt" in done.stdout


def test_the_banner_says_what_one_must_know(finished_run):
    _, done = finished_run
    for text in ("Device", "Precision", "parameters", "120 images", "8 x 1 (accumulation) = 8",
                 "0 to 40: 3 passes over the data", "Estimated time", "weights.pt", "Ctrl-C",
                 "--resume"):  # fmt: skip
        assert text in done.stdout, text


def test_exported_weights_are_the_ema_in_fp16(finished_run):
    folder, _ = finished_run
    weights, checkpoint = load(folder / "weights.pt"), load(folder / "run" / "model-40.pt")
    assert weights["step"] == 40
    assert weights["config"]["process"]["objective"] == "pred_noise"
    parameters = dict(tiny_diffusion().named_parameters())
    differs = False
    for name, value in weights["ema"].items():
        bare = name.removeprefix("ema_model.")
        assert value.dtype == (torch.float16 if bare in parameters else torch.float32)
        expected = checkpoint["ema"][name]
        assert torch.allclose(value.float(), expected, rtol=1e-3, atol=1e-6)
        differs |= not torch.allclose(value.float(), checkpoint["model"][bare], rtol=1e-3)
    assert differs  # the EMA, not the raw network
    # The snippet that README and lesson show.
    state = {k.removeprefix("ema_model."): v for k, v in weights["ema"].items()
             if k.startswith("ema_model.")}  # fmt: skip
    diffusion = tiny_diffusion()
    diffusion.load_state_dict(state)


def test_checkpoints_load_into_the_librarys_trainer_and_back(finished_run, tiny_data, tmp_path,
                                                             cli):  # fmt: skip
    folder, _ = finished_run
    data = shutil.copytree(tiny_data, tmp_path / "data")
    diffusion = tiny_diffusion()
    trainer = Trainer(diffusion, str(data), train_batch_size=16, train_num_steps=42,
                      results_folder=str(folder / "run"), calculate_fid=False)  # fmt: skip
    trainer.load(40)
    ours = load(folder / "run" / "model-40.pt")
    assert trainer.step == 40
    for name, value in trainer.ema.ema_model.state_dict().items():
        assert torch.equal(value, ours["ema"][f"ema_model.{name}"])
    trainer.results_folder = tmp_path / "run"
    trainer.results_folder.mkdir()
    trainer.step = 41
    trainer.save(1)
    done = train(cli, tmp_path, data, "--resume", steps=45)
    assert done.code == 0, done.stderr
    assert "library's own checkpoint" in done.stdout
    assert [int(row["step"]) for row in rows_of(tmp_path / "run" / "losses.csv")] == [45]


def test_a_second_run_on_top_stops(cli, tiny_data, finished_run, tmp_path):
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    done = train(cli, folder, tiny_data, steps=50)
    assert done.code == 1
    assert "--resume" in done.sentence
    assert "--results-dir" in done.sentence
    assert before == {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}


def test_a_finished_run_has_nothing_to_do(cli, tiny_data, finished_run, tmp_path):
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    weights = (folder / "weights.pt").read_bytes()
    more = ["--heldout", tiny_data, "--lr", "5e-3", "--resume"]
    done = train(cli, folder, tiny_data, *more, steps=40)
    assert done.code == 0
    assert "finished" in done.stdout
    assert (folder / "weights.pt").read_bytes() == weights
    (folder / "weights.pt").unlink()  # as if it had been killed just before the export
    done = train(cli, folder, tiny_data, *more, steps=40)
    assert done.code == 0
    assert (folder / "weights.pt").read_bytes()


def test_weights_of_an_earlier_run_are_kept(cli, tiny_data, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"precious")
    (tmp_path / "weights.previous.pt").write_bytes(b"more precious")
    done = train(cli, tmp_path, tiny_data, steps=5)
    assert done.code == 0, done.stderr
    assert (tmp_path / "weights.previous-2.pt").read_bytes() == b"precious"
    assert (tmp_path / "weights.previous.pt").read_bytes() == b"more precious"
    assert load(tmp_path / "weights.pt")["step"] == 5


def test_initial_weights_start_another_size(cli, tiny_data, finished_run, tmp_path):
    weights = finished_run[0] / "weights.pt"
    done = train(cli, tmp_path, tiny_data, "--init-weights", weights, "--image-size", 16,
                 "--lr", "1e-12", steps=5)  # fmt: skip
    assert done.code == 0, done.stderr
    trained, started = load(tmp_path / "run" / "model-5.pt"), load(weights)
    name = "model.init_conv.weight"
    difference = trained["model"][name] - started["ema"][f"ema_model.{name}"].float()
    assert difference.abs().max() < 1e-6
    for bad, words in {"missing.pt": "does not exist", tiny_data / "a" / "0000.png": "EMA weights"
                       }.items():  # fmt: skip
        done = train(cli, tmp_path, tiny_data, "--init-weights", bad, "--results-dir", "other")
        assert done.code == 1
        assert words in done.sentence


def test_quick_has_paths_of_its_own(tmp_path):
    args = ex3.parse_options(["--train", "--quick"])
    assert str(args.results_dir) == "training_results/quick"
    assert args.weights_out != ex3.parse_options(["--train"]).weights_out
    assert args.image_size == 32
    assert ex3.parse_options(["--train", "--quick", "--steps", "7"]).steps == 7


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--train", "--verify"],
        ["--train", "--steps", "0"],
        ["--train", "--steps", "many"],
        ["--train", "--batch-size", "-3"],
        ["--train", "--lr", "nan"],
        ["--train", "--lr", "-1"],
        ["--train", "--keep", "1"],
        ["--train", "--schedule", "cubic"],
        ["--train", "--device", "tpu"],
        ["--train", "--image-size", "60"],
        ["--train", "--dim", "7"],
    ],
)
def test_wrong_usage_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as leaving:
        ex3.parse_options(words)
    assert leaving.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_outputs_that_cannot_be_written(cli, tiny_data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for more, words in (
        (["--results-dir", "file"], "is a file"),
        (["--weights-out", "folder"], "is a folder"),
        (["--weights-out", "file/weights.pt"], "Cannot write"),
        (["--results-dir", "/proc/run"], "Cannot write"),
    ):
        done = train(cli, tmp_path, tiny_data, *more)
        assert done.code == 1
        assert words in done.sentence
    if not torch.cuda.is_available():
        assert "cuda" in train(cli, tmp_path, tiny_data, "--device", "cuda").sentence


def test_memory_error_names_the_settings_that_fit(cli, tiny_data, tmp_path):
    """The child process may take 150 MB more than it has; the batch needs far more."""
    done = cli.run("--train", "--data", tiny_data, "--steps", 5, *SMALL, "--batch-size", 65536,
                   "--compile", "off", cwd=tmp_path, limit_memory=600_000_000)  # fmt: skip
    assert done.code == 1
    assert "--batch-size 32768 --gradient-accumulate 2" in done.sentence


def test_plain_network_learns_a_plain_data_set(tmp_path):
    """Not a unit test: 300 steps on one-coloured images must predict noise far better than 1."""
    diffusion = tiny_diffusion()
    images = torch.full((100, 3, 8, 8), 128, dtype=torch.uint8)
    optimizer = torch.optim.Adam(diffusion.model.parameters(), lr=3e-3)
    for step in range(1, 301):
        batch = draw_batch(images, 0, step, range(8), 8, 1000)
        loss = ex3.denoising_loss(diffusion, diffusion.model, *batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = draw_batch(images, 1, 1, range(64), 64, 1000)
    with torch.no_grad():
        final = ex3.denoising_loss(diffusion, diffusion.model, *batch).mean()
        x_0, t, noise = batch
        guess = diffusion.q_sample(x_0, t, noise)  # x_t itself as the guess of the noise
    assert final < 0.25
    assert final < F.mse_loss(guess, noise)
