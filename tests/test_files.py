"""files.py: a whole file or none, whatever happens; names that may be written."""

import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ddpm_basics.console import UserError
from ddpm_basics.files import (
    check_folder,
    check_output,
    file_digest,
    read_json,
    remove_leftovers,
    unused_name,
    write_atomically,
    write_json,
)


def seen(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [ZeroDivisionError, KeyboardInterrupt, RuntimeError])
def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, trouble):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(text, *troubles):
        with write_atomically(path) as temporary:
            temporary.write_text(text)
            assert path.read_text() == "old"
            for one in troubles:
                raise one("halfway")

    with pytest.raises(trouble, match="halfway"):
        write("half of the n", trouble)
    assert path.read_text() == "old"
    assert seen(tmp_path) == ["file.txt"]
    write("new")
    assert path.read_text() == "new"
    assert seen(tmp_path) == ["file.txt"]


def test_temporary_names(tmp_path):
    """Hidden, of the same kind (libraries go by the suffix), and no other process's."""
    with write_atomically(tmp_path / "a.png") as temporary:
        assert temporary.name == f".a.{os.getpid()}.tmp.png"
        temporary.touch()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads Linux's /proc")
def test_all_is_on_the_disk_before_the_rename_and_the_rename_after(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def note_fsync(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with write_atomically(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert calls == [temporary.name, "rename", tmp_path.name]


@contextmanager
def file_limit(size):
    """Let no file grow beyond so many bytes, which for a program is a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_to_handle(path):
    with path.open("wb") as file:
        torch.save(torch.zeros(10**6), file)


def save_to_path(path):
    torch.save(torch.zeros(10**6), path)  # torch's own C++ writes, and knows no OSError


def write_bytes(path):
    path.write_bytes(bytes(10**6))


@pytest.mark.parametrize("save", [write_bytes, save_to_handle, save_to_path])
def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path, monkeypatch, save):
    (tmp_path / "weights.pt").write_text("old")
    if save is save_to_path:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with (
        file_limit(10**5),
        pytest.raises(OSError, match=r"File too large|No space left on device") as caught,
        write_atomically(tmp_path / "weights.pt") as temporary,
    ):
        save(temporary)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert seen(tmp_path) == ["weights.pt"]
    assert (tmp_path / "weights.pt").read_text() == "old"


def test_json_there_and_back(tmp_path):
    content = {"name": "aṣọ òkè", "losses": [0.5, None], "steps": 3}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "aṣọ òkè" in text
    assert text.endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == content
    assert json.loads(text) == content


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe\x00", b"[" * 9**5]
)
def test_no_json_object_is_none(tmp_path, text):
    assert read_json(tmp_path / "missing.json") is None
    assert read_json(tmp_path) is None
    (tmp_path / "a.json").write_bytes(text)
    assert read_json(tmp_path / "a.json") is None


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    keep = ["a.png", ".hidden", "b.tmp", "c.tmp.png", ".tmpfile", ".notes.tmp.txt"]
    for name in [*keep, ".a.77.tmp.png", ".losses.8.tmp.csv", ".write-test.9.tmp"]:
        (tmp_path / name).touch()
    (tmp_path / ".cache.1.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert seen(tmp_path) == sorted([*keep, ".cache.1.tmp"])
    remove_leftovers(tmp_path / "missing")


def test_unused_names(tmp_path):
    assert unused_name(tmp_path / "a.pt") == tmp_path / "a.pt"
    for name in ("a.pt", "a-2.pt"):
        (tmp_path / name).touch()
    assert unused_name(tmp_path / "a.pt") == tmp_path / "a-3.pt"


def test_digests_tell_files_apart(tmp_path):
    for name, content in {"a": b"one", "b": b"one", "c": b"two"}.items():
        (tmp_path / name).write_bytes(content)
    a, b, c = (file_digest(tmp_path / name) for name in "abc")
    assert a == b != c
    assert len(a) == 32


# ---- Refusing ------------------------------------------------------------------------------------


def test_outputs_that_must_not_be_written(tmp_path):
    (tmp_path / "there.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = seen(tmp_path)
    for name, words in {
        "there.png": "exists already: delete it or name another file",
        "folder.png": r"is a folder or a device: name a file that ends in \.png",
        "grid.jpg": r"has to end in \.png",
        "grid": r"has to end in \.png",
        "file/grid.png": "Cannot write into .*file",
    }.items():
        with pytest.raises(UserError, match=words):
            check_output(tmp_path / name, ".png", may_replace=False)
    assert seen(tmp_path) == before
    check_output(tmp_path / "there.png", ".png", may_replace=True)
    check_output(tmp_path / "new" / "GRID.PNG", ".png", may_replace=False)
    assert seen(tmp_path) == sorted([*before, "new"])
    assert seen(tmp_path / "new") == []


def test_folders_are_made_and_left_empty(tmp_path):
    for _ in range(2):
        check_folder(tmp_path / "a" / "b")
        assert seen(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write into .*file \(File exists\): name another"):
        check_folder(tmp_path / "file")


@pytest.mark.skipif("os.geteuid() == 0", reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    for folder in (tmp_path / "closed", tmp_path / "closed" / "below"):
        with pytest.raises(UserError, match=r"\(Permission denied\)"):
            check_folder(folder)
