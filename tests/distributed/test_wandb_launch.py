"""Offline wandb of a launch, read back: every metric that a panel promises, once, from one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.wandb_worker import GROUP
from tests.support import tiny
from tests.support.launcher import run
from tests.support.wandb_file import history, records, values
from tests.support.wandb_server import serving
from train.tracking.dashboard_panels import SECTIONS, keys
from train.tracking.wandb_names import wandb_name

pytestmark = pytest.mark.distributed

NO_PANEL = {wandb_name(key) for key in ("step", "tokens", "seconds")}
NO_PANEL |= {"_step", "_runtime", "_timestamp"}


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of two ranks: of a training that stopped and went on, and of its evaluation."""
    folder = tmp_path_factory.mktemp("wandb")
    tiny.model(seed=7).save_pretrained(folder / "teacher")
    output = run("ddp", Path(__file__).with_name("wandb_worker.py"), folder, processes=2)
    assert "first: stopped here" in output
    return sorted(
        folder.glob("run/wandb/offline-run-*/run-*.wandb"),
        key=lambda f: (f.parent.name.split("-")[2], f.stat().st_mtime),  # when they began, first
    )


def test_every_panel_shows_what_the_main_process_logs(segments: list[Path]) -> None:
    first, second, evaluation = segments  # one process, or there would be more
    rows = history(first) + history(second)
    logged = set().union(*rows) - NO_PANEL
    assert logged == keys(*SECTIONS) - keys("evaluation")
    (summary,) = (
        values(record.summary.update)
        for record in records(evaluation)
        if record.WhichOneof("record_type") == "summary"
        and "postshare/perplexity/post" in values(record.summary.update)
    )
    assert keys("evaluation") <= set(summary)
    assert summary["postshare/perplexity/post"] == 13.0
    assert summary["postshare/bytes/compact"] == 900


def test_segments_join_into_the_rows_of_the_file(segments: list[Path]) -> None:
    first, second, _ = segments
    assert first.name == second.name  # the run's id
    assert [row["_step"] for row in history(first)] == [1, 2, 3]
    assert [row["_step"] for row in history(second)] == [3, 4, 5]  # from the checkpoint of step 2
    joined = {row["_step"]: row for file in (first, second) for row in history(file)}
    folder = first.parents[2]
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in kept:
        assert {key: joined[row["step"]][wandb_name(key)] for key in row} == row
    # What the second says again is what the first has said.
    assert history(second)[0]["train/loss"] == history(first)[2]["train/loss"]


def test_sync_appends_the_segments(segments: list[Path]) -> None:
    """`wandb sync` itself, as docs/tracking.md has it; the server is ours."""
    first, second, _ = segments
    with serving() as server:
        sync = [Path(sys.executable).with_name("wandb"), "sync", first.parent, second.parent]
        done = subprocess.run(
            [*map(str, sync)], capture_output=True, text=True, timeout=300,
            cwd=first.parent,  # where it leaves its own log
            env={
                **os.environ, "WANDB_API_KEY": "0" * 40,
                "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ((name, lines),) = server.rows.items()
    rows = [json.loads(line) for line in lines]
    assert first.name == f"run-{name}.wandb"
    assert [row["train/global_step"] for row in rows] == [1, 2, 3, 3, 4, 5]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in rows] == [
        row["train/loss"] for file in (first, second) for row in history(file)
    ]


def test_the_run_and_its_exports_say_where_they_come_from(segments: list[Path]) -> None:
    told = []
    for file in segments:
        (record,) = (r.run for r in records(file) if r.WhichOneof("record_type") == "run")
        told.append((record.run_group, record.job_type, record.display_name))
    training = (GROUP, "post-train", f"{GROUP}-post-train")
    assert told == [training, training, (GROUP, "evaluate", f"{GROUP}-evaluate")]
    artifacts = [r.artifact for r in records(segments[2]) if r.HasField("artifact")]
    assert [(a.name, a.type) for a in artifacts] == [
        ("tiny-compact", "model"),
        ("tiny-dense", "model"),
    ]
    metadata = json.loads(artifacts[0].metadata)
    assert metadata["plan_sha256"] == tiny.PLAN.hash()
    assert (metadata["base_model"], metadata["data"]) == ("tiny", ["tiny"])
    (entry,) = artifacts[0].manifest.contents
    assert (entry.path, Path(entry.local_path).read_text()) == ("weights", "compact")
