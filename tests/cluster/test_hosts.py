"""launch/hosts.sh on two hosts: network namespaces, reached by nsenter instead of ssh."""

from __future__ import annotations

import shlex
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.hosts import NAMES, on
from tests.support import REPOSITORY
from tests.support.launcher import environment
from train.tracking.metrics_log import read_rows
from train.training.checkpoint import steps_in

RECIPE = (
    "recipes/demo_postshare.yaml",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.checkpoint_every=0",
    "data.sequence_length=64",
    "evaluate.blocks=4",
    "evaluate.continued=false",
)


def train(folder: Path, launch_file: str, *overrides: str) -> subprocess.Popen[str]:
    """Start `launch/hosts.sh` for both hosts, one process on each."""
    work = folder.parent
    (work / "hosts.txt").write_text("\n".join(NAMES))
    lines = ["#!/usr/bin/env bash", "case $1 in"]
    lines += [f'{n}) exec {shlex.join(on(i, "sh", "-c"))} "$2";;' for i, n in enumerate(NAMES)]
    (work / "remote").write_text("\n".join([*lines, "esac"]))
    (work / "remote").chmod(0o755)
    return subprocess.Popen(
        ["launch/hosts.sh", work / "hosts.txt", *RECIPE, *overrides, f"output_dir={folder}"],
        cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment(
            REMOTE=str(work / "remote"), PROCESSES_PER_NODE="1",
            LAUNCH_FILE=f"launch/accelerate/{launch_file}.yaml",
        ),
    )  # fmt: skip


def output_of(process: subprocess.Popen[str], seconds: float = 300) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        raise AssertionError(process.communicate()[0]) from None


@pytest.mark.usefixtures("two_hosts")
def test_stopped_and_started_again_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    """DDP, told to stop by SIGTERM; the weights are those of a run that was not."""
    for name in ("stopped", "undisturbed"):
        (tmp_path / name).mkdir()
    folder, whole = tmp_path / "stopped" / "run", tmp_path / "undisturbed" / "run"
    steps = "train.steps=60"
    process = train(folder, "ddp", steps)
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 200
    while not metrics.is_file() or len(read_rows(metrics)) < 5:
        assert process.poll() is None, output_of(process)
        assert time.monotonic() < end
        time.sleep(0.1)
    process.terminate()
    output = output_of(process, 60)
    assert process.returncode != 0
    (saved,) = steps_in(folder / "checkpoints")
    assert f"stopped after step {saved} of 60" in output, output

    process = train(folder, "ddp", steps)
    output = output_of(process)
    assert process.returncode == 0, output
    assert f"resuming from {folder}/checkpoints/step-{saved:06d}" in output

    process = train(whole, "ddp", steps)
    output = output_of(process)
    assert process.returncode == 0, output
    mine, theirs = (load_file(f / "weights" / "model.safetensors") for f in (folder, whole))
    for name, value in theirs.items():
        assert float((mine[name] - value).norm()) <= 1e-6 * float(value.norm()), name


@pytest.mark.usefixtures("two_hosts")
def test_zero3_over_two_hosts(tmp_path: Path) -> None:
    process = train(tmp_path / "run", "zero3", "train.steps=3")
    output = output_of(process)
    assert process.returncode == 0, output
    assert (tmp_path / "run" / "export" / "compact" / "manifest.json").is_file()
