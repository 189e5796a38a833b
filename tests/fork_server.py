"""Runs a script's command line again and again without paying for its imports each time.

Started as `python fork_server.py MODULE`, it imports the module once and then forks a child for
every request on standard input: {"argv": [...], "cwd": "...", "stdout": FILE, "stderr": FILE,
"limit_file_size": bytes or null, "limit_memory": bytes or null, "environment": {...} or absent}.
The child is a process like any other: it has a pid of its own, takes signals, and can be killed.
Answers are lines of JSON, first {"pid": N}, then {"code": N} with the shell's convention for
signals (-9 after SIGKILL).
"""

import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `import ddpm_basics`

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot


def become_command(module, request):
    """Turn this forked child into one run of the script; never returns."""
    os.setsid()
    for name, number in (("stdout", 1), ("stderr", 2)):
        handle = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    os.chdir(request["cwd"])
    os.environ |= request.get("environment", {})
    for key, limit in (("limit_file_size", resource.RLIMIT_FSIZE), ("limit_memory", None)):
        value = request.get(key)
        if value is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            used = pages * resource.getpagesize()
            resource.setrlimit(
                limit or resource.RLIMIT_AS,
                (value, value) if limit else (used + value, used + value),
            )
    sys.argv = [request.get("program", module.__file__), *request["argv"]]
    code = 1
    try:
        code = module.main() or 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else bool(leaving.code)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main():
    """Serve requests until standard input ends."""
    torch.set_num_threads(1)  # threads do not survive a fork
    module = importlib.import_module(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            become_command(module, json.loads(line))
        answers.write(json.dumps({"pid": pid}) + "\n")
        _, status = os.waitpid(pid, 0)
        answers.write(json.dumps({"code": os.waitstatus_to_exitcode(status)}) + "\n")


if __name__ == "__main__":
    main()
