"""Launches from a folder with a `train.py` of the user's own, which `-m train` would start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launcher import environment, launch, run
from train.tracking.metrics_log import read_rows

pytestmark = pytest.mark.distributed
FURTHER = [pytest.param(name, marks=pytest.mark.more) for name in ("ddp", "zero2")]

SHORT = (
    "train.steps=2",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "data.sequence_length=64",
    "evaluate.blocks=2",
    "evaluate.continued=false",
)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a `train.py` that is not ours."""
    (tmp_path / "train.py").write_text("raise SystemExit('this is mine')\n")
    return tmp_path


def test_a_module_is_theirs(own: Path) -> None:
    result = launch("cpu", "-m", "train", "demo_postshare", folder=own)
    assert result.failed
    assert "this is mine" in result.output, result.report()


@pytest.mark.parametrize("config", ["cpu", *FURTHER])
def test_the_command_is_ours(config: str, own: Path) -> None:
    command = ("--no_python", "postshare", "run", "demo_postshare")
    output = run(config, *command, *SHORT, "output_dir=run", folder=own)
    assert "this is mine" not in output
    assert "-m train" not in output, "no warning of what has not been started"
    assert len(read_rows(own / "run" / "metrics.jsonl")) == 2
    assert '"command": "postshare run demo_postshare' in (own / "run/provenance.json").read_text()
    assert (own / "run" / "summary.json").is_file()


@pytest.mark.more
def test_torchrun_starts_it_too(own: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--no_python", "postshare", "doctor"]
    done = subprocess.run(
        command, cwd=own, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert "2 answer, on 1 host" in done.stdout, done.stdout + done.stderr
    assert done.returncode in (0, 1), "what the doctor finds here is not the question"
    assert "this is mine" not in done.stdout + done.stderr
