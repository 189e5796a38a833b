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
from conftest import ROOT
from PIL import Image

from ddpm_basics.fabrics.__main__ import main
from ddpm_basics.fabrics.colour import encode_srgb, linear_rgb, oklab
from ddpm_basics.fabrics.drawing import DATA_VERSION, TRADITIONS, render
from ddpm_basics.fabrics.photographs import BrokenPhotograph, photograph

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from measure_fabrics import (
    distances,
    hue_shares,
    load_fabrics,
    nearest_within,
    palette_spread,
)

COMMAND = [sys.executable, "-m", "ddpm_basics.fabrics"]

# SHA-256 over all pixels of the two sets below, and the short checksum of one image of each kind.
# The weights were trained on these very pixels: if they change, DATA_VERSION has to change too.
TRAIN_SHA = "cf5dc30b56fee88c3808ba01273c9ff01326d58f13ae008b5c0061ff75891c98"
NEAR_COPY = 0.10  # root mean square difference; the closest pair of all is 0.13 apart


def short(pixels):
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def snapshot(folder):
    """Everything that can be seen of a folder: names, contents, times of the last change."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def leftovers(folder):
    return [path for path in Path(folder).rglob("*") if ".tmp" in path.name]


def manifest_of(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Both splits, drawn with the default options: the folders train and heldout."""
    home = tmp_path_factory.mktemp("rendered")
    for split, options in (("train", []), ("heldout", ["--split", "heldout", "--count", "1000"])):
        command = [*COMMAND, "--output", home / split, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert re.search(r"Wrote \d+ images .* in \d+\.\d s\.", done.stdout)
        assert "100%" in done.stderr  # the progress bar
    return home


@pytest.fixture(scope="module")
def train(rendered):
    return load_fabrics(rendered / "train")


@pytest.fixture(scope="module")
def heldout(rendered):
    return load_fabrics(rendered / "heldout")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Run the command in this process and return (exit code, stdout, stderr)."""

    def call(*argv):
        try:
            code = main([str(a) for a in (*argv, "--workers", "1")])
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
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


# --------------------------------------------------------------------------- the drawings


def test_set_is_complete(rendered, train):
    folder = rendered / "train"
    pixels, labels = train
    assert pixels.shape == (1059, 64, 64, 3)
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    manifest = manifest_of(folder)
    assert on_disk == set(manifest["traditions"])
    assert all(file.split("/")[0] == label for file, label in manifest["traditions"].items())
    assert manifest["version"] == DATA_VERSION
    assert (manifest["seed"], manifest["split"], manifest["count"]) == (0, "train", 1059)
    assert not leftovers(folder)
    shares = Counter(labels)
    assert len(shares) >= 10
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


def test_golden_checksum(rendered):
    assert manifest_of(rendered / "train")["sha256"] == TRAIN_SHA


@pytest.mark.parametrize(
    ("seed", "split", "index", "checksum"),
    [
        (0, "train", 0, "c404f2d5edab26f0"),
        (0, "train", 6, "4be94ba50bfbbe0d"),
        (0, "train", 2, "d555f48d214ab722"),
        (0, "train", 11, "d8bedcf6836be35b"),
        (0, "heldout", 0, "2c38af7354aaa69f"),
        (0, "heldout", 999, "fea41e5d5643942c"),
        (7, "train", 1000000000, "46cd41ab1a85ec0f"),
    ],
)
def test_golden_images(seed, split, index, checksum):
    assert short(render(seed, index, split)) == checksum


def test_checksum_is_over_the_pixels(rendered, train):
    manifest = manifest_of(rendered / "train")
    assert hashlib.sha256(train[0].tobytes()).hexdigest() == manifest["sha256"]
    assert [short(image) for image in train[0]] == list(manifest["pixels"].values())


def test_image_depends_on_seed_split_and_index_alone(train, heldout):
    for index in (999, 3, 500, 3, 47):  # in any order, by any process
        assert np.array_equal(render(0, index), train[0][index])
        assert np.array_equal(render(0, index, "heldout"), heldout[0][index])
    assert not np.array_equal(render(1, 3), train[0][3])


def test_worker_processes_do_not_matter(here, train):
    for workers in (1, 2, 3):
        out = here / str(workers)
        command = [*COMMAND, "--count", "70", "--output", out, "--workers", str(workers)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        assert np.array_equal(load_fabrics(out)[0], train[0][:70])


def test_heldout_has_no_end():
    far = render(0, 10**15, "heldout")
    assert far.shape == (64, 64, 3)
    assert not np.array_equal(far, render(0, 10**15 + 12, "heldout"))


@pytest.mark.parametrize("index", range(12))
def test_other_sizes_are_the_same_drawing(index):
    """128 pixels halved is about the 64-pixel picture; odd sizes work."""
    small, large = render(0, index), render(0, index, size=128)
    halved = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BOX))
    assert distances(halved[None], small[None])[0, 0] < NEAR_COPY
    assert render(0, index, size=50).shape == (50, 50, 3)


def test_oklab_round_trip():
    white = oklab("ffffff")
    assert white == pytest.approx([1, 0, 0], abs=1e-4)
    for colour in ("000000", "b3202a", "16275c", "ffffff", "1d7340"):
        back = encode_srgb(linear_rgb(oklab(colour)[:, None]))
        assert bytes(back[:, 0]).hex() == colour


def test_every_tradition_names_its_source():
    for draw in TRADITIONS.values():
        assert re.search(r"See .*\((19|20)\d\d\)", " ".join(draw.__doc__.split())), draw.__name__


# --------------------------------------------------------------------------- the folder


def test_second_run_does_nothing(run, here):
    assert run("--count", 30)[0] == 0
    before = snapshot(here)
    code, stdout, _ = run("--count", 30)
    assert code == 0
    assert "is complete: 30 images, nothing to do" in stdout
    assert snapshot(here) == before


def test_default_folders(run, here):
    run("--count", 2)
    run("--count", 2, "--split", "heldout")
    assert manifest_of(here / "african_fabric_processed")["split"] == "train"
    assert manifest_of(here / "african_fabric_heldout")["split"] == "heldout"


def test_half_written_folder_is_completed(run, here):
    run("--count", 30)
    folder = here / "african_fabric_processed"
    before, whole = snapshot(folder), manifest_of(folder)
    (folder / "kente/0006.png").unlink()
    picture = (folder / "kuba/0008.png").read_bytes()
    (folder / "kuba/0008.png").write_bytes(picture[:300])
    (folder / "fugu/.0004.77.tmp.png").write_bytes(picture[:300])
    shutil.rmtree(folder / "adire")
    code, stdout, _ = run("--count", 30)
    assert code == 0
    assert "5 images added to 25" in stdout
    assert manifest_of(folder) == whole
    assert {path: data for path, (data, _) in snapshot(folder).items()} == {
        path: data for path, (data, _) in before.items()
    }


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


def test_another_version_of_the_drawings_is_not_mixed_in(run, refused, here, monkeypatch):
    run("--count", 12)
    monkeypatch.setattr("ddpm_basics.fabrics.folder.DATA_VERSION", "2")
    assert "version 1" in refused("--count", 12)


def test_force_renders_anew(run, here):
    run("--count", 12)
    before = snapshot(here)
    assert run("--count", 12, "--force")[0] == 0
    after = snapshot(here)
    assert {path: data for path, (data, _) in before.items()} == {
        path: data for path, (data, _) in after.items()
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
    for text in ('{"traditions": {"a.png": "a"}}', "[]", "null", "{", '{"made_by": 3}'):
        (here / "out").mkdir(exist_ok=True)
        (here / "out/manifest.json").write_text(text)
        assert "files of your own, such as manifest.json" in refused("--output", "out")
        assert "not even --force" in refused("--output", "out", "--force")
        assert (here / "out/manifest.json").read_text() == text


def test_folder_of_the_older_command_is_ours(run, refused, here):
    run("--output", "out", "--count", 12)
    manifest = manifest_of("out")
    assert manifest["made_by"] == "ddpm_basics.fabrics"
    manifest["made_by"] = "prepare_fabrics.py"
    (here / "out/manifest.json").write_text(json.dumps(manifest))
    before = snapshot(here)
    assert "nothing to do" in run("--output", "out", "--count", 12)[1]
    assert "out holds 12 images" in refused("--output", "out", "--count", 13)
    assert snapshot(here) == before


def test_manifest_cannot_point_outside(run, refused, here):
    run("--output", "out", "--count", 1)
    manifest = manifest_of("out")
    for path in ("../precious.png", str(here / "precious.png")):
        (here / "precious.png").write_bytes(b"my own")
        manifest["traditions"] = {path: "kente"}
        (here / "out/manifest.json").write_text(json.dumps(manifest))
        refused("--output", "out", "--count", 2, "--force")
        assert (here / "precious.png").read_bytes() == b"my own"


def test_changed_picture_is_not_overwritten(run, refused, here):
    run("--output", "out", "--count", 12)
    changed = here / "out/kente/0006.png"
    Image.new("RGB", (64, 64), "red").save(changed)
    before = changed.read_bytes()
    assert "kente/0006.png was changed" in refused("--output", "out", "--count", 12)
    assert changed.read_bytes() == before
    assert run("--output", "out", "--count", 12, "--force")[0] == 0
    assert changed.read_bytes() != before


# --------------------------------------------------------------------------- bad input, bad luck


@pytest.mark.parametrize(
    "argv",
    [
        ["--count", "0"],
        ["--count", "-3"],
        ["--count", "many"],
        ["--count", "1.5"],
        ["--size", "0"],
        ["--size", "7"],
        ["--size", "100000"],
        ["--seed", "-1"],
        ["--split", "test"],
        ["--workers", "0"],
        ["--unknown"],
        ["stray"],
        ["--skip-broken"],
        ["--photos", "x", "--count", "5"],
        ["--photos", "x", "--split", "heldout"],
    ],
)
def test_wrong_usage(argv, here, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_output_that_cannot_be_written(refused, here):
    (here / "file").write_text("my own")
    assert "file is a file" in refused("--output", "file", "--count", 1)
    assert "Not a directory" in refused("--output", "file/out", "--count", 1)
    assert (here / "file").read_text() == "my own"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(refused, here):
    (here / "closed").mkdir(mode=0o500)
    assert "Permission denied" in refused("--output", "closed/out", "--count", 1)


def test_no_space_left(run, refused, here, monkeypatch):
    replace, written = os.replace, []

    def full(source, target):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in refused("--count", 20)
    assert not leftovers(here)
    assert manifest_of("african_fabric_processed")["sha256"] is None
    monkeypatch.setattr(os, "replace", replace)
    code, stdout, _ = run("--count", 20)
    assert code == 0
    assert "16 images added to 4" in stdout  # the manifest was the fifth file


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def start(folder, *options):
    command = [*COMMAND, "--output", folder, "--workers", "2", *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_interrupt_and_go_on(here, train, run):
    process = start(here / "out", "--count", "400")
    wait_for(lambda: len(list(here.rglob("0*.png"))) > 10, process)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: to all processes of the terminal
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted: run the same command again" in stderr
    assert "Traceback" not in stderr
    assert not leftovers(here)
    done = list(here.rglob("0*.png"))
    assert 10 < len(done) < 400
    for path in done:
        assert np.array_equal(np.asarray(Image.open(path)), train[0][int(path.stem)])
    assert manifest_of("out")["sha256"] is None


def test_killed_worker(here):
    process = start(here / "out", "--count", "400")
    wait_for(lambda: len(list(here.rglob("0*.png"))) > 10, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc")
    workers = [
        child
        for child in children.read_text().split()
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error: A worker process was killed" in stderr
    assert "Traceback" not in stderr


def test_help(run):
    code, stdout, _ = run("--help")
    assert code == 0
    for words in ("(default: 1059)", "(default: 64)", "african_fabric_heldout", "--skip-broken"):
        assert words in " ".join(stdout.split())
    assert "usage: python -m ddpm_basics.fabrics" in stdout


# --------------------------------------------------------------------------- photographs


def bands(width=96, height=32, mode="RGB"):
    """Red, green and blue side by side: the middle square is green."""
    image = Image.new("RGB", (width, height), "lime")
    image.paste("red", (0, 0, width // 3, height))
    image.paste("blue", (width - width // 3, 0, width, height))
    return image.convert(mode)


def see_through():
    """Red that hides behind full transparency, beside opaque blue."""
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (20, 0, 40, 40))
    return image


def halves(pixels):
    """The colours of the left and the right half."""
    middle = pixels.shape[1] // 2
    return pixels[:, : middle - 3].mean((0, 1)), pixels[:, middle + 3 :].mean((0, 1))


def prepared(path, size=16):
    return photograph(Path(path), size).astype(float)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.Png", "a.webp", "a.TIF", "a.tiff"])
def test_photo_formats_and_crop(here, name):
    """The middle square is cut out before the reduction: nothing of red and blue is left."""
    kinds = {"jpg": "JPEG", "tif": "TIFF"}
    ending = name.lower().split(".")[1]
    settings = {"lossless": True} if ending == "webp" else {"quality": 95, "subsampling": 0}
    bands().save(name, kinds.get(ending, ending.upper()), **settings)
    assert prepared(name) == pytest.approx(np.broadcast_to([0, 255, 0], (16, 16, 3)), abs=6)
    bands().rotate(90, expand=True).save(name, kinds.get(ending, ending.upper()), **settings)
    assert prepared(name) == pytest.approx(np.broadcast_to([0, 255, 0], (16, 16, 3)), abs=6)


def test_photo_is_turned_upright(here):
    image = Image.new("RGB", (40, 40), "red")
    image.paste("blue", (0, 20, 40, 40))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save("a.png", exif=exif)
    left, right = halves(prepared("a.png"))
    assert left == pytest.approx([0, 0, 255], abs=3)
    assert right == pytest.approx([255, 0, 0], abs=3)


def grey_and_hidden():
    """The same picture in grey: hidden black beside opaque grey."""
    image = Image.new("LA", (40, 40), (0, 0))
    image.paste((100, 255), (20, 0, 40, 40))
    return image


def palette_with_hole():
    image = Image.new("P", (40, 40), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (20, 0, 40, 40))
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("make", "right"),
    [(see_through, [0, 0, 255]), (grey_and_hidden, [100] * 3), (palette_with_hole, [0, 0, 255])],
)
def test_transparency_becomes_white(here, make, right):
    make().save("a.png")
    left_colour, right_colour = halves(prepared("a.png"))
    assert left_colour == pytest.approx([255, 255, 255], abs=3)
    assert right_colour == pytest.approx(right, abs=3)


def test_rgb_with_one_transparent_colour(here):
    bands(40, 40).save("a.png", transparency=(255, 0, 0))
    assert prepared("a.png")[8, 1] == pytest.approx([255] * 3, abs=3)


@pytest.mark.parametrize("mode", ["P", "CMYK", "L", "1"])
def test_other_modes(here, mode):
    image = Image.new("RGB", (40, 40), "white")
    image.paste("black", (20, 0, 40, 40))
    image.convert(mode).save("a.tif")
    left, right = halves(prepared("a.tif"))
    assert left == pytest.approx([255] * 3, abs=3)
    assert right == pytest.approx([0] * 3, abs=3)


def test_cmyk_jpeg(here):
    bands(40, 40, "CMYK").save("a.jpg", quality=95)
    assert prepared("a.jpg")[8, 8] == pytest.approx([0, 255, 0], abs=8)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled(here, name):
    levels = np.zeros((32, 32), np.uint16)
    levels[:, :16], levels[:, 16:] = 65535 // 4, 40000
    Image.fromarray(levels).save(name)
    left, right = halves(prepared(name))
    assert left == pytest.approx([64] * 3, abs=1)
    assert right == pytest.approx([156] * 3, abs=1)


def test_sixteen_bits_of_colour(here):
    """A 16-bit RGB TIFF, byte by byte, as Pillow cannot write one."""
    pixels = np.full((8, 8, 3), (65535, 32896, 0), "<u2").tobytes()
    tags = [(256, 3, 8), (257, 3, 8), (259, 3, 1), (262, 3, 2), (273, 4, 140), (277, 3, 3)]
    tags += [(278, 3, 8), (279, 4, len(pixels))]
    entries = [(258, (3).to_bytes(2, "little") + (3).to_bytes(4, "little"), 134)]
    table = {258: (258).to_bytes(2, "little") + entries[0][1] + (134).to_bytes(4, "little")}
    for tag, kind, value in tags:
        numbers = (tag.to_bytes(2, "little"), kind.to_bytes(2, "little"))
        table[tag] = b"".join([*numbers, (1).to_bytes(4, "little"), value.to_bytes(4, "little")])
    head = b"II*\0" + (8).to_bytes(4, "little") + len(table).to_bytes(2, "little")
    head += b"".join(table[tag] for tag in sorted(table)) + bytes(4)
    head = head.ljust(134, b"\0") + (16).to_bytes(2, "little") * 3
    Path("a.tif").write_bytes(head + pixels)
    assert prepared("a.tif", 8)[4, 4] == pytest.approx([255, 128, 0], abs=1)


def test_reduction_is_smooth(here):
    """Fine lines become grey; taking every n-th pixel would leave black or white."""
    lines = np.zeros((256, 256), np.uint8)
    lines[:, ::2] = 255
    Image.fromarray(lines).save("a.png")
    assert prepared("a.png")[4:-4, 4:-4] == pytest.approx(np.full((8, 8, 3), 127.5), abs=4)


@pytest.fixture
def album(here):
    """Photographs in subfolders, with other files between them."""
    for name in ("top.JPG", "cloth/red.png", "cloth/blue.webp", "cloth/old/c.tiff", "wall/d.jpeg"):
        path = here / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        bands(200, 100 + len(name)).save(path)
    (here / "album/notes.txt").write_text("not a photograph")
    (here / "album/.hidden.png").write_text("not a photograph")
    return here / "album"


def test_album(run, album):
    code, stdout, _ = run("--photos", album)
    assert code == 0
    assert "1 other files" in stdout
    pixels, labels = load_fabrics("african_fabric_processed")
    assert pixels.shape == (5, 64, 64, 3)
    assert Counter(labels) == {"cloth": 2, "cloth/old": 1, "wall": 1, "photographs": 1}
    manifest = manifest_of("african_fabric_processed")
    assert all(str(Path(f).parent) == label for f, label in manifest["traditions"].items())
    before = snapshot("african_fabric_processed")
    assert "nothing to do" in run("--photos", album)[1]
    assert snapshot("african_fabric_processed") == before


def test_album_that_changed(run, refused, album):
    run("--photos", album, "--size", 32)
    assert "5 images of 32x32" in refused("--photos", album)
    (album / "new.png").write_bytes((album / "cloth/red.png").read_bytes())
    assert "from the photographs in 'album'" in refused("--photos", album, "--size", 32)
    assert "from the photographs" in refused()
    assert run("--photos", album, "--force")[0] == 0
    assert manifest_of("african_fabric_processed")["count"] == 6


def test_output_inside_the_album(run, album, monkeypatch):
    monkeypatch.chdir(album)
    for _ in range(2):  # the second time, what the first has written is not taken for photographs
        assert run("--photos", ".")[0] == 0
        assert manifest_of("african_fabric_processed")["count"] == 5


def test_broken_photographs(run, refused, album):
    whole = (album / "wall/d.jpeg").read_bytes()
    (album / "wall/cut.jpeg").write_bytes(whole[: len(whole) // 2])
    (album / "empty.png").write_bytes(b"")
    (album / "text.tif").write_text("not a photograph")
    code, _, stderr = run("--photos", album)
    assert code == 1
    for name in ("wall/cut.jpeg", "empty.png", "text.tif"):
        assert len(re.findall(rf"Broken, left out: .*{name}: \w", stderr)) == 1
    assert "3 photographs could not be read" in refused("--photos", album)  # the second time, too
    assert len(list(Path("african_fabric_processed").rglob("*.png"))) == 5
    assert manifest_of("african_fabric_processed")["sha256"]
    code, _, stderr = run("--photos", album, "--skip-broken")
    assert code == 0
    assert stderr.count("Broken, left out") == 3


def test_nothing_but_broken(run, here):
    (here / "album").mkdir()
    (here / "album/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, _, stderr = run("--photos", "album")
    assert code == 1
    assert "a.png" in stderr


def test_no_photographs(refused, here):
    assert "There is no folder album" in refused("--photos", "album")
    (here / "album").mkdir()
    assert "holds no photographs" in refused("--photos", "album")
    (here / "album/a.gif").write_bytes(b"")
    assert "holds no photographs" in refused("--photos", "album")
    assert not (here / "african_fabric_processed").exists()
    assert "in the output folder" in refused("--photos", "album", "--output", ".")


@pytest.mark.parametrize("kind", ["floating point", "32 bits", "too large"])
def test_pixels_that_cannot_be_scaled(here, kind, monkeypatch):
    if kind == "too large":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("RGB", (40, 40)).save("a.tif")
    else:
        dtype = np.float32 if kind == "floating point" else np.int32
        Image.fromarray(np.full((20, 20), 100000, dtype)).save("a.tif")
    with pytest.raises(BrokenPhotograph, match=r"a\.tif: .+"):
        photograph(Path("a.tif"), 16)
