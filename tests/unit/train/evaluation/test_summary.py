from __future__ import annotations

import gc
import io
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sa_models.errors import PostshareError
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import AttentionSpan, HeadTie, SharingPlan
from tests.support import tiny
from train.common.console import plain_console
from train.data.blocks import Blocks
from train.evaluation import summary
from train.evaluation.perplexity import Perplexity, perplexity
from train.evaluation.summary import (
    EvaluatedModel,
    TrainingCost,
    evaluate_models,
    read_block_losses,
    saved_sentence,
    summary_table,
)
from train.stages.run import print_whole

CPU = torch.device("cpu")


class Loads:
    """Models by name; counts how often each is loaded, and how many there are at a time."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.alive = 0
        self._made: list[weakref.ref[LlamaForCausalLM]] = []

    def model(self, name: str, seed: int, **made_of: Any) -> EvaluatedModel:
        def load() -> PreTrainedModel:
            self.alive = max(self.alive, sum(made() is not None for made in self._made))
            model = tiny.model(seed)
            if seed:
                model = SharedLlamaForCausalLM.from_materialized(model, tiny.PLAN)
            self.names.append(name)
            self._made.append(weakref.ref(model))
            return model

        return EvaluatedModel(load, {"weights": seed, **made_of})


def evaluate(
    folder: Path, models: dict[str, EvaluatedModel], blocks: Blocks, limit: int | None = None
) -> tuple[dict[str, float], list[str]]:
    said: list[str] = []
    found = evaluate_models(models, blocks, 2, limit, CPU, folder, said.append)
    return {name: value.loss for name, value in found.items()}, said


@pytest.mark.parametrize("changed", ["weights", "attention", "tokens", "order", "labels", "limit"])
def test_a_loss_is_kept_for_the_very_model_and_text_alone(changed: str, tmp_path: Path) -> None:
    loads, text = Loads(), tiny.blocks(6)
    models = {"base": loads.model("base", 0), "post": loads.model("post", 1)}
    before, _ = evaluate(tmp_path, models, text, 4)
    assert evaluate(tmp_path, models, text, 4) == (before, [])
    assert loads.names == ["base", "post"]

    again, limit = ["base", "post"], 4
    if changed == "weights":
        models["post"], again = loads.model("post", 2), ["post"]
    elif changed == "attention":
        models["post"], again = loads.model("post", 1, attention="eager"), ["post"]
    elif changed == "limit":
        limit = 5
    else:
        text = {
            "tokens": tiny.blocks(6, seed=5),
            "order": Reversed(text, 4),
            "labels": tiny.blocks(6, document_mask=True),
        }[changed]
    found, (line,) = evaluate(tmp_path, models, text, limit)
    assert loads.names[2:] == again
    assert line.startswith(f"measured again: {', '.join(again)} (")
    for name, model in models.items():
        expected = perplexity(model.load(), text, 2, limit, progress=False).loss
        assert found[name] == pytest.approx(expected, rel=1e-6)
        held = read_block_losses(tmp_path)[name]
        assert held.perplexity.loss == pytest.approx(expected, rel=1e-6)
        written = json.loads((tmp_path / "evaluation.json").read_text())["models"]
        assert written[name]["loss"] == pytest.approx(expected, rel=1e-6)
    assert changed not in ("weights", "tokens", "labels", "limit") or found != before


class Reversed(Blocks):
    """The first blocks of another text, last first."""

    def __init__(self, blocks: Blocks, count: int) -> None:
        self.blocks, self.count, self.length = blocks, count, blocks.length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.blocks[self.count - 1 - index]


def test_losses_of_an_earlier_version_are_measured_again(tmp_path: Path) -> None:
    loads, text = Loads(), tiny.blocks(4)
    models = {"base": loads.model("base", 0)}
    expected, _ = evaluate(tmp_path, models, text)
    file = tmp_path / "evaluation-blocks.json"
    value = json.loads(file.read_text())
    del value["base"]["of"]
    value["base"]["nats"] = [9.0] * len(value["base"]["nats"])
    file.write_text(json.dumps(value))
    found, (line,) = evaluate(tmp_path, models, text)
    assert found == expected
    assert "earlier version, which does not say what was measured" in line
    assert loads.names == ["base", "base"]


def test_one_model_is_held_at_a_time(tmp_path: Path) -> None:
    """A compact one refers to itself: without a word to the collector it stays."""
    loads = Loads()
    gc.disable()
    try:
        models = {str(seed): loads.model(str(seed), seed) for seed in (1, 2, 0, 3)}
        evaluate(tmp_path, models, tiny.blocks(2))
    finally:
        gc.enable()
    assert loads.names == ["1", "2", "0", "3"]
    assert loads.alive == 0


def test_the_version_of_what_is_computed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, text = Loads(), tiny.blocks(2)
    models = {"base": loads.model("base", 0)}
    evaluate(tmp_path, models, text)
    monkeypatch.setattr(summary, "VERSION", summary.VERSION + 1)
    evaluate(tmp_path, models, text)
    assert loads.names == ["base", "base"]


def test_a_loss_that_is_not_finite_names_its_model(tmp_path: Path) -> None:
    """Found by reading: a base that overflows was told to lower the learning rate."""

    def load() -> PreTrainedModel:
        model = tiny.model()
        model.model.norm.weight.data.fill_(torch.nan)
        return model

    models = {"good": Loads().model("good", 0), "base": EvaluatedModel(load, {})}
    with pytest.raises(PostshareError, match=r"^base: the evaluation loss is nan; .* of another"):
        evaluate(tmp_path, models, tiny.blocks(2))
    assert list(read_block_losses(tmp_path)) == ["good"]


# --- the table ------------------------------------------------------------------------------------

LLAMA_2_70B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)


def summary_of(plan: SharingPlan, continued: float | None = 3.2) -> dict[str, Any]:
    values = {"base": 3.32, "continued": continued, "direct": 4.41, "post": 3.24}
    measured = {n: Perplexity(1.0, v, 100) for n, v in values.items() if v is not None}
    return summary.summarize(
        measured,
        plan,
        plan.savings(LLAMA_2_70B),
        0.01,
        {"base": 137_953_296_384, "compact": 137_000_000_000},
        TrainingCost(tokens=600, seconds=1.0),
        element_bytes=2,
        positions=4096,
    )


def printed(value: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    print_whole(plain_console(file=out, width=80), summary_table(value))
    return out.getvalue().splitlines()


MIXED = SharingPlan(
    ties=(HeadTie((5, 0), (1, 3), ("q", "k", "v", "o")),), removed=((6, 0), (6, 1), (7, 2))
)


def test_what_changes_is_counted_in_units_by_their_name() -> None:
    value = summary_of(MIXED)
    lines = printed(value)
    assert "KV groups" in lines[0]
    assert "tied +" in lines[1]
    assert "removed" in lines[2]
    assert [line.split()[-5:-2] for line in lines if "3.24" in line] == [["1", "+", "3/640"]]
    assert saved_sentence(value).startswith(
        "saved     0.2% of the KV groups tied, 0.5% of the KV groups removed: "
    )
    assert summary.units_of({"heads": value["heads"]})["total"] == 64 * 80  # of an earlier version


def test_the_table_of_a_70b_fits_80_columns() -> None:
    lines = printed(summary_of(MIXED))
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert len(lines) == 3 + 1 + 4  # a heading in three lines, a rule, one line a model


def test_without_the_control_there_is_no_column_for_it() -> None:
    head = " ".join(printed(summary_of(MIXED, continued=None))[:3])
    assert "vs" not in head
    assert "continued" not in head
    assert "continued" in " ".join(printed(summary_of(MIXED))[:3])


def test_shares_of_the_cache_have_one_form() -> None:
    lines = printed(summary_of(SharingPlan(spans=(AttentionSpan(1, (2, 3)),))))
    assert [line.split()[-3] for line in lines if "137," in line] == [
        "100.0%", "100.0%", "98.8%", "98.8%",
    ]  # fmt: skip
