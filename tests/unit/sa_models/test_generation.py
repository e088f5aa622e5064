"""generate() with spans: every way to decode, against greedy decoding without any cache."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.support.reference import SPAN_PLANS, Reference, dense, shared, some_plan, tokens, use

COUNT = 10


@lru_cache
def model_of(kind: str) -> Any:
    model = use(shared(dense(), some_plan(kind, "gqa")), "sdpa", 4)
    model.generation_config.max_new_tokens = COUNT
    model.generation_config.do_sample = False
    return model


@lru_cache
def story(kind: str, length: int = 5, row: int = 0) -> list[int]:
    """What follows the last ``length`` tokens of a row, by the definition."""
    with torch.no_grad():
        reference = Reference.of(dense(), some_plan(kind, "gqa"))
        return reference.greedy(tokens()[row, -length:].tolist(), COUNT)


def prompt(length: int = 5, row: int = 0) -> torch.Tensor:
    return tokens()[row : row + 1, -length:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prompt_lookup_num_tokens": 3},
    ],
)
@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_greedy(kind: str, options: dict[str, Any]) -> None:
    for length in (1, 5):
        generated = model_of(kind).generate(prompt(length), **options)
        assert generated[0].tolist() == story(kind, length)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reuse_rows", [0, 1, 100])
def test_greedy_in_replay_and_reuse(implementation: str, reuse_rows: int) -> None:
    for kind in ("sa interleaved, mapped", "both"):
        model = use(shared(dense(), some_plan(kind, "gqa")), implementation, reuse_rows)
        generated = model.generate(prompt(), max_new_tokens=COUNT, do_sample=False)
        assert generated[0].tolist() == story(kind)


@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_a_batch_of_padded_prompts_equals_each_alone(kind: str) -> None:
    lengths = (2, 5, 9)
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = prompt(length, row % 2)[0], 1
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        generated = model_of(kind).generate(ids, attention_mask=mask, **options)
        for row, length in enumerate(lengths):
            assert generated[row, 9 - length :].tolist() == story(kind, length, row % 2)


@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_sampling_with_a_seed(kind: str) -> None:
    results, model = [], model_of(kind)  # made before the seed is set: it draws its weights
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        results.append(model.generate(prompt(), do_sample=True, num_return_sequences=3, **options))
    assert len({tuple(row) for row in results[0].tolist()}) == 3
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_beam_search(kind: str) -> None:
    model = model_of(kind)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    expected = model.generate(tokens(), use_cache=False, **options)
    assert torch.equal(model.generate(tokens(), **options), expected)
    assert torch.equal(model.generate(tokens(), cache_implementation="static", **options), expected)
    # By hand, from the definition: two beams, two tokens.
    with torch.no_grad():
        reference = Reference.of(dense(), some_plan(kind, "gqa"))
        beams = [(0.0, prompt()[0].tolist())]
        for _ in range(2):
            grown = []
            for score, ids in beams:
                scores = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                grown += [(score + float(s), [*ids, t]) for t, s in enumerate(scores)]
            beams = sorted(grown, reverse=True)[:2]
    generated = model.generate(prompt(), num_beams=2, max_new_tokens=2)
    assert generated[0].tolist() == beams[0][1]


@pytest.mark.parametrize("cache", ["returned", "dynamic", "plain", "static"])
@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_going_on_from_a_cache(kind: str, cache: str) -> None:
    """Three tokens, then the rest on top of the same cache."""
    model, expected = model_of(kind), story(kind)
    given = {
        "returned": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "plain": lambda: DynamicCache(),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[cache]()
    options = {} if given is None else {"past_key_values": given}
    first = model.generate(prompt(), max_new_tokens=3, return_dict_in_generate=True, **options)
    assert first.sequences[0].tolist() == expected[:8]
    rest = model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=COUNT - 3
    )
    assert rest[0].tolist() == expected


def test_assisted_by_a_dense_model_and_assisting_one() -> None:
    """Caches are cropped when a guess was wrong; each model keeps its own."""
    for kind in ("sa", "cla mapped", "both, ties"):
        model, base = model_of(kind), dense()
        assert model.generate(prompt(), assistant_model=base)[0].tolist() == story(kind)
        expected = base.generate(prompt(), max_new_tokens=COUNT, do_sample=False)
        assisted = base.generate(
            prompt(), assistant_model=model, max_new_tokens=COUNT, do_sample=False
        )
        assert torch.equal(assisted, expected)


def test_a_prompt_in_chunks() -> None:
    for kind in ("sa interleaved, mapped", "both"):
        for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
            generated = model_of(kind).generate(prompt(), prefill_chunk_size=2, **options)
            assert generated[0].tolist() == story(kind)


def test_embeddings_instead_of_tokens() -> None:
    model = model_of("both")
    embedded = model.get_input_embeddings()(prompt())
    assert model.generate(inputs_embeds=embedded)[0].tolist() == story("both")[5:]
