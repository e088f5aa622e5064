"""What the plan stage holds in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from sa_models.savings import llama_parameters
from tests.support.spans_base import base_model, recipe, write_base, write_text
from train.planning.search import auto_report
from train.stages import plan as stage
from train.stages.pipeline import plan


def living() -> int:
    """Models that are in memory, whoever holds them."""
    return sum(issubclass(type(found), LlamaForCausalLM) for found in gc.get_objects())


def test_no_model_is_held_that_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another part of the stage has worked with is gone, though compact models refer to
    themselves and the collector is not called by itself."""
    write_base(tmp_path / "base")
    write_text(tmp_path / "text.jsonl")
    saved = 2 * 8 * 32 * 4 + 2 * 4 * 8 * 32  # a span, and two units
    of = recipe(
        tmp_path,
        tmp_path / "run",
        plan={
            "strategy": "auto",
            "budget": {"bytes": f"-{100 * saved / llama_parameters(base_model(tmp_path).config)}%"},
            "calibration_blocks": 2,
        },
        spans=[{"leader": 2, "followers": [3]}],
        materialize={"reconstruct": True, "calibration_blocks": 2},
        train={"steps": 0},
    )
    counts: dict[str, set[int]] = {}

    def watch(module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counts.setdefault(name, set()).add(living() - before)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    for name in ("load_dense", "search_auto", "compare_rebuilt", "time_front"):
        watch(stage, name)
    watch(auto_report, "decode_time")
    monkeypatch.setattr("train.evaluation.decode_time.SECONDS", 0.0)
    gc.collect()
    before = living()
    gc.disable()
    try:
        plan(of)
    finally:
        gc.enable()
    assert counts == {
        "load_dense": {0},  # for the search, for every plan that is reconstructed, for the times
        "search_auto": {1},
        "compare_rebuilt": {0},
        "time_front": {1},
        "decode_time": {1},
    }
