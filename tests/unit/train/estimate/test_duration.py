"""The dry run's steps, hours and GPU-hours."""

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
from train.estimate.duration import Job
from train.estimate.llama_shapes import find_shape
from train.estimate.throughput import Assumed, Speed
from train.models.tokenizer import load_tokenizer
from train.planning.problem import PlanProblem
from train.recipe.recipe import Recipe, load_recipe, validate
from train.recipe.sections.plan import PlanSection


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


def test_the_cost_is_told_where_the_speed_is_known(tmp_path: Path, text: Path) -> None:
    of = recipe(tmp_path, text, epochs=None, steps=3600)
    missing = "speed       not known: no chip is named; give --chip H100, or --speed TOKENS"
    assert missing in printed(of)
    # 3,600 steps of 4 x 64 tokens at 256 tokens/s: an hour of 2 GPUs, and once more the control.
    lines = printed(of, assumed=Assumed(tokens_per_second=256.0))
    at = lines.index("speed       256 tokens/s on 2 GPU(s): as given")
    assert lines[at + 1 : at + 6] == [
        "time        training  about 60 minutes, 2 GPU-hours, 921,600 tokens",
        "            control   about 60 minutes, 2 GPU-hours, as many",
        "            search    none by measured loss",
        "            in all    about 2.0 hours, 4 GPU-hours",
        "            without   evaluation, export, penalty",
    ]
    folder = of.folder / "continued"
    folder.mkdir(parents=True)
    row = json.dumps({"step": 10, "seconds": 5.0})
    (folder / "metrics.jsonl").write_text(f"{row}\n{row[:9]}")
    alone = of.model_copy(update={"evaluate": of.evaluate.model_copy(update={"continued": False})})
    lines = printed(alone, gpus=1)
    found = f"0.5 s a step, as in {folder / 'metrics.jsonl'}"
    at = lines.index(f"speed       512 tokens/s on 1 GPU(s): {found}")
    assert lines[at + 1 : at + 3] == [
        "time        training  about 30 minutes, 0.5 GPU-hours, 921,600 tokens",
        "            control   none",
    ]


def test_epochs_that_cannot_be_counted_cost_by_the_thousand_steps(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "MOST_BYTES", 1000)
    lines = printed(recipe(tmp_path, text), assumed=Assumed(tokens_per_second=256.0), gpus=1)
    assert "time        training  about 17 minutes, 0.278 GPU-hours, for each 1,000 steps" in lines
    assert not any("in all " in line for line in lines)


def test_a_search_is_counted_on_one_gpu_in_fp32(tmp_path: Path, text: Path) -> None:
    plan = {"strategy": "loss", "budget": {"heads": 10}, "calibration_blocks": 4}
    trained = recipe(tmp_path, text, epochs=None, steps=10, precision="bf16")
    of = trained.model_copy(update={"plan": PlanSection.model_validate(plan)})
    shape, _ = find_shape(of.model)
    job = Job(of, PlanProblem(of.plan, shape), 10, 2)
    passes = duration.search_passes(job.problem)
    assert passes is not None
    # Ten rounds of one action measure 8 of them and the new state; 6 rounds share two estimates.
    assert (passes.forward, passes.backward) == (1 + 10 * (8 + 1), 4)
    # A forward pass is a third of a step: at 3,000 tokens/s of two GPUs one reads 4,500 a second.
    tokens = (91 + 3 * 4) * 4 * 64
    for slower in (1.0, 10.0):
        found = duration.search_seconds(job, Speed(3000.0, ("",), slower))
        assert found == pytest.approx(tokens / 4500 * slower)
    assert duration.search_seconds(job, Speed(3000.0, ("",), None)) is None
    lines = printed(of, assumed=Assumed(tokens_per_second=3000.0), gpus=2)
    assert "            search    not known: fp32 at this speed; give --chip" in lines


@pytest.mark.parametrize("name", ["demo", "demo_sa", "demo_postshare", "llama2-7b-postshare-30"])
def test_no_cell_is_wrapped_at_80_columns(name: str) -> None:
    lines = printed(load_recipe(name), assumed=Assumed(5000.0))
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
