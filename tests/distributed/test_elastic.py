"""torchrun starts its processes again after one was killed; the run ends as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.conftest import Together
from tests.distributed.runs import RUNS
from tests.support import REPOSITORY
from tests.support.launcher import environment, ranks_of
from train.tracking.metrics_log import read_rows

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

SECONDS = 150
RUN = RUNS["checkpointed"]


# On two hosts the launchers then disagree about the number of restarts: one of them has seen a
# failure, the other a host that comes again.
@pytest.mark.parametrize(
    "hosts", [pytest.param(1, marks=pytest.mark.more), pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_killed_rank_is_started_again_with_the_others(
    hosts: int, together: Together, tmp_path: Path
) -> None:
    folder, port = tmp_path / "run", _free_port()
    where = {
        1: ("--nproc_per_node", "2", "--master_port", str(port)),
        2: ("--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"),
    }
    launchers = [
        _torchrun(tmp_path / f"host-{host}", *where[hosts], folder=folder) for host in range(hosts)
    ]
    try:
        before = _ranks_at_step(7, folder, launchers, tmp_path)
        assert len(before) == 2
        os.kill(before[-1], signal.SIGKILL)
        end = time.monotonic() + SECONDS
        statuses = [launcher.wait(end - time.monotonic()) for launcher in launchers]
    except subprocess.TimeoutExpired:
        raise AssertionError(_said(tmp_path)) from None
    finally:
        for launcher in launchers:
            launcher.terminate()
        for launcher in launchers:
            launcher.wait(60)
    said = _said(tmp_path)
    assert statuses == [0] * hosts, said
    assert re.search(r"resuming from .*step-0000(05|10)", said), said
    whole, _ = together("ddp", "checkpointed")
    mine, undisturbed = (load_file(f / "weights" / "model.safetensors") for f in (folder, whole))
    assert mine.keys() == undisturbed.keys()
    for name, value in undisturbed.items():
        assert float((mine[name] - value).norm()) <= 1e-6 * float(value.norm()), name


def _torchrun(log: Path, *options: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--max_restarts", "2", *options]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "-m", "train", *RUN.arguments(folder)],
            cwd=REPOSITORY, stdout=output, stderr=output, env=environment(),
        )  # fmt: skip


def _ranks_at_step(
    step: int, folder: Path, launchers: list[subprocess.Popen[bytes]], logs: Path
) -> list[int]:
    end = time.monotonic() + SECONDS
    while len(read_rows(folder / "metrics.jsonl")) < step:
        assert all(launcher.poll() is None for launcher in launchers), _said(logs)
        assert time.monotonic() < end, _said(logs)
        time.sleep(0.05)
    return [pid for launcher in launchers for pid in ranks_of(launcher)]


def _said(logs: Path) -> str:
    return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(logs.glob("host-*")))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])
