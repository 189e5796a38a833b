"""Run the robustness tests at full length and note what they measured.

    python tests/benchmarks/measure_robustness.py

Kills 50 training processes (tests/test_runs.py), watches memory over 5,000 steps, and
writes training_results/reference/robustness.json with the hardware named.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ddpm_basics.files import write_json  # noqa: E402
from ddpm_basics.hardware import describe  # noqa: E402

TESTS = "test_survives_kills or test_memory_stays_flat"


def main():
    """Run the tests, collect their figures, write the file."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow",
                   "tests/test_runs.py", "-k", TESTS]  # fmt: skip
        environment = os.environ | {"ROBUSTNESS_RECORD": str(record), "KILLS": "50"}
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if not record.exists():
            sys.exit("Nothing was measured: nothing was written.")
        figures = dict(line.split("=") for line in record.read_text().splitlines())
    result = {
        "hardware": describe(torch.device("cpu")),
        "torch": str(torch.__version__),
        **{name: int(value) for name, value in figures.items()},
        "all_tests_passed": done.returncode == 0,  # a figure outside its bound is a figure, too
    }
    output = ROOT / "training_results" / "reference" / "robustness.json"
    write_json(output, result)
    print(f"Wrote {output}: {result}")


if __name__ == "__main__":
    main()
