"""wandb online, and its server goes away: training goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.support.wandb_server import Server
from train.tracking.metrics_log import read_rows


@pytest.mark.more
@pytest.mark.parametrize("network", ["never there", "gone in mid-run"])
def test_online_without_the_network_training_goes_on(network: str, tmp_path: Path) -> None:
    """The real wandb, in a process of its own; its server is here, and goes away."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    script = f"""
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
import time
from pathlib import Path
from tests.support import tiny
from train.tracking import wandb_run
from train.training import loop
from train.training.loop import train
wandb_run.CALL_SECONDS, wandb_run.CLOSING_SECONDS = 30, 5
started, seed = Path({str(tmp_path / "started")!r}), loop.seed_step
def wait(base, step, rank):
    if step == 2:
        started.touch()
        while started.exists(): time.sleep(0.01)
    seed(base, step, rank)
loop.seed_step = wait
asked = tiny.recipe(Path({str(tmp_path / "run")!r}), steps=4)
asked = asked.model_copy(update={{"wandb": asked.wandb.model_copy(update={{"mode": "online"}})}})
train(tiny.job(asked), asked)
"""
    if network == "never there":
        server.shutdown()
        server.server_close()
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={
            **os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40,
            "WANDB_INIT_TIMEOUT": "10",
        },
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() - began < 90
        time.sleep(0.05)
    if network == "gone in mid-run":
        server.shutdown()
        server.server_close()
    (tmp_path / "started").unlink()
    gone = time.monotonic()
    _, said = child.communicate(timeout=90)
    assert child.returncode == 0, said
    assert time.monotonic() - gone < 60
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 4
    warnings = [line for line in said.splitlines() if "warning: wandb failed" in line]
    assert len(warnings) == 1, said
    if network == "gone in mid-run":
        assert "later: wandb sync" in warnings[0], said
