"""Ctrl-C and SIGTERM while training: the step is finished, a checkpoint saved, then it leaves."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import torch

from ddpm_basics.checkpoints import save_checkpoint
from ddpm_basics.runs import Run, resume_command


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM in a block into a flag; a second Ctrl-C leaves at once."""

    def __init__(self, run: Run) -> None:
        self.run, self.signal = run, 0

    def __enter__(self) -> StopRequest:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():  # a notebook's own, for whatever comes next
            signal.signal(number, handler or signal.SIG_DFL)

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note the signal; the loop looks after every step."""
        # A launcher passes the signal on to processes that have had it from the terminal already,
        # so that with several processes a second signal means nothing.
        if self.signal and self.run.accelerator.num_processes == 1:
            raise SystemExit(128 + number)
        if not self.signal:
            os.write(2, b"\nStopping: finishing this step and saving. Ctrl-C again: leave now.\n")
        self.signal = number

    def agreed(self, may_wait: bool) -> bool:
        """Tell whether to stop now; several processes agree, or one would wait for the others.

        Asking them makes a GPU wait, so it is done only when the loop waits anyway.
        """
        run = self.run
        if run.accelerator.num_processes > 1 and (may_wait or run.device.type == "cpu"):
            flag = torch.tensor([float(self.signal)], device=run.device)
            self.signal = int(run.accelerator.gather(flag).max().item())
            return self.signal > 0
        return self.signal > 0 and run.accelerator.num_processes == 1

    def save_and_leave(self) -> NoReturn:
        """Write the checkpoint that the message promises, and exit as a signal would."""
        run = self.run
        if run.accelerator.is_main_process:
            path = run.options.results_dir / f"model-{run.step}.pt"
            if not path.exists():
                save_checkpoint(run)
            print(
                f"\nStopped after step {run.step:,}; saved {path}. Go on with: {resume_command()}"
            )
        run.accelerator.wait_for_everyone()
        sys.exit(128 + self.signal)
