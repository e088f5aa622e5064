from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table
from transformers import LlamaConfig

from sa_models.plan import AttentionSpan, HeadTie, SharingPlan
from train.planning.find import plan_lines
from train.planning.search_page import add_to_page, cost_line

GQA = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
MHA = LlamaConfig(**{**GQA.to_diff_dict(), "num_key_value_heads": 32})


def test_a_table_becomes_markdown(tmp_path: Path) -> None:
    table = Table("plan")
    table.add_column("loss\nnow", justify="right")
    table.add_row("a | b", "1.5")
    add_to_page(tmp_path, "First.")
    add_to_page(tmp_path, table, "Last.")
    assert (tmp_path / "plan-search.md").read_text() == (
        "First.\n\n| plan | loss now |\n| --- | ---: |\n| a \\| b | 1.5 |\n\nLast.\n\n"
    )


def test_the_cost_of_a_plan() -> None:
    line = cost_line(math.log(38.41), math.log(37.46))
    assert line == ("cost      perplexity 37.46 to 38.41 on calibration text, untrained: +2.5%")
    assert len(line) <= 80


def test_the_lines_of_a_plan_count_units_by_their_name() -> None:
    plan = SharingPlan(
        ties=(HeadTie((5, 0), (1, 3), ("q", "k", "v", "o")),),
        removed=((6, 0), (6, 1), (7, 2)),
    )
    line = plan_lines(plan, GQA, 0.0163, 2)[0]
    assert line == ("plan      4 of 256 KV groups change, 1.56% (asked 1.63%): 1 tied, 3 removed")
    assert plan_lines(plan, MHA, 0.0163, 2)[0].startswith("plan      4 of 1024 heads change")


def test_the_lines_of_a_large_plan_fit_80_columns() -> None:
    ties = tuple(
        HeadTie((layer, unit), (0, unit), ("q", "k", "v", "o"))
        for layer in range(1, 12)
        for unit in range(20)
    )
    removed = tuple((layer, unit) for layer in (12, 13, 14) for unit in range(32))
    spans = tuple(AttentionSpan(layer, (layer + 1,)) for layer in range(16, 32, 2))
    plan = SharingPlan(ties=ties, removed=removed, spans=spans)
    lines = plan_lines(plan, MHA, 0.3, 2)
    assert [line.split()[0] for line in lines] == [
        "plan", "layers", "spans", "saved", "weights", "cache",
    ]  # fmt: skip
    assert lines[1] == "layers    3 of 32 without attention: 12-14"
    assert lines[2] == "spans     16 -> 17 (attention weights) and 7 more, see plan.json"
    assert lines[4].endswith(" bytes, 13.8% less than stock")
    assert lines[5] == "cache     409,600 bytes per token, 21.9% less than stock"
    assert max(map(len, lines)) <= 80
