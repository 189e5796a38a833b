"""console.py: what an option takes, and how what goes wrong is worded."""

import argparse
import errno
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from ddpm_basics.console import (
    UserError,
    duration,
    new_parser,
    real_number,
    run_command,
    whole_number,
)


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (whole_number(0), {"0": 0, "007": 7}, ["-1", "1.0", "1e3", "", "-", "--1", "two"]),
        (whole_number(-3, 5), {"-3": -3, "5": 5}, ["-4", "6", "9" * 30]),
        (real_number(0), {"0": 0, "1e-4": 1e-4, "12": 12}, ["-1e-9", "nan", "inf", "", "1,5"]),
        (real_number(0.5, below=1), {"0.5": 0.5, ".99": 0.99}, ["0.49", "1", "1.0"]),
    ],
)
def test_numbers(convert, good, bad):
    for text, number in good.items():
        assert convert(text) == number
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' is not a .*number "):
            convert(text)


def test_wrong_usage_is_exit_code_2_and_says_what_is_right(capsys):
    parser = new_parser("Draws.", prog="draw")
    parser.add_argument("--count", type=whole_number(1, 9), default=4, help="how many")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--count", "10"])
    assert stop.value.code == 2
    assert "--count: '10' is not a whole number from 1 to 9" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: draw")
    assert "how many (default: 4)" in shown


@pytest.fixture
def ending(capsys):
    """How a command ends that raises this error, or calls this: (exit code, stderr)."""

    def call(trouble=None):
        def work():
            if isinstance(trouble, BaseException):
                raise trouble
            if trouble:
                trouble()

        code = run_command(work, "Nothing is lost.", "draw fewer at a time.")
        output = capsys.readouterr()
        assert not output.out
        return code, output.err

    return call


def test_success(ending):
    assert ending() == (0, "")


def test_what_the_user_can_mend(ending):
    assert ending(UserError("There is no kente: name another.")) == (
        1,
        "Error: There is no kente: name another.\n",
    )


def test_what_a_file_brings_into_a_message_is_one_short_line(ending):
    code, said = ending(UserError("It knows a\n  b, \x1b[2J, \udce9  and " + "x" * 5000))
    assert code == 1
    assert said.startswith("Error: It knows a b, \\x1b[2J, \\udce9  and xxx")
    assert said.endswith("x ...\n")
    assert len(said) < 1020


def test_ctrl_c(ending):
    assert ending(KeyboardInterrupt()) == (130, "\nInterrupted. Nothing is lost.\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room(ending, number):
    words = os.strerror(number)
    code, said = ending(OSError(number, words, "here/a.png"))
    assert code == 1
    assert said == (
        f"Error: {words} (here/a.png): free some space and run the same command again; files "
        "written before are whole.\n"
    )


def test_what_the_system_refuses(ending, tmp_path):
    code, said = ending((tmp_path / "nowhere" / "a.png").read_bytes)
    assert code == 1
    assert said == (
        f"Error: No such file or directory ({tmp_path}/nowhere/a.png): "
        "fix that or choose another place.\n"
    )
    assert ending(OSError("the camera sleeps")) == (
        1,
        "Error: the camera sleeps: fix that or choose another place.\n",
    )


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: bytearray(2**62),  # Python's own
        lambda: torch.empty(2**50),  # torch's, on the CPU
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
    ],
)
def test_memory_that_ends(ending, trouble):
    assert ending(trouble) == (1, "Error: Out of memory: draw fewer at a time.\n")


@pytest.mark.parametrize("fault", [RuntimeError("shapes differ"), ValueError("x"), KeyError("x")])
def test_faults_of_ours_are_not_hidden(ending, fault):
    with pytest.raises(type(fault)):
        ending(fault)


def test_durations():
    assert [duration(s) for s in (0.04, 119.9, 120, 7199, 7200, 172799, 172800)] == [
        "0.0 s", "119.9 s", "2.0 minutes", "120.0 minutes", "2.0 hours", "48.0 hours", "2.0 days",
    ]  # fmt: skip


def test_a_reader_who_has_enough_gets_no_sentence():
    """A command whose output goes to `| head` ends quietly with exit code 1."""
    code = (
        "import sys; from ddpm_basics.console import run_command\n"
        "def work():\n"
        "    for _ in range(100_000): print('a line')\n"
        "sys.exit(run_command(work, '', ''))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait() == 1
