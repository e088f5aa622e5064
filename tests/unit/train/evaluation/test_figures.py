from __future__ import annotations

import io
from dataclasses import asdict, replace

import pytest
from transformers import LlamaConfig

from sa_models.plan import HeadTie, SharingPlan
from train.common.console import plain_console
from train.evaluation.figures import DecodeRatio, Figures, rows_table

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
TIED = SharingPlan(ties=(HeadTie((1, 0), (0, 1), ("q", "k", "v", "o")),))
REMOVED = SharingPlan(removed=((1, 0), (1, 1)))


def figures(plan: SharingPlan, positions: int = 4096, residual: int = 0) -> Figures:
    return Figures.of_plan(plan.savings(LLAMA_2_7B), 2, positions, residual)


def test_ties_save_weights_and_no_cache() -> None:
    rows = figures(TIED, positions=131072).rows()
    stored = 6_738_415_616 - 4 * 128 * 4096
    assert rows == {
        "weight bytes": f"{2 * stored:,}, 0.0% less than stock",
        "cache bytes per token": "524,288, as stock",
        "cache of 8 x 8,192 tokens": "34.4 GB, stock 34.4 GB",
        "decode time against stock": "not measured",
        "perplexity against continued": "not measured",
    }


def test_removals_save_cache_at_no_more_tokens_than_the_model_reads() -> None:
    rows = figures(REMOVED).rows()
    assert rows["cache bytes per token"] == f"{524_288 - 2 * 2 * 128 * 2:,}, 0.2% less than stock"
    assert rows["cache of 8 x 4,096 tokens"] == "17.1 GB, stock 17.2 GB"


def test_residuals_are_stored() -> None:
    found = figures(TIED, residual=8 * 128 * 4096)
    assert found.weight_bytes == 2 * (6_738_415_616 + 4 * 128 * 4096)
    assert found.rows()["weight bytes"].endswith("0.0% more than stock")


@pytest.mark.parametrize(("ratio", "words"), [(0.947, "5.3% less"), (1.032, "3.2% more")])
def test_what_was_measured(ratio: float, words: str) -> None:
    found = replace(
        figures(REMOVED),
        decode=DecodeRatio(ratio, "float32, batch 1", (0.9, 1.1)),
        perplexity=1.0115,
    )
    assert Figures.from_dict(asdict(found)) == found
    rows = found.rows()
    assert rows["decode time against stock"] == f"{words} (float32, batch 1)"
    assert rows["perplexity against continued"] == "+1.2%"


def test_no_row_is_wrapped_at_80_columns() -> None:
    long = DecodeRatio(0.947, "float32, batch 1, untrained", (0.9, 1.0))
    found = replace(figures(REMOVED), decode=long, perplexity=1.0)
    text = io.StringIO()
    plain_console(file=text, width=80).print(rows_table(found.rows()))
    lines = text.getvalue().splitlines()
    assert len(lines) == len(found.rows()) == 5
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
