"""A rank that is stopped, killed, stuck, slow or not finite: the others say which one, and end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.support.launcher import Launch, environment, launch, ranks_of
from train.common.exit_codes import ExitCode
from train.tracking.metrics_log import read_rows

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "fault_worker.py"
HANG = 10.0
RECIPE = (
    "recipes/demo_postshare.yaml",
    "train.steps=500",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.checkpoint_every=0",
    f"train.hang_timeout={HANG}",
    "data.sequence_length=64",
    "evaluate.continued=false",
)


def start(
    folder: Path,
    *program: str | Path,
    overrides: tuple[str, ...] = (),
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
) -> Launch:
    # The launcher kills a stopped process this long after it has told it to stop.
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return launch(
        "ddp", *program, *RECIPE, *overrides, f"output_dir={folder}", timeout=150,
        variables=patience, meanwhile=meanwhile,
    )  # fmt: skip


def send_to_rank(
    folder: Path, rank: int, number: signal.Signals, times: list[float]
) -> Callable[[subprocess.Popen[str]], None]:
    """Once three steps are done; appends the time of the signal."""

    def meanwhile(launcher: subprocess.Popen[str]) -> None:
        end, metrics = time.monotonic() + 100, folder / "metrics.jsonl"
        while len(read_rows(metrics)) < 3:
            assert launcher.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        (pid,) = [pid for pid in ranks_of(launcher) if rank_of(pid) == rank]
        times.append(time.monotonic())
        os.kill(pid, number)

    return meanwhile


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (value,) = [v for v in variables if v.startswith(b"RANK=")]
    return int(value.removeprefix(b"RANK="))


@pytest.mark.parametrize(
    "stopped", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.more)]
)
def test_a_stopped_rank_is_named_and_all_others_dump_their_stacks(
    tmp_path: Path, stopped: int
) -> None:
    times: list[float] = []
    send = send_to_rank(tmp_path / "run", stopped, signal.SIGSTOP, times)
    result = start(tmp_path / "run", "-m", "train", meanwhile=send)
    took = time.monotonic() - times[0]
    assert not result.timed_out, result.report()
    errors = re.findall(r"error: no progress for 10 s: rank (\d) \(host .*is silent", result.output)
    assert errors == [str(stopped)], result.report()
    assert re.search(r"silent since step \d+, \w+", result.output), result.report()
    assert f"stacks of rank {1 - stopped} at step" in result.output
    assert f"exitcode  : {int(ExitCode.HUNG)}" in result.output, result.report()
    assert HANG < took < HANG + 50, "30 s of them until the launcher kills the stopped one"


@pytest.mark.more
def test_a_rank_whose_data_never_comes_is_late_not_silent(tmp_path: Path) -> None:
    result = start(tmp_path / "run", WORKER, "stuck_data")
    assert not result.timed_out, result.report()
    (line,) = re.findall(r"error: no progress .*", result.output)
    # Two micro-batches a step: the fourth is in the second step.
    assert re.search(
        r"rank 1 \(host \S+, process \d+\) is late, still at step 2, reading data "
        r"\(the others wait at step 2, counting tokens\)", line
    ), result.report()  # fmt: skip
    for rank in (0, 1):
        assert f"stacks of rank {rank} at step 2" in result.output, result.report()
    assert result.output.count("in wrapped") >= 1, "the line that sleeps is in a stack"


@pytest.mark.slow
def test_one_process_with_a_stuck_source(tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER), "stuck_data", *RECIPE, f"output_dir={tmp_path / 'run'}"]
    began = time.monotonic()
    result = subprocess.run(
        command, cwd=REPOSITORY, timeout=100, text=True, capture_output=True, check=False,
        env=environment(),
    )  # fmt: skip
    assert result.returncode == ExitCode.HUNG, result.stderr
    # Four micro-batches a step: the fourth is in the first, which may take three times as long.
    assert "no progress for 30 s: the process is still at step 1, reading data" in result.stderr
    assert "in wrapped" in result.stderr
    assert time.monotonic() - began > 3 * HANG


@pytest.mark.more
def test_a_killed_rank_is_named_in_one_line(tmp_path: Path) -> None:
    times: list[float] = []
    send = send_to_rank(tmp_path / "run", 1, signal.SIGKILL, times)
    result = start(tmp_path / "run", "-m", "train", meanwhile=send)
    assert not result.timed_out, result.report()
    (line,) = re.findall(r"error: .*", result.output)
    assert re.search(r"rank 1 \(host \S+, process \d+\) cannot be reached", line), result.report()
    assert "start the same command again" in line
    ranks = [line for line in result.output.splitlines() if line.startswith("[default")]
    assert not any("Traceback" in line for line in ranks), result.report()


def test_the_slow_rank_is_named_and_the_one_whose_loss_is_nan(tmp_path: Path) -> None:
    """Two forwards a step: five steps are slow, the sixth has no loss."""
    short = ("train.steps=6", "train.health_every=2")
    result = start(tmp_path / "run", WORKER, "slow_then_nan", overrides=short)
    assert not result.timed_out, result.report()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "slowest_rank" in row] == [2, 4]
    for row in (rows[1], rows[3]):
        assert row["slowest_rank"] == 1
        # Two forwards, each a second longer.
        assert row["rank_seconds_max"] > row["rank_seconds_median"] + 1
        assert row["rank_seconds_max"] < row["step_seconds"]
        assert row["lm_loss"] < row["lm_loss_max"] < 1.5 * row["lm_loss"]
        assert row["memory_bytes_max"] >= row["memory_bytes"]
    assert re.search(r"post 4/6 .*slowest rank 1 \(\+\d+%\)", result.output), result.report()

    (line,) = re.findall(r"error: .*", result.output)
    assert "step 6: the lm loss on rank 1 is nan" in line, result.report()
    assert re.search(r"exitcode  : 2\b", result.output), result.report()
    assert len(rows) == 5
