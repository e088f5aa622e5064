"""Stop signals, sent by the system to real processes: a command whose stage is a few lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_models.export.export import export_model
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.compact_folder import open_weights
from tests.support import REPOSITORY
from train.common import signals
from train.common.signals import Interrupted, StopSignal, watching

# The command line with a stage of the test's own: importing no torch, it starts at once.
COMMAND = """
import multiprocessing, signal, sys, time, types
from train.common import signals
from train.cli import launched
from train.common.signals import StopSignal, TrainingStopped

def say(text):
    print(text, flush=True)

def stage(recipe):
{stage}

sys.modules["train.stages.pipeline"] = types.SimpleNamespace(run=stage)
import train.stages
train.stages.pipeline = sys.modules["train.stages.pipeline"]
sys.argv = ["/x/train/__main__.py", "demo"]
launched()
"""

WORKING = "say('ready'); time.sleep(30)"

TRAINING = """
with StopSignal() as stop:
    say('ready')
    for step in range(300):
        time.sleep(0.1)
        if stop.received:
            say('heard')
            {heard}
            raise TrainingStopped(step, 300, 'runs/x/step-1', 1)
"""


class Command:
    def __init__(self, stage: str, **environment: str) -> None:
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(stage=textwrap.indent(stage, "    "))],
            cwd=REPOSITORY, env={**surroundings, **environment, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == text, self.process.communicate()[1]

    def send(self, *numbers: signal.Signals, every: float = 0.0) -> None:
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(every)

    def end(self) -> tuple[int, str]:
        """Exit status (minus the signal that killed it) and stderr."""
        try:
            _, errors = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running: {self.process.communicate()}") from None
        return self.process.returncode, errors


CODES = [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_outside_a_training_it_ends_with_one_line(number: signal.Signals, code: int) -> None:
    command = Command(WORKING)
    command.wait_for("ready")
    command.send(number)
    status, errors = command.end()
    assert status == code
    assert errors == (
        f"stopped by {number.name}; what was finished is kept, go on with: python -m train demo\n"
    )


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_training_ends_where_it_wants_to(number: signal.Signals, code: int) -> None:
    command = Command(TRAINING.format(heard=""))
    command.wait_for("ready")
    command.send(number)
    status, errors = command.end()
    assert status == code
    assert errors.startswith("stopped after step ")
    assert errors.endswith("resume with: python -m train demo\n")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills_at_once(number: signal.Signals) -> None:
    command = Command(TRAINING.format(heard="time.sleep(30)"))
    command.wait_for("ready")
    command.send(number)
    command.wait_for("heard")
    command.send(number)
    assert command.end() == (-number, "")


COMPUTING = """
import hashlib
with StopSignal() as stop:
    say('ready')
    hashlib.pbkdf2_hmac('sha256', b'one call', b'of a minute', 300_000_000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills_a_library_that_computes(number: signal.Signals) -> None:
    """No Python runs meanwhile in the main thread, and so none of its handlers."""
    command = Command(COMPUTING)
    command.wait_for("ready")
    time.sleep(0.5)
    began = time.monotonic()
    command.send(number, every=0.5)
    assert command.process.poll() is None
    command.send(number)
    assert command.end() == (128 + number, "")
    assert time.monotonic() - began < 10


def test_below_a_launcher_a_library_that_computes_is_killed_after_the_echo() -> None:
    command = Command("signals.ECHO = 1.0\n" + COMPUTING, TORCHELASTIC_RUN_ID="none")
    command.wait_for("ready")
    command.send(signal.SIGINT, signal.SIGTERM, every=0.6)
    assert command.process.poll() is None
    command.send(signal.SIGTERM)
    assert command.end() == (128 + signal.SIGTERM, "")


def test_a_process_that_has_forked_hears_for_itself_alone() -> None:
    """A worker's signals must not end its parent, which shares the pipe."""
    stage = """
import os
say('ready')
workers = []
for _ in range(2):
    workers.append(os.fork())
    if workers[-1] == 0:
        time.sleep(30)
        os._exit(1)
time.sleep(0.5)
for pid in workers:
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
time.sleep(0.5)
say('heard')
"""
    command = Command(stage)
    command.wait_for("ready")
    command.wait_for("heard")
    assert command.end() == (0, "")


def test_a_warning_does_not_count_as_the_first_signal() -> None:
    """At its time limit Slurm sends SIGTERM after the warning: the checkpoint goes on."""
    command = Command(TRAINING.format(heard="time.sleep(1)"))
    command.wait_for("ready")
    command.send(signal.SIGUSR1)
    command.wait_for("heard")
    command.send(signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, every=0.1)
    assert command.end()[0] == 75


def test_below_a_launcher_an_echo_does_not_kill_but_a_later_signal_does() -> None:
    stage = "signals.ECHO = 1.0\n" + TRAINING.format(heard="time.sleep(30)")
    command = Command(stage, TORCHELASTIC_RUN_ID="none")
    command.wait_for("ready")
    command.send(signal.SIGTERM)
    command.wait_for("heard")
    command.send(signal.SIGTERM, every=1.2)
    assert command.process.poll() is None
    command.send(signal.SIGTERM)
    assert command.end() == (-signal.SIGTERM, "")


def test_a_signal_after_the_last_step_ends_what_follows() -> None:
    stage = "with StopSignal():\n    say('ready')\n    time.sleep(1)\nsay('next'); time.sleep(30)"
    command = Command(stage)
    command.wait_for("ready")
    command.send(signal.SIGTERM)
    status, errors = command.end()
    assert status == 75
    assert errors.startswith("stopped by SIGTERM; ")


def test_what_breaks_because_another_rank_has_gone_is_no_bug() -> None:
    stage = """
def broken(*_): raise RuntimeError('Connection closed by peer')
with StopSignal():
    say('ready')
    time.sleep(1)
    broken()
"""
    command = Command(stage)
    command.wait_for("ready")
    command.send(signal.SIGUSR1)
    status, errors = command.end()
    assert status == 75
    assert errors == (
        "stopped by SIGUSR1 (RuntimeError: Connection closed by peer); what was finished is kept, "
        "go on with: python -m train demo\n"
    )


def test_what_a_library_makes_of_the_interruption_is_told_as_the_signal() -> None:
    """C++ that calls Python may raise an error of its own instead, as torch does for storages."""
    stage = """
def to_tensor():
    try:
        say('ready')
        time.sleep(30)
    except BaseException:
        pass
    raise ValueError('could not determine the shape')
to_tensor()
"""
    command = Command(stage)
    command.wait_for("ready")
    command.send(signal.SIGTERM)
    status, errors = command.end()
    assert status == 75
    assert errors == (
        "stopped by SIGTERM (ValueError: could not determine the shape); what was finished is "
        "kept, go on with: python -m train demo\n"
    )


def test_worker_processes_are_ended_as_ever() -> None:
    """A pool ends its idle workers by SIGTERM: they must neither save nor print."""
    stage = """
with multiprocessing.get_context('fork').Pool(2) as pool:
    pool.map(abs, [1, 2])
say('ready')
"""
    command = Command(stage)
    command.wait_for("ready")
    assert command.end() == (0, "")


def test_a_training_that_no_command_watches_leaves_no_handler_behind() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    stop = StopSignal()
    with pytest.raises(Interrupted, match="SIGUSR1"), stop:  # the block took no notice
        signal.raise_signal(signal.SIGUSR1)
    with StopSignal() as stop:
        assert not stop.received
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("stage", ["write", "verify"])
def test_a_stopped_export_leaves_nothing_that_looks_finished(tmp_path: Path, stage: str) -> None:
    once = threading.Lock()  # both formats' threads report, and a second signal is deadly

    def signalled(now: str, done: int, total: int) -> None:
        if now == stage and done > total // 2 and once.acquire(blocking=False):
            signal.raise_signal(signal.SIGTERM)

    def export(**options: Any) -> None:
        export_model(
            open_weights(REPOSITORY / "train" / "demo" / "base"),
            SharingPlan(ties=(HeadTie((1, 0), (0, 1), ("q", "k")),)),
            tmp_path / "export",
            dtype=torch.float32,
            shard_bytes=1 << 20,
            **options,
        )

    with pytest.raises(Interrupted), watching():
        export(progress=signalled)
    signals._watch.forget()  # a real process would have ended
    assert not list(tmp_path.glob("export/[!.]*/manifest.json"))
    export()
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["compact", "dense"]
