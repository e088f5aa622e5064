"""launch/slurm without a Slurm: its commands are stand-ins that note how they are called.

tests/cluster submits the same files to a real one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from train.recipe.recipe import load_recipe

FILES = sorted((REPOSITORY / "launch" / "slurm").glob("*.sbatch"))

STUBS = {
    "scontrol": """
        case "$1 $2" in
          "show hostnames") echo a7; echo a8;;
          "show job") echo "JobId=40017 JobState=${STATE:-RUNNING} PreemptTime=${PREEMPTED:-None}";;
          *) echo "$@" >>"$NOTES/scontrol";;
        esac""",
    "scancel": 'echo "$@" >>"$NOTES/scancel"; touch "$NOTES/warned"',
    # One task, on the second node. It ends when it is warned, with the status asked for.
    "srun": """
        [[ $1 == --kill-on-bad-exit=1 ]] && shift
        export SLURM_NODEID=1
        "$@" || exit
        [[ ${WAIT:-} ]] || exit ${STATUS:-0}
        for _ in $(seq 300); do [[ -e $NOTES/warned ]] && exit ${STATUS:-0}; sleep 0.1; done
        exit 9""",
    "accelerate": 'printf "%s\\n" "$@" >"$NOTES/accelerate"; trap -p USR1 >"$NOTES/ignored"',
    "apptainer": """
        [[ $1 == exec ]] && shift
        while [[ $1 == --* ]]; do case $1 in --nv) shift;; *) shift 2;; esac; done
        echo "$1" >"$NOTES/image"; shift; exec "$@" """,
}


class Batch:
    """A batch script that Slurm has started, for the job of this environment."""

    def __init__(self, folder: Path, file: str, *arguments: str, **environment: str) -> None:
        self.notes = folder / "notes"
        stubs, work = folder / "bin", folder / "work"
        for path in (self.notes, stubs, work):
            path.mkdir()
        (work / "launch").symlink_to(REPOSITORY / "launch")
        for name, body in STUBS.items():
            (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (stubs / name).chmod(0o755)
        self.process = subprocess.Popen(
            ["bash", REPOSITORY / "launch" / "slurm" / file, *arguments],
            env={
                "PATH": f"{stubs}:{os.environ['PATH']}", "NOTES": str(self.notes),
                "SLURM_SUBMIT_DIR": str(work), "SLURM_JOB_ID": "40017", "SLURM_NNODES": "2",
                "SLURM_JOB_NODELIST": "a[7-8]", "SLURM_GPUS_ON_NODE": "4", **environment,
            },
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def warn(self) -> None:
        end = time.monotonic() + 60
        while not (self.notes / "accelerate").exists():
            assert time.monotonic() < end, "the launcher was never started"
            time.sleep(0.05)
        self.process.send_signal(signal.SIGUSR1)

    def end(self) -> int:
        self.output, self.errors = self.process.communicate(timeout=60)
        return self.process.returncode

    def note(self, name: str) -> str:
        file = self.notes / name
        return file.read_text().strip() if file.exists() else ""


def test_each_node_launches_its_share(tmp_path: Path) -> None:
    batch = Batch(tmp_path, "train.sbatch", "recipes/demo_postshare.yaml", "data.train=a b")
    assert batch.end() == 0, batch.errors
    assert batch.note("accelerate").split("\n") == [
        "launch", "--machine_rank", "1",
        "--config_file", "launch/accelerate/zero3.yaml",
        "--num_machines", "2", "--num_processes", "8",
        "--main_process_ip", "a7", "--main_process_port", str(15000 + 40017 % 16000),
        "-m", "train", "recipes/demo_postshare.yaml", "data.train=a b",
    ]  # fmt: skip
    assert batch.note("scontrol") == "", "not queued again"


def test_the_environment_chooses_launch_file_and_processes(tmp_path: Path) -> None:
    batch = Batch(
        tmp_path, "train.sbatch", "recipes/demo_postshare.yaml",
        LAUNCH_FILE="launch/accelerate/ddp.yaml", PROCESSES_PER_NODE="3",
    )  # fmt: skip
    assert batch.end() == 0, batch.errors
    called = batch.note("accelerate").split("\n")
    assert "launch/accelerate/ddp.yaml" in called
    assert called[called.index("--num_processes") + 1] == "6"


def test_warned_and_stopped_it_is_queued_again(tmp_path: Path) -> None:
    batch = Batch(tmp_path, "train.sbatch", "recipes/demo_postshare.yaml", WAIT="1", STATUS="1")
    batch.warn()
    assert batch.end() == 1
    assert batch.note("scancel") == "--signal=USR1 40017"
    assert batch.note("scontrol") == "requeue 40017"
    assert "''" in batch.note("ignored"), "the launcher itself ignores the warning"


@pytest.mark.parametrize("status", ["0", "1"])
def test_otherwise_it_is_not(tmp_path: Path, status: str) -> None:
    """It failed without a warning, or it was done in spite of one."""
    wait = {"WAIT": "1"} if status == "0" else {}
    batch = Batch(tmp_path, "train.sbatch", "recipes/demo_postshare.yaml", STATUS=status, **wait)
    if wait:
        batch.warn()
    assert batch.end() == int(status)
    assert batch.note("scontrol") == ""


def test_preempted_it_is_queued_again_and_cancelled_it_is_not(tmp_path: Path) -> None:
    since = "2026-11-23T13:45:30"
    for state, asked in (("RUNNING", "requeue 40017"), ("CANCELLED", "")):
        folder = tmp_path / state
        folder.mkdir()
        batch = Batch(
            folder,
            "train.sbatch",
            "recipes/demo_postshare.yaml",
            STATUS="1",
            PREEMPTED=since,
            STATE=state,
        )
        assert batch.end() == 1
        assert batch.note("scontrol") == asked


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_without_a_recipe_it_says_how_it_is_used(tmp_path: Path, file: Path) -> None:
    batch = Batch(tmp_path, file.name, IMAGE="x", SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_JOB_ID="1")
    assert batch.end() == 2
    assert batch.errors.startswith("usage: sbatch launch/slurm/")


def test_in_a_container(tmp_path: Path) -> None:
    batch = Batch(
        tmp_path, "container.sbatch", "recipes/demo_postshare.yaml", IMAGE="/images/p.sif"
    )
    assert batch.end() == 0, batch.errors
    assert batch.note("image") == "/images/p.sif"
    assert "recipes/demo_postshare.yaml" in batch.note("accelerate")


def test_the_sweep_covers_all_pairs_and_sets_keys_that_exist(tmp_path: Path) -> None:
    seen = set()
    for task in range(9):
        folder = tmp_path / str(task)
        folder.mkdir()
        batch = Batch(
            folder, "sweep.sbatch", "recipes/demo_postshare.yaml", "train.steps=3",
            SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_JOB_ID="7",
        )  # fmt: skip
        assert batch.end() == 0, batch.errors
        called = batch.note("accelerate").split("\n")
        recipe = load_recipe(
            "demo_postshare", called[called.index("recipes/demo_postshare.yaml") + 1 :]
        )
        assert recipe.plan.budget is not None
        seen.add((recipe.plan.budget.ratio, recipe.penalty.coefficient, recipe.output_dir))
    assert len({pair[:2] for pair in seen}) == len({pair[2] for pair in seen}) == 9


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_warns_requeues_and_appends(file: Path) -> None:
    text = file.read_text()
    for option in ("signal=B:USR1@300", "requeue", "open-mode=append", "partition=gpu"):
        assert re.search(rf"^#SBATCH --{option}$", text, re.M), option
    for recipe in re.findall(r"recipes/\S+\.yaml", text):
        assert (REPOSITORY / recipe).is_file(), recipe
