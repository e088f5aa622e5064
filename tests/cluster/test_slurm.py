"""launch/slurm as shipped, on a real Slurm of two nodes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.slurm import ENDED, Slurm
from train.tracking.metrics_log import TIMING_KEYS, read_rows
from train.training.checkpoint import steps_in

STEPS = 400  # long enough for a warning, which Slurm looks for every 30 seconds
RECIPE = (
    "recipes/demo_postshare.yaml",
    f"train.steps={STEPS}",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.checkpoint_every=0",
    "data.sequence_length=64",
    "evaluate.blocks=4",
    "evaluate.continued=false",
)
ON_CPU = ("--nodes=2", "--gpus-per-node=1")


class Job:
    """One command line, submitted as often as one likes; all starts write to one file."""

    def __init__(self, cluster: Slurm, folder: Path, *options: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.output = folder.with_suffix(".out")
        self.command = (
            *ON_CPU, f"--output={self.output}", *options,
            "launch/slurm/train.sbatch", *RECIPE, f"output_dir={folder}",
        )  # fmt: skip
        self.id = ""

    def submit(self) -> None:
        self.id = self.cluster.submit(*self.command)

    def wait_for(self, *states: str, seconds: float = 600) -> str:
        until = {*states, *ENDED}
        state = self.cluster.wait(self.id, lambda state: state in until, seconds, self.output)
        assert state in states, f"{state}\n{self.text()}"
        return state

    def wait_for_steps(self, count: int) -> None:
        """Until `count` more steps have been logged."""
        wanted = self.steps() + count
        end = time.monotonic() + 300
        while self.steps() < wanted:
            state = self.cluster.state(self.id)
            assert state not in ENDED, f"{state}\n{self.text()}"
            assert time.monotonic() < end, f"{state}\n{self.text()}"
            time.sleep(0.5)

    def steps(self) -> int:
        file = self.folder / "metrics.jsonl"
        return len(read_rows(file)) if file.is_file() else 0

    def saved(self) -> int:
        """The newest checkpoint's step."""
        return max(steps_in(self.folder / "checkpoints"), default=0)

    def text(self) -> str:
        return self.output.read_text() if self.output.is_file() else ""


@pytest.fixture(scope="module", autouse=True)
def launch_file(cluster: Slurm) -> None:
    cluster.environment["LAUNCH_FILE"] = "launch/accelerate/ddp.yaml"


@pytest.fixture(scope="module")
def undisturbed(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = Job(cluster, tmp_path_factory.mktemp("undisturbed") / "run")
    job.submit()
    assert job.wait_for(*ENDED) == "COMPLETED", job.text()
    return job.folder


@pytest.mark.timeout(1800)
def test_cancelled_preempted_and_out_of_time_it_ends_as_if_undisturbed(
    cluster: Slurm, undisturbed: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path / "run")
    ends = []

    def stopped_and_saved() -> None:
        assert job.saved() > max(ends, default=0), job.text()
        assert f"stopped after step {job.saved()} of {STEPS}" in job.text()
        assert not list(job.folder.glob("checkpoints/*.tmp"))
        ends.append(job.saved())

    # Cancelled: saved, and not queued again.
    job.submit()
    job.wait_for_steps(5)
    cluster.run("scancel", job.id)
    assert job.wait_for(*ENDED) == "CANCELLED"
    stopped_and_saved()
    assert "queued again" not in job.text()

    # The same command goes on. A job that matters more takes the nodes: Slurm queues it again.
    job.submit()
    job.wait_for_steps(5)
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 2"
    )
    job.wait_for("PENDING")
    assert f"job {job.id}: queued again" in job.text()
    stopped_and_saved()
    job.wait_for("RUNNING")
    assert cluster.state(urgent) == "COMPLETED"

    # Its time is nearly over: warned, saved, queued again by itself.
    job.wait_for_steps(5)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=3")  # @300 is more than that
    job.wait_for("PENDING")
    assert "the time limit is near" in job.text(), job.text()
    assert job.text().count(f"job {job.id}: queued again") == 2
    stopped_and_saved()
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert job.wait_for(*ENDED) == "COMPLETED", job.text()
    assert f"resuming from {job.folder / 'checkpoints'}/step-{ends[-1]:06d}" in job.text()
    print("stopped after the steps", *ends)

    # Two processes have trained, and what they have done is the undisturbed run.
    assert "each of 2 nodes, the first is psnode1" in job.text()
    state = json.loads((job.folder / f"checkpoints/step-{ends[-1]:06d}/state.json").read_text())
    assert state["written_by"] == "DDP, 2 processes"
    rows, expected = (read_rows(f / "metrics.jsonl") for f in (job.folder, undisturbed))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, wanted in zip(rows, expected, strict=True):
        for key in row.keys() - TIMING_KEYS:
            assert row[key] == pytest.approx(wanted[key], rel=1e-6), (row["step"], key)
    mine, theirs = (
        load_file(f / "weights" / "model.safetensors") for f in (job.folder, undisturbed)
    )
    for name, value in theirs.items():
        assert float((mine[name] - value).norm()) <= 1e-6 * float(value.norm()), name


def test_the_sweep_trains_every_pair_in_a_folder_of_its_own(cluster: Slurm, tmp_path: Path) -> None:
    cluster.environment["SWEEP_DIR"] = str(tmp_path / "sweep")
    output = tmp_path / "slurm-%a.out"
    job = cluster.submit(
        "--array=1,3", "--gpus-per-node=1", f"--output={output}", "launch/slurm/sweep.sbatch",
        *RECIPE, "train.steps=2",
    )  # fmt: skip
    for task in ("1", "3"):
        file = tmp_path / f"slurm-{task}.out"
        state = cluster.wait(f"{job}_{task}", lambda state: state in ENDED, 300, file)
        assert state == "COMPLETED", file.read_text()
    folders = sorted(path.name for path in (tmp_path / "sweep").iterdir())
    assert folders == ["ratio-0.1-coefficient-0.5", "ratio-0.2-coefficient-0.1"]
    for name in folders:
        summary = json.loads((tmp_path / "sweep" / name / "summary.json").read_text())
        assert summary["heads"]["requested_ratio"] == float(name.split("-")[1])
