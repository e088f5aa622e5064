from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from sa_models.errors import PostshareError
from tests.support import tiny
from tests.support.tiny import row
from train.common import progress
from train.tracking.metrics_log import Tracker, read_rows, truncate_rows
from train.training.loop import train

# --- metrics.jsonl --------------------------------------------------------------------------------


def test_rows_are_appended_and_truncated(tmp_path: Path) -> None:
    asked = tiny.recipe(tmp_path, steps=4)
    with Tracker("post", asked, tmp_path, 4) as tracker:
        for step in (1, 2, 3):
            tracker.log(row(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lm_lo')
    with Tracker("post", asked, tmp_path, 4, resumed_step=2) as tracker:
        tracker.log(row(3, lm_loss=1.0))
    assert [(r["step"], r["lm_loss"]) for r in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 2.0),
        (2, 2.0),
        (3, 1.0),
    ]


def test_a_damaged_file_is_not_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(PostshareError, match=r"line 2 is not JSON"):
        truncate_rows(path, 1)
    assert len(path.read_text().splitlines()) == 3


def test_only_the_main_process_tracks(tmp_path: Path) -> None:
    with Tracker(
        "post", tiny.recipe(tmp_path, steps=4), tmp_path / "run", 4, main=False
    ) as tracker:
        tracker.log(row(1))
        tracker.say("nothing")
        assert tracker.wandb_run_id is None
    assert not (tmp_path / "run").exists()


def test_what_a_row_holds(tmp_path: Path) -> None:
    asked = tiny.recipe(tmp_path, steps=4)
    train(tiny.job(asked), asked)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert set(rows[0]) == {
        "step", "tokens", "lm_loss", "penalty", "total_loss", "gradient_norm", "learning_rate",
        "pair_distance_mean", "pair_distance_worst", "pair_cosine_mean", "pair_cosine_worst",
        "pairs_merged", "penalty_bytes",
        "seconds", "step_seconds", "tokens_per_second", "data_wait_seconds", "memory_bytes",
    }  # fmt: skip
    assert [r["tokens"] for r in rows] == [120, 240, 360, 480]
    assert 2**20 < rows[0]["memory_bytes"] < 2**40
    assert rows[0]["data_wait_seconds"] <= rows[0]["step_seconds"]
    rate = rows[1]["tokens_per_second"] * rows[1]["step_seconds"]
    assert rate == pytest.approx(120)


# --- the line -------------------------------------------------------------------------------------


def test_without_a_terminal_a_line_every_few_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker("post", tiny.recipe(tmp_path, steps=4), tmp_path, 100) as tracker:
        for step in range(1, 101):
            tracker.log(row(step))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith(
        "post 1/100 loss 2.0000  penalty 0.5  1,234 tokens/s  data 20%  1.00 GiB ETA "
    )
    assert lines[-1].endswith("ETA 0:00")


def test_on_a_terminal_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", console)
    with Tracker("post", tiny.recipe(tmp_path, steps=4), tmp_path, 10) as tracker:
        tracker.log(row(7))
        tracker.say("saved [bold]")
    text = screen.getvalue()
    assert "7/10 loss 2.0000" in text
    assert "saved [bold]" in text
