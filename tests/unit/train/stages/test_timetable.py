from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from train.stages.run import Run
from train.stages.timetable import Stage, announce
from train.tracking.metrics_log import ProgressLine


def train(folder: Path, steps: int, seconds: float, finished: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "seconds": seconds}) + "\n")
    if finished:
        (folder / "weights").mkdir()
        result = {"steps": steps, "tokens": 1, "seconds": seconds}
        (folder / "result.json").write_text(json.dumps(result))


def run(main: bool = True) -> Run:
    return cast(Run, SimpleNamespace(ranks=SimpleNamespace(is_main=main)))


def lines(stages: list[Stage], capsys: pytest.CaptureFixture[str], main: bool = True) -> list[str]:
    for number in range(1, len(stages) + 1):
        announce(run(main), stages, number)
    return capsys.readouterr().err.splitlines()


def test_a_stage_says_its_number_and_what_is_known_of_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(current: Run) -> None: ...

    stages = [
        Stage("plan", work),
        Stage("continued", work, 1200, tmp_path / "continued"),
        Stage("post", work, 1000, tmp_path),
        Stage("heal", work, 200, tmp_path / "heal"),
        Stage("export", work),
        Stage("evaluate", work, reads=90),  # as 30 steps
    ]
    assert lines(stages, capsys) == [
        "stage 1 of 6: plan",
        "stage 2 of 6: continued, 1,200 steps",
        "stage 3 of 6: post, 1,000 steps",
        "stage 4 of 6: heal, 200 steps",
        "stage 5 of 6: export",
        "stage 6 of 6: evaluate",
    ]
    train(tmp_path / "continued", 1200, 600.0)  # half a second a step
    assert lines(stages, capsys) == [
        "stage 1 of 6: plan; about 10:15 left",
        "stage 2 of 6: continued, done before; about 10:15 left",
        "stage 3 of 6: post, 1,000 steps; about 10:15 left",
        "stage 4 of 6: heal, 200 steps; about 1:55 left",
        "stage 5 of 6: export; about 0:15 left",
        "stage 6 of 6: evaluate; about 0:15 left",
    ]
    train(tmp_path, 400, 400.0, finished=False)  # stopped there; now a second a step
    assert lines(stages, capsys)[2:4] == [
        "stage 3 of 6: post, 1,000 steps; about 13:50 left",
        "stage 4 of 6: heal, 200 steps; about 3:50 left",
    ]
    assert lines(stages, capsys, main=False) == []


def test_the_line_of_a_training_knows_those_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {
        "step": 5, "lm_loss": 2.0, "step_seconds": 2.0, "tokens_per_second": 10.0,
        "data_wait_seconds": 0.0, "memory_bytes": 2**30, "seconds": 10.0,
    }  # fmt: skip
    for later, end in ((20, "1.00 GiB  all training 0:50 ETA"), (0, "1.00 GiB ETA")):
        line = ProgressLine("continued", 10, 4, later)
        line.show(row)
        line.close()
        assert end in capsys.readouterr().err
