from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from tests.support import tiny
from tests.support.in_memory import text_blocks
from train.data.blocks import prepare_data
from train.evaluation.perplexity import perplexity
from train.models.tokenizer import load_tokenizer
from train.recipe.recipe import validate


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny.model(vocab_size=50, attention_dropout=0.5, initializer_range=0.2)


def documents(*lengths: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 50, length).tolist() for length in lengths]


def test_is_the_token_weighted_mean(model: LlamaForCausalLM) -> None:
    """With document masks, blocks predict different numbers of tokens: a mean of means is wrong."""
    ids = documents(3, 2, 1, 10, 16, 7, 9)
    blocks = text_blocks(ids, 16, document_mask=True)
    model.train()
    result = perplexity(model, blocks, batch_size=2, progress=False)
    assert model.training
    model.eval()
    nll, tokens = 0.0, 0
    for sequence in ids:  # whole documents, one at a time
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].double()
        chosen = logits.log_softmax(-1)[range(len(sequence) - 1), sequence[1:]]
        nll -= chosen.sum().item()
        tokens += len(sequence) - 1
    assert result.tokens == tokens == 48 - 7
    assert result.loss == pytest.approx(nll / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-6)


def test_does_not_depend_on_the_batch_size(model: LlamaForCausalLM) -> None:
    blocks = text_blocks(documents(12 * 7), 12)
    losses = [
        perplexity(model, blocks, batch_size, progress=False).loss for batch_size in (1, 3, 7, 50)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    first = perplexity(model, blocks, 4, limit=2, progress=False)
    assert first.tokens == 2 * 11
    assert first.loss != pytest.approx(losses[0], rel=1e-4)


def test_half_precision_logits_are_summed_in_full(model: LlamaForCausalLM) -> None:
    blocks = text_blocks(documents(64 * 40), 64)
    full = perplexity(model, blocks, 8, progress=False).loss
    half = perplexity(model.bfloat16(), blocks, 8, progress=False).loss
    assert half == pytest.approx(full, rel=5e-3)


def test_refuses_what_has_no_value(model: LlamaForCausalLM) -> None:
    blocks = text_blocks(documents(12), 12)
    with pytest.raises(PostshareError, match=r"no token to evaluate"):
        perplexity(model, blocks, 1, limit=0, progress=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PostshareError, match=r"loss is nan"):
        perplexity(model, blocks, 1, progress=False)


@pytest.mark.usefixtures("own_cache")
def test_mixed7m_has_the_perplexity_of_its_readme(shared: Path) -> None:
    folder = str(shared / "models" / "mixed7M")
    text = str(shared / "text" / "mixed-validation.jsonl")
    data: dict[str, Any] = {"train": text, "validation": text, "sequence_length": 256}
    recipe = validate(
        {
            "name": "mixed",
            "model": {"path": folder},
            "data": data,
            "plan": {"strategy": "none"},
            "train": {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 1e-3},
        }
    )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _, blocks = prepare_data(
        recipe, load_tokenizer(folder), needed_blocks=None, vocab_size=model.config.vocab_size
    )
    result = perplexity(model, blocks, batch_size=8, limit=96, progress=False)
    assert result.tokens == 96 * 255
    # <s> and </s> around every document: with </s> alone it would be 62.9, with <s> alone 63.7.
    assert result.perplexity == pytest.approx(60.4, abs=0.05)
