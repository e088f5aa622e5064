"""Ctrl-C and SIGTERM: finish the step, save, say how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any


class TrainingStopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal ended the training after a complete step; the command line exits with 130.

    Its text is one line: where the training stands, and the command that resumes it.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path, world: int) -> None:
        self.step, self.steps, self.checkpoint = step, steps, checkpoint
        super().__init__(
            f"stopped after step {step} of {steps}, saved {checkpoint}; "
            f"resume with: {resume_command(world)}"
        )


def resume_command(world: int) -> str:
    """The command line of this process again: the run folder knows where it stopped."""
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    if world > 1:  # the launcher's own options are not ours to know
        return f"accelerate launch <the same options> -m train {shlex.join(arguments)}"
    if program.name == "__main__.py":
        return f"python -m {program.parent.name} {shlex.join(arguments)}"
    return shlex.join([program.name, *arguments])


class StopSignal:
    """Within `with`, SIGINT and SIGTERM only set `received`.

    In one process a second signal acts as ever. Below a launcher it does not: on Ctrl-C a rank is
    signalled twice, by the terminal and by torchrun, which kills after 30 seconds anyway.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
