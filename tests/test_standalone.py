"""One script, downloaded alone, installs what it needs and does its job."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


def copy_alone(name, folder):
    """A folder with one script in it and nothing else."""
    shutil.copy(ROOT / f"{name}.py", folder)
    assert [p.name for p in folder.iterdir()] == [f"{name}.py"]


def uv_run(folder, *words):
    """`uv run SCRIPT ...`: an environment from the inline metadata, not from this one."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    command = [sys.executable, "-m", "uv", "run", "--no-project", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_training_works_in_an_empty_folder(tiny_data, tmp_path):
    copy_alone("exercise3_train", tmp_path)
    command = [sys.executable, "exercise3_train.py", "--train", "--data", str(tiny_data)]
    small = "--steps 3 --image-size 8 --dim 8 --dim-mults 1 2 --batch-size 8 --device cpu"
    done = subprocess.run([*command, *small.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models/ddpm_african_fabrics.pt").exists()
    assert (tmp_path / "training_results/sample-3.png").exists()


def test_uv_runs_one_downloaded_script(tmp_path):
    """The small one; the others differ only in what is installed, which takes minutes."""
    copy_alone("prepare_fabrics", tmp_path)
    done = uv_run(tmp_path, "prepare_fabrics.py", "--count", "12")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("african_fabric_processed/*/*.png"))) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["exercise1_generate", "exercise2_explore", "exercise3_train", "evaluate_fabrics"]
)
def test_uv_installs_what_the_large_scripts_import(tmp_path, name):
    """Several GB: bad input gets past every import to the script's own sentence."""
    copy_alone(name, tmp_path)
    words = {
        "exercise1_generate": ["--weights", "missing.pt"],
        "exercise2_explore": ["--part", "a", "--weights", "missing.pt"],
        "exercise3_train": ["--verify", "--data", "missing"],
        "evaluate_fabrics": ["missing"],
    }[name]
    done = uv_run(tmp_path, f"{name}.py", *words)
    assert done.returncode == 1, done.stderr
    assert "missing" in done.stderr
    assert "Traceback" not in done.stderr
