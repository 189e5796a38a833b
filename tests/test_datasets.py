"""Data sets by name: tiny files in their real formats go through the downloads of torchvision."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import load_script, write_blocks
from PIL import Image
from torchvision import datasets as library

from ddpm_basics.datasets import DATA_SETS, find_data_set, fit, read_data_set
from ddpm_basics.runs import Run

ex3 = load_script("exercise3_train")
TINY = ["--dim", "8", "--dim-mults", "1", "2", "--batch-size", "8", "--steps", "2", "--device",
        "cpu", "--precision", "fp32", "--log-every", "1"]  # fmt: skip
COUNT = 30  # pictures in each part of a tiny data set


class Answer(io.BytesIO):
    """What a server sends: a file, or nothing where there is no network."""

    def __init__(self, folder, request):
        path = folder / Path(request.full_url).name
        if not path.is_file():
            raise URLError("Name or service not known")
        super().__init__(path.read_bytes())
        self.url, self.length = request.full_url, path.stat().st_size


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def numbers(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def serve_mnist(folder, patch, kind):
    """IDX files, gzipped, under the names and checksums that torchvision asks for."""
    resources = []
    for part, (name, _) in enumerate(kind.resources):
        shape, magic = ((COUNT, 28, 28), 0x803) if "images" in name else ((COUNT,), 0x801)
        values = numbers(shape, part // 2) if magic == 0x803 else np.arange(COUNT) % 10
        head = b"".join(n.to_bytes(4, "big") for n in (magic, *shape))
        (folder / name).write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))
        resources.append((name, md5(folder / name)))
    patch.setattr(kind, "resources", resources)
    return [numbers((COUNT, 28, 28), part)[:, None] for part in (0, 1)]


def serve_cifar(folder, patch):
    """A tar of pickled batches, each picture a row of 3,072 numbers."""
    kind, pixels = library.CIFAR10, numbers((COUNT, 3, 32, 32))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog"]
    parts = {name: (pixels[i * 6 : i * 6 + 6]) for i, (name, _) in enumerate(kind.train_list)}
    parts["test_batch"] = numbers((COUNT, 3, 32, 32), 1)
    contents = {name: {"data": part.reshape(len(part), -1), "labels": [*range(len(part))]}
                for name, part in parts.items()}  # fmt: skip
    contents["test_batch"]["labels"] = [5] * COUNT
    contents["batches.meta"] = {"label_names": names}
    sums = {}
    with tarfile.open(folder / kind.filename, "w:gz") as archive:
        for name, content in contents.items():
            data = pickle.dumps(content)
            sums[name] = hashlib.md5(data).hexdigest()
            entry = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    patch.setattr(kind, "tgz_md5", md5(folder / kind.filename))
    patch.setattr(kind, "train_list", [[name, sums[name]] for name, _ in kind.train_list])
    patch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    patch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    return [pixels, parts["test_batch"]]


def serve_celeba(folder, patch):
    """A zip of JPEGs and five tables; a drive that hands them out."""
    kind, names = library.CelebA, [f"{i:06d}.jpg" for i in range(1, 2 * COUNT + 1)]
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for i, name in enumerate(names):
            file = io.BytesIO()
            Image.new("RGB", (178, 218), (4 * i, 80, 160)).save(file, "JPEG")
            archive.writestr(f"img_align_celeba/{name}", file.getvalue())
    rows = {"list_eval_partition.txt": lambda i: f"{i // COUNT}", "identity_CelebA.txt": str}
    for _, _, name in kind.file_list[1:]:
        head = "" if name in rows else f"{len(names)}\nA B\n"
        lines = [f"{n} {rows.get(name, lambda i: '-1  1')(i)}\n" for i, n in enumerate(names)]
        (folder / name).write_text(head + "".join(lines))
    files = [(name, md5(folder / name), name) for _, _, name in kind.file_list]
    patch.setattr(kind, "file_list", files)

    def hand_out(name, root, filename, checksum):
        os.makedirs(root, exist_ok=True)
        shutil.copy(folder / name, root)

    patch.setattr(library.celeba, "download_file_from_google_drive", hand_out)
    patch.setitem(sys.modules, "gdown", SimpleNamespace())
    colours = np.array([(4 * i, 80, 160) for i in range(2 * COUNT)])
    flat = colours[:, :, None, None] * np.ones((64, 64))
    return [flat[:COUNT], flat[COUNT:]]


SERVERS = {
    "mnist": partial(serve_mnist, kind=library.MNIST),
    "fashion_mnist": partial(serve_mnist, kind=library.FashionMNIST),
    "cifar10": serve_cifar,
    "celeba": serve_celeba,
}


SOURCES = {
    "mnist": library.MNIST.mirrors[0],
    "fashion_mnist": library.FashionMNIST.mirrors[0],
    "cifar10": library.CIFAR10.url,
    "celeba": "Google Drive",
}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """served(name) -> pixels of both parts, whose files can be fetched into an empty folder."""
    server = tmp_path / "server"
    for folder in (server, tmp_path / "here"):
        folder.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, **_: Answer(server, request))

    def serve(name):
        return SERVERS[name](server, monkeypatch)

    return serve


@pytest.mark.parametrize("name", SERVERS)
def test_they_are_fetched_once_and_read(name, served, monkeypatch, capsys):
    """Pixels, labels and both parts; the second time nobody asks the server."""
    known, originals = DATA_SETS[name], served(name)
    size = min(known.side, 64)
    for part, more in ((0, {}), (1, {"train": False, "at_most": 20})):
        found = read_data_set(name, size, known.channels, **more)
        chosen = np.linspace(0, COUNT - 1, 20).round().astype(int) if part else slice(None)
        expected = originals[part][chosen].astype(int)
        error = np.abs(found.pixels.astype(int) - expected).max()
        assert found.pixels.dtype == np.uint8
        assert error <= (3 if name == "celeba" else 0)  # JPEG
        if part == 0:
            said = capsys.readouterr().out
            assert said.startswith(f"Fetching {name} from {SOURCES[name]}")
            assert said.count("\n") == 1
            monkeypatch.setattr(urllib.request, "urlopen", None)
            monkeypatch.setattr(library.celeba, "download_file_from_google_drive", None)
            labels = {
                "mnist": "3 - three", "fashion_mnist": "Dress", "cifar10": "cat", "celeba": "",
            }  # fmt: skip
            assert found.labels[3] == labels[name]
            assert len(set(found.labels)) == {"celeba": 1, "cifar10": 6}.get(name, 10)
            assert len(set(found.digests().values())) == COUNT
    assert os.listdir() == ["data"]


def test_digits_come_with_scikit_learn():
    train, heldout = read_data_set("digits", 8, 1), read_data_set("digits", 8, 1, train=False)
    assert len(train.pixels) + len(heldout.pixels) == 1797
    assert not set(train.digests().values()) & set(heldout.digests().values())
    assert set(np.unique(train.pixels)) == {round(255 * level / 16) for level in range(17)}
    ones, zeros = (np.array(train.labels) == label for label in "10")
    middle = train.pixels[:, 0, 3:5, 3:5].mean((1, 2))
    assert middle[ones].mean() > 200 > 50 > middle[zeros].mean(), "a nought is hollow"


def test_28_is_set_into_32_and_enlarged_beyond():
    picture = Image.fromarray(numbers((28, 28)))
    framed = np.asarray(fit(picture, 32))
    assert np.array_equal(framed[2:30, 2:30], np.asarray(picture))
    framed = framed.copy()
    framed[2:30, 2:30] = 0
    assert not framed.any()
    assert np.asarray(fit(picture, 28)).tobytes() == picture.tobytes()
    assert np.asarray(fit(picture, 64))[[0, -1]].any()


# ---- What follows the data where it is not typed -------------------------------------------------


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """parsed(words) -> the options that the exercise would train with, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(ex3, "train", seen.append)

    def parse(words):
        assert ex3.main(["--train", *words.split()]) == 0
        return seen.pop()

    return parse


@pytest.mark.parametrize(
    ("words", "size", "channels", "flip", "results", "weights"),
    [
        ("--data mnist", 32, 1, "off", "mnist", "models/ddpm_mnist.pt"),
        ("--data mnist --dim-mults 1 2 4", 28, 1, "off", "mnist", "models/ddpm_mnist.pt"),
        ("--data fashion_mnist --flip off", 32, 1, "off", "fashion_mnist",
         "models/ddpm_fashion_mnist.pt"),
        ("--data fashion_mnist", 32, 1, "on", "fashion_mnist", "models/ddpm_fashion_mnist.pt"),
        ("--data cifar10", 32, 3, "on", "cifar10", "models/ddpm_cifar10.pt"),
        ("--data cifar10 --channels 1", 32, 1, "on", "cifar10", "models/ddpm_cifar10.pt"),
        ("--data celeba", 64, 3, "on", "celeba", "models/ddpm_celeba.pt"),
        ("--data celeba --quick", 32, 3, "on", "quick/celeba",
         "training_results/quick/ddpm_celeba.pt"),
        ("--data digits", 8, 1, "off", "digits", "models/ddpm_digits.pt"),
        ("--data digits --quick", 8, 1, "off", "quick/digits",
         "training_results/quick/ddpm_digits.pt"),
        ("--data digits --image-size 16 --flip on --results-dir training_results/here", 16, 1,
         "on", "here", "models/ddpm_digits.pt"),
        ("", 64, 3, "on", "", "models/ddpm_african_fabrics.pt"),
    ],
)  # fmt: skip
def test_what_follows_the_data(parsed, words, size, channels, flip, results, weights):
    options = parsed(words)
    assert (options.image_size, options.channels, options.flip) == (size, channels, flip)
    assert options.results_dir == Path("training_results") / results
    assert options.weights_out == Path(weights)


def test_a_folder_of_that_name_wins(train, capsys):
    write_blocks(Path("digits"), 120)
    assert find_data_set(Path("digits")) is None
    code, said, complaint = train("digits")
    assert code == 0, complaint
    assert "120 images from digits (the folder here, not the data set of that name)" in said
    assert "Mirrored    half of them" in said
    assert ex3.main(["--verify", "--data", "digits"]) == 0
    assert "digits (the folder here, not the data set" in capsys.readouterr().out


# ---- From the data to pictures -------------------------------------------------------------------


def test_from_mnist_to_a_seven(served, capsys):
    """A grey network at 28x28, told what its labels are; nothing of it lies where fabrics do."""
    served("mnist")
    assert ex3.main(["--verify", "--data", "mnist"]) == 0
    assert "the data set mnist (28x28, padded to 32x32)" in capsys.readouterr().out
    assert ex3.main(["--train", "--data", "mnist", *TINY]) == 0
    said = capsys.readouterr().out
    assert "28x28 images" in said
    assert "30 images from the data set mnist (28x28) with 10 labels, 30 held-out ones" in said
    assert "Mirrored    none" in said
    record = json.loads(Path("training_results/mnist/run.json").read_text())
    assert (record["data_set"], record["flip"], record["channels"]) == ("mnist", "off", 1)
    assert sorted(os.listdir("training_results")) == ["mnist"]
    assert os.listdir("models") == ["ddpm_mnist.pt"]
    words = ["--weights", "models/ddpm_mnist.pt", "--label", "7 - seven", "--num-samples", "2",
             "--steps", "2", "--samples-dir", "sevens", "--device", "cpu"]  # fmt: skip
    assert load_script("exercise1_generate").main(words) == 0
    for path in Path("sevens").glob("*.png"):
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("L", (28, 28))


def test_flips_are_off_where_they_are():
    """For every row of a step; nothing else about it changes."""
    steps = {}
    for flip in ("on", "off"):
        run = SimpleNamespace(
            options=SimpleNamespace(seed=1, flip=flip), effective_batch=64,
            data=SimpleNamespace(images=torch.zeros(9, 1, 8, 8)),
            diffusion=SimpleNamespace(num_timesteps=10, image_size=(8, 8)),
        )  # fmt: skip
        steps[flip] = Run.numbers(run, 1)
    assert steps["on"].flip.any()
    assert not steps["off"].flip.any()
    for on, off in zip(steps["on"]._replace(flip=torch.ones(1)),
                       steps["off"]._replace(flip=torch.ones(1)), strict=True):  # fmt: skip
        assert torch.equal(on, off)


def test_a_run_goes_on_as_it_began(train, tiny_data, monkeypatch):
    """Flips and loss are those of its checkpoint, and others are refused."""
    penalties, asked = sys.modules["exercise3_train"].PENALTIES, []
    l1 = penalties["l1"]
    monkeypatch.setitem(penalties, "l2", None)
    monkeypatch.setitem(penalties, "l1", lambda x, *y, **z: asked.append(len(x)) or l1(x, *y, **z))
    code, _, complaint = train(tiny_data, "--flip", "off", "--loss", "l1")
    assert code == 0, complaint
    assert sum(asked) == 4 * 8 + 120, "of each step, and of the fixed losses"
    code, said, complaint = train(tiny_data, "--resume", "--steps", 5)
    assert code == 0, complaint
    assert "Mirrored    none" in said
    record = json.loads(Path("run/run.json").read_text())
    assert (record["flip"], record["loss"], record["steps_done"]) == ("off", "l1", 5)
    for words, named in ((["--flip", "on"], "flip: off in the file, on here"),
                         (["--loss", "huber"], "loss: l1 in the file, huber here")):  # fmt: skip
        code, _, complaint = train(tiny_data, "--resume", "--steps", 6, *words)
        assert code == 1
        assert named in complaint
    # Checkpoints of before these options were recorded: mirrored, squared.
    state = torch.load("run/model-5.pt", weights_only=True)
    for key in ("flip", "loss", "data_set"):
        del state["config"][key]
    torch.save(state, "run/model-5.pt")
    code, _, complaint = train(tiny_data, "--resume", "--steps", 6, "--loss", "l1")
    assert "loss: l2 in the file, l1 here" in complaint


# ---- What is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_offline_one_sentence_says_what_from_where(name, served, monkeypatch, capsys):
    def refuse(*_):
        raise URLError("Name or service not known")

    monkeypatch.setattr(library.celeba, "download_file_from_google_drive", refuse)
    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace())
    assert ex3.main(["--train", "--data", name, *TINY]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"Error: The data set {name} can neither be read in data/ nor ")
    assert f" fetched from {SOURCES[name]} (" in said


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn.datasets"), ("celeba", "gdown")])
def test_a_missing_package_is_one_sentence(name, module, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert ex3.main(["--verify", "--data", name]) == 1
    assert capsys.readouterr().err.strip().endswith("pip install -r requirements-extras.txt")
