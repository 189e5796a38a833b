"""The fabrics package: the drawings, the folder, photographs, and everything that can go wrong."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image

from ddpm_basics.console import UserError
from ddpm_basics.fabrics.__main__ import main
from ddpm_basics.fabrics.card import size_category
from ddpm_basics.fabrics.colour import encode_srgb, linear_rgb, oklab
from ddpm_basics.fabrics.drawing import DATA_VERSION, TRADITIONS, render
from ddpm_basics.fabrics.folder import draw_fabrics, prepare_photographs
from ddpm_basics.fabrics.manifest import read_manifest

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from measure_fabrics import distances, hue_shares, load_fabrics, nearest_within, palette_spread

# SHA-256 over all pixels of the default folder. The weights were trained on these very pixels: if
# they change, DATA_VERSION has to change too.
TRAIN_SHA = "cf5dc30b56fee88c3808ba01273c9ff01326d58f13ae008b5c0061ff75891c98"
NEAR_COPY = 0.10  # root mean square difference; the closest pair of all is 0.13 apart


def short(pixels):
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def contents(folder):
    """Every file in a folder, and what is in it."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def snapshot(folder):
    """The same with the times of the last change."""
    return {path: (data, path.stat().st_mtime_ns) for path, data in contents(folder).items()}


def leftovers(folder):
    return [path for path in Path(folder).rglob("*") if ".tmp" in path.name]


def manifest_of(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())


def start(folder, *options):
    """Start the command in a process group of its own, as a shell does."""
    command = [sys.executable, "-m", "ddpm_basics.fabrics", "--output", str(folder), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


@pytest.fixture(scope="module")
def train_folder(tmp_path_factory):
    """The training set, drawn by the command with the default options."""
    folder = tmp_path_factory.mktemp("drawn") / "train"
    process = start(folder)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert re.fullmatch(rf"{folder} is complete: 1059 images, 1059 of them new \(.+\)\.\n", stdout)
    assert "100%" in stderr  # the progress bar
    return folder


@pytest.fixture(scope="module")
def train(train_folder):
    return load_fabrics(train_folder)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """A thousand held-out fabrics, drawn from within this process."""
    folder = tmp_path_factory.mktemp("drawn") / "heldout"
    draw_fabrics(folder, split="heldout", count=1000)
    return load_fabrics(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Run the command in this process and return (exit code, stdout, stderr)."""

    def call(*argv):
        code = main([str(a) for a in (*argv, "--workers", "1")])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def refused(run):
    """Run a command that has to fail with exit code 1 and one sentence, and return that."""

    def call(*argv):
        code, _, stderr = run(*argv)
        sentences = [line for line in stderr.splitlines() if line.startswith("Error: ")]
        assert code == 1
        assert len(sentences) == 1, stderr
        return sentences[0]

    return call


# ---- The drawings --------------------------------------------------------------------------------


def test_set_is_complete(train_folder, train):
    pixels, labels = train
    assert pixels.shape == (1059, 64, 64, 3)
    manifest = read_manifest(train_folder)
    on_disk = {path.relative_to(train_folder).as_posix() for path in train_folder.rglob("*.*")}
    assert on_disk == {*manifest.traditions, "manifest.json", "README.md"}
    assert all(file.split("/")[0] == label for file, label in manifest.traditions.items())
    assert (manifest.version, manifest.seed, manifest.split) == (DATA_VERSION, 0, "train")
    assert (manifest.count, manifest.size) == (1059, 64)
    shares = Counter(labels)
    assert list(shares) == list(TRADITIONS)
    assert max(shares.values()) - min(shares.values()) <= 1


def test_no_two_training_images_are_alike(train):
    assert nearest_within(train[0]).min() > NEAR_COPY


def test_no_heldout_image_is_a_near_copy(train, heldout):
    assert len(heldout[0]) == 1000
    assert distances(heldout[0], train[0]).min() > NEAR_COPY


def test_the_distance_sees_copies(train):
    """A mirrored, slightly darker copy counts as a near copy, another fabric does not."""
    some = train[0][:60]
    copies = (some[:, :, ::-1] * 0.95).astype(np.uint8)
    assert np.diag(distances(copies, some)).max() < NEAR_COPY / 2
    black, white = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    assert distances(black, white)[0, 0] == pytest.approx(1)


def test_palettes_are_spread(train):
    """Average colours lie 0.15 apart in OKLab, at least 0.06 within a tradition; 12 hues occur."""
    pixels, labels = train
    assert palette_spread(pixels) > 0.14
    for label in np.unique(labels):
        assert palette_spread(pixels[labels == label]) > 0.05, label
    assert hue_shares(pixels).min() > 0.01
    assert palette_spread(np.repeat(pixels[:1], 9, 0)) < 1e-6  # a set without any would fail


def test_no_image_is_blank_or_blown_out(train):
    spread = train[0].reshape(1059, -1, 3).std(1).mean(1)
    assert spread.min() > 12  # of 255
    assert (train[0] == 255).all(-1).mean() < 0.01
    assert (train[0] == 0).all(-1).mean() < 0.05  # black lines are black


def test_traditions_look_different(train, heldout):
    """A nearest-neighbour vote on coarse colour counts already tells most traditions apart."""

    def looks(pixels):
        bins = (pixels // 43).astype(int) @ [36, 6, 1]
        counts = np.stack([np.bincount(row.ravel(), minlength=216) for row in bins])
        return np.sqrt(counts / 4096)

    kernel = looks(heldout[0]) @ looks(train[0]).T
    guess = train[1][kernel.argmax(1)]
    assert (guess == heldout[1]).mean() > 0.5  # 0.08 by chance


def test_golden_checksum(train_folder, train):
    """Of the pixels themselves, and the manifest tells the same."""
    manifest = manifest_of(train_folder)
    assert hashlib.sha256(train[0].tobytes()).hexdigest() == manifest["sha256"] == TRAIN_SHA
    assert [short(image) for image in train[0]] == list(manifest["pixels"].values())


@pytest.mark.parametrize(
    ("seed", "split", "index", "checksum"),
    [
        (0, "heldout", 0, "2c38af7354aaa69f"),
        (0, "heldout", 999, "fea41e5d5643942c"),
        (7, "train", 1000000000, "46cd41ab1a85ec0f"),
    ],
)
def test_golden_images(seed, split, index, checksum):
    assert short(render(seed, index, split)) == checksum


def test_image_depends_on_seed_split_and_index_alone(train, heldout):
    for index in (999, 3, 500, 3, 47):  # in any order, by any process
        assert np.array_equal(render(0, index), train[0][index])
        assert np.array_equal(render(0, index, "heldout"), heldout[0][index])
    assert not np.array_equal(render(1, 3), train[0][3])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_do_not_matter(tmp_path, train, workers):
    draw_fabrics(tmp_path / "out", count=70, workers=workers)
    assert np.array_equal(load_fabrics(tmp_path / "out")[0], train[0][:70])


@pytest.mark.parametrize("index", range(12))
def test_other_sizes_are_the_same_drawing(index):
    """128 pixels halved is about the 64-pixel picture; odd sizes work."""
    small, large = render(0, index), render(0, index, size=128)
    halved = large.resize((64, 64), Image.Resampling.BOX)
    assert distances(np.asarray(halved)[None], np.asarray(small)[None])[0, 0] < NEAR_COPY
    assert render(0, index, size=50).size == (50, 50)


def test_oklab_round_trip():
    white = oklab("ffffff")
    assert white == pytest.approx([1, 0, 0], abs=1e-4)
    for colour in ("000000", "b3202a", "16275c", "ffffff", "1d7340"):
        back = encode_srgb(linear_rgb(oklab(colour)[:, None]))
        assert bytes(back[:, 0]).hex() == colour


def test_every_tradition_names_its_source():
    for draw in TRADITIONS.values():
        assert re.search(r"See .*\((19|20)\d\d\)", " ".join(draw.__doc__.split())), draw.__name__


# ---- The folder ----------------------------------------------------------------------------------


def test_default_folders_and_a_second_run_that_does_nothing(run, here):
    for options in (["--count", 30], ["--count", 2, "--split", "heldout"]):
        assert run(*options)[0] == 0
    before = snapshot(here)
    assert read_manifest(here / "african_fabric_processed").split == "train"
    assert read_manifest(here / "african_fabric_heldout").split == "heldout"
    code, stdout, _ = run("--count", 30)
    assert code == 0
    assert "is complete: 30 images, 0 of them new" in stdout
    assert snapshot(here) == before


def test_half_written_folder_is_completed(run, here):
    run("--output", "out", "--count", 30)
    before = contents("out")
    (here / "out/kente/0006.png").unlink()
    picture = (here / "out/kuba/0008.png").read_bytes()
    (here / "out/kuba/0008.png").write_bytes(picture[:300])
    (here / "out/fugu/.0004.77.tmp.png").write_bytes(picture[:300])
    (here / "out/.manifest.77.tmp.json").write_text("{")
    shutil.rmtree(here / "out/adire")
    code, stdout, _ = run("--output", "out", "--count", 30)
    assert code == 0
    assert "30 images, 5 of them new" in stdout
    assert contents("out") == before


def test_drawn_but_not_noted(run, refused, here):
    """As a run leaves it that is killed just before the end."""
    run("--output", "out", "--count", 12)
    before, manifest = contents("out"), manifest_of("out")
    unfinished = json.dumps(manifest | {"sha256": None, "pixels": {}})
    (here / "out/manifest.json").write_text(unfinished)
    assert "12 images, 0 of them new" in run("--output", "out", "--count", 12)[1]
    assert contents("out") == before
    (here / "out/manifest.json").write_text(unfinished)
    Image.new("RGB", (100, 100), "red").save(here / "out/kente/0006.png")  # not by us, that size
    assert "kente/0006.png was changed" in refused("--output", "out", "--count", 12)


@pytest.mark.parametrize(
    "options", [["--seed", 1], ["--count", 13], ["--size", 32], ["--split", "heldout"]]
)
def test_other_settings_in_the_same_folder(run, refused, here, options):
    argv = ["--count", 12, "--output", "out"]
    run(*argv)
    before = snapshot(here)
    assert "out holds 12 images of 64x64 (train, seed 0, version 1)" in refused(*argv, *options)
    assert snapshot(here) == before
    (here / "out/kente/mine.png").write_bytes(b"my own")
    assert run(*argv, *options, "--force")[0] == 0
    manifest = manifest_of(here / "out")
    assert all(manifest[option[2:]] == value for option, value in [options])
    on_disk = {path.relative_to("out").as_posix() for path in Path("out").rglob("*.png")}
    assert on_disk == {*manifest["traditions"], "kente/mine.png"}


def test_data_card(run, refused, here):
    """Its head is what hubs read; it tells how to draw the same; a user's own README.md stays."""
    run("--output", "out", "--count", 30, "--seed", 5, "--split", "heldout")
    head, text = (here / "out/README.md").read_text().split("---\n", 2)[1:]
    card = yaml.safe_load(head)
    assert (card["license"], card["size_categories"]) == ("mit", ["n<1K"])
    assert {"unconditional-image-generation", "image-classification"} == {*card["task_categories"]}
    (files,) = card["configs"][0]["data_files"]
    assert files["split"] == "test"
    assert len(list((here / "out").glob(files["path"]))) == 30
    manifest = manifest_of("out")
    assert manifest["sha256"] in text
    assert "fabrics --split heldout --seed 5 --count 30 --size 64" in text
    for label in set(manifest["traditions"].values()):
        assert f"| {label} | {30 // 12 + (list(TRADITIONS).index(label) < 30 % 12)} |" in text
    assert [size_category(n) for n in (999, 1000, 20_000, 10**8)] == [
        "n<1K", "1K<n<10K", "10K<n<100K", "n>10M"]  # fmt: skip

    (here / "out/README.md").write_text("# mine")
    for more in ((), ("--force",)):
        assert run("--output", "out", "--count", 12, "--split", "heldout", *more, "--seed", 6)[
            0
        ] == (0 if more else 1)
        assert (here / "out/README.md").read_text() == "# mine"


def test_photographs_get_no_card(run, here):
    """Nobody here knows their licence; one of drawn fabrics that stood there goes with them."""
    run("--output", "out", "--count", 12)
    assert run("--photos", "out", "--output", "prepared")[0] == 0
    assert not (here / "prepared/README.md").exists()
    assert run("--photos", "prepared", "--output", "out", "--force")[0] == 0
    assert not (here / "out/README.md").exists()


def test_another_version_of_the_drawings_is_not_mixed_in(run, refused, here, monkeypatch):
    run("--count", 12)
    monkeypatch.setattr("ddpm_basics.fabrics.folder.DATA_VERSION", "2")
    assert "version 1" in refused("--count", 12)


def test_force_draws_anew(run, here):
    run("--count", 12)
    before = snapshot(here)
    assert run("--count", 12, "--force")[0] == 0
    after = snapshot(here)
    assert {path: data for path, (data, _) in after.items()} == {
        path: data for path, (data, _) in before.items()
    }
    assert all(after[path][1] > before[path][1] for path in before)


def test_folder_with_own_files(run, refused, here):
    own = here / "out/kente/0006.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"my own")
    before = snapshot(here)
    assert "holds files of your own, such as kente/0006.png" in refused("--output", "out")
    assert "not even --force" in refused("--output", "out", "--force")
    assert snapshot(here) == before
    assert run("--output", "out", "--count", 6, "--force")[0] == 0  # 0006 is not needed
    assert own.read_bytes() == b"my own"


def test_manifest_of_somebody_else(refused, here):
    (here / "out").mkdir()
    ours = {"made_by": "ddpm_basics.fabrics", "count": 1, "size": 64,
            "traditions": {"a.png": "a"}}  # fmt: skip
    for text in (
        '{"count": 1, "size": 64, "traditions": {"a.png": "a"}}', "[]", "null", "{",
        '{"made_by": 3}', '{"made_by": "ddpm_basics.fabrics"}', json.dumps(ours | {"else": 1}),
        json.dumps(ours | {"traditions": ["a.png"]}), json.dumps(ours | {"pixels": 3}),
        *(json.dumps(ours | {"sha256": None, key: value}) for key, value in (
            ("count", 10**12), ("count", "1"), ("count", 1.0), ("size", 0), ("size", [64]),
            ("seed", -1), ("seed", float("nan")), ("split", "test"), ("version", 7),
            ("traditions", {"a.png": 1}), ("traditions", {"a\0.png": "a"}),
            ("traditions", {"\ud800.png": "a"}))),
    ):  # fmt: skip
        (here / "out/manifest.json").write_text(text)
        assert read_manifest(here / "out") is None
        assert "files of your own, such as manifest.json" in refused("--output", "out")
        assert "not even --force" in refused("--output", "out", "--force")
        assert (here / "out/manifest.json").read_text() == text
    (here / "out/manifest.json").write_text(json.dumps(ours))
    assert read_manifest(here / "out").count == 1


def test_folder_of_the_older_command_is_ours(run, refused, here):
    run("--output", "out", "--count", 12)
    manifest = manifest_of("out")
    assert manifest["made_by"] == "ddpm_basics.fabrics"
    older = {key: manifest[key] for key in ("version", "seed", "split", "count", "size", "sha256",
                                            "pixels", "traditions")}  # fmt: skip
    text = json.dumps({"made_by": "prepare_fabrics.py", **older})
    (here / "out/manifest.json").write_text(text)
    before = snapshot(here)
    assert "12 images, 0 of them new" in run("--output", "out", "--count", 12)[1]
    assert "out holds 12 images" in refused("--output", "out", "--count", 13)
    assert snapshot(here) == before


def test_manifest_cannot_point_outside(run, refused, here):
    run("--output", "out", "--count", 1)
    manifest = manifest_of("out")
    shutil.rmtree(here / "out/adinkra")
    precious = here / "precious.png"
    precious.write_bytes(b"my own")
    for path in ("../precious.png", str(precious)):
        (here / "out/manifest.json").write_text(json.dumps(manifest | {"traditions": {path: "a"}}))
        assert read_manifest(here / "out") is None
        refused("--output", "out", "--count", 2, "--force")
        assert precious.read_bytes() == b"my own"


@pytest.mark.parametrize("size", [64, 100])
def test_changed_picture_is_not_overwritten(run, refused, here, size):
    run("--output", "out", "--count", 12)
    changed = here / "out/kente/0006.png"
    Image.new("RGB", (size, size), "red").save(changed)
    before = changed.read_bytes()
    assert "kente/0006.png was changed" in refused("--output", "out", "--count", 12)
    assert changed.read_bytes() == before
    assert run("--output", "out", "--count", 12, "--force")[0] == 0
    assert changed.read_bytes() != before


# ---- Bad input, bad luck -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--count", "0"], ["--size", "7"], ["--size", "1025"], ["--seed", "-1"],
        ["--workers", "0"], ["--split", "test"], ["--unknown"], ["stray"], ["--skip-broken"],
        ["--photos", "x", "--count", "5"], ["--photos", "x", "--seed", "1"],
        ["--photos", "x", "--split", "heldout"],
    ],
)  # fmt: skip
def test_wrong_usage(argv, here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_output_that_is_a_file(refused, here):
    (here / "file").write_text("my own")
    for output in ("file", "file/out"):
        assert "Cannot write into file" in refused("--output", output, "--count", 1)
    assert (here / "file").read_text() == "my own"


def test_no_space_left(run, refused, here, monkeypatch):
    replace, written = os.replace, []

    def full(source, target):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in refused("--output", "out", "--count", 20)
    assert not leftovers(here)
    assert manifest_of(here / "out")["sha256"] is None
    monkeypatch.setattr(os, "replace", replace)
    code, stdout, _ = run("--output", "out", "--count", 20)
    assert code == 0
    assert "20 images, 16 of them new" in stdout  # the manifest was the fifth file


def test_callers_in_the_same_process_get_the_exception(here):
    """Callers in the same process get the exception, and a folder as it was."""
    draw_fabrics(here / "out", count=2, workers=1)
    before = snapshot(here)
    with pytest.raises(UserError, match="out holds 2 images"):
        draw_fabrics(here / "out", count=3, workers=1)
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare_photographs(here / "nowhere", here / "other")
    assert snapshot(here) == before


def workers_of(process):
    """The process numbers of the command's workers, as soon as they start."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    command_lines = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, line in command_lines.items() if b"spawn_main" in line]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.fixture
def running(here):
    """The command at work on 400 fabrics with two worker processes."""
    process = start(here / "out", "--count", "400", "--workers", "2")
    yield process
    process.kill()
    process.wait()


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")


@needs_proc
def test_interrupt_while_workers_start(running):
    wait_for(lambda: workers_of(running), running)
    os.killpg(running.pid, signal.SIGINT)  # what Ctrl-C does: to all processes of the terminal
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in stderr


def test_interrupt_and_go_on(running, here, train):
    wait_for(lambda: len(list(here.rglob("0*.png"))) > 10, running)
    os.killpg(running.pid, signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Interrupted. Run the same command again" in stderr
    assert "Traceback" not in stderr
    assert not leftovers(here)
    assert read_manifest(here / "out").sha256 is None
    done = snapshot(here / "out")
    assert 10 < len(list(here.rglob("0*.png"))) < 400
    draw_fabrics(here / "out", count=400)
    assert np.array_equal(load_fabrics(here / "out")[0], train[0][:400])
    del done[here / "out/manifest.json"]
    assert done.items() <= snapshot(here / "out").items()  # drawn once


@needs_proc
def test_killed_worker(running, here):
    wait_for(lambda: len(list(here.rglob("0*.png"))) > 10, running)
    workers = workers_of(running)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "Error: A worker process was killed: run this with --workers 1." in stderr
    assert "Traceback" not in stderr


# ---- Photographs ---------------------------------------------------------------------------------


@pytest.fixture
def album(here):
    """Photographs in subfolders, green in the middle, with other files between them."""
    for name in ("top.JPG", "cloth/red.png", "cloth/blue.webp", "cloth/old/c.tiff", "wall/d.jpeg"):
        path = here / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = Image.new("RGB", (200, 60 + len(name)), "red")
        photo.paste("lime", (60, 0, 140, 200))
        photo.save(path)
    (here / "album/notes.txt").write_text("not a photograph")
    return here / "album"


def test_album(run, album):
    code, stdout, _ = run("--photos", album, "--output", "out")
    assert code == 0
    assert "notes.txt (none of " in stdout
    pixels, labels = load_fabrics("out")
    assert pixels.shape == (5, 64, 64, 3)
    assert np.abs(pixels.mean((0, 1, 2)) - [0, 255, 0]).max() < 3  # the middle, as it was
    assert Counter(labels) == {"cloth": 2, "cloth/old": 1, "wall": 1, "photographs": 1}
    manifest = read_manifest(Path("out"))
    assert all(str(Path(f).parent) == label for f, label in manifest.traditions.items())
    assert (manifest.count, manifest.size, manifest.photos) == (5, 64, "album")
    assert manifest.version is manifest.seed is manifest.split is None
    before = snapshot("out")
    assert "5 images, 0 of them new" in run("--photos", album, "--output", "out")[1]
    assert snapshot("out") == before


def test_album_that_changed(run, refused, album):
    argv = ["--photos", album, "--output", "out"]
    run(*argv, "--size", 32)
    assert "5 images of 32x32" in refused(*argv)
    red = (album / "cloth/red.png").read_bytes()
    (album / "cloth/red.png").write_bytes(red + b"longer")
    assert "from the photographs in 'album'" in refused(*argv, "--size", 32)
    (album / "cloth/red.png").write_bytes(red)
    assert run(*argv, "--size", 32)[0] == 0
    (album / "new.png").write_bytes(red)
    assert "from the photographs in 'album'" in refused(*argv, "--size", 32)
    assert "from the photographs in 'album'" in refused("--output", "out")
    assert run(*argv, "--force")[0] == 0
    assert read_manifest(Path("out")).count == 6
    assert run("--output", "out", "--count", 12, "--force")[0] == 0
    assert {path.name for path in Path("out").iterdir()} == {
        *TRADITIONS, "manifest.json", "README.md"}  # fmt: skip


def test_output_inside_or_around_the_album(run, refused, album, monkeypatch):
    assert "is in the output folder" in refused("--photos", album, "--output", ".")
    assert "is in the output folder" in refused("--photos", album, "--output", album)
    monkeypatch.chdir(album)
    for _ in range(2):  # the second time, what the first has written is not taken for photographs
        code, stdout, _ = run("--photos", ".")
        assert code == 0
        assert "notes.txt (none of " in stdout
        assert read_manifest(album / "african_fabric_processed").count == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_photographs(album, capsys, workers):
    whole = (album / "wall/d.jpeg").read_bytes()
    for number in range(40):  # enough for two processes
        (album / f"wall/{number}.jpeg").write_bytes(whole)
    (album / "wall/cut.jpeg").write_bytes(whole[: len(whole) // 2])
    (album / "empty.png").write_bytes(b"")
    (album / "text.tif").write_text("not a photograph")
    states = []
    for _ in range(2):
        with pytest.raises(UserError, match="3 photographs could not be read"):
            prepare_photographs(album, Path("out"), workers=workers)
        stderr = capsys.readouterr().err
        for name in ("wall/cut.jpeg", "empty.png", "text.tif"):
            assert len(re.findall(rf"Broken, left out: .*{name} cannot be read", stderr)) == 1
        states.append(snapshot("out"))
    assert states[0] == states[1]
    assert len(list(Path("out").rglob("*.png"))) == 45
    assert read_manifest(Path("out")).sha256
    next(Path("out").rglob("*.png")).unlink()
    prepare_photographs(album, Path("out"), workers=workers, skip_broken=True)
    output = capsys.readouterr()
    assert "45 images, 1 of them new" in output.out
    assert output.err.count("Broken, left out") == 3


def test_no_photographs(refused, here):
    assert "album does not exist" in refused("--photos", "album")
    (here / "album").mkdir()
    (here / "album/a.gif").write_bytes(b"")
    assert "holds no photographs" in refused("--photos", "album")
    assert [path.name for path in here.iterdir()] == ["album"]
