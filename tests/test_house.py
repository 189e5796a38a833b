"""How the house is built: which way the arrows point, where the lesson stands, sizes, style."""

import ast
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

EXERCISES = [ROOT / f"exercise{name}.py" for name in ("1_generate", "2_explore", "3_train")]
PACKAGE = sorted((ROOT / "ddpm_basics").rglob("*.py"))
ROWS = [  # a room imports from its own row or from one further down
    {
        "fabrics",
        "evaluation",
        "data",
        "runs",
        "checkpoints",
        "losses",
        "trackers",
        "interrupts",
        "weight_files",
        "export",
        "model",
        "sample_folder",
        "steering",
        "figures",
    },
    {"training", "sampling", "images", "hardware", "options", "datasets"},
    {"files", "console", "labs"},
]
LIMITS = {  # lines, functions
    "exercise1_generate.py": (220, 20),
    "exercise2_explore.py": (450, 20),
    "exercise3_train.py": (340, 20),
}


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def imported(path):
    """The names of all modules that a file imports, also inside functions."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    """The room that a file of the package belongs to; None for the map in __init__.py."""
    name = path.relative_to(ROOT / "ddpm_basics").parts[0].removesuffix(".py")
    return None if name == "__init__" else name


def rooms(path):
    """The rooms that a file imports."""
    known = set.union(*ROWS)
    names = [name.split(".")[1] for name in imported(path) if name.startswith("ddpm_basics.")]
    return {name for name in names if name in known}


def row(room):
    return next(i for i, names in enumerate(ROWS) if room in names)


def functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]


def test_every_room_has_its_place():
    assert {room_of(path) for path in PACKAGE} - {None} == set.union(*ROWS)
    text = ast.get_docstring(tree_of(ROOT / "ddpm_basics/__init__.py"))
    named = {line.split()[0] for line in text.splitlines()[2:]}
    assert named == set.union(*ROWS), "the map in ddpm_basics/__init__.py"
    assert len(tree_of(ROOT / "ddpm_basics/__init__.py").body) == 1, "it imports nothing"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path):
    assert not [name for name in imported(path) if name.startswith("exercise")]
    if room_of(path):
        above = [room for room in rooms(path) if row(room) < row(room_of(path))]
        assert above == [], f"{path} imports from further up"


def test_no_circles():
    arrows = {room: set() for room in set.union(*ROWS)}
    for path in PACKAGE:
        if room_of(path) and path.name != "__main__.py":  # a command, which nothing imports
            arrows[room_of(path)] |= rooms(path) - {room_of(path)}
    assert arrows["checkpoints"] > {"runs"}, "the test has stopped looking"
    while free := [room for room, needs in arrows.items() if not needs]:
        for room in free:
            del arrows[room]
        for needs in arrows.values():
            needs -= set(free)
    assert arrows == {}


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.name)
def test_exercises_import_no_exercise(path):
    assert not [name for name in imported(path) if name.startswith("exercise")]


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.name)
def test_exercises_are_short(path):
    lines, count = LIMITS[path.name]
    assert len(path.read_text().splitlines()) <= lines
    assert len(functions(path)) <= count
    names = [node.name for node in tree_of(path).body if isinstance(node, ast.FunctionDef)]
    assert names[-1] == "main", "an exercise reads from top to bottom"


def test_functions_are_short():
    lengths = {}
    for path in [*EXERCISES, *PACKAGE]:
        for node in functions(path):
            lengths[f"{path.name}: {node.name}"] = node.end_lineno - node.lineno + 1
    long = [name for name, length in lengths.items() if length > 60]
    assert long == []
    assert sorted(lengths.values())[len(lengths) // 2] <= 10


def source_of(node, path):
    return ast.get_source_segment(path.read_text(), node)


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.name)
def test_the_walk_from_noise_to_image_stands_in_the_exercise(path):
    loops = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.For)]
    walks = [source_of(loop, path) for loop in loops if "pairwise(" in ast.unparse(loop.iter)]
    # Exercise 2 asks whoever steers.
    asked = "ask(" if path.stem == "exercise2_explore" else "predict_x_0("
    assert any(asked in walk and "_step(" in walk for walk in walks)


def test_the_training_step_stands_in_exercise_3():
    path = EXERCISES[2]
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
    }
    assert {"q_sample", "backward", "clip_grad_norm_", "step"} <= called
    text = path.read_text()
    assert '"l2": F.mse_loss' in text
    assert "run.ema.update()" in text, "the average"
    assert (
        text.index("def denoising_loss") < text.index("def train_step") < text.index("def train(")
    )


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.name)
def test_what_learners_change_stands_at_the_top(path):
    first = next(
        node.lineno
        for node in tree_of(path).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    )
    top = {
        node.targets[0].id: path.read_text().splitlines()[node.lineno - 1]
        for node in tree_of(path).body
        if isinstance(node, ast.Assign) and node.lineno < first
    }
    wanted = {
        "exercise1_generate.py": {"RANDOM_SEED", "SAMPLING_STEPS"},
        "exercise2_explore.py": {"RANDOM_SEED", "SAMPLING_STEPS", "CAPTURE_TIMESTEPS",
                                 "STEP_COUNTS"},
        "exercise3_train.py": {"RANDOM_SEED", "BATCH_SIZE", "GRADIENT_ACCUMULATE",
                               "LEARNING_RATE", "TRAIN_STEPS"},
    }[path.name]  # fmt: skip
    assert wanted <= top.keys()
    assert all("  # " in top[name] for name in wanted - {"SAMPLING_STEPS"}), "a comment each"


def test_nothing_small_imports_torch():
    """Drawing the data set starts fast, and on all cores."""
    code = "import sys, ddpm_basics.fabrics.__main__; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--strict", "ddpm_basics"]],
    ids=" ".join,
)
def test_style(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_blanket_ignores():
    for path in PACKAGE:
        for line in path.read_text().splitlines():
            assert "type: ignore" not in line or "type: ignore[" in line, path
