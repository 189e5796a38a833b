"""images.py: any picture decoded alike, folders read or refused, sheets and films."""

import os

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_basics.console import UserError
from ddpm_basics.images import (
    decode,
    find_images,
    from_picture,
    label_of,
    read_folder,
    save_film,
    save_gif,
    save_picture,
    tile,
    to_picture,
)

WHITE, BLACK = [255] * 3, [0] * 3


def bands(width=96, height=32, mode="RGB"):
    """Red, green and blue side by side: the middle square is green."""
    image = Image.new("RGB", (width, height), "lime")
    image.paste("red", (0, 0, width // 3, height))
    image.paste("blue", (width - width // 3, 0, width, height))
    return image.convert(mode)


def two_halves(mode, left, right):
    image = Image.new(mode, (40, 40), left)
    image.paste(right, (20, 0, 40, 40))
    return image


def halves(path):
    """The colours of the left and of the right half, as they are read."""
    pixels = np.asarray(decode(path, 16)).astype(float)
    assert pixels.shape == (16, 16, 3)
    return pixels[:, :6].mean((0, 1)), pixels[:, 10:].mean((0, 1))


# ---- Decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.JPEG", "a.jfif", "a.Png", "a.webp", "a.TIF", "a.tiff", "a.bmp"]
)
def test_the_middle_square_is_cut_out_before_the_reduction(tmp_path, name):
    """In every format, upright and across: nothing of red and blue is left."""
    kinds = {"jpg": "JPEG", "jfif": "JPEG", "tif": "TIFF"}
    ending = name.lower().split(".")[1]
    settings = {"lossless": True} if ending == "webp" else {"quality": 95, "subsampling": 0}
    for picture in (bands(), bands().rotate(90, expand=True)):
        picture.save(tmp_path / name, kinds.get(ending, ending.upper()), **settings)
        pixels = np.asarray(decode(tmp_path / name, 16)).astype(float)
        assert pixels == pytest.approx(np.broadcast_to([0, 255, 0], (16, 16, 3)), abs=6)
        assert decode(tmp_path / name).size == picture.size


def test_reduction_is_smooth(tmp_path):
    """Fine lines become grey; taking every n-th pixel would leave black or white."""
    lines = np.zeros((256, 256), np.uint8)
    lines[:, ::2] = 255
    Image.fromarray(lines).save(tmp_path / "a.png")
    pixels = np.asarray(decode(tmp_path / "a.png", 16)).astype(float)
    assert pixels[4:-4, 4:-4] == pytest.approx(np.full((8, 8, 3), 127.5), abs=4)


def test_pixels_of_the_right_size_are_not_touched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for size in (None, 16):
        assert np.array_equal(np.asarray(decode(tmp_path / "a.png", size)), pixels)


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    two_halves("RGB", "blue", "red").rotate(-90).save(tmp_path / "a.png", exif=exif)
    left, right = halves(tmp_path / "a.png")  # blue above red, turned
    assert left == pytest.approx([255, 0, 0], abs=3)
    assert right == pytest.approx([0, 0, 255], abs=3)


def palette_with_hole():
    image = two_halves("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info["transparency"] = 0
    return image


def one_transparent_colour():
    image = two_halves("RGB", "red", "blue")
    image.info["transparency"] = (255, 0, 0)
    return image


@pytest.mark.parametrize(
    ("picture", "right"),
    [
        (two_halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), [0, 0, 255]),
        (two_halves("RGBA", (255, 0, 0, 0), (0, 0, 0, 128)), [127] * 3),
        (two_halves("LA", (0, 0), (100, 255)), [100] * 3),
        (palette_with_hole(), [0, 0, 255]),
        (one_transparent_colour(), [0, 0, 255]),
    ],
    ids=["RGBA", "half", "LA", "P", "RGB"],
)
def test_what_is_transparent_lies_over_white(tmp_path, picture, right):
    """Whatever colour hides there."""
    picture.save(tmp_path / "a.png")
    for colour, wanted in zip(halves(tmp_path / "a.png"), (WHITE, right), strict=True):
        assert colour == pytest.approx(wanted, abs=3)


@pytest.mark.parametrize("mode", ["P", "CMYK", "L", "1", "YCbCr"])
def test_other_kinds_of_pixels(tmp_path, mode):
    two_halves("RGB", "white", "black").convert(mode).save(tmp_path / "a.tif")
    for colour, wanted in zip(halves(tmp_path / "a.tif"), (WHITE, BLACK), strict=True):
        assert colour == pytest.approx(wanted, abs=3)


def test_jpeg_of_a_printer(tmp_path):
    bands(40, 40, "CMYK").save(tmp_path / "a.jpg", quality=95)
    assert decode(tmp_path / "a.jpg", 16).getpixel((8, 8)) == pytest.approx((0, 255, 0), abs=8)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    """All 65,536 levels come within half a level of eight bits; nothing saturates."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / name)
    pixels = np.asarray(decode(tmp_path / name)).astype(float)
    assert np.abs(pixels[..., 0] - levels / 257).max() <= 0.5


def write_tiff(path, pixels, bits, channels, meaning):
    """A TIFF of 8x8, byte by byte, as Pillow cannot write every kind."""

    def number(value, length):
        return value.to_bytes(length, "little")

    depth = (258, 3, 3, 134) if channels == 3 else (258, 3, 1, bits)
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), depth, (259, 3, 1, 1), (262, 3, 1, meaning)]
    tags += [(273, 4, 1, 140), (277, 3, 1, channels), (278, 3, 1, 8), (279, 4, 1, len(pixels))]
    table = b"".join(number(t, 2) + number(k, 2) + number(n, 4) + number(v, 4)
                     for t, k, n, v in tags)  # fmt: skip
    head = (b"II*\0" + number(8, 4) + number(len(tags), 2) + table + bytes(4)).ljust(134, b"\0")
    path.write_bytes(head + number(bits, 2) * 3 + pixels)


@pytest.mark.parametrize(
    ("pixels", "bits", "channels", "meaning", "shown"),
    [
        (np.full((8, 8, 3), (65535, 32896, 0), "<u2").tobytes(), 16, 3, 2, (255, 128, 0)),
        (np.full((8, 8), 52428, "<u2").tobytes(), 16, 1, 1, (204, 204, 204)),
        (np.full((8, 8), 52428, "<u2").tobytes(), 16, 1, 0, (51, 51, 51)),
        (bytes([0x08, 0x08, 0x00]) * 32, 12, 1, 1, (8, 8, 8)),  # 128 of 4,095
    ],
    ids=["colour", "grey", "0 is white", "12 bits"],
)
def test_deep_tiffs_are_scaled_as_they_say(tmp_path, pixels, bits, channels, meaning, shown):
    write_tiff(tmp_path / "a.tif", pixels, bits, channels, meaning)
    assert decode(tmp_path / "a.tif", 8).getpixel((4, 4)) == pytest.approx(shown, abs=1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.write_text("no picture"), "cannot identify"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "truncated"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        (
            lambda path: Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(path, "TIFF"),
            "do not define a white level: save it with 16 bits",
        ),
        (
            lambda path: Image.fromarray(np.full((9, 9), 200, np.int32)).save(path, "TIFF"),
            "do not define a white level: save it with 16 bits",
        ),
        (lambda path: Image.new("1", (20000, 20000)).save(path, "PNG"), "decompression bomb"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, damage, reason):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(path)
    damage(path)
    with pytest.raises(UserError, match=rf"a\.png cannot be read as an image \(.*{reason}"):
        decode(path)


# ---- Folders -------------------------------------------------------------------------------------


def write_pictures(folder, *names, size=(8, 8)):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 0, 200)).save(folder / name)
    return folder


def test_images_are_found_at_any_depth_in_order(tmp_path):
    names = ["a/b/3.png", "a/2.JPG", "1.tiff", "c.bmp", ".hidden.png", ".git/no.png"]
    write_pictures(tmp_path, *names)
    for name in ("notes.txt", "film.gif"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    images, others = find_images(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in images] == [
        "1.tiff", "a/2.JPG", "a/b/3.png", "c.bmp"]  # fmt: skip
    kind = "none of .bmp, .jfif, .jpeg, .jpg, .png, .tif, .tiff, .webp"
    assert {p.name: why for p, why in others.items()} == {
        ".git": "hidden", ".hidden.png": "hidden", "film.gif": kind, "notes.txt": kind,
        "pipe.png": "no file",
    }  # fmt: skip


def test_links_are_followed_but_not_in_circles(tmp_path):
    """To folders elsewhere, which may lead back or to each other; each is read once."""
    data, away = tmp_path / "data", write_pictures(tmp_path / "away", "1.png", "deep/2.png")
    other = write_pictures(tmp_path / "other", "3.png")
    write_pictures(data, "own/4.png")
    links = {
        data / "away": away, data / "deep": away / "deep", data / "5.png": away / "1.png",
        data / "again": data / "own", data / "own/up": data, data / "all": tmp_path,
        away / "back": data, away / "to": other, other / "fro": away,
        data / "lost": tmp_path / "nowhere", data / "lost.png": tmp_path / "nowhere.png",
    }  # fmt: skip
    for link, target in links.items():
        link.symlink_to(target)
    images, others = find_images(data)
    found = [path.relative_to(data).as_posix() for path in images]
    assert found == ["5.png", "away/1.png", "away/to/3.png", "deep/2.png", "lost.png", "own/4.png"]
    anyway = "a link to a folder that is read anyway"
    assert {path.relative_to(data).as_posix(): why for path, why in others.items()} == {
        "again": anyway, "all": anyway, "away/back": anyway, "away/deep": anyway,
        "away/to/fro": anyway, "lost": "a link to nothing", "own/up": anyway,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"1 of 6 images .* broken: .*lost\.png .*No such file"):
        read_folder(data)


def test_labels(tmp_path):
    for name, label in {"1.png": "", "kente/1.png": "kente", "a/b/1.png": "a/b"}.items():
        assert label_of(tmp_path / name, tmp_path) == label


def test_a_folder_is_read_with_its_labels(tmp_path):
    write_pictures(tmp_path, "kuba/1.png", "kente/2.png", "3.png")
    found = read_folder(tmp_path)
    assert found.labels == ["", "kente", "kuba"]
    assert [path.name for path in found.files] == ["3.png", "2.png", "1.png"]
    assert found.pixels.shape == (3, 3, 8, 8)
    assert found.pixels.dtype == np.uint8
    assert found.pixels.flags.c_contiguous
    assert found.pixels[:, :, 5, 5].tolist() == [[2, 0, 200], [1, 0, 200], [0, 0, 200]]
    assert read_folder(tmp_path, size=4).pixels.shape == (3, 3, 4, 4)


def test_digests_follow_the_pixels_and_not_the_files(tmp_path):
    before = read_folder(write_pictures(tmp_path, "a/1.png", "2.png")).digests()
    assert sorted(before) == ["2.png", "a/1.png"]
    assert before["2.png"] != before["a/1.png"]
    Image.open(tmp_path / "2.png").save(tmp_path / "2.png", compress_level=0)
    assert read_folder(tmp_path).digests() == before
    Image.new("RGB", (8, 8)).save(tmp_path / "2.png")
    assert {f for f, digest in read_folder(tmp_path).digests().items() if digest != before[f]} == {
        "2.png"
    }


def test_folders_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_pictures(tmp_path / "few", "1.png", "2.png")
    broken = write_pictures(tmp_path / "broken", "1.png", "2.png", "3.png")
    (broken / "2.png").write_bytes(b"\x89PNG")
    mixed = write_pictures(tmp_path / "mixed", "1.png", "2.png", "3.png")
    write_pictures(mixed, "0.png", size=(5, 9))
    for name, words in {
        "missing": "missing does not exist",
        "file": "is a file, not a folder",
        "empty": r"holds 0 images \(.*\.webp\), and at least 2 are needed",
        "broken": r"1 of 3 images in .*broken are broken: .*2\.png cannot be read as an image",
        "mixed": r"0\.png has 5x9 pixels and most of its folder have 8x8",
    }.items():
        with pytest.raises(UserError, match=words):
            read_folder(tmp_path / name, at_least=2)
    with pytest.raises(UserError, match=r"holds 2 images .* at least 3 are needed"):
        read_folder(tmp_path / "few", at_least=3)
    assert len(read_folder(tmp_path / "few", at_least=2).files) == 2
    assert len(read_folder(mixed, size=8).files) == 4


@pytest.mark.skipif("os.geteuid() == 0", reason="root may read everything")
def test_an_unreadable_folder_is_named(tmp_path):
    write_pictures(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(UserError, match=r"/a cannot be read \(Permission denied\)"):
            find_images(tmp_path)
    finally:
        (tmp_path / "a").chmod(0o755)


# ---- Showing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_every_level_survives_the_way_there_and_back(channels):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(channels, 0)
    image = from_picture(to_picture(levels / 255))
    assert image.shape == (channels, 16, 16)
    assert image.dtype == np.float32
    assert np.array_equal(image, levels / np.float32(255))


def test_images_are_rounded_and_clipped():
    image = torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 1.5]).expand(3, 2, 4)
    assert np.asarray(to_picture(image))[1, :, 2].tolist() == [0, 0, 1, 255]


def test_a_sheet_holds_every_image_in_its_place():
    """Five grey images make rows of three; the sixth place stays white, as do the gaps."""
    sheet = np.asarray(tile(torch.linspace(0.1, 0.5, 5)[:, None, None, None].expand(5, 3, 6, 4)))
    assert sheet.shape == (8 + 2 * (6 + 8), 8 + 3 * (4 + 8), 3)
    middles = sheet[8 + 3 :: 6 + 8, 8 + 2 :: 4 + 8, 0]
    assert middles.tolist() == [[26, 51, 76], [102, 128, 255]]
    corner = np.zeros(sheet.shape[:2], bool)
    for row, column in np.ndindex(2, 3):
        corner[8 + 14 * row :, 8 + 12 * column :][:6, :4] = True
    assert (sheet[~corner] == 255).all()


def test_sheets_as_asked_for():
    red = Image.new("RGB", (4, 4), "red")
    plain = tile([red] * 4, columns=4, gap=2)
    assert plain.size == (4 * 6 + 2, 4 + 2 * 2)
    large = tile([red] * 4, columns=4, gap=2, cell=40, resample=Image.Resampling.NEAREST)
    assert large.size == (4 * 42 + 2, 40 + 2 * 2)
    assert large.getpixel((41, 41)) == (255, 0, 0)
    words = tile([red], cell=40, title="A title wider than the one picture", captions=["kente"])
    pixels = np.asarray(words)
    column = (pixels == [255, 0, 0]).all(2).any(0)
    assert column.sum() == 40
    assert abs(column.argmax() - column[::-1].argmax()) <= 1  # in the middle
    row = (pixels == [255, 0, 0]).all(2).any(1)
    dark = (pixels < 100).all(2).any(1)
    assert dark[: row.argmax()].any()  # the title above
    assert dark[len(row) - row[::-1].argmax() :].any()  # the caption below


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.png"
    save_picture(bands(), path)
    with pytest.raises(OSError, match="cannot write mode"):
        save_picture(Image.new("F", (4, 4)), path)
    assert list(tmp_path.iterdir()) == [path]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(bands()))


def test_gifs_have_every_frame_its_time_and_its_colours(tmp_path):
    rng = np.random.default_rng(0)
    hues = rng.integers(0, 256, (3, 12, 3), np.uint8)  # twelve colours in each frame, 36 in all
    frames = [Image.fromarray(np.tile(row, (8, 1, 1))) for row in hues]
    save_gif(frames, tmp_path / "a.gif", [100, 50, 700])
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
        assert film.info["loop"] == 0  # for ever
        for number, milliseconds in enumerate([100, 50, 700]):
            film.seek(number)
            assert film.info["duration"] == milliseconds
            shown = np.asarray(film.convert("RGB")).astype(int)
            assert np.abs(shown - np.asarray(frames[number])).max() <= 8
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("size", [(62, 50), (61, 49)])
def test_films_play_everywhere(tmp_path, size):
    """H.264 with 4:2:0 colour, which needs even sides; frames in order, of the right length."""
    shades = (0, 80, 160, 240)
    save_film((Image.new("L", size, shade) for shade in shades), tmp_path / "a.mp4", 250)
    with imageio.get_reader(tmp_path / "a.mp4") as film:
        facts = film.get_meta_data()
        shown = [float(frame.mean()) for frame in film]
    assert (facts["fps"], facts["codec"], facts["size"]) == (4, "h264", (62, 50))
    assert "yuv420p" in facts["pix_fmt"]
    assert shown == pytest.approx(shades, abs=6)
    assert len(list(tmp_path.iterdir())) == 1
