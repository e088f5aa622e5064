"""Strided perplexity against one forward for every token, and against lm-eval's rolling windows."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from tests.support import tiny
from train.evaluation import sliding_perplexity

TEXTS = [47, 16, 1, 5, 33]
"""Tokens of each text, the prefix left out."""


def texts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [
        [1, *torch.randint(tiny.VOCABULARY, (length,), generator=draw).tolist()] for length in TEXTS
    ]


def compact() -> SharedLlamaForCausalLM:
    model = tiny.model(num_key_value_heads=2)
    plan = SharingPlan(ties=tiny.PLAN.ties[:1])
    materialize_(dict(model.named_parameters()), HeadLayout.from_config(model.config), plan)
    return SharedLlamaForCausalLM.from_materialized(model, plan)


MODELS = {
    "mha": tiny.model,
    "gqa": lambda: tiny.model(num_key_value_heads=2),
    "mqa, untied": lambda: tiny.model(num_key_value_heads=1, tie_word_embeddings=False),
    "compact": compact,
}


@torch.no_grad()
def token_by_token(
    model: Any, text: list[int], context: int, stride: int
) -> tuple[list[float], list[int]]:
    """Nats and the number of tokens seen, of each token: what is before it in its window."""
    nats, seen = [], []
    for at in range(1, len(text)):
        # The first window ends after `context` tokens, each further one `stride` later.
        end = context
        while end < at:
            end += stride
        end = min(end, len(text) - 1)
        before = text[max(0, end - context) : at]
        logits = model(torch.tensor([before]), use_cache=False).logits[0, -1].double()
        nats.append(-logits.log_softmax(-1)[text[at]].item())
        seen.append(len(before))
    return nats, seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 1), (7, 7), (64, 64)])
def test_every_token_is_predicted_once_from_its_window(
    name: str, context: int, stride: int
) -> None:
    model = MODELS[name]().eval()
    found = sliding_perplexity.window_losses(model, texts(), context, stride, batch_size=3)
    expected = [token_by_token(model, text, context, stride) for text in texts()]
    assert sum(found.tokens) == sum(TEXTS)
    # Windows of a text follow one another: their sums are the text's tokens, cut.
    nats = list(itertools.chain.from_iterable(nats for nats, _ in expected))
    start = 0
    for total, count in zip(found.nats, found.tokens, strict=True):
        assert total == pytest.approx(sum(nats[start : start + count]), abs=2e-4)
        start += count
    for _, seen in expected:  # the module's promise
        assert all(count > context - stride for count in seen[context:])


def test_a_smaller_stride_sees_more() -> None:
    """47 tokens in windows of 16: stride 16 leaves some tokens with one before them."""
    _, few = token_by_token(tiny.model().eval(), texts()[0], 16, 16)
    _, many = token_by_token(tiny.model().eval(), texts()[0], 16, 4)
    assert (min(few[16:]), min(many[16:])) == (1, 13)
    assert len(sliding_perplexity.windows(47, 16, 16)) == 3
    assert len(sliding_perplexity.windows(47, 16, 4)) == 1 + 8


def test_batches_do_not_matter() -> None:
    model = tiny.model().eval()
    runs = [sliding_perplexity.window_losses(model, texts(), 16, 5, size) for size in (1, 4, 100)]
    for other in runs[1:]:
        assert other.tokens == runs[0].tokens
        assert other.nats == pytest.approx(runs[0].nats, abs=1e-4)


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    found = sliding_perplexity.window_losses(
        tiny.model().eval(), texts(), 16, 5, 4, lambda done, total: seen.append((done, total))
    )
    count = len(found.nats)
    assert seen == [(min(done, count), count) for done in range(4, count + 4, 4)]


def test_disjoint_windows_are_those_of_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install 'postshare[eval]'")
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length, context in [(47, 16), (16, 16), (5, 16), (33, 7)]:
        tokens = list(range(100, 100 + length))
        rolling = get_rolling_token_windows(tokens, 1, context, 1)
        theirs = [
            (len(before), predicted) for before, predicted in map(make_disjoint_window, rolling)
        ]
        text = [1, *tokens]
        ours = [
            # lm-eval hands over the context before the first predicted token
            (w.first - w.begin + 1, text[w.first + 1 : w.stop + 1])
            for w in sliding_perplexity.windows(length, context, context)
        ]
        assert ours == theirs


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_that_leaves_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(PostshareError, match=f"stride {stride} with a context of 16"):
        sliding_perplexity.windows(20, 16, stride)


def test_tokens_without_embedding_are_refused() -> None:
    with pytest.raises(PostshareError, match="token id 48, the model's vocab_size is 48"):
        sliding_perplexity.window_losses(tiny.model().eval(), [[1, 48]], 16, 16, 1)


class FakeTokenizer:
    name_or_path = "fake"
    bos_token_id: int | None = None
    eos_token_id: int | None = 2

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def test_a_text_begins_with_bos_or_else_eos() -> None:
    tokenizer: Any = FakeTokenizer()
    assert sliding_perplexity.encode(tokenizer, ["a bb", "", "ccc"]) == [[2, 1, 2], [2, 3]]
    tokenizer.bos_token_id = 0  # 0 is a token like any other
    assert sliding_perplexity.encode(tokenizer, ["a bb"]) == [[0, 1, 2]]
    with pytest.raises(PostshareError, match="the text is empty"):
        sliding_perplexity.encode(tokenizer, [" "])
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    with pytest.raises(PostshareError, match="neither BOS nor EOS"):
        sliding_perplexity.encode(tokenizer, ["a"])
