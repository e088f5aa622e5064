"""Signals below `accelerate launch`: to the launcher, which passes them on, and to the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launcher import Launch, launch, ranks_of
from train.tracking.metrics_log import read_rows
from train.training.checkpoint import steps_in

pytestmark = pytest.mark.distributed

RECIPE = (
    "recipes/demo_postshare.yaml",
    "train.steps=200",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.checkpoint_every=0",
    "data.sequence_length=64",
    "evaluate.continued=false",
)

MODULE = ("-m", "train")
COMMAND = ("--no_python", "postshare", "run")
Send = Callable[[subprocess.Popen[str]], None]


def start(
    folder: Path,
    *overrides: str,
    when: Callable[[], bool],
    send: Send,
    form: tuple[str, ...] = MODULE,
) -> Launch:
    """Launch two ranks and send once `when` is true."""

    def meanwhile(launcher: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 120
        while not when() and launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        send(launcher)

    return launch(
        "ddp", *form, *RECIPE, *overrides, f"output_dir={folder}", timeout=100,
        meanwhile=meanwhile,
    )  # fmt: skip


def to_launcher(launcher: subprocess.Popen[str]) -> None:
    launcher.send_signal(signal.SIGTERM)


def by_hand(launcher: subprocess.Popen[str]) -> None:
    """Ctrl-C: the processes have sessions of their own, so it reaches the launcher alone."""
    launcher.send_signal(signal.SIGINT)


def to_everybody(launcher: subprocess.Popen[str]) -> None:
    """As Slurm does: each rank hears of it from there and from the launcher."""
    for pid in [*ranks_of(launcher), launcher.pid]:
        os.kill(pid, signal.SIGTERM)


def warning_to_ranks(launcher: subprocess.Popen[str]) -> None:
    """As train.sbatch does, whose launcher ignores the warning."""
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("send", "form"),
    [
        (to_launcher, COMMAND),
        pytest.param(to_launcher, MODULE, marks=pytest.mark.slow),  # the other test has -m train
        pytest.param(by_hand, COMMAND, marks=pytest.mark.slow),
        pytest.param(by_hand, MODULE, marks=pytest.mark.slow),
        pytest.param(to_everybody, COMMAND, marks=pytest.mark.slow),
        pytest.param(to_everybody, MODULE, marks=pytest.mark.slow),
        pytest.param(warning_to_ranks, COMMAND, marks=pytest.mark.slow),
        pytest.param(warning_to_ranks, MODULE, marks=pytest.mark.slow),  # also: make test-cluster
    ],
)
def test_in_a_training_all_ranks_save_the_same_step(
    tmp_path: Path, send: Send, form: tuple[str, ...]
) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    result = start(
        tmp_path / "run",
        when=lambda: metrics.is_file() and len(read_rows(metrics)) >= 3,
        send=send,
        form=form,
    )
    assert not result.timed_out, result.report()
    assert result.status == 1, "the launcher's own, whatever its ranks exit with"
    (saved,) = steps_in(tmp_path / "run" / "checkpoints")
    assert saved == len(read_rows(metrics)) < 200
    assert result.output.count(f"stopped after step {saved} of 200") == 1, result.report()
    again = f"resume with: accelerate launch <the same options> {' '.join(form)} {RECIPE[0]}"
    assert again in result.output, result.report()
    if send is warning_to_ranks:
        assert "exitcode  : 75" in result.output, result.report()


def test_outside_a_training_all_ranks_end_and_nothing_looks_finished(tmp_path: Path) -> None:
    """The main process evaluates; the other one waits for it."""
    weights = tmp_path / "run" / "export"
    result = start(
        tmp_path / "run", "train.steps=2", "evaluate.batch_size=1", "data.sequence_length=256",
        when=lambda: (weights / "compact").is_dir(), send=to_launcher,
    )  # fmt: skip
    assert not result.timed_out, result.report()
    assert result.status == 1
    assert result.output.count("stopped by SIGTERM") == 1, result.report()
    ranks = [line for line in result.output.splitlines() if line.startswith("[default")]
    assert not any("Traceback" in line for line in ranks), result.report()
    assert not (tmp_path / "run" / "summary.json").exists()
