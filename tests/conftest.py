"""What several test files need: the scripts, tiny data, and a quick way to run a command line."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `import ddpm_basics`, whatever folder pytest starts in

# A shell starts what runs in its background deaf to Ctrl-C, and children inherit that; the tests
# that press Ctrl-C must not depend on how they were started.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two threads of many test processes on two cores only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TQDM_MININTERVAL"] = (
    "0"  # progress bars show every step, so that tests can wait for one
)


# A file goes to one worker as a whole (its fixtures are made once), so the long ones come first:
# otherwise one worker ends with the longest while the others are idle.
LONGEST_FIRST = [
    "test_runs", "test_docs", "test_shipped_weights", "test_exercise1", "test_end_to_end",
    "test_evaluation", "test_exercise2", "test_training",
    "test_fabrics", "test_docs_browser",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sort by file, the long files first; the order inside a file stays."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    """An untrained network is the same one in every run, whatever tests ran before."""
    torch.manual_seed(0)


def load_script(name):
    """Import a top-level script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Finished:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def sentence(self):
        """The one line of an error message; fails if there is a traceback or none or more."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.stderr
        return lines[0]


class Command:
    """A running command line: wait for it, send it signals."""

    def __init__(self, server, folder, number):
        self.server, self.folder, self.number = server, folder, number
        self.pid = json.loads(server.process.stdout.readline())["pid"]
        self.code = None

    def send(self, signal_number):
        """Send a signal, as `kill` does."""
        os.kill(self.pid, signal_number)

    def output(self, name):
        """What has been written so far to 'stdout' or 'stderr'."""
        path = self.folder / f"{name}-{self.number}"
        return path.read_text() if path.exists() else ""

    def finish(self):
        """Wait for the end."""
        if self.code is None:
            self.code = json.loads(self.server.process.stdout.readline())["code"]
        return Finished(self.code, self.output("stdout"), self.output("stderr"))

    def wait_until(self, condition, seconds=60):
        """Poll until condition() is true; fails the test after so many seconds."""
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, self.output("stdout") + self.output("stderr")
            time.sleep(0.0005)


class Server:
    """A process that has imported a module and forks a child per command (see fork_server.py)."""

    def __init__(self, module, folder):
        self.folder, self.count = folder, 0
        command = [sys.executable, str(Path(__file__).parent / "fork_server.py"), module]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *argv, cwd, **limits):
        """Start a command line in a folder; returns a Command."""
        self.count += 1
        request = {"argv": [str(a) for a in argv], "cwd": str(cwd), **limits}
        for name in ("stdout", "stderr"):
            request[name] = str(self.folder / f"{name}-{self.count}")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Command(self, self.folder, self.count)

    def run(self, *argv, cwd, **limits):
        """Run a command line to its end."""
        return self.start(*argv, cwd=cwd, **limits).finish()

    def close(self):
        """End the server."""
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """serve('exercise3_train') -> Server for that script or module, one per session."""
    servers = {}

    def get(name):
        if name not in servers:
            servers[name] = Server(name, tmp_path_factory.mktemp(f"serve-{name}"))
        return servers[name]

    yield get
    for server in servers.values():
        server.close()


def write_blocks(folder, count, size=8, seed=0):
    """`count` tiny PNGs of random colour blocks, in two subfolders."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST).save(path)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder of 120 images of 8x8; tests that change it take a copy."""
    return write_blocks(tmp_path_factory.mktemp("tiny") / "data", 120)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """train(folder, ...) -> (exit code, stdout, stderr): a tiny network, in this very process."""
    monkeypatch.chdir(tmp_path)
    script = load_script("exercise3_train")

    def run(data, *more):
        small = ["--image-size", 8, "--dim", 8, "--dim-mults", 1, 2, "--batch-size", 8,
                 "--steps", 4, "--log-every", 2, "--device", "cpu",
                 "--precision", "fp32"]  # fmt: skip
        words = ["--train", "--data", data, "--results-dir", "run", "--weights-out", "run.pt"]
        code = script.main([str(word) for word in (*words, *small, *more)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def labelled_weights(tiny_weights):
    """The same with three labels: a, b, c/d."""
    import torch
    from tiny_networks import labelled

    path = tiny_weights.with_name("labelled.pt")
    torch.save(labelled(torch.load(tiny_weights, weights_only=True)), path)
    return path


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A weight file in the bundled format, of a tiny network that has learned something."""
    import torch
    from tiny_networks import bundled, make_diffusion, teach

    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(bundled(teach(make_diffusion())), path)
    return path
