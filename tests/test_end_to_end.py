"""The house as a newcomer meets it: a clean clone, and commands that are started elsewhere."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache

import pytest
from conftest import ROOT
from PIL import Image

from ddpm_basics.training import FIXED_IMAGES

EXERCISES = ["exercise1_generate", "exercise2_explore", "exercise3_train"]
NEEDED_UNSEEN = {  # which package is needed that no line of ours imports, and why
    "torchvision": EXERCISES,  # by the library
    "imageio-ffmpeg": ["exercise2_explore"],  # by imageio, for films
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What git would hand out if all that stands here were committed, and nothing else."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("this is not a git repository")
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, found.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def files(folder):
    """Everything in a folder by its path in it; Python's own cache is none of our files."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def run(*words, cwd):
    """Run a command line of Python to its end; return what it said."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interrupt(*words, cwd, when):
    """Start a command line and press Ctrl-C as soon as a file is there."""
    running = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=cwd, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not when.exists() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "Traceback" not in said


def test_from_a_fresh_clone_to_new_fabrics(clone, tmp_path):
    """Data, training with a break, new fabrics, figures: all in the current folder."""
    before = files(clone)
    draw, explore, train = (clone / f"{name}.py" for name in EXERCISES)
    data = ["--output", tmp_path / "african_fabric_processed", "--count", 108, "--size", 16]
    assert "108 of them new" in run("-m", "ddpm_basics.fabrics", *data, cwd=clone)
    assert run(train, "--verify", "--image-size", 16, cwd=tmp_path).splitlines()[-1] == (
        "Found 108 images in dataset"
    )

    # Nothing is trained yet: the weights that stand beside the script are found.
    assert f"{clone}/models" in run(explore, "--part", "c", "d", "--device", "cpu", cwd=tmp_path)

    small = ["--image-size", 16, "--dim", 8, "--dim-mults", 1, 2, "--batch-size", 8, "--device",
             "cpu", "--save-every", 10]  # fmt: skip
    saved = tmp_path / "training_results" / "model-10.pt"
    interrupt(train, "--train", "--steps", 5000, *small, cwd=tmp_path, when=saved)
    step = max(int(path.stem.split("-")[1]) for path in saved.parent.glob("model-*.pt"))
    said = run(train, "--train", "--resume", "--steps", step + 5, *small, cwd=tmp_path)
    assert f"Resuming training_results/model-{step}.pt at step {step}" in said

    # From here on the weights in the current folder go first.
    said = run(draw, "--num-samples", 4, "--steps", 3, "--device", "cpu", cwd=tmp_path)
    assert said.startswith("models/ddpm_african_fabrics.pt: ")
    assert f"step {step + 5}" in said.splitlines()[0]

    made = {name for name in files(tmp_path) if name.count("/") == 0}
    assert made == {
        "exercise1_output.png", "training_samples_grid.png",
        *(f"forward_diffusion_demo.{kind}" for kind in ("gif", "json", "png")),
        *(f"noise_schedule_comparison.{kind}" for kind in ("json", "png")),
    }  # fmt: skip
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "african_fabric_processed", "models", "training_results"}  # fmt: skip
    assert (tmp_path / f"training_results/sample-{step + 5}.png").exists()
    assert (
        len(list((tmp_path / "training_results/heldout_fabrics").glob("*/*.png"))) == FIXED_IMAGES
    )
    assert files(clone) == before


# ---- uv run --------------------------------------------------------------------------------------


def metadata(name):
    """The packages that a script's inline metadata names."""
    block = re.search(
        r"^# /// script\n(.*?)^# ///$", (ROOT / f"{name}.py").read_text(), re.S | re.M
    )
    listed = re.search(r"dependencies = \[(.*?)\]", block[1], re.S)[1]
    return set(re.findall(r'"([\w-]+)', listed))


@cache
def imports(path):
    """All that a file imports: names of modules, and of what is taken out of them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages(path):
    """The third-party packages that a file reaches through the rooms of ddpm_basics."""
    known = {"PIL": "pillow"}
    todo, seen, found = [path], set(), set()
    while todo:
        path = todo.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        for name in imports(path):
            first, *rest = name.split(".")
            if first == "ddpm_basics":
                place = ROOT.joinpath(first, *rest)
                todo += [place.with_suffix(".py"), place / "__init__.py"]
            elif first not in sys.stdlib_module_names:
                found.add(known.get(first, first.replace("_", "-")))
    assert len(seen) > 5, "the rooms were not found"
    return found


@pytest.mark.parametrize("name", EXERCISES)
def test_the_metadata_names_what_a_script_reaches(name):
    unseen = {package for package, names in NEEDED_UNSEEN.items() if name in names}
    assert metadata(name) == packages(ROOT / f"{name}.py") | unseen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exercise1_generate", ["--weights", "missing.pt"]),
        ("exercise2_explore", ["--part", "c", "--weights", "missing.pt"]),
        ("exercise3_train", ["--verify", "--data", "missing"]),
    ],
)
def test_uv_installs_what_a_script_reaches(clone, tmp_path, name, words):
    """Several GB: bad input gets past every import to the script's own sentence."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    command = [sys.executable, "-m", "uv", "run", "--no-project", clone / f"{name}.py", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Error: " in done.stderr
    assert "missing" in done.stderr
    assert "Traceback" not in done.stderr
