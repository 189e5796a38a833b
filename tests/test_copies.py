"""The standalone rule: no script imports a sibling, and copies equal their originals."""

import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
MARK = re.compile(r"# Copied from (\w+\.py)$")


def definitions(source):
    """{name: (lines of the definition with its decorators, the line above)} at the top level."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            found[node.name] = ("\n".join(lines[first : node.end_lineno]), lines[first - 1])
    return found


def tokens(source):
    """What Python sees of a source: comments and line breaks do not count, docstrings do."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER}
    read = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(t.type, t.string) for t in read if t.type not in skip]


def find_drift(sources):
    """Names of copies, 'script: function', that differ from their originals or have none."""
    drifted = []
    known = {name: definitions(source) for name, source in sources.items()}
    for script, functions in known.items():
        for name, (text, above) in functions.items():
            mark = MARK.match(above.strip())
            if mark:
                original = known[mark[1]].get(name)
                if original is None or tokens(original[0]) != tokens(text):
                    drifted.append(f"{script}: {name}")
    return drifted


def test_copies_equal_their_originals():
    sources = {path.name: path.read_text() for path in SCRIPTS}
    copies = sum(source.count("# Copied from ") for source in sources.values())
    assert copies > 10  # otherwise this test has stopped looking
    assert find_drift(sources) == []


def test_a_copy_that_drifted_is_named():
    original = "def f(x):\n    return x + 1\n"
    copy = "# Copied from a.py\n" + original
    assert find_drift({"a.py": original, "b.py": copy}) == []
    assert find_drift({"a.py": original, "b.py": copy.replace("+ 1", "+ 2")}) == ["b.py: f"]
    assert find_drift({"a.py": "", "b.py": copy}) == ["b.py: f"]


def test_what_stands_twice_is_marked():
    """A definition that two scripts share word for word says where it came from."""
    seen = {}
    for path in SCRIPTS:
        for name, (text, above) in definitions(path.read_text()).items():
            if not MARK.match(above.strip()):
                seen.setdefault((name, tuple(tokens(text))), []).append(path.name)
    assert {name: files for (name, _), files in seen.items() if len(files) > 1} == {}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_imports_a_sibling(path):
    siblings = {other.stem for other in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        assert not siblings & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_shows_defaults_and_answers_without_torch(path):
    command = [sys.executable, "-X", "importtime", str(path), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "(default: " in done.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_inline_metadata_names_what_is_imported(path):
    """The PEP 723 block has a package for every import, in the versions of requirements.txt."""
    source = path.read_text()
    block = re.search(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$", source)
    text = "".join(line[2:] + "\n" for line in block[1].splitlines())
    python = re.search(r'requires-python = "(.+)"', text)[1]
    assert python == ">=3.10"
    dependencies = re.search(r"dependencies = \[(.*)\]", text, re.DOTALL)[1]
    bounds = set(re.findall(r'"(.+?)"', dependencies))
    assert bounds <= set((ROOT / "requirements.txt").read_text().splitlines())
    listed = {re.split(r"[<>=\[]", name)[0] for name in bounds}
    package = {"PIL": "pillow"}
    # The library brings these along, in versions that fit it.
    if "denoising-diffusion-pytorch" in listed:
        listed |= {"torch", "torchvision", "numpy", "tqdm", "accelerate", "ema-pytorch", "pillow"}
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module.split(".")[0]]
        for name in names:
            if name not in sys.stdlib_module_names:
                assert package.get(name, name.replace("_", "-")) in listed, name


def test_functions_are_short():
    """Under 60 lines each, most of them under 20: a script is to be read."""
    lengths = []
    for path in SCRIPTS:
        for name, (text, _) in definitions(path.read_text()).items():
            if not text.startswith("class"):
                lengths.append(text.count("\n") + 1)
                limit = 75 if name == "parse_options" else 60  # a list of options, one a line
                assert lengths[-1] <= limit, f"{path.name}: {name} has {lengths[-1]} lines"
    assert sorted(lengths)[len(lengths) // 2] < 20


def test_ruff_is_content():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
