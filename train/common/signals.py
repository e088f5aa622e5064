"""Signals: finish the step, save, say how to go on; outside a training, end cleanly.

SIGINT (Ctrl-C), SIGTERM (a scheduler) and SIGUSR1 (Slurm's warning) are *stop signals*. Within a
:class:`StopSignal`, which a training is, the first one only sets a flag. Elsewhere it raises
:class:`Interrupted` where the program stands: what is written then is written beside, and stays
there.

A second SIGINT or SIGTERM kills at once, also while a library computes and Python's own handlers
have to wait: a thread listens as well. Two exceptions: SIGUSR1 is a warning and never counts; and
below a launcher each signal comes twice, from its sender and from the launcher, so that what
follows the first one within `ECHO` seconds is taken for its echo.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from train.common.exit_codes import ExitCode

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO = 5.0
"""Seconds after the first signal in which, below a launcher, another one is its echo."""
GRACE = 0.2
"""Seconds in which the handler itself may end the process, by the signal, before a thread does."""


class Interrupted(BaseException):
    """A stop signal arrived outside a training. Like KeyboardInterrupt, no library swallows it.

    `error` is what a library has made of it all the same, or what came of a rank that is gone.
    """

    def __init__(self, number: signal.Signals, error: Exception | None = None) -> None:
        self.number = number
        became = "" if error is None else f" ({type(error).__name__}: {error})"
        super().__init__(
            f"stopped by {number.name}{became}; what was finished is kept, go on with: "
            f"{resume_command(int(os.environ.get('WORLD_SIZE', '1')))}"
        )


class TrainingStopped(Exception):  # noqa: N818 - nothing went wrong
    """A stop signal ended the training after a complete step, and a checkpoint was written.

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
    as_module = program.name == "__main__.py"
    start = ["-m", program.parent.name] if as_module else [program.name]
    command = shlex.join([*start, *arguments])
    if world > 1:  # the launcher's own options are not ours to know
        how = "" if as_module else "--no_python "
        return f"accelerate launch <the same options> {how}{command}"
    return f"python {command}" if as_module else command


# --- one watch a process, as signals are the process's --------------------------------------------


def _below_launcher() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


class _Listener:
    """A thread that ends the process at the second SIGINT or SIGTERM.

    Python runs its handlers between two steps of the main thread, which may be minutes apart. But
    the interpreter writes each signal into a pipe as soon as it comes (`signal.set_wakeup_fd`).
    """

    def __init__(self) -> None:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()

    def stop(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write)  # which ends the thread

    def _listen(self, pipe: int) -> None:
        first: float | None = None
        with open(pipe, "rb", buffering=0) as heard:
            while number := heard.read(1):
                if number[0] not in (signal.SIGINT, signal.SIGTERM):
                    continue
                if first is None:
                    first = time.monotonic()
                elif not _below_launcher() or time.monotonic() - first > ECHO:
                    time.sleep(GRACE)
                    # Only the main thread may change a handler: the code says which signal it was.
                    os._exit(128 + number[0])


class _Watch:
    """The handlers, and what they have heard."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferring = 0
        self._urged_at: float | None = None
        self._listener: _Listener | None = None
        self._before: dict[signal.Signals, Any] = {}
        os.register_at_fork(after_in_child=self._stop)  # a pool ends its workers by SIGTERM

    @property
    def running(self) -> bool:
        return bool(self._before)

    def start(self) -> None:
        self.received = self._urged_at = None
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        self._listener = _Listener()

    def stop(self) -> None:
        """Restore the handlers; once a signal has come the process is ending, and they stay."""
        if self.received is None:
            self._stop()

    def forget(self) -> None:
        self.received = None
        self._stop()

    def _stop(self) -> None:
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        while self._before:
            signal.signal(*self._before.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            self._urge(number)
        if self.received is None:
            self.received = signal.Signals(number)
            if not self.deferring:
                raise Interrupted(self.received)

    def _urge(self, number: int) -> None:
        """Make the next SIGINT or SIGTERM deadly."""
        if not _below_launcher():
            # The system's own doing: it works inside a long call of a library as well.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        elif self._urged_at is None:
            self._urged_at = time.monotonic()
        elif time.monotonic() - self._urged_at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


_watch = _Watch()


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Around a whole command: a stop signal that meets no training raises Interrupted."""
    _watch.start()
    try:
        yield
    finally:
        _watch.stop()


def received() -> signal.Signals | None:
    """The stop signal that this process has received, if it has."""
    return _watch.received


def exit_code(number: signal.Signals | None) -> ExitCode:
    """What a command exits with that `number` has stopped; None: Ctrl-C came as an exception."""
    by_hand = number is None or number == signal.SIGINT
    return ExitCode.INTERRUPTED if by_hand else ExitCode.STOPPED


class StopSignal:
    """Within `with`, the first stop signal only sets `received`.

    Raises Interrupted at its end when one has come and the training took no notice: it came after
    the last step.
    """

    @property
    def received(self) -> bool:
        return _watch.received is not None

    def __enter__(self) -> StopSignal:
        self._alone = not _watch.running  # a training that no command watches over
        if self._alone:
            _watch.start()
        _watch.deferring += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        _watch.deferring -= 1
        received = _watch.received
        if self._alone:
            _watch.forget()
        if received is not None and kind is None:
            raise Interrupted(received)
