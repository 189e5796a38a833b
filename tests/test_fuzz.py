"""Damaged files and odd options, thousands of them: no traceback, no hang, nothing else touched.

The cases are made by fuzzing.py, each from its kind and number alone.
"""

import hashlib
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, Finished
from fuzzing import KINDS, SECONDS, make_base, make_case, run, snapshot

CASES = {"weights": 900, "pictures": 900, "manifests": 500, "logs": 300, "options": 900}
QUICK = {"weights": range(14, 26), "pictures": range(3, 15), "manifests": range(10, 20),
         "logs": range(2), "options": range(9, 21)}  # fmt: skip  # they take a second or two each
LONGEST = 1500  # characters of a message


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_data):
    return make_base(tmp_path_factory.mktemp("base"), tiny_data)


def contents(folder):
    """What stands in the files of a folder, whatever their names."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return {hashlib.sha256(path.read_bytes()).digest() for path in files}


def message(done):
    """What a command says at its end, without progress bars."""
    lines = [line for line in done.stderr.split("\n") if "\r" not in line]
    return "\n".join(lines[-30:])


def faults(case, done, folder, base):
    """Say what is wrong with the way a case has ended; nothing where all is well."""
    if done.code not in (0, 1, 2):
        yield f"ended with {done.code}"
    if "Traceback" in done.stderr:
        yield "a traceback"
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    if done.code == 1 and (len(errors) != 1 or len(errors[0]) > LONGEST):
        yield "not one sentence"
    if done.code == 2 and "error: " not in message(done):
        yield "wrong usage without a word"
    if (folder / "output/marker").exists():
        yield "code was run"
    if done.code == 0 and case.hopeless:
        yield "damage passed over in silence"


def judge(kind, number, base, folder, start=run):
    """Run a case; return its exit code and what is wrong with it."""
    case = make_case(kind, number, base, folder)
    inputs, output = folder / "input", folder / "output"
    before = snapshot(base.folder), snapshot(inputs)
    mine = contents(output) if kind == "options" else set()
    done = start(case, output)
    wrong = list(faults(case, done, folder, base))
    if (snapshot(base.folder), snapshot(inputs)) != before:
        wrong.append("something outside of its folder was touched")
    if not mine <= contents(output):
        wrong.append("a file that was there is gone")
    if done.code == 0 and case.same_as:
        drawn = (output / "exercise1_output.png").read_bytes()
        case.argv = case.same_as
        start(case, output)
        if drawn != (output / "exercise1_output.png").read_bytes():
            wrong.append("another picture, and exit code 0")
    said = f"{kind} {number}: {case.command} {' '.join(case.argv)[:600]!r} ({case.damage})"
    return done.code, [f"{said}: {what}\n{message(done)[-1500:]}" for what in wrong]


def by_command_line(case, folder):
    """Run a case as a user would."""
    command = case.command.split() if case.command.startswith("-m") else [ROOT / case.command]
    words = [sys.executable, *map(str, command), *case.argv]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True,
                          errors="replace", timeout=6 * SECONDS)  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


def judge_all(kind, numbers, base, folder, start=run):
    """Run many cases; return {exit code: how many} and everything that is wrong."""
    codes, wrong = Counter(), []
    for number in numbers:
        code, found = judge(kind, number, base, folder / f"{kind}{number}", start)
        codes[code] += 1
        wrong += found
        shutil.rmtree(folder / f"{kind}{number}")
    print(f"{kind}: {sum(codes.values())} cases, exit codes {dict(sorted(codes.items()))}")
    return codes, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_cases(kind, base, tmp_path):
    _, wrong = judge_all(kind, QUICK[kind], base, tmp_path)
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_cases(kind, base, tmp_path, record_property):
    codes, wrong = judge_all(kind, range(CASES[kind]), base, tmp_path)
    record_property(kind, dict(codes))
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_cases_by_the_command_line(kind, base, tmp_path):
    _, wrong = judge_all(kind, range(10_000, 10_010), base, tmp_path, by_command_line)
    assert wrong == []
