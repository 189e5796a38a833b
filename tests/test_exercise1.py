"""exercise1_generate.py: the grid, the samples folder, interruptions, what is refused."""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from PIL import Image
from tiny_networks import SIZE, bundled, make_diffusion

from ddpm_basics.console import UserError
from ddpm_basics.images import to_picture
from ddpm_basics.sample_folder import recorded_precision

exercise1 = load_script("exercise1_generate")
SCRIPT = ROOT / "exercise1_generate.py"
GRID = "exercise1_output.png"
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines",
          "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(SCRIPT)]  # fmt: skip


@pytest.fixture(scope="session")
def cli(serve):
    return serve("exercise1_generate")


@pytest.fixture
def draw(cli, tiny_weights, tmp_path):
    """draw('--seed', 3) runs the command in a fresh folder with four quick steps."""

    def run(*options, code=0, **limits):
        done = cli.run("--weights", tiny_weights, "--steps", 4, "--num-samples", 5,
                       "--device", "cpu", *options, cwd=tmp_path, **limits)  # fmt: skip
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


def all_the_same(one, other):
    """Whether two folders hold the same images."""
    one, other = fabrics(one), fabrics(other)
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def cells(path, columns, count):
    """The cells [160, 160, 3] of a grid that has a title."""
    grid, pitch = pixels(path), 168
    left = (grid.shape[1] - columns * pitch + 8) // 2
    return [
        grid[y : y + 160, x : x + 160]
        for y, x in ((44 + i // columns * pitch, left + i % columns * pitch) for i in range(count))
    ]


def seen(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- The plain command ---------------------------------------------------------------------------


def test_the_plain_command(cli, tiny_weights, tmp_path):
    """A grid of sixteen, every fact about the weights, and nothing else, in any folder."""
    (tmp_path / "models").mkdir()
    shutil.copy(tiny_weights, tmp_path / "models" / "ddpm_african_fabrics.pt")
    done = cli.run(cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert seen(tmp_path) == [GRID, "models"]
    images = cells(tmp_path / GRID, 4, 16)
    assert len({image.tobytes() for image in images}) == 16
    weights, how, wrote = done.stdout.splitlines()
    for fact in ("models/ddpm_african_fabrics.pt: EMA weights, step 1,234", "width 8 x 1-2",
                 "predicts v (pred_v), sigmoid schedule, 1000 timesteps"):  # fmt: skip
        assert fact in weights
    assert how.startswith("DPM-Solver++, 20 steps, on ")
    assert re.fullmatch(rf"Wrote {GRID} in \d+\.\d s\.", wrote)
    assert "40/40" in done.stderr, "the progress bar: 20 steps for each of two batches of eight"
    first = (tmp_path / GRID).read_bytes()
    assert cli.run("--seed", 9, cwd=tmp_path).code == 0, "its own grid may be replaced"
    assert (tmp_path / GRID).read_bytes() != first


def test_started_in_a_folder_without_weights(tmp_path):
    """As a student starts it: the shipped weights stand beside the script."""
    command = [sys.executable, str(SCRIPT), "--num-samples", "1", "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{ROOT / 'models' / 'ddpm_african_fabrics.pt'}: ")
    assert seen(tmp_path) == [GRID]


def test_the_grid_shows_the_images_below_a_title(draw, tmp_path):
    draw("--samples-dir", "fabrics")
    assert (pixels(tmp_path / GRID)[:40] < 100).any(), "no title"
    images = fabrics(tmp_path / "fabrics")
    assert list(images) == [f"fabric_{i:04d}.png" for i in range(5)]
    for image, shown in zip(images.values(), cells(tmp_path / GRID, 3, 5), strict=True):
        assert image.shape == (SIZE, SIZE, 3)
        assert np.abs(shown.mean((0, 1)) - image.mean((0, 1))).max() < 2
    before = (tmp_path / GRID).read_bytes()
    (tmp_path / GRID).unlink()
    draw("--samples-dir", "fabrics")
    assert (tmp_path / GRID).read_bytes() == before, "of images that were there already"


def test_the_grid_has_room_for_sixty_four(draw, tmp_path):
    many = ("--num-samples", 65, "--steps", 1, "--sampler", "ddim")
    assert "64 images at most: name a folder for all 65" in draw(*many, code=1).sentence
    assert seen(tmp_path) == []
    draw(*many, "--samples-dir", "fabrics")
    assert len(fabrics(tmp_path / "fabrics")) == 65
    assert cells(tmp_path / GRID, 8, 64)[-1].std() > 1
    assert pixels(tmp_path / GRID).shape[0] == 44 + 8 * 168


def test_grey_images_can_be_drawn(draw, tmp_path):
    torch.save(make_diffusion(channels=1).state_dict(), tmp_path / "grey.pt")
    draw("--weights", "grey.pt", "--image-size", 32, "--samples-dir", "grey")
    assert pixels(tmp_path / "grey" / "fabric_0000.png").shape == (32, 32)


# ---- What an image is ----------------------------------------------------------------------------


def test_full_contrast(draw, tiny_weights, tmp_path):
    """The decoded files against the library's sample(): means, spreads, and every pixel."""
    # fp32 also where the hardware has bf16; and the library asks its network everywhere
    exactly = ("--precision", "fp32", "--samples-dir", "fabrics")
    draw("--sampler", "ddim", "--steps", 10, "--num-samples", 6, "--seed", 3, *exactly)
    images = np.stack(list(fabrics(tmp_path / "fabrics").values())) / 255

    ema = torch.load(tiny_weights, weights_only=True)["ema"]
    library = make_diffusion(sampling_timesteps=10)
    library.load_state_dict({k.removeprefix("ema_model."): v for k, v in ema.items()})
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
    options = ("--sampler", sampler, "--precision", precision)
    draw(*options, "--seed", 5, "--samples-dir", "all")
    draw(*options, "--seed", 5, "--samples-dir", "ones", "--batch-size", 1)
    draw(*options, "--seed", 7, "--samples-dir", "later", "--num-samples", 2)
    assert all_the_same(tmp_path / "all", tmp_path / "ones")
    together, later = (fabrics(tmp_path / name) for name in ("all", "later"))
    assert same(together["fabric_0002.png"], later["fabric_0000.png"])
    assert same(together["fabric_0003.png"], later["fabric_0001.png"])
    assert not same(together["fabric_0000.png"], together["fabric_0001.png"])


def test_two_processes_share_the_work(draw, tiny_weights, tmp_path):
    """With a samples folder and without."""
    draw("--samples-dir", "alone", "--output", "alone.png", "--precision", "fp32")
    options = ["--weights", str(tiny_weights), "--steps", "4", "--num-samples", "5",
               "--device", "cpu", "--precision", "fp32"]  # fmt: skip

    def launch(*more):
        return subprocess.run([sys.executable, *LAUNCH, *options, *more], cwd=tmp_path,
                              capture_output=True, text=True, timeout=120)  # fmt: skip

    done = launch("--samples-dir", "shared")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Wrote {GRID} and 5 images in shared in ") == 1
    assert all_the_same(tmp_path / "alone", tmp_path / "shared")
    done = launch("--output", "together.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote together.png in ") == 1
    for name in (GRID, "together.png"):
        assert np.abs(pixels(tmp_path / name) - pixels(tmp_path / "alone.png")).max() <= 2


def test_memory_stays_flat(monkeypatch, tmp_path):
    """Of many images those in the grid are kept, and no others."""
    made = []  # weak references: a dead one returns None

    def alive(kind):
        return sum(isinstance(thing(), kind) for thing in made)

    def draw_gray(_, seeds, *__):
        assert alive(torch.Tensor) <= 1, "the batch before"
        batch = torch.full((len(seeds), 3, 8, 8), 0.5)
        made.append(weakref.ref(batch))
        return batch

    def remembered_picture(image):
        picture = to_picture(image)
        made.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(exercise1, "draw", draw_gray)
    monkeypatch.setattr(exercise1, "to_picture", remembered_picture)
    options = Namespace(seed=0, steps=1, batch_size=4, samples_dir=tmp_path, labels=[])
    shown = exercise1.draw_all(make_diffusion(), list(range(50, 90)), options, "fp32", False)
    gc.collect()
    assert list(shown) == list(range(50, 64))
    assert len(made) == 50, "ten batches and forty pictures"
    assert (alive(torch.Tensor), alive(Image.Image)) == (0, 14)


# ---- Labels --------------------------------------------------------------------------------------


@pytest.fixture
def draw_told(draw, labelled_weights):
    """draw(), from weights that know the labels a, b and c/d."""
    known = ("--weights", labelled_weights, "--precision", "fp32")  # not what is faster just now
    return lambda *options, **more: draw(*known, *options, **more)


def test_labels_in_turn_by_default(draw_told, tmp_path):
    """Each with its name below, and each the image that its label alone gives."""
    done = draw_told("--samples-dir", "all")
    assert "DPM-Solver++, 4 steps, guidance 2, on " in done.stdout
    everything = fabrics(tmp_path / "all")
    for i, label in enumerate(("a", "b", "c/d", "a", "b")):
        folder = f"only {i}"
        draw_told("--samples-dir", folder, "--label", label, "--guidance", 2)
        alone = fabrics(tmp_path / folder)
        name = f"fabric_{i:04d}.png"
        assert same(everything[name], alone[name])
        assert not same(everything[f"fabric_{(i + 1) % 5:04d}.png"],
                        alone[f"fabric_{(i + 1) % 5:04d}.png"])  # fmt: skip
    with_names = pixels(tmp_path / GRID).shape
    draw_told("--label", "none")
    assert with_names[0] == pixels(tmp_path / GRID).shape[0] + 2 * 24, "two rows of names"


def test_no_label_is_the_plain_network(draw, draw_told, tmp_path):
    draw("--samples-dir", "plain", "--precision", "fp32")
    draw_told("--samples-dir", "none", "--label", "none")
    draw_told("--samples-dir", "zero", "--guidance", 0)
    no_names = pixels(tmp_path / GRID).shape
    assert all_the_same(tmp_path / "plain", tmp_path / "none")
    assert all_the_same(tmp_path / "plain", tmp_path / "zero")
    draw_told("--samples-dir", "two")
    assert no_names[0] < pixels(tmp_path / GRID).shape[0], "a label that was not asked for"
    draw_told("--samples-dir", "one", "--guidance", 1)
    two, one = fabrics(tmp_path / "two"), fabrics(tmp_path / "one")
    assert not any(same(two[name], one[name]) for name in two)


def test_labels_that_the_weights_do_not_know(draw, draw_told, labelled_weights, tmp_path):
    for options, words in {
        ("--label", "kente"): f"{labelled_weights} knows no kente, but a, b, c/d.",
        ("--label", "none", "--guidance", 2): "--guidance strengthens a label",
    }.items():
        assert words in draw_told(*options, code=1).sentence
    for options in (("--label", "a"), ("--label", "all"), ("--guidance", 2)):
        assert f"knows no labels: leave out {options[0]}" in draw(*options, code=1).sentence
    assert seen(tmp_path) == []
    draw("--label", "none")  # as it is


def test_a_folder_of_another_label_is_refused(draw_told):
    draw_told("--samples-dir", "mine")
    for options, words in {
        ("--label", "b"): "labels ['a', 'b', 'c/d'], now ['b']",
        ("--guidance", 3): "guidance 2.0, now 3.0",
    }.items():
        sentence = draw_told("--samples-dir", "mine", *options, code=1).sentence
        assert f"mine holds images of another setting ({words}" in sentence


# ---- The samples folder --------------------------------------------------------------------------


def test_a_second_run_draws_only_what_is_missing(draw, tmp_path):
    first = draw("--samples-dir", "fabrics")
    assert re.fullmatch(
        rf"Wrote {GRID} and 5 images in fabrics in \d+\.\d s\.", first.stdout.splitlines()[-1]
    )
    folder = tmp_path / "fabrics"
    shutil.copytree(folder, tmp_path / "complete")
    (folder / "fabric_0001.png").unlink()
    (folder / "fabric_0004.png").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    done = draw("--samples-dir", "fabrics")
    assert "3 images of an earlier run were kept" in done.stdout
    assert f"Wrote {GRID} and 2 images in fabrics" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all_the_same(folder, tmp_path / "complete")
    done = draw("--samples-dir", "fabrics", "--num-samples", 7, "--batch-size", 3)
    assert "5 images of an earlier run were kept" in done.stdout
    assert len(fabrics(folder)) == 7


def test_the_grid_of_a_folder_may_be_drawn_anew(draw, tmp_path):
    """With --output as well; a picture that has nothing to do with the folder stays."""
    words = ("--samples-dir", "fabrics", "--output", "mine.png")
    draw(*words, "--num-samples", 3)
    before = (tmp_path / "mine.png").read_bytes()
    draw(*words, "--num-samples", 4)
    assert (tmp_path / "mine.png").read_bytes() != before
    (tmp_path / "other.png").write_bytes(before)
    done = draw("--samples-dir", "fabrics", "--output", "other.png", code=1)
    assert "other.png exists already" in done.sentence
    assert (tmp_path / "other.png").read_bytes() == before


def test_a_damaged_image_in_the_folder_is_named(draw, tmp_path):
    draw("--samples-dir", "fabrics")
    path = tmp_path / "fabrics/fabric_0001.png"
    path.write_bytes(path.read_bytes()[:-40])
    done = draw("--samples-dir", "fabrics", code=1)
    assert "fabrics/fabric_0001.png cannot be read as an image" in done.sentence


def test_another_setting_is_refused_and_nothing_is_lost(draw, tmp_path):
    draw("--samples-dir", "fabrics", "--precision", "fp32")
    torch.save(bundled(make_diffusion()), tmp_path / "others.pt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for options, words in {
        ("--seed", 1): "seed 42, now 1",
        ("--sampler", "ddim"): "sampler dpmpp, now ddim",
        ("--steps", 5): "steps 4, now 5",
        ("--precision", "bf16"): "precision fp32, now bf16",
        ("--weights", "others.pt"): "weights ",
        ("--seed", 1, "--steps", 5): "steps 4, now 5, seed 42, now 1",
    }.items():
        sentence = draw("--samples-dir", "fabrics", *options, code=1).sentence
        assert f"fabrics holds images of another setting ({words}" in sentence, options
        assert "name another --samples-dir" in sentence
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_the_same_command_adopts_the_precision_of_the_first(draw, tmp_path):
    """auto may choose another one on another machine."""
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        draw("--samples-dir", folder, "--precision", precision, "--num-samples", 1)
        assert recorded_precision(folder) == precision
        done = draw("--samples-dir", folder)
        assert f" in {precision}\n" in done.stdout
        assert len(fabrics(folder)) == 5
    assert recorded_precision(tmp_path / "none") == recorded_precision(None) == "auto"


@pytest.mark.parametrize("text", ['{"weights": "', "[]", '{"precision": "fp7"}', "{}", None])
def test_fabrics_of_unknown_origin_are_left_alone(draw, tmp_path, text):
    """The record is damaged, or says too little, or there is none."""
    folder = tmp_path / "fabrics"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "fabric_0000.png")
    if text is not None:
        (folder / "generation.json").write_text(text)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "name another" in draw("--samples-dir", folder, code=1).sentence
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert seen(tmp_path) == ["fabrics"]


def test_other_files_in_the_folder_are_left_alone(draw, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("notes.txt", "cat.png", ".fabric_0000.77.tmp.png"):
        (folder / name).write_text(name)
    draw("--samples-dir", folder)
    assert [(folder / name).read_text() for name in ("notes.txt", "cat.png")] == [
        "notes.txt", "cat.png"]  # fmt: skip
    assert len(list(folder.iterdir())) == 2 + 5 + 1, "what a killed run has left is removed"


# ---- Bad luck and bad input ----------------------------------------------------------------------


def test_no_space_left(draw, tmp_path):
    """The grid does not fit: one sentence, whole images, and the next run goes on."""
    done = draw("--samples-dir", "fabrics", code=1, limit_file_size=3000)
    assert re.match(r"Error: File too large.*free some space and run the same", done.sentence)
    assert seen(tmp_path) == ["fabrics"]
    images = fabrics(tmp_path / "fabrics")
    assert len(images) == 5
    assert "5 images of an earlier run were kept" in draw("--samples-dir", "fabrics").stdout
    assert all(
        (image == images[name]).all() for name, image in fabrics(tmp_path / "fabrics").items()
    )


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_goes_on(cli, tiny_weights, draw, tmp_path):
    draw("--samples-dir", "undisturbed", "--num-samples", 8, "--precision", "fp32")
    options = ("--weights", tiny_weights, "--steps", 4, "--num-samples", 8, "--batch-size", 1,
               "--samples-dir", "fabrics", "--device", "cpu", "--precision", "fp32")  # fmt: skip
    folder = tmp_path / "fabrics"
    for finished in (0, 2, 5):
        run = cli.start(*options, cwd=tmp_path)
        run.wait_until(lambda: len(list(folder.glob("[fg]*"))) > finished)  # noqa: B023
        run.send(signal.SIGINT)
        done = run.finish()
        assert done.code == 130
        assert "Traceback" not in done.stderr
        assert "Interrupted. The same command draws what is missing" in done.stderr
        assert not list(tmp_path.rglob(".*tmp*")), "temporary files are left"
    there = len(fabrics(folder))
    assert 5 <= there < 8
    assert f"{there} images of an earlier run were kept" in cli.run(*options, cwd=tmp_path).stdout
    assert all_the_same(tmp_path / "undisturbed", folder)


@pytest.mark.parametrize(
    "options",
    ["--num-samples 0", "--steps 2.5", "--device toaster", "--sampler euler",
     "--seed -1", "--batch-size 0", "--precision fp8", "--image-size 0", "--nonsense", "stray"],
)  # fmt: skip
def test_wrong_usage(cli, tmp_path, options):
    done = cli.run(*options.split(), cwd=tmp_path)
    assert done.code == 2
    assert "Traceback" not in done.stderr
    assert (
        f"error: {'argument ' + options.split()[0] if ' ' in options else 'unrecognized'}"
        in (done.stderr.splitlines()[-1])
    )
    assert seen(tmp_path) == []


def test_what_cannot_be_done_gets_one_sentence(draw, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "cat.png").write_text("a photograph")
    (tmp_path / "file").write_text("no folder")
    torch.save(make_diffusion().model.state_dict(), tmp_path / "bare.pt")
    huge = make_diffusion().state_dict()
    huge["model.mid_block1.block1.proj.weight"] *= 1e38  # finite, but sums of them are not
    torch.save(huge, tmp_path / "huge.pt")
    cases = {
        (
            "--weights",
            "huge.pt",
            "--image-size",
            SIZE,
        ): "huge.pt are not all finite, or beyond 65,504",
        ("--image-size", 32): "image_size: 16 in the file, 32 here",
        ("--weights", "none.pt"): "none.pt does not exist",
        ("--weights", "cat.png"): "no PyTorch weight file",
        ("--weights", "bare.pt", "--image-size", 15): "must be a multiple of 2",
        ("--steps", 1001): "1001 steps are too many: the model has 1000",
        ("--precision", "fp16"): "fp16 needs a GPU",
        ("--output", "grid.jpg"): "has to end in .png",
        ("--output", "folder.png"): "is a folder",
        ("--output", "cat.png"): "cat.png exists already",
        ("--output", "file/grid.png"): "Cannot write into file",
        ("--samples-dir", "file"): "file is a file",
        ("--samples-dir", "file/below"): "Cannot write into file/below",
    }
    for device in ("cuda", "mps"):
        if not getattr(torch, device).is_available():
            cases["--device", device] = f"has no {device}"
    before = seen(tmp_path)
    for options, words in cases.items():
        assert words in draw(*options, code=1).sentence, options
        assert seen(tmp_path) == before, options
    assert (tmp_path / "cat.png").read_text() == "a photograph"


def test_constants_are_the_defaults(monkeypatch):
    """RANDOM_SEED and SAMPLING_STEPS at the top are what the lesson tells learners to edit."""
    asked = []
    monkeypatch.setattr(exercise1, "generate", asked.append)
    monkeypatch.setattr(exercise1, "RANDOM_SEED", 7)
    monkeypatch.setattr(exercise1, "NUM_SAMPLES", 3)
    monkeypatch.setattr(exercise1, "LABEL", "b")
    monkeypatch.setattr(exercise1, "GUIDANCE", 3.5)
    monkeypatch.setattr(exercise1, "OUTPUT", "mine.png")
    assert exercise1.main([]) == 0
    plain = asked[0]
    assert (plain.seed, plain.num_samples) == (7, 3)
    assert (plain.output, plain.samples_dir) == (Path("mine.png"), None)
    assert (plain.label, plain.guidance, plain.steps) == (None, None, None), "until the weights are"


def test_the_number_of_steps_follows_typing_constants_and_weights(monkeypatch, tmp_path):
    def refuse(timesteps, steps):
        raise UserError(f"{steps} steps")

    torch.save(bundled(make_diffusion(timesteps=100)), tmp_path / "short.pt")
    team = Namespace(num_processes=1, is_main_process=True)
    monkeypatch.setattr(exercise1, "PartialState", lambda **_: team)
    monkeypatch.setattr(exercise1, "check_steps", refuse)
    monkeypatch.setitem(exercise1.SAMPLING_STEPS, "ddim", 33)
    for words, steps in {
        "": 20, "--sampler ddim": 33, "--sampler ddim --steps 5": 5, "--sampler ddpm": 100,
        "--steps 101": 101,
    }.items():  # fmt: skip
        command = f"--weights {tmp_path}/short.pt --device cpu --precision fp32 {words}"
        options = exercise1.generate_options(
            command.split(), "", seed=1, num_samples=1, label="all", guidance=1.0,
            steps=exercise1.SAMPLING_STEPS, batch_size={}, output=GRID,
        )  # fmt: skip
        with pytest.raises(UserError, match=f"^{steps} steps$"):
            exercise1.generate(options)


def test_what_weights_do_not_say_can_be_typed(draw, tmp_path):
    """The same network, taken for another one, draws something else, as the record says."""
    unet = make_diffusion("pred_noise", "linear")
    torch.save(unet.state_dict(), tmp_path / "whole.pt")
    torch.save(unet.model.state_dict(), tmp_path / "unet.pt")
    size = ("--image-size", SIZE, "--precision", "fp32")
    right = ("--objective", "pred_noise", "--schedule", "linear")
    for name, weights, more, said in (
        ("whole", "whole.pt", (), f"{SIZE} pixels\n"),
        ("right", "unet.pt", right, f"{SIZE} pixels (assumed: timesteps)\n"),
        ("wrong", "unet.pt", (), "(assumed: objective, schedule, timesteps)\n"),
    ):
        done = draw("--weights", weights, "--samples-dir", name, *size, *more)
        assert said in done.stdout
    assert all_the_same(tmp_path / "whole", tmp_path / "right")
    assert not all_the_same(tmp_path / "whole", tmp_path / "wrong")
    done = draw("--weights", "unet.pt", "--samples-dir", "wrong", *size, *right, code=1)
    assert "objective pred_v, now pred_noise, schedule sigmoid, now linear" in done.sentence


# ---- Many images ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_ten_thousand_images(draw, tiny_weights, tmp_path):
    """Two processes are killed on the way, one goes on: nothing twice, flat memory, even pace."""
    options = ["--weights", tiny_weights, "--steps", 2, "--num-samples", 10_000, "--device", "cpu",
               "--samples-dir", "fabrics"]  # fmt: skip
    folder = tmp_path / "fabrics"

    def count():
        return sum(1 for _ in folder.glob("fabric_*.png"))

    def start(*how):
        return subprocess.Popen(
            [sys.executable, *how, *map(str, options)], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def wait_for(images, running):
        while count() < images:
            assert running.poll() is None, f"ended after {count()} images"
            time.sleep(0.1)

    together = start(*LAUNCH)
    wait_for(3000, together)
    os.killpg(together.pid, signal.SIGKILL)
    together.wait()
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("fabric_*.png")}
    assert 3000 <= len(there) < 10_000

    alone = start(str(SCRIPT))
    sizes = []
    for images in (5000, 9500):
        wait_for(images, alone)
        pages = int(Path(f"/proc/{alone.pid}/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    said, _ = alone.communicate()
    assert alone.returncode == 0
    assert f"{len(there)} images of an earlier run were kept" in said
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
