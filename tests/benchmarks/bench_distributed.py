"""Two processes against one, waiting for data, and what a checkpoint costs: the demo, as launched.

One process runs on one core with one thread; two run on two cores with one thread each. Every
training has the same global batch. Tokens per second are the median of a run's steps after the
first five; runs of a comparison are interleaved, and the best of each counts, as a busy machine
only ever slows one down.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from train.tracking.metrics_log import read_rows

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST = 5
ROUNDS = 3
OVERRIDES = (
    "train.steps=40",
    "train.micro_batch_size=4",
    "train.evaluate_every=0",
    "train.checkpoint_every=0",
    "evaluate.continued=false",
    "evaluate.blocks=8",
)


def rows(folder: Path, config: str, processes: int, *overrides: str) -> list[dict[str, float]]:
    """metrics.jsonl of one run, without its first steps."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(REPOSITORY / "launch" / "accelerate" / f"{config}.yaml")]
    command += ["--main_process_port", "0", "--num_processes", str(processes)]
    command += [
        "-m",
        "train",
        "recipes/demo_postshare.yaml",
        *OVERRIDES,
        f"output_dir={folder}",
        *overrides,
    ]
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:processes])
    subprocess.run(
        ["taskset", "-c", cores, *command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return read_rows(folder / "metrics.jsonl")[FIRST:]


def measure() -> dict[str, dict[str, float]]:
    kinds: dict[str, tuple[str, int, tuple[str, ...]]] = {
        "one": ("cpu", 1, ()),
        "ddp": ("ddp", 2, ()),
        "zero1": ("zero1", 2, ()),
        "streaming": ("cpu", 1, ("data.streaming=true",)),
        "checkpoints": ("cpu", 1, ("train.checkpoint_every=4",)),
    }
    speed: dict[str, list[float]] = {kind: [] for kind in kinds}
    waiting: dict[str, list[float]] = {kind: [] for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as home:
        for turn in range(ROUNDS):
            for kind, (config, processes, overrides) in kinds.items():
                print(f"round {turn + 1} of {ROUNDS}: {kind}", file=sys.stderr, flush=True)
                found = rows(Path(home) / f"{kind}-{turn}", config, processes, *overrides)
                speed[kind].append(statistics.median(row["tokens_per_second"] for row in found))
                waited = sum(row["data_wait_seconds"] for row in found)
                waiting[kind].append(waited / sum(row["step_seconds"] for row in found))
                # From row to row, so that what a checkpoint delays counts: the mean, not a median.
                seconds[kind].append(
                    (found[-1]["seconds"] - found[0]["seconds"]) / (len(found) - 1)
                )
    best = {kind: max(values) for kind, values in speed.items()}
    return {
        "distributed": {
            "tokens_per_second_one": best["one"],
            "ddp_over_one": best["ddp"] / best["one"],
            "zero1_over_ddp": best["zero1"] / best["ddp"],
        },
        "data": {f"share_of_step_{kind}": min(waiting[kind]) for kind in ("one", "streaming")},
        "checkpoints": {
            "step_with_one_in_four_over_none": min(seconds["checkpoints"]) / min(seconds["one"])
        },
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
