"""torchrun starts its processes again after one was killed; the run ends as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.harness import REPOSITORY, run
from tests.distributed.test_signals import ranks_of
from train.tracking import read_rows

pytestmark = pytest.mark.distributed

RECIPE = (
    "recipes/demo.yaml",
    "train.steps=40",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.checkpoint_every=5",
    "data.sequence_length=64",
    "evaluate.blocks=2",
    "evaluate.continued=false",
)


@pytest.mark.xfail(
    run=False, reason="the restarted ranks wait before their first step; cause not found"
)
def test_a_killed_rank_is_started_again_with_the_others(tmp_path: Path) -> None:
    folder, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--max_restarts", "2", "--master_port", "0", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "localhost:0", "-m", "train", *RECIPE, f"output_dir={folder}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=output, stderr=output,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 150
        while len(read_rows(folder / "metrics.jsonl")) < 12:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        before = ranks_of(process)  # type: ignore[arg-type]
        assert len(before) == 2
        os.kill(before[1], signal.SIGKILL)
        process.wait(300)
    finally:
        process.terminate()
        process.wait()
    said = log.read_text()
    assert process.returncode == 0, said
    assert re.search(r"resuming from .*step-0000(05|10)", said), said
    run("ddp", "-m", "train", *RECIPE, f"output_dir={whole}")
    mine, theirs = (load_file(f / "weights" / "model.safetensors") for f in (folder, whole))
    for name, value in theirs.items():
        assert float((mine[name] - value).norm()) <= 1e-6 * float(value.norm()), name
