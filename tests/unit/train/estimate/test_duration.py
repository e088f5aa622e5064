"""The dry run's steps and hours."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from train.common.console import plain_console
from train.data.blocks import prepare_data
from train.estimate import duration
from train.estimate.dry_run import print_dry_run
from train.models.tokenizer import load_tokenizer
from train.recipe.recipe import Recipe, load_recipe, validate


def recipe(folder: Path, text: Path, **train: Any) -> Recipe:
    return validate(
        {
            "name": "test",
            "output_dir": str(folder / "run"),
            "model": {"path": "demo-base"},
            "data": {
                "train": str(text),
                "validation_fraction": 0.1,
                "sequence_length": 64,
            },
            "plan": {"budget": {"ratio": 0.3}},
            "train": {
                "epochs": 2,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
                **train,
            },
        }
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    rows = [f"Document {i}: every stage reads and writes files, {i} times." for i in range(90)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def printed(of: Recipe, **options: Any) -> list[str]:
    out = io.StringIO()
    print_dry_run(of, console=plain_console(file=out, width=80), **options)
    return out.getvalue().splitlines()


def test_epochs_of_local_text_are_counted(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = recipe(tmp_path, text)
    blocks, _ = prepare_data(of, load_tokenizer("demo-base"), needed_blocks=None, vocab_size=2048)
    steps = math.ceil(2 * len(blocks) / 4)
    assert steps > 3
    lines = printed(of)
    assert f"training    {steps} steps, 2 epoch(s) of the local text" in lines
    assert f"tokens      256 per step, {steps * 256:,} ({steps * 256 / 1000:.3g} K) in all" in lines
    monkeypatch.setattr(duration, "MOST_BYTES", 1000)
    assert "training    2 epoch(s); the data tells how many steps" in printed(of)


def test_the_time_is_told_where_the_speed_is_known(tmp_path: Path, text: Path) -> None:
    of = recipe(tmp_path, text, epochs=None, steps=3600)
    missing = "time        not known; give the tokens per second of all GPUs together: --speed"
    assert missing in printed(of)
    line = "time        about 2.0 hours of training, the control included (256 tokens/s)"
    assert line in printed(of, tokens_per_second=256.0)
    folder = of.folder / "continued"
    folder.mkdir(parents=True)
    row = json.dumps({"step": 10, "seconds": 5.0})
    (folder / "metrics.jsonl").write_text(f"{row}\n{row[:9]}")
    alone = of.model_copy(update={"evaluate": of.evaluate.model_copy(update={"continued": False})})
    found = next(line for line in printed(alone) if line.startswith("time"))
    assert found == (
        "time        about 30 minutes of training, there is no control "
        f"(0.5 s a step, as in {folder / 'metrics.jsonl'})"
    )


@pytest.mark.parametrize("name", ["demo", "demo_sa", "demo_postshare", "llama2-7b-postshare-30"])
def test_no_cell_is_wrapped_at_80_columns(name: str) -> None:
    lines = printed(load_recipe(name), tokens_per_second=5000.0)
    facts = [line for line in lines if not line.startswith(("config", "warning"))]
    facts = facts[: next(n for n, line in enumerate(facts) if line.startswith("memory"))]
    assert max(map(len, facts)) <= 80
    assert not any("…" in line for line in lines)
    rows = [line for line in lines if line[:3] in {f" {stage} " for stage in range(4)}]
    assert len(rows) == 2 * 4
    parts, in_all = (lines[at + 1] for at, line in enumerate(lines) if line.startswith(" ZeRO"))
    for column in ("gradients", "optimizer", "activations", "total"):
        assert column in parts
    assert in_all.split()[1:] == ["off", "selective", "on"]
    # The total of the first table is that of the recipe's own way in the second.
    on = load_recipe(name).train.gradient_checkpointing
    assert [row.split()[-1] for row in rows[:4]] == [
        row.split()[3 if on else 1] for row in rows[4:]
    ]
    assert lines[-1] == "the whole recipe, defaults included: --full"
