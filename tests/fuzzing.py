"""Cases for test_fuzz.py: weights, pictures, manifests, logs and options as nobody would want them.

All about case `number` of a kind follows from Random(f"{kind} {number}"), so that it can be made
again. A case has a folder of its own: what the command reads in `input`, which has to stay as it
is, and `output`, in which it runs. It is a command's main() in a forked child, whose memory and
time are limited.
"""

import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import fork_server
import numpy as np
import torch
from conftest import Finished
from PIL import Image
from tiny_networks import bundled, labelled, make_diffusion

import ddpm_basics.evaluation.__main__ as evaluation
import ddpm_basics.fabrics.__main__ as fabrics
import exercise1_generate
import exercise2_explore
import exercise3_train

COMMANDS = {
    "exercise1_generate.py": exercise1_generate,
    "exercise2_explore.py": exercise2_explore,
    "exercise3_train.py": exercise3_train,
    "-m ddpm_basics.evaluation": evaluation,
    "-m ddpm_basics.fabrics": fabrics,
}
CPU = "--device cpu --precision fp32"
DRAW = f"{CPU} --num-samples 1 --steps 2"
NETWORK = f"{CPU} --image-size 8 --dim 8 --dim-mults 1 2 --batch-size 4"
RUN = f"--train {NETWORK} --results-dir run --weights-out run.pt"
SHORT = {"SHORT_STEPS": 1, "REGION_STEPS": 2, "REGION_ROUNDS": 1, "GUIDANCES": (0, 2),
         "STRENGTHS": (0.5,), "COLOUR_WEIGHTS": (0, 1)}  # fmt: skip  # of exercise 2
SECONDS, MEMORY = 20, 3 * 2**30  # that a case may take; real ones stay far below both


@dataclass
class Case:
    """A command and its words; `hopeless` where it must not end with exit code 0."""

    command: str
    argv: list[str]
    damage: str
    hopeless: bool = False
    same_as: list[str] = field(default_factory=list)  # what draws the same, if this draws at all


# ---- What is whole -------------------------------------------------------------------------------


@dataclass
class Base:
    """Whole files, made once, which the cases damage copies of."""

    folder: Path
    states: dict[str, dict]  # what stands in each kind of weight file


def make_base(folder, data):
    """Make a tiny network, train another one for two steps, draw three folders of fabrics."""
    plain = make_diffusion()
    labels = labelled(bundled(plain))
    states = {"bundled": bundled(plain), "labelled": labels, "process": plain.state_dict(),
              "unet": plain.model.state_dict()}  # fmt: skip
    shutil.copytree(data, folder / "data")
    torch.save(labels, folder / "whole.pt")
    (folder / "untouched.txt").write_text("mine")
    train = ["--data", "data", *RUN.split(), "--steps", "2", "--save-every", "1"]
    draw = ["--weights", "whole.pt", *DRAW.split(), "--samples-dir", "samples"]
    cloth = ["--workers", "1", "--size", "24", "--count"]
    for command, argv in (
        ("exercise3_train.py", train),
        ("exercise1_generate.py", draw),
        ("-m ddpm_basics.fabrics", ["--output", "fabrics", *cloth, "108"]),
        ("-m ddpm_basics.fabrics", ["--output", "heldout", *cloth, "60", "--split", "heldout"]),
    ):
        done = run(Case(command, argv, ""), folder)
        assert done.code == 0, done.stderr
    states["trainer"] = torch.load(folder / "run/model-2.pt", weights_only=True)
    return Base(folder, states)


# ---- Running -------------------------------------------------------------------------------------


def run(case, folder):
    """Call a command's main() in a child of this process, in a folder; see fork_server.py."""
    places = {name: str(folder / f".{name}") for name in ("stdout", "stderr")}
    request = {"argv": case.argv, "cwd": str(folder), "limit_memory": MEMORY, **places}
    pid = os.fork()
    if pid == 0:
        signal.alarm(6 * SECONDS)  # for one that waits; other processes may slow it down, too
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        vars(exercise2_explore).update(SHORT)
        vars(exercise3_train).update(NUM_SAMPLES=2, SAMPLING_STEPS=2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"))
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), errors="backslashreplace")
        fork_server.become_command(COMMANDS[case.command], request)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Finished(code, *(Path(place).read_text(errors="replace") for place in places.values()))


def snapshot(folder):
    """Tell what stands in a folder: {path: size and time of its last change}."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[path] = about.st_size, about.st_mtime_ns
    return found


def make_case(kind, number, base, folder):
    """Make the folder of a case, and what is in it."""
    for name in ("input", "output"):
        (folder / name).mkdir(parents=True)
    (folder / "input/untouched.txt").write_text("mine")
    return KINDS[kind](random.Random(f"{kind} {number}"), base, folder)


# ---- Bytes and values ----------------------------------------------------------------------------

NASTY = [None, True, 0, -1, 1, 3, 0.5, -0.5, 1e99, float("nan"), float("inf"), 10**30, -(2**63),
         "", "a", "nan", "64", "x" * 5000, "a\nb", "\ud800", "\x1b[2J", "ọ̀", "../untouched.txt",
         "/", ".", "all", "none", [], {}, [[]], [1, "a"], {"a": {}}, [0] * 1000]  # fmt: skip


def flip(rng, content):
    """Change some bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
    return bytes(changed)


def spoil_text(rng, content):
    """Change the bytes of a text in one of many ways."""
    place = rng.randrange(len(content))
    ways = {
        "flipped": lambda: flip(rng, content),
        "cut": lambda: content[:place],
        "without its beginning": lambda: content[place:],
        "twice": lambda: content + content,
        "with a hole": lambda: content[:place] + content[place + 30 :],
        "with zeros": lambda: content[:place] + bytes(50) + content[place:],
        "latin": lambda: content[:place] + b"\xe9\xff" + content[place:],
        "utf-16": lambda: content.decode().encode("utf-16"),
        "with a mark": lambda: b"\xef\xbb\xbf" + content,
        "with CRLF": lambda: content.replace(b"\n", b"\r\n"),
        "deep": lambda: b'{"a":' * 10**5,
        "lists in lists": lambda: b"[" * 10**5 + b"]" * 10**5,
        "a long number": lambda: content.replace(b"1", b"1" * 10**4, 1),
        "long": lambda: content * 200,
        "empty": lambda: b"",
        "zeros": lambda: bytes(len(content)),
    }
    name = rng.choice(sorted(ways))
    return name, ways[name]()


def places(content):
    """All (holder, key) in nested dictionaries and lists."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in list(keys):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from places(content[key])


def spoil_values(rng, content):
    """Replace, rename or drop one to three values in nested dictionaries and lists."""
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        # Long lists of the same kind would else take nearly all of the damage.
        found = list(places(content))
        top = [place for place in found if place[0] is content]
        if not found:
            break
        holder, key = rng.choice(top if rng.random() < 0.6 else found)
        way = rng.choice(["replace", "replace", "replace", "drop", "rename"])
        if way == "replace":
            holder[key] = copy.deepcopy(rng.choice(NASTY))
        elif way == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[
                rng.choice(["", "a", "../../input/untouched.txt", "x" * 300, "\ud800", "a\0b"])
            ] = holder.pop(key)
        done.append(f"{way} {str(key)[:40]}")
    return ", ".join(done)


# ---- Weight files --------------------------------------------------------------------------------


class Code:
    """What a pickle runs when it is opened as more than data."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def weights_of(content):
    """The dictionaries of a weight file in which tensors stand, innermost."""
    holders = [content] if any(isinstance(v, torch.Tensor) for v in content.values()) else []
    return holders + [h for v in content.values() if isinstance(v, dict) for h in weights_of(v)]


def spoil_tensor(rng, tensor):
    """Give a tensor other numbers, another shape or another type; True where that is fatal."""
    flat = tensor.clone().float().reshape(-1) if tensor.numel() else torch.zeros(1)
    ways = {
        "nan": lambda: flat.index_fill(0, torch.tensor([len(flat) // 2]), torch.nan).view_as(
            tensor
        ),
        "inf": lambda: torch.full_like(tensor.float(), torch.inf),
        "huge": lambda: torch.full_like(tensor.float(), 3e38),
        "zeros": lambda: torch.zeros_like(tensor),
        "negative": lambda: -tensor.float(),
        "flat": lambda: flat if tensor.dim() != 1 else flat[None],
        "one number": lambda: torch.tensor(1.0) if tensor.dim() else torch.ones(2, 2),
        "nothing": lambda: torch.zeros(0),
        "too long": lambda: torch.cat([flat, flat]),
        "a billion": lambda: torch.zeros(1).expand(2**30, 4),
        "of whole numbers": lambda: tensor.long(),
        "of truths": lambda: tensor.bool(),
        "complex": lambda: tensor.to(torch.complex64),
        "fp64": lambda: tensor.double(),
        "fp8": lambda: tensor.float().to(torch.float8_e4m3fn),
        "sparse": lambda: tensor.float().to_sparse(),
        "meta": lambda: tensor.to("meta"),
        "no tensor": lambda: copy.deepcopy(rng.choice(NASTY)),
    }
    name = rng.choice(sorted(ways))
    return name, ways[name](), name in ("nan", "inf", "huge", "flat", "one number", "nothing",
                                        "too long", "a billion", "no tensor")  # fmt: skip


def spoil_tensors(rng, content):
    """Change, drop or rename tensors; True where no network is left that could draw."""
    holder = rng.choice(weights_of(content))
    key = rng.choice(sorted(k for k in holder if isinstance(holder[k], torch.Tensor)))
    read = holder is content.get("ema", content) and not str(key).startswith("online")
    way = rng.choice(["spoil"] * 4 + ["drop", "rename"])
    if way == "spoil":
        way, holder[key], fatal = spoil_tensor(rng, holder[key])
    else:
        value, fatal = holder.pop(key), True
        if way == "rename":
            holder[rng.choice([f"{key}.more", "", 7, "model.more"])] = value
    return f"{key} {way}", fatal and read and "downs." in str(key)


def other_files(rng, path, marker):
    """Write something that is no weight file, or one that would run code."""
    code = Code(marker)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(rng.choice([code, {"ema": code}, 1])))
        archive.writestr("archive/version", "3\n")
    deep = []
    for _ in range(100):
        deep = [deep]
    ways = {
        "a pickle with code": lambda: path.write_bytes(pickle.dumps(code, rng.randrange(6))),
        "code in a zip": lambda: path.write_bytes(packed.getvalue()),
        "code among weights": lambda: torch.save({"ema": {"ema_model.model": code}}, path),
        "code in an old file": lambda: torch.save(
            {"step": code}, path, _use_new_zipfile_serialization=False
        ),
        "a pickle": lambda: path.write_bytes(pickle.dumps(rng.choice(NASTY), rng.randrange(6))),
        "a deep pickle": lambda: path.write_bytes(pickle.dumps(deep)),
        "a list": lambda: torch.save(copy.deepcopy(rng.choice(NASTY)), path),
        "one tensor": lambda: torch.save(torch.zeros(3), path),
        "an array": lambda: np.savez(path.open("wb"), np.zeros(3)),
        "random": lambda: path.write_bytes(rng.randbytes(rng.choice([1, 10, 1000]))),
        "zip and nonsense": lambda: path.write_bytes(b"PK\x03\x04" + rng.randbytes(500)),
        "text": lambda: path.write_text("weights " * 9),
        "empty": lambda: path.write_bytes(b""),
        "a folder": path.mkdir,
        "missing": lambda: None,
        "a link to nothing": lambda: path.symlink_to("nowhere"),
    }
    name = rng.choice(sorted(ways))
    ways[name]()
    return name, True


def spoil_weights(rng, content, path, marker):
    """Write a weight file with something wrong in it."""
    way = rng.choice(["bytes", "bytes", "tensors", "tensors", "tensors", "values", "values",
                      "labels", "config", "code", "other"])  # fmt: skip
    if way == "other":
        return other_files(rng, path, marker)
    damage, hopeless = "", False
    if way == "tensors":
        damage, hopeless = spoil_tensors(rng, content)
    elif way == "code":
        holder, key = rng.choice([place for place in places(content)])
        holder[key], damage, hopeless = Code(marker), f"code as {key}", True
    elif way == "labels":
        names = rng.choice([["a", "a", "b"], [1, 2, 3], "abc", ["all", "none", ""], ["a\nb"], [],
                            ["ọ" * 3000] * 3, {"a": 1}, 7, None, [[], {}, None]])  # fmt: skip
        _, table, _ = spoil_tensor(rng, torch.randn(3, 32))
        content["labels"] = {"names": names, "embedding": table}
        damage = f"labels {str(names)[:40]}"
    elif way in ("values", "config"):
        target = content.setdefault("config", {}) if way == "config" else content
        damage = spoil_values(rng, target) if target else ""
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.9)
    if way == "bytes":
        whole = path.read_bytes()
        if rng.random() < 0.4:
            path.write_bytes(whole[: rng.randrange(len(whole) - 100)])
            return "cut", True
        path.write_bytes(flip(rng, whole))
        return "flipped", False
    return damage, hopeless


def weights_case(rng, base, folder):
    """A weight file for exercise 1 or 2, --init-weights or --resume."""
    reader = rng.choice(["draw"] * 5 + ["explore", "init", "init", "resume", "resume", "resume"])
    form = (
        rng.choice(sorted(base.states)) if reader != "resume" or rng.random() < 0.2 else "trainer"
    )
    content = copy.deepcopy(dict(base.states[form]))
    path, marker = folder / "input/weights.pt", folder / "output/marker"
    (folder / "output/run").mkdir()
    if reader == "resume":
        path = folder / "output/run/model-2.pt"
    damage, hopeless = spoil_weights(rng, content, path, marker)
    damage = f"{form}: {damage}"
    if reader == "draw":
        words = ["--weights", str(path), *DRAW.split()]
        whole = ["--weights", str(base.folder / "whole.pt"), *DRAW.split()]
        same = (
            whole
            if (form, damage) == ("labelled", "labelled: flipped") and zipfile.is_zipfile(path)
            else []
        )
        return Case("exercise1_generate.py", words, damage, hopeless, same)
    if reader == "explore":
        words = ["--weights", str(path), "--data", str(base.folder / "data"), *CPU.split()]
        return Case("exercise2_explore.py", [*words, "--part", "c"], damage, hopeless)
    words = ["--data", str(base.folder / "data"), *RUN.split(), "--steps", "3"]
    if reader == "init":
        words += ["--init-weights", str(path), "--steps", "1"]
        return Case("exercise3_train.py", words, damage, hopeless)
    hopeless = hopeless and "code" in damage
    return Case("exercise3_train.py", [*words, "--resume"], damage, hopeless)


# ---- Pictures ------------------------------------------------------------------------------------

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB",
         "HSV", "I", "F", "I;16", "I;16B")  # fmt: skip
SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp",
          "GIF": ".png", "PPM": ".bmp", "ICO": ".png", "TGA": ".tif", "JPEG2000": ".jpg",
          "AVIF": ".webp", "DIB": ".bmp", "PCX": ".png", "SGI": ".jfif"}  # fmt: skip
ODD_NAMES = ["a\nb", "-rf", "--help", "%s{}", "x" * 200, " ", "ọ̀ yẹ́", "\udce9\udcff", "a;b|c",
             "'\"", "\x1b[2J", "con", "..a", "$HOME"]  # fmt: skip


def picture_of(rng):
    """A picture of any mode, from one pixel to thin ones of 20,000 a side."""
    long = rng.choice([1, 2, 7, 8, 9, 64, 257, 1000, 5000, 20000])
    short = rng.choice([1, 2, 8, 33, long]) if long < 1000 else rng.choice([1, 2, 9])
    size = rng.choice([(long, short), (short, long)])
    mode = rng.choice(MODES)
    picture = Image.new(rng.choice(["L", "RGB"]), size)
    picture.frombytes(rng.randbytes(len(picture.tobytes())))
    with suppress(ValueError, OSError):
        picture = picture.convert(mode)
    if picture.mode != mode:
        with suppress(ValueError, OSError):
            picture = Image.new(mode, size)
    return picture


def saved(rng, picture):
    """The bytes of a picture in a format that takes its mode, and the suffix of its name."""
    for kind in rng.sample(sorted(SUFFIX), len(SUFFIX)):
        more = rng.choice([
            {}, {}, {}, {"exif": b"Exif\0\0" + rng.randbytes(40)}, {"lossless": True},
            {"compression": rng.choice(["tiff_lzw", "jpeg", "group4", "tiff_adobe_deflate"])},
            {"transparency": rng.choice([0, 255, b"\x00\x80"])}, {"icc_profile": rng.randbytes(99)},
            {"save_all": True, "append_images": [picture, picture]}, {"progressive": True},
        ])  # fmt: skip
        file = io.BytesIO()
        try:
            picture.save(file, kind, **more)
        except Exception:  # this format does not take it
            continue
        if file.getvalue():
            return file.getvalue(), SUFFIX[kind]
    return rng.randbytes(99), ".png"


def chunk(name, content):
    """A chunk of a PNG."""
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


@cache
def bombs():
    """Small files that claim to be large ones: [(bytes, suffix)]."""
    sides = 100_000, 100_000
    signature, zeros = b"\x89PNG\r\n\x1a\n", zlib.compress(bytes(10**7), 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *sides, 8, 2, 0, 0, 0))
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**9 // 4), 9))
    tiff = Image.new("L", (8, 8))
    file = io.BytesIO()
    tiff.save(file, "TIFF", tiffinfo={})
    tags = file.getvalue().replace(struct.pack("<HHII", 256, 4, 1, 8), b"\0\1\4\0\1\0\0\0" +
                                   struct.pack("<I", sides[0]))  # fmt: skip
    tags = tags.replace(struct.pack("<HHII", 257, 4, 1, 8), b"\1\1\4\0\1\0\0\0" +
                        struct.pack("<I", sides[1]))  # fmt: skip
    bmp = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, *sides, 1, 24, 0, 0, 0, 0, 0, 0)
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    frame = jpeg.getvalue().replace(b"\x08\x00\x08\x00\x08\x03", b"\x08\xff\xdc\xff\xdc\x03")
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes([0x80, 0, 0, 0, 0, 0, 255, 255, 255])
    gif += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\x00;"
    end = chunk(b"IEND", b"")
    return [
        (signature + header + chunk(b"IDAT", zeros) + end, ".png"),
        (signature + small + text + chunk(b"IDAT", zlib.compress(bytes(200))) + end, ".png"),
        (signature + small + chunk(b"IDAT", zeros) + end, ".png"),
        (tags, ".tif"), (bmp, ".bmp"), (frame, ".jpg"), (gif, ".png"), (gif, ".jfif"),
    ]  # fmt: skip


def no_picture(rng, path):
    """Put something at a path that no decoder should wait for."""
    ways = {
        "text": lambda: path.write_text("no picture"),
        "empty": lambda: path.write_bytes(b""),
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link to nothing": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path),
        "a link to zeros": lambda: path.symlink_to("/dev/zero"),
        "random": lambda: path.write_bytes(rng.randbytes(300)),
        "weights": lambda: torch.save({"a": torch.zeros(9)}, path),
    }
    name = rng.choice(sorted(ways))
    ways[name]()
    return name


def bad_picture(rng, folder, number):
    """Write one picture that is odd, damaged or none; return its path and what it is."""
    name = f"{rng.choice(ODD_NAMES) if rng.random() < 0.2 else 'picture'}{number}"
    below = folder / rng.choice([".", ".", "sub", "/".join("d" * 40), rng.choice(ODD_NAMES)])
    below.mkdir(parents=True, exist_ok=True)
    way = rng.choice(["odd", "odd", "flipped", "flipped", "flipped", "cut", "bomb", "none"])
    if way == "none":
        path = below / f"{name}{rng.choice(['.png', '.jpg', '.PNG', '.tiff', '.txt'])}"
        return path, no_picture(rng, path)
    if way == "bomb":
        content, suffix = rng.choice(bombs())
    else:
        picture = picture_of(rng)
        content, suffix = saved(rng, picture)
        way += f" {picture.mode} {picture.width}x{picture.height}{suffix}"
    if way.startswith("flipped"):
        # Near its beginning, where what counts stands, or anywhere.
        head = len(content) if rng.random() < 0.5 else min(len(content), 60)
        content = flip(rng, content[:head]) + content[head:]
    elif way.startswith("cut"):
        kept = rng.randrange(len(content))
        way += f" to {kept} of {len(content)}"
        content = content[:kept]
    path = below / (name + suffix)
    path.write_bytes(content)
    return path, way


def pictures_case(rng, base, folder):
    """A folder of pictures, most of them good; or one picture, or a mask."""
    data = folder / "input/data"
    data.mkdir()
    reader = rng.choice(["verify"] * 10 + ["photos"] * 3 + ["train", "picture", "mask", "evaluate",
                         "figure", "samples"])  # fmt: skip
    found = [bad_picture(rng, data, i) for i in range(rng.choice([1, 1, 2, 4]))]
    path, damage = found[0][0], ", ".join(what for _, what in found)
    good = base.folder / ("heldout" if reader == "evaluate" else "data")
    (data / "good").symlink_to(good)
    if rng.random() < 0.1:
        (data / "loop").symlink_to(data)
        (data / "good again").symlink_to(good)
    grey = rng.choice([[], [], [], ["--channels", "1"]])
    if reader == "verify":
        return Case("exercise3_train.py", ["--verify", "--data", str(data), *grey], damage)
    if reader == "train":
        words = ["--data", str(data), *RUN.split(), *grey, "--steps", "1"]
        return Case("exercise3_train.py", words, damage)
    if reader == "photos":
        words = ["--photos", str(data), "--output", "out", "--size", "8", "--workers", "1"]
        skip = rng.choice([[], ["--skip-broken"]])
        return Case("-m ddpm_basics.fabrics", words + skip, damage)
    if reader == "evaluate":
        words = [str(data), "--train", str(base.folder / "fabrics"), "--heldout"]
        return Case("-m ddpm_basics.evaluation", [*words, str(base.folder / "heldout")], damage)
    if reader == "figure":
        shutil.copy(path, folder / "output/figure.png") if path.is_file() else None
        words = [str(base.folder / "fabrics"), "--train", str(base.folder / "fabrics"), "--heldout"]
        words += [str(base.folder / "heldout"), "--figure", "figure.png"]
        return Case("-m ddpm_basics.evaluation", words, damage)
    if reader == "samples":
        shutil.copytree(base.folder / "samples", folder / "output/samples")
        if path.is_file():
            shutil.copy(path, folder / "output/samples/fabric_0000.png")
        words = ["--weights", str(base.folder / "whole.pt"), *DRAW.split(), "--samples-dir"]
        return Case("exercise1_generate.py", [*words, "samples"], damage)
    words = [
        "--weights",
        str(base.folder / "whole.pt"),
        "--data",
        str(base.folder / "data"),
        f"--{reader}={path}",
        *CPU.split(),
        "--part",
        "f" if reader == "mask" else "c",
    ]
    return Case("exercise2_explore.py", words, damage)


# ---- Manifests and logs --------------------------------------------------------------------------


def spoil_json(rng, path):
    """Damage a JSON file in its bytes or in its values."""
    content = path.read_bytes()
    if rng.random() < 0.4:
        damage, content = spoil_text(rng, content)
    else:
        values = json.loads(content)
        damage = spoil_values(rng, values)
        content = json.dumps(values).encode()
    path.write_bytes(content)
    return damage


def manifests_case(rng, base, folder):
    """The manifest of a folder of fabrics, or the record of a folder of samples."""
    output = folder / "output"
    if rng.random() < 0.35:
        shutil.copytree(base.folder / "samples", output / "samples")
        damage = spoil_json(rng, output / "samples/generation.json")
        words = ["--weights", str(base.folder / "whole.pt"), *DRAW.split(), "--samples-dir"]
        return Case("exercise1_generate.py", [*words, "samples"], damage)
    (output / "fabrics").mkdir()
    shutil.copytree(base.folder / "fabrics", output / "fabrics", dirs_exist_ok=True)
    manifest = output / "fabrics/manifest.json"
    half = rng.random() < 0.4  # as if it had been interrupted
    if half:
        values = json.loads(manifest.read_bytes()) | {"sha256": None, "pixels": {}}
        manifest.write_text(json.dumps(values))
    damage = spoil_json(rng, manifest)
    reader = rng.choice(["draw", "draw", "force", "verify", "verify", "train", "evaluate"])
    if reader == "verify":
        words = ["--verify", "--data", "fabrics"]
        return Case("exercise3_train.py", words, damage)
    if reader == "train":
        words = ["--data", "fabrics", "--heldout", str(base.folder / "heldout"), *RUN.split()]
        return Case("exercise3_train.py", [*words, "--steps", "1"], damage)
    if reader == "evaluate":
        words = ["fabrics", "--train", "fabrics", "--heldout", str(base.folder / "heldout")]
        return Case("-m ddpm_basics.evaluation", words, damage)
    words = ["--output", "fabrics", "--count", "108", "--size", "24", "--workers", "1"]
    force = ["--force"] if reader == "force" else []
    return Case("-m ddpm_basics.fabrics", words + force, damage)


CELLS = ["", "nan", "inf", "-1", "1e400", "1e99", "0", "0x10", "1_000", "٣", "1,5", '"2"', " 7 ",
         "x" * 9999, "=1+1", "1;2", "\x00", "True", "2.5"]  # fmt: skip


def spoil_table(rng, path):
    """Damage losses.csv in its bytes, its cells or its rows, or put something else there."""
    content = path.read_bytes()
    way = rng.choice(["bytes", "bytes", "cells", "cells", "rows", "other"])
    if way == "bytes":
        way, content = spoil_text(rng, content)
    elif way == "cells":
        rows = [line.split(",") for line in content.decode().splitlines()]
        for _ in range(rng.choice([1, 2, 10])):
            row = rng.choice(rows)
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        content = "\n".join(map(",".join, rows)).encode() + b"\n"
    elif way == "rows":
        lines = content.splitlines(keepends=True)
        rng.shuffle(lines)
        content = b"".join(lines * rng.choice([1, 2, 3000]))
    else:
        path.unlink()
        link = partial(path.symlink_to, "../../input/untouched.txt")
        return rng.choice([("a folder", path.mkdir), ("missing", bool), ("a link", link)])
    return way, lambda: path.write_bytes(content)


def logs_case(rng, base, folder):
    """losses.csv or run.json of a run that goes on."""
    shutil.copytree(base.folder / "run", folder / "output/run")
    damage = []
    if rng.random() < 0.8:
        way, write = spoil_table(rng, folder / "output/run/losses.csv")
        write()
        damage.append(f"losses.csv {way}")
    if not damage or rng.random() < 0.3:
        damage.append(f"run.json {spoil_json(rng, folder / 'output/run/run.json')}")
    if rng.random() < 0.1:
        (folder / "output/run/run.json").unlink()
        (folder / "output/run/run.json").mkdir()
        damage.append("run.json a folder")
    steps = rng.choice(["2", "3", "3", "3", "4"])
    words = ["--data", str(base.folder / "data"), *RUN.split(), "--steps", steps]
    resume = ["--resume"] if rng.random() < 0.95 else []
    return Case("exercise3_train.py", words + resume, ", ".join(damage))


# ---- Options -------------------------------------------------------------------------------------

WORDS = ["0", "-1", "1", "2", "3", "7", "8", "16", "1e99", "nan", "inf", "", " ", "ọ̀", "x" * 5000,
         "²", "٣", "1_0", "0x8", "1.5", "1e-9", "99999999999999999999999", "2147483648", "all",
         "none", "a", "--train", "-", "\udcff", "a\nb"]  # fmt: skip
NUMBERS = ["1", "2", "3", "4", "7", "8", "12", "16", "24", "32", "0.5", "100"]
COUNTS = ["0", "-1", "1", "2", "3", "7", "1e99", "nan", "", "1.5", "99999999999999999999999"]
PATHS = ["", ".", "..", "~", "run", "new", "closed/x", "mine.png", "mine.pt", "mine", "mine.json",
         "a\nb.png", "\udcff.png", "x" * 300, "a/b/c.png", "new.png", "new.pt",
         "new.json"]  # fmt: skip
SOURCES = [*PATHS, "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/fd/1", "{base}",
           "{base}/untouched.txt", "{base}/data", "{base}/whole.pt", "{base}/data/a/0000.png",
           "{base}/fabrics", "{base}/samples", "{base}/run/model-2.pt"]  # fmt: skip
COMMON = {"--device": ["cpu", "auto", "cuda", "mps", "tpu"], "--seed": WORDS,
          "--precision": ["fp32", "bf16", "fp16", "auto", "fp8"]}  # fmt: skip
PROCESS = {"--objective": ["pred_v", "pred_noise", "pred_x0", "v"],
           "--schedule": ["sigmoid", "cosine", "linear", "s"]}  # fmt: skip
OPTIONS = {
    "exercise1_generate.py": {
        **COMMON, **PROCESS, "--weights": SOURCES, "--num-samples": COUNTS, "--label": WORDS,
        "--guidance": WORDS, "--sampler": ["dpmpp", "ddim", "ddpm", "x"], "--steps": WORDS,
        "--output": PATHS, "--samples-dir": PATHS, "--image-size": WORDS, "--batch-size": WORDS,
    },
    "exercise2_explore.py": {
        **COMMON, "--part": ["c", "d", "h", "", "f"], "--weights": SOURCES, "--data": SOURCES,
        "--picture": SOURCES, "--mask": SOURCES, "--label": WORDS, "--output-dir": PATHS,
    },
    "exercise3_train.py": {
        **COMMON, **PROCESS, "--verify": [], "--train": [], "--quick": [], "--resume": [],
        "--data": SOURCES, "--crop": WORDS, "--channels": ["1", "2", "3"], "--heldout": SOURCES,
        "--image-size": WORDS, "--dim": WORDS, "--dim-mults": WORDS,
        "--loss-weight": ["min5", "simple", "x"], "--steps": COUNTS,
        "--batch-size": WORDS, "--gradient-accumulate": COUNTS, "--lr": WORDS,
        "--lr-final": WORDS, "--warmup": WORDS, "--compile": ["off", "maybe"],
        "--results-dir": PATHS, "--save-every": WORDS, "--log-every": WORDS, "--keep": WORDS,
        "--init-weights": SOURCES, "--weights-out": [*PATHS, "pipe.pt"],
    },
    "-m ddpm_basics.evaluation": {
        "": SOURCES, "--train": SOURCES, "--heldout": SOURCES, "--output": PATHS, "--figure": PATHS,
        "--seed": WORDS, "--device": COMMON["--device"],
    },
    "-m ddpm_basics.fabrics": {
        "--output": PATHS, "--count": COUNTS, "--seed": WORDS,
        "--split": ["train", "heldout", "test"], "--photos": SOURCES, "--skip-broken": [],
        "--size": WORDS, "--force": [], "--workers": ["0", "1", "2", "x"],
    },
}  # fmt: skip
START = {  # options that make each command a short one; what comes after them counts
    "exercise1_generate.py": f"--weights {{base}}/whole.pt {DRAW}",
    "exercise2_explore.py": f"--weights {{base}}/whole.pt --data {{base}}/data {CPU} --part c",
    "exercise3_train.py": f"--data {{base}}/data {NETWORK} --steps 1",
    "-m ddpm_basics.evaluation": "{base}/fabrics --train {base}/fabrics --heldout {base}/heldout",
    "-m ddpm_basics.fabrics": "--count 5 --size 8 --workers 1",
}


def options_case(rng, base, folder):
    """One to six options with values that are wrong, odd, or contradict each other."""
    command = rng.choice([*START, "exercise1_generate.py", "exercise3_train.py"])
    for name in ("closed", "mine.png", "mine.pt", "mine.json", "mine/0000.png"):
        path = folder / "output" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"mine: {name}")
    os.mkfifo(folder / "output/pipe.pt")
    words = START[command].split()
    if command == "exercise3_train.py":
        words += [rng.choice(["--train", "--train", "--train", "--verify"])]
    for _ in range(rng.choice([1, 1, 2, 2, 3, 6])):
        option = rng.choice(sorted(OPTIONS[command]))
        values = OPTIONS[command][option]
        count = rng.choice([1] * 20 + [0, 2])
        if values in (WORDS, COUNTS) and rng.random() < 0.6:
            values = NUMBERS
        words += [option] * bool(option) + [rng.choice(values) for _ in range(count) if values]
    words = [word.replace("{base}", str(base.folder)) for word in words]
    return Case(command, words, "")


KINDS = {
    "weights": weights_case,
    "pictures": pictures_case,
    "manifests": manifests_case,
    "logs": logs_case,
    "options": options_case,
}
