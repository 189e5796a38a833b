"""exercise1_generate.py: weight files, images, folders, interruptions, bad input."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from PIL import Image

from ddpm_basics.console import UserError
from ddpm_basics.files import write_atomically
from ddpm_basics.hardware import pick_precision
from ddpm_basics.model import load_weights

exercise1 = load_script("exercise1_generate")
SCRIPT = ROOT / "exercise1_generate.py"
SIZE = 16


def make_diffusion(objective="pred_noise", beta_schedule="sigmoid", channels=3, **more):
    """The library's own objects, built without any function of ours."""
    torch.manual_seed(1)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=channels, flash_attn=False)
    return GaussianDiffusion(unet, image_size=SIZE, timesteps=1000, objective=objective,
                             beta_schedule=beta_schedule, **more)  # fmt: skip


def bundled(diffusion, **changes):
    """The format of models/ddpm_african_fabrics.pt: parameters in fp16, buffers in fp32."""
    parameters = {name for name, _ in diffusion.named_parameters()}
    ema = {
        f"ema_model.{name}": value.half() if name in parameters else value
        for name, value in diffusion.state_dict().items()
    }
    process = {"image_size": SIZE, "timesteps": 1000, "objective": diffusion.objective,
               "beta_schedule": "sigmoid"}  # fmt: skip
    config = {"network": {"dim": 8, "dim_mults": [1, 2], "channels": 3}, "process": process}
    return {"step": 1234, "version": "2.3.4", "ema": ema, "config": config, **changes}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A bundled file of a tiny network whose x_0 leaves the corners of the colour cube."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    diffusion = make_diffusion()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=3e-3)
    ramp = torch.linspace(0, 1, SIZE)
    for _ in range(60):
        colors, slopes = torch.rand(8, 3, 1, 1), torch.rand(8, 1, 1, 1)
        diffusion((colors + slopes * ramp) / 2 * torch.ones(SIZE, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(bundled(diffusion), path)
    return path


@pytest.fixture(scope="session")
def cli(serve):
    return serve("exercise1_generate")


@pytest.fixture
def draw(cli, weights, tmp_path):
    """draw('--seed', 3) runs the command in a fresh folder with four quick steps."""

    def run(*options, code=0, cwd=tmp_path, **limits):
        done = cli.run("--weights", weights, "--steps", 4, "--num-samples", 5, "--device", "cpu",
                       *options, cwd=cwd, **limits)  # fmt: skip
        assert done.code == code, done.stdout + done.stderr
        return done

    return run


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture).astype(int)


def fabrics(folder):
    """{file name: pixels} of a samples folder."""
    return {path.name: pixels(path) for path in sorted(folder.glob("*.png"))}


def same(one, other):
    """Equal up to one of 255 levels, which the order of additions in a batch may decide."""
    return one.shape == other.shape and np.abs(one - other).max() <= 1


# ---- What it writes and says ---------------------------------------------------------------------


def test_the_plain_command(cli, weights, tmp_path):
    """Sixteen fabrics, the grid, and every fact about the weights, with all options left alone."""
    (tmp_path / "models").mkdir()
    shutil.copy(weights, tmp_path / "models" / "ddpm_african_fabrics.pt")
    done = cli.run(cwd=tmp_path)
    assert done.code == 0, done.stderr
    images = fabrics(tmp_path / "generated_samples")
    assert list(images) == [f"fabric_{i:04d}.png" for i in range(16)]
    assert {image.shape for image in images.values()} == {(SIZE, SIZE, 3)}
    assert len({image.tobytes() for image in images.values()}) == 16
    assert {path.name for path in tmp_path.iterdir()} == {
        "models", "generated_samples", "exercise1_output.png"}  # fmt: skip
    parameters = sum(p.numel() for p in make_diffusion().model.parameters())
    for fact in ("step 1,234", "library 2.3.4", f"{parameters:,} parameters", "width 8 x 1-2",
                 "predicts the noise (pred_noise)", "sigmoid schedule", "1000 timesteps",
                 "DPM-Solver++, 20 steps", "--sampler ddim --steps 250"):  # fmt: skip
        assert fact in done.stdout
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"Wrote exercise1_output.png and 16 images in generated_samples "
        r"\(\d+\.\d\d s per image\); \d+\.\d s in all\.", last
    )  # fmt: skip
    assert "40/40" in done.stderr, "the progress bar: 20 steps for each of two batches of eight"


def test_the_grid_shows_the_images_below_a_title(draw, tmp_path):
    draw("--num-samples", 4)
    grid = pixels(tmp_path / "exercise1_output.png")
    assert (grid[:40] < 100).any(), "no title"
    for i, image in enumerate(fabrics(tmp_path / "generated_samples").values()):
        width, cell = grid.shape[1], 160
        x = (width - 2 * cell - 8) // 2 + i % 2 * (cell + 8)
        y = 44 + i // 2 * (cell + 8)
        shown = grid[y : y + cell, x : x + cell].mean((0, 1))
        assert np.abs(shown - image.mean((0, 1))).max() < 2


def test_full_contrast(draw, weights, tmp_path):
    """The decoded files against the library's sample(): means, spreads, and every pixel."""
    # fp32 also where the hardware has bf16; and the library asks its network everywhere
    exactly = ("--precision", "fp32", "--min-signal", 0)
    draw("--sampler", "ddim", "--steps", 10, "--num-samples", 6, "--seed", 3, *exactly)
    images = np.stack(list(fabrics(tmp_path / "generated_samples").values())) / 255

    checkpoint = torch.load(weights, weights_only=True)
    library = make_diffusion(sampling_timesteps=10)
    library.load_state_dict({k.removeprefix("ema_model."): v for k, v in checkpoint["ema"].items()})
    noise = [
        torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(3 + i)) for i in range(6)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: torch.stack(noise))
        expected = library.sample(batch_size=6).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.mean((0, 1, 2)) - expected.mean((0, 1, 2))).max() < 0.002
    assert np.abs(images.std((0, 1, 2)) - expected.std((0, 1, 2))).max() < 0.002
    assert np.abs(images - expected).max() < 1.1 / 255
    assert expected.std() > 0.1, "too flat to tell full contrast from half of it"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", ["dpmpp", "ddim", "ddpm"])
def test_an_image_depends_on_its_seed_alone(draw, tmp_path, sampler, precision):
    options = ("--sampler", sampler, "--steps", 6, "--precision", precision)
    draw(*options, "--seed", 5, "--samples-dir", "all")
    draw(*options, "--seed", 5, "--samples-dir", "ones", "--batch-size", 1)
    draw(*options, "--seed", 7, "--samples-dir", "later", "--num-samples", 2)
    together, ones, later = (fabrics(tmp_path / name) for name in ("all", "ones", "later"))
    assert all(same(together[name], ones[name]) for name in together)
    assert same(together["fabric_0002.png"], later["fabric_0000.png"])
    assert same(together["fabric_0003.png"], later["fabric_0001.png"])
    assert not same(together["fabric_0000.png"], together["fabric_0001.png"])


def test_two_processes_share_the_work(draw, weights, tmp_path):
    draw("--samples-dir", "alone")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
         str(SCRIPT), "--weights", str(weights), "--steps", "4", "--num-samples", "5",
         "--samples-dir", "shared", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote exercise1_output.png and 5 images") == 1
    alone, shared = fabrics(tmp_path / "alone"), fabrics(tmp_path / "shared")
    assert alone.keys() == shared.keys()
    assert all(same(alone[name], shared[name]) for name in alone)


@pytest.mark.slow
def test_compiled_images_are_the_same(draw, tmp_path):
    options = ("--batch-size", 2, "--precision", "fp32")
    draw("--samples-dir", "plain", *options)
    draw("--samples-dir", "compiled", "--compile", "on", *options)
    plain, compiled = fabrics(tmp_path / "plain"), fabrics(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    assert all(same(plain[name], compiled[name]) for name in plain)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_memory_stays_flat(weights, tmp_path):
    """Three hundred images need no more memory than a hundred."""
    diffusion, _ = load_weights(weights)
    options = SimpleNamespace(seed=0, steps=1, sampler="ddim", batch_size=4, compile="off",
                              samples_dir=tmp_path, min_signal=0.03)  # fmt: skip

    def used_after(indices):
        exercise1.draw_fabrics(diffusion, indices, options, torch.float32, False)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    used_after(range(100))
    before = used_after(range(100, 200))
    assert used_after(range(200, 500)) - before < 10, "MiB"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_ten_thousand_images(draw, weights, tmp_path):
    """Two processes are killed on the way, one goes on: nothing twice, flat memory, even pace."""
    options = ["--weights", weights, "--steps", 2, "--num-samples", 10_000, "--device", "cpu"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no"]  # fmt: skip
    folder = tmp_path / "generated_samples"

    def count():
        return sum(1 for _ in folder.glob("fabric_*.png"))

    def start(*how):
        return subprocess.Popen(
            [sys.executable, *how, str(SCRIPT), *map(str, options)], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def wait_for(images, running):
        while count() < images:
            assert running.poll() is None, f"ended after {count()} images"
            time.sleep(0.1)

    together = start(*launch)
    wait_for(3000, together)
    os.killpg(together.pid, signal.SIGKILL)
    together.wait()
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("fabric_*.png")}
    assert 3000 <= len(there) < 10_000

    alone = start()
    sizes = []
    for images in (5000, 9500):
        wait_for(images, alone)
        pages = int(Path(f"/proc/{alone.pid}/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    said, _ = alone.communicate()
    assert alone.returncode == 0
    assert f"{len(there)} of the images were there already" in said
    assert sizes[1] - sizes[0] < 10, "MiB more"
    assert count() == 10_000
    for name, written in there.items():
        assert (folder / name).stat().st_mtime_ns == written, "drawn twice"
    assert fabrics(folder).keys() == {f"fabric_{i:04d}.png" for i in range(10_000)}  # all readable
    drawn = sorted(p.stat().st_mtime for p in folder.glob("fabric_*.png") if p.name not in there)
    first, second = drawn[2000] - drawn[0], drawn[-1] - drawn[-2001]
    assert second < 1.5 * first, "the pace fell"
    draw("--steps", 2, "--num-samples", 1, "--seed", 42 + 9_999, "--samples-dir", "one")
    assert same(fabrics(tmp_path / "one")["fabric_0000.png"], pixels(folder / "fabric_9999.png"))


# ---- The samples folder --------------------------------------------------------------------------


def test_a_second_run_draws_only_what_is_missing(draw, tmp_path):
    draw()
    folder = tmp_path / "generated_samples"
    complete = fabrics(folder)
    (folder / "fabric_0001.png").unlink()
    (folder / "fabric_0004.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    done = draw()
    assert "3 of the images were there already" in done.stdout
    assert "2 images in generated_samples" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = fabrics(folder)
    assert again.keys() == complete.keys()
    assert all(same(again[name], complete[name]) for name in complete)
    assert "Wrote exercise1_output.png and 0 images" in draw().stdout


def test_other_settings_get_the_folder_and_nothing_is_lost(draw, weights, tmp_path):
    """Another seed, another sampler, other weights: the plain command works, old images stay."""
    draw()
    first = fabrics(tmp_path / "generated_samples")
    (tmp_path / "generated_samples" / "notes.txt").write_text("mine")
    done = draw("--seed", 1)
    assert "generated_samples held images of another setting (seed)" in done.stdout
    assert "they are now in generated_samples.1" in done.stdout
    second = fabrics(tmp_path / "generated_samples")
    trained_again = tmp_path / "again.pt"
    torch.save(bundled(make_diffusion()), trained_again)
    assert "(weights)" in draw("--seed", 1, "--weights", trained_again).stdout

    for name, images in (("generated_samples.1", first), ("generated_samples.2", second)):
        assert all((fabrics(tmp_path / name)[file] == images[file]).all() for file in images)
    assert (tmp_path / "generated_samples.1" / "notes.txt").read_text() == "mine"
    assert len(fabrics(tmp_path / "generated_samples")) == 5
    assert not same(first["fabric_0000.png"], second["fabric_0000.png"])


def test_min_signal_is_a_setting_of_its_own(draw, tmp_path):
    draw()
    done = draw("--min-signal", 0)
    assert "images of another setting (min_signal)" in done.stdout
    first, second = (fabrics(tmp_path / f"generated_samples{end}") for end in (".1", ""))
    assert not same(first["fabric_0000.png"], second["fabric_0000.png"])
    record = json.loads((tmp_path / "generated_samples" / "generation.json").read_text())
    assert record["min_signal"] == 0


def test_a_damaged_record_counts_as_another_setting(draw, tmp_path):
    draw()
    record = tmp_path / "generated_samples" / "generation.json"
    for number, text in enumerate((record.read_text()[:20], "[]"), 1):
        record.write_text(text)
        draw()
        assert len(fabrics(tmp_path / f"generated_samples.{number}")) == 5
    assert json.loads(record.read_text())["seed"] == 42


def test_fabrics_of_unknown_origin_are_left_alone(draw, tmp_path):
    folder = tmp_path / "generated_samples"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "fabric_0000.png")
    done = draw(code=1)
    assert "not known how they were made: name another folder" in done.sentence
    assert [path.name for path in folder.iterdir()] == ["fabric_0000.png"]


def test_an_existing_file_is_never_the_output(draw, tmp_path):
    photo = tmp_path / "cat.png"
    Image.new("RGB", (4, 4), "red").save(photo)
    before = photo.read_bytes()
    assert "cat.png exists already" in draw("--output", photo, code=1).sentence
    assert photo.read_bytes() == before
    assert not (tmp_path / "generated_samples").exists(), "found out too late"
    draw()
    draw("--seed", 9)  # the script's own default output may be replaced


# ---- Weight files --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trainer_checkpoint(tmp_path_factory):
    """Made by the library's own Trainer, in two steps on a hundred noise images."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(100):
        picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        picture.save(folder / "data" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "denoising_diffusion_pytorch.denoising_diffusion_pytorch.cpu_count", lambda: 0
        )
        trainer = Trainer(
            make_diffusion("pred_v", "cosine"), folder / "data", train_batch_size=16,
            train_num_steps=2, save_and_sample_every=1000, calculate_fid=False,
            results_folder=str(folder / "results"),
        )  # fmt: skip
        trainer.train()
        trainer.save(1)
    return folder / "results" / "model-1.pt", trainer.ema.ema_model.state_dict()


def same_state(diffusion, expected, tolerance=1e-6):
    state = diffusion.state_dict()
    assert state.keys() == expected.keys()
    return all(torch.allclose(state[k], expected[k].float(), atol=tolerance) for k in expected)


def test_a_checkpoint_of_the_librarys_trainer(cli, trainer_checkpoint, tmp_path):
    path, ema = trainer_checkpoint
    diffusion, facts = load_weights(path, image_size=SIZE)
    assert same_state(diffusion, ema)
    raw = torch.load(path, weights_only=True)["model"]
    assert raw.keys() == ema.keys(), "the raw network would have fitted as well"
    assert facts["kind"] == "EMA weights of a training checkpoint"
    assert (facts["step"], facts["objective"], facts["beta_schedule"]) == (2, "pred_v", "cosine")
    done = cli.run("--weights", path, "--image-size", SIZE, "--steps", 2, "--num-samples", 1,
                   cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.stderr
    assert "predicts v (pred_v), cosine schedule" in done.stdout


def test_the_bundled_file(weights):
    diffusion, facts = load_weights(weights)
    checkpoint = torch.load(weights, weights_only=True)
    state = {k.removeprefix("ema_model."): v for k, v in checkpoint["ema"].items()}
    assert same_state(diffusion, state)
    assert {p.dtype for p in diffusion.parameters()} == {torch.float32}
    assert facts["image_size"] == SIZE
    assert facts["kind"] == "EMA weights"


@pytest.mark.parametrize("kind", ["trainer", "bundled"])
def test_the_snippet_of_the_lesson(kind, weights, trainer_checkpoint):
    """Loads files 1 and 2 with nothing but torch and the library."""
    path = weights if kind == "bundled" else trainer_checkpoint[0]
    diffusion = make_diffusion()
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = {k.removeprefix('ema_model.'): v for k, v in checkpoint['ema'].items()
             if k.startswith('ema_model.')}  # fmt: skip
    diffusion.load_state_dict(state)
    assert same_state(load_weights(path, SIZE)[0], diffusion.state_dict())


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("part", ["diffusion", "unet"])
def test_bare_state_dicts(tmp_path, part, prefix):
    diffusion = make_diffusion()
    source = diffusion if part == "diffusion" else diffusion.model
    path = tmp_path / "bare.pt"
    torch.save({prefix + key: value for key, value in source.state_dict().items()}, path)
    loaded, facts = load_weights(path, image_size=SIZE)
    assert same_state(loaded, diffusion.state_dict())
    assert facts["step"] is None
    assert facts["kind"] == ("bare weights" if part == "diffusion" else "bare U-Net weights")


def test_a_compiled_unet_inside_a_diffusion(tmp_path):
    diffusion = make_diffusion()
    renamed = {key.replace("model.", "model._orig_mod."): value
               for key, value in diffusion.state_dict().items()}  # fmt: skip
    torch.save(renamed, tmp_path / "compiled.pt")
    assert same_state(load_weights(tmp_path / "compiled.pt", SIZE)[0], diffusion.state_dict())


@pytest.mark.parametrize("min_snr", [False, True])
@pytest.mark.parametrize("schedule", ["sigmoid", "cosine", "linear"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_v", "pred_x0"])
def test_objective_and_schedule_are_read_from_the_buffers(tmp_path, objective, schedule, min_snr):
    diffusion = make_diffusion(objective, schedule, min_snr_loss_weight=min_snr)
    torch.save(diffusion.state_dict(), tmp_path / "bare.pt")
    loaded, facts = load_weights(tmp_path / "bare.pt", SIZE)
    assert (facts["objective"], facts["beta_schedule"]) == (objective, schedule)
    assert loaded.objective == objective
    assert torch.equal(loaded.alphas_cumprod, diffusion.alphas_cumprod)


def test_a_schedule_of_ones_own_comes_with_the_file(tmp_path):
    diffusion = make_diffusion(schedule_fn_kwargs={"tau": 0.7})
    torch.save(diffusion.state_dict(), tmp_path / "own.pt")
    loaded, facts = load_weights(tmp_path / "own.pt", SIZE)
    assert facts["beta_schedule"] == "custom"
    assert torch.equal(loaded.alphas_cumprod, diffusion.alphas_cumprod)


def test_width_multipliers_and_channels_are_read_from_the_shapes(tmp_path):
    unet = Unet(dim=12, dim_mults=(1, 3, 4), channels=1)
    torch.save(unet.state_dict(), tmp_path / "grey.pt")
    loaded, facts = load_weights(tmp_path / "grey.pt", SIZE)
    assert (facts["dim"], facts["dim_mults"], facts["channels"]) == (12, (1, 3, 4), 1)
    assert loaded.channels == 1


def test_grey_images_can_be_drawn(cli, tmp_path):
    torch.save(make_diffusion(channels=1).state_dict(), tmp_path / "grey.pt")
    done = cli.run("--weights", "grey.pt", "--image-size", SIZE, "--steps", 2, "--num-samples", 2,
                   cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.stderr
    assert pixels(tmp_path / "generated_samples" / "fabric_0000.png").shape == (SIZE, SIZE)


class Attack:
    """Unpickled the ordinary way, this would create the file named."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def bad_weights(folder, weights):
    """{file name: what its refusal says}; writes the files."""
    whole = weights.read_bytes()
    (folder / "empty.pt").touch()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    middle = bytearray(whole)
    middle[200:900] = b"\0" * 700
    (folder / "damaged.pt").write_bytes(middle)
    (folder / "text.pt").write_text("These are no weights.\n" * 9)
    (folder / "page.pt").write_text("<!doctype html><title>404</title>")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (folder / "folder.pt").mkdir()
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("hello.txt", "no weights")
    Image.new("RGB", (4, 4)).save(folder / "picture.pt", format="PNG")
    torch.save(Attack(folder / "owned"), folder / "attack.pt")
    torch.save({"ema": {"ema_model.x": Attack(folder / "owned")}}, folder / "inside.pt")
    torch.save(Attack(folder / "owned"), folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.pt").write_bytes(pickle.dumps(Attack(folder / "owned"), 2))
    (folder / "new_pickle.pt").write_bytes(pickle.dumps(Attack(folder / "owned"), 5))
    torch.save(torch.ones(3), folder / "tensor.pt")
    torch.save({}, folder / "nothing.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    diffusion = make_diffusion()
    torch.save(bundled(diffusion, version="1.11.1"), folder / "one.pt")
    old = {k: v for k, v in diffusion.state_dict().items() if "mem_kv" not in k}
    torch.save(old, folder / "unnamed_one.pt")
    torch.save({k: v for k, v in diffusion.state_dict().items() if k != "model.init_conv.bias"},
               folder / "missing_key.pt")  # fmt: skip
    torch.save(Unet(dim=8, dim_mults=(1, 2), self_condition=True).state_dict(), folder / "self.pt")
    torch.save(Unet(dim=8, dim_mults=(1, 2), full_attn=(True, True)).state_dict(),
               folder / "full.pt")  # fmt: skip
    strange = diffusion.state_dict()
    strange["loss_weight"] = torch.linspace(3, 4, 1000)
    torch.save(strange, folder / "strange.pt")
    broken = diffusion.state_dict()
    broken["model.init_conv.bias"] = torch.full((8,), float("nan"))
    torch.save(broken, folder / "nan.pt")
    torch.save(diffusion.state_dict() | {"model.init_conv.bias": "words"}, folder / "words.pt")
    other = "belong to another architecture"
    return {
        "absent.pt": "does not exist", "empty.pt": "is empty", "cut.pt": "is cut off",
        "damaged.pt": "is damaged", "text.pt": "is damaged or no PyTorch weight file",
        "page.pt": "is damaged or no PyTorch", "pointer.pt": "git lfs pull",
        "folder.pt": "is a folder", "zip.pt": "is damaged or no PyTorch",
        "picture.pt": "is damaged or no PyTorch", "attack.pt": "wants to run code",
        "inside.pt": "wants to run code", "old.pt": "wants to run code",
        "pickle.pt": "wants to run code", "new_pickle.pt": "nothing but tensors",
        "tensor.pt": "no weights but a Tensor",
        "nothing.pt": "holds no U-Net", "linear.pt": "holds no U-Net",
        "one.pt": "denoising-diffusion-pytorch 1.11.1", "unnamed_one.pt": "version 1",
        "missing_key.pt": other, "self.pt": other, "full.pt": other,
        "words.pt": other,
        "strange.pt": "its loss weight fits no objective", "nan.pt": "not all finite",
    }  # fmt: skip


def test_bad_weight_files_get_one_sentence_each(cli, weights, tmp_path):
    for name, words in bad_weights(tmp_path, weights).items():
        done = cli.run("--weights", name, "--image-size", SIZE, cwd=tmp_path)
        assert done.code == 1, name
        assert words in done.sentence, name
        assert name in done.sentence, "the file is not named"
        assert "Warning" not in done.stderr, name
        assert not (tmp_path / "generated_samples").exists()
    assert not (tmp_path / "owned").exists(), "code in a weight file was run"


def test_a_refused_pickle_names_what_it_wanted_to_run(cli, weights, tmp_path):
    bad_weights(tmp_path, weights)
    for name in ("attack.pt", "inside.pt", "old.pt", "pickle.pt"):
        sentence = cli.run("--weights", name, cwd=tmp_path).sentence
        assert f"({os.system.__module__}.system)" in sentence, name


# ---- Bad input and bad luck ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    ["--min-signal 1", "--min-signal -0.1", "--min-signal nan", "--min-signal a", "--num-samples 0",
     "--num-samples many", "--steps -3", "--steps 0", "--steps 2.5",
     "--device toaster", "--sampler euler", "--seed -1", "--seed 99999999999999999999",
     "--batch-size 0", "--precision fp8", "--image-size 0", "--nonsense", "stray"],
)  # fmt: skip
def test_wrong_usage(cli, tmp_path, options):
    done = cli.run(*options.split(), cwd=tmp_path)
    assert done.code == 2
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_done_gets_one_sentence(draw, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    cases = {
        ("--steps", 1001): "1001 steps are too many: the model has 1000",
        ("--sampler", "ddim", "--steps", 5000): "5000 steps are too many",
        ("--precision", "fp16"): "fp16 needs a GPU",
        ("--output", "grid.jpg"): "ends in .png",
        ("--output", "folder.png"): "is a folder",
        ("--output", "file/grid.png"): "file",
        ("--samples-dir", "file"): "is a file",
        ("--samples-dir", "file/below"): "file/below",
    }
    for device in ("cuda", "mps"):
        if not getattr(torch, device).is_available():
            cases["--device", device] = f"has no {device}"
    before = sorted(tmp_path.iterdir())
    for options, words in cases.items():
        assert words in draw(*options, code=1).sentence, options
        assert sorted(tmp_path.iterdir()) == before, options


@pytest.mark.skipif("os.geteuid() == 0", reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(draw, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for options in (("--output", locked / "grid.png"), ("--samples-dir", locked / "samples")):
        assert "Permission denied" in draw(*options, code=1).sentence


def test_no_space_left(monkeypatch, capsys, weights, tmp_path):
    """When the disk is full at the third image: one sentence, two whole images, nothing else."""
    monkeypatch.chdir(tmp_path)
    save, count = Image.Image.save, iter(range(10))

    def full_disk(self, path, *args, **kwargs):
        if next(count) == 2:
            path.write_bytes(b"\x89PNG half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    code = exercise1.main(["--weights", str(weights), "--steps", "2", "--num-samples", "4"])
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Error: No space left on device (")
    assert sorted(path.name for path in (tmp_path / "generated_samples").iterdir()) == [
        "fabric_0000.png", "fabric_0001.png", "generation.json"]  # fmt: skip


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_goes_on(cli, weights, draw, tmp_path):
    draw("--samples-dir", "undisturbed", "--batch-size", 1, "--num-samples", 8)
    options = ("--weights", weights, "--steps", 4, "--num-samples", 8, "--batch-size", 1,
               "--device", "cpu")  # fmt: skip
    folder = tmp_path / "generated_samples"
    for finished in (0, 2, 5):
        run = cli.start(*options, cwd=tmp_path)
        run.wait_until(lambda: len(list(folder.glob("[fg]*"))) > finished)  # noqa: B023
        run.send(signal.SIGINT)
        done = run.finish()
        assert done.code == 130
        assert "Traceback" not in done.stderr
        assert "Interrupted." in done.stderr
        assert not list(tmp_path.rglob(".*tmp*")), "temporary files are left"
    there = len(fabrics(folder))
    assert 5 <= there < 8
    done = cli.run(*options, cwd=tmp_path)
    assert f"{there} of the images were there already" in done.stdout
    expected, images = fabrics(tmp_path / "undisturbed"), fabrics(folder)
    assert expected.keys() == images.keys()
    assert all(same(expected[name], images[name]) for name in expected)


def test_constants_are_the_defaults(monkeypatch):
    """RANDOM_SEED and SAMPLING_STEPS at the top are what the lesson tells learners to edit."""
    monkeypatch.setattr(exercise1, "RANDOM_SEED", 7)
    monkeypatch.setattr(exercise1, "NUM_SAMPLES", 3)
    monkeypatch.setitem(exercise1.SAMPLING_STEPS, "ddim", 33)
    options = exercise1.parse_options(["--sampler", "ddim"])
    assert (options.seed, options.num_samples, options.steps) == (7, 3, 33)
    assert exercise1.parse_options(["--sampler", "ddim", "--steps", "5"]).steps == 5


def test_auto_precision_is_what_the_hardware_computes_fast():
    cpu = torch.device("cpu")
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    expected = torch.bfloat16 if native else torch.float32
    assert pick_precision("auto", cpu) == expected
    assert pick_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(UserError):
        pick_precision("fp16", cpu)


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with write_atomically(path) as temporary:
            temporary.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with write_atomically(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
