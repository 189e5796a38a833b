"""data.py: what --verify finds and says, data drawn where it is missing, held-out images."""

import json
import os
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script, write_blocks
from PIL import Image

from ddpm_basics import data
from ddpm_basics.console import UserError
from ddpm_basics.fabrics.folder import draw_fabrics
from ddpm_basics.fabrics.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from ddpm_basics.images import find_images, read_folder

ex3 = load_script("exercise3_train")


def given(heldout, folder, results, size):
    """The options that held-out images follow."""
    return SimpleNamespace(
        heldout=heldout, data=folder, results_dir=results, image_size=size, channels=3
    )


ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


@pytest.fixture
def verify(tmp_path, monkeypatch, capsys):
    """verify(folder) -> (exit code, stdout, stderr), run in an empty folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(folder):
        code = ex3.main(["--verify", "--data", str(folder), "--image-size", "8"])
        return code, *capsys.readouterr()

    return run


# ---- --verify ------------------------------------------------------------------------------------


def test_verify_reports_and_draws(verify, tiny_data):
    code, said, _ = verify(tiny_data)
    assert code == 0
    lines = said.splitlines()
    assert lines[0].split(maxsplit=2) == ["Data", "folder", str(tiny_data)]
    assert lines[1].split(maxsplit=1) == ["Sizes", "8x8: 120"]
    assert lines[2].split(maxsplit=1) == ["Modes", "RGB: 120"]
    assert [line.split() for line in lines[3:5]] == [["a", "60"], ["b", "60"]]
    assert lines[-2].startswith("Wrote training_samples_grid.png in ")
    assert lines[-1] == "Found 120 images in dataset"
    assert os.listdir() == ["training_samples_grid.png"]
    with Image.open("training_samples_grid.png") as grid:
        colours = {grid.getpixel((88 + 168 * i, 124 + 168 * j)) for i in range(3) for j in range(3)}
    assert len(colours) == 9, "nine images"


def test_verify_names_every_file_that_is_not_right(verify, tiny_data, tmp_path):
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    whole = (folder / "a" / "0000.png").read_bytes()
    (folder / "a" / "empty.png").touch()
    (folder / "a" / "noise.JPG").write_bytes(b"no image at all")
    (folder / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    for i in range(25):
        (folder / f"{i:02d}.txt").touch()
    Image.new("RGB", (5, 9)).save(folder / "small.png")
    Image.new("RGBA", (9, 9)).save(folder / "b" / "clear.png")
    twelve_bits = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(twelve_bits).save(folder / "dark.png")
    (folder / "lost.png").symlink_to(folder / "nowhere")
    code, said, complaint = verify(folder)
    assert code == 1
    for text in (
        "5x9: 1, 8x8: 121, 9x9: 1",
        "I;16: 1, RGB: 121, RGBA: 1",
        f"Passed over: 25\n  {folder}/00.txt (none of .bmp, ",
        "  ... and 5 more\n",
        f"Smaller than the network's images: 1\n  {folder}/small.png (only 5x9)\n",
        f"One colour or nearly black: 3\n  {folder}/b/clear.png (one colour)\n",
        f"  {folder}/dark.png (nearly black)\n",
        f"BROKEN: 4\n  {folder}/a/empty.png cannot be read as an image (an empty file)",
        f"  {folder}/a/noise.JPG cannot be read as an image",
        f"  {folder}/b/cut.png cannot be read as an image",
        f"  {folder}/lost.png cannot be read as an image",
    ):
        assert text in said
    assert ["(no", "label)", "2"] in [line.split() for line in said.splitlines()]
    assert "4 of 127 image files are broken, named above" in complaint
    assert "Found" not in said
    assert Path("training_samples_grid.png").exists()


def test_large_pictures_are_no_concern(verify, tmp_path, monkeypatch):
    """Pillow warns of many pixels, and means pictures that were made to fill the memory."""
    folder = write_blocks(tmp_path / "large", 120, size=96)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify(folder)[0] == 0


def test_too_little_to_train_on(verify, tmp_path):
    write_blocks(tmp_path / "few", 30)
    (tmp_path / "broken").mkdir()
    for i in range(120):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"\x89PNG not really")
    for name, words in {
        "missing": "missing does not exist",
        "few": "few holds 30 readable images, and training needs at least 100",
        "broken": "broken holds 0 readable images",
    }.items():
        code, _, complaint = verify(tmp_path / name)
        assert code == 1
        assert words in complaint
        assert complaint.count("\n") == 1
    assert os.listdir() == []
    with pytest.raises(UserError, match=r"holds 30 images .* at least 100 are needed"):
        data.read_images(tmp_path / "few", 8, 3)  # so does training


# ---- What is taken for a label, what for a channel -----------------------------------------------


def test_only_folders_that_hold_pictures_are_labels(train, tiny_data, tmp_path):
    folder = tmp_path / "data"
    for name in ("train/10", "test/2", ".ipynb_checkpoints", "__MACOSX/2", "empty"):
        (folder / name).mkdir(parents=True)
    for i, path in enumerate(find_images(tiny_data)[0]):
        shutil.copy(path, folder / ("train/10", "test/2")[i % 2] / f"{i}.png")
    (folder / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(path.read_bytes())
    (folder / "__MACOSX" / "2" / "._1.png").write_bytes(b"Mac OS X")
    code, said, complaint = train(folder, "--steps", 2)
    assert code == 0, complaint
    assert [line.split(maxsplit=1)[1] for line in said.splitlines() if "Labels" in line] == [
        "test/2, train/10"], "nobody overlooks what they are"  # fmt: skip


@pytest.mark.parametrize("name", ["all", "none"])
def test_names_that_mean_something_else_are_refused(tmp_path, name):
    folder = write_blocks(tmp_path / "data", 120)
    (folder / "a").rename(folder / name)
    with pytest.raises(UserError, match=f"named {name}, which --label takes for something else"):
        data.read_images(folder, 8, 3)


def test_training_in_grey(train, tmp_path, capsys):
    """From pictures to pictures in one channel; such weights are a start for more of it."""
    draw = load_script("exercise1_generate").main
    folder = write_blocks(tmp_path / "data", 120)
    code, _, complaint = train(folder, "--channels", 1, "--heldout", folder)
    assert code == 0, complaint
    assert json.loads(Path("run/run.json").read_text())["channels"] == 1
    images, _, _ = data.read_images(folder, 8, 1)
    assert images.images.shape == (120, 1, 8, 8)
    expected = np.asarray(Image.open(find_images(folder)[0][0]).convert("L"))
    assert np.array_equal(images.images[0, 0], expected)
    more = ["--init-weights", "run.pt", "--results-dir", "more", "--weights-out", "more.pt"]
    assert train(folder, "--channels", 1, "--steps", 1, *more)[0] == 0
    code, _, complaint = train(folder, *more, "--results-dir", "third")
    assert code == 1
    assert "channels: 1 in the file, 3" in complaint
    assert draw(["--weights", "more.pt", "--num-samples", "2", "--steps", "2", "--samples-dir", "s",
                 "--device", "cpu"]) == 0  # fmt: skip
    with Image.open(find_images(Path("s"))[0][0]) as picture:
        assert (picture.mode, picture.size) == ("L", (8, 8))


# ---- Drawing what is missing ---------------------------------------------------------------------


@pytest.fixture
def few(tmp_path, monkeypatch):
    """The default is 12 fabrics, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "draw_fabrics", partial(draw_fabrics, count=12, workers=1))


def pixels(folder):
    return read_folder(folder).pixels


def test_the_default_data_is_drawn_where_it_is_missing(few, capsys):
    data.provide(data.DEFAULT)
    assert "african_fabric_processed does not exist yet: drawing the fabrics first" in (
        capsys.readouterr().out
    )
    assert len(find_images(data.DEFAULT)[0]) == 12
    data.provide(data.DEFAULT)
    assert capsys.readouterr().out == "", "it is complete"
    with pytest.raises(UserError, match=r"another does not exist: .* or one of .* mnist, "):
        data.provide(Path("another"))
    assert not Path("another").exists(), "nobody's photographs are replaced by drawings"


def test_a_half_drawn_folder_is_completed(few, capsys):
    """Any such folder, as it was meant: a seed, a size and a split of its own."""
    folder = Path("mine")
    draw_fabrics(folder, split="heldout", count=14, seed=5, size=8, workers=1)
    whole, manifest = pixels(folder), read_manifest(folder)
    for path in find_images(folder)[0][::2]:
        path.unlink()
    write_manifest(folder, replace(manifest, sha256=None, pixels={}))
    capsys.readouterr()
    data.provide(folder)
    assert "mine is only half drawn: drawing the rest first" in capsys.readouterr().out
    assert np.array_equal(pixels(folder), whole)
    assert read_manifest(folder) == manifest


def test_half_prepared_photographs_are_left_alone(few, tiny_data, capsys):
    """Only their owner knows where the photographs are."""
    folder = Path(shutil.copytree(tiny_data, "photos"))
    files = {path.relative_to(folder).as_posix(): "a" for path in find_images(folder)[0]}
    write_manifest(folder, Manifest(count=200, size=8, photos="holiday", traditions=files))
    data.provide(folder)
    assert capsys.readouterr().out == ""


# ---- Held-out images -----------------------------------------------------------------------------


def test_a_held_out_folder_of_ones_own(tiny_data, tmp_path):
    found = data.read_heldout(given(tiny_data, tmp_path, tmp_path, 8), ["b", "c"], ALONE)
    assert torch.equal(found.images, torch.from_numpy(pixels(tiny_data)))
    assert found.labels.tolist() == [-1] * 60 + [0] * 60, "an unknown label is none"
    few = write_blocks(tmp_path / "few", 9)
    with pytest.raises(UserError, match=r"holds 9 images .* at least 10 are needed"):
        data.read_heldout(given(few, tmp_path, tmp_path, 8), [], ALONE)


def test_drawn_fabrics_bring_their_own(few, monkeypatch):
    """Into the results folder, once, in the size of the data; the network never sees them."""
    monkeypatch.setattr(data, "FIXED_IMAGES", 12)
    results = Path("run")
    draw_fabrics(Path("mine"), count=12, size=16, workers=1)
    options = given(None, Path("mine"), results, 16)
    first = data.read_heldout(options, ["kente"], ALONE)
    manifest = read_manifest(results / "heldout_fabrics")
    assert (manifest.split, manifest.size) == ("heldout", 16)
    before = {path: path.stat().st_mtime_ns for path in find_images(results)[0]}
    assert (first.labels == 0).sum() == 1, "one of twelve is a kente"
    assert torch.equal(first.images, data.read_heldout(options, ["kente"], ALONE).images)
    assert before == {path: path.stat().st_mtime_ns for path in find_images(results)[0]}
    trained = {image.tobytes() for image in pixels(Path("mine"))}
    assert not trained & {image.numpy().tobytes() for image in first.images}


def test_photographs_have_none(few, tiny_data):
    assert data.read_heldout(given(None, tiny_data, Path("run"), 8), [], ALONE) is None
    draw_fabrics(Path("unseen"), split="heldout", count=12, size=8, workers=1)
    assert data.read_heldout(given(None, Path("unseen"), Path("run"), 8), [], ALONE) is None
    (Path("unseen") / MANIFEST).write_text("{")
    assert data.read_heldout(given(None, Path("unseen"), Path("run"), 8), [], ALONE) is None
    assert not Path("run").exists()
