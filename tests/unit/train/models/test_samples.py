"""Samples of text: the very tokens of the held-out blocks, continued by each model's likeliest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from tests.support.words import tiny_tokenizer
from train.evaluation.summary import EvaluatedModel, evaluate_models
from train.models.samples import ADDED, PROMPT, Samples, passage

END = 99


def test_a_passage_is_the_beginning_of_a_document_with_room() -> None:
    ids = [*range(10), END, *range(20), END, *range(100, 180)]
    given, after = passage([ids], {END})
    assert given == [*range(100, 100 + PROMPT)], "the document of 20 tokens is too short"
    assert after == [*range(100 + PROMPT, 100 + PROMPT + ADDED)]
    assert passage([[*range(40)]], {END}) == ([*range(20)], [*range(20, 40)])
    none = [*range(70)]
    assert passage([none, none[::-1]], {END})[0] == [*range(PROMPT)], "none begins: the block does"
    assert passage([none, [5, END, *range(200, 270)]], {END})[0] == [*range(200, 200 + PROMPT)]


def test_each_model_continues_what_is_evaluated(tmp_path: Path) -> None:
    text, tokenizer = tiny.blocks(6), tiny_tokenizer()
    models = {
        name: EvaluatedModel(lambda seed=seed: tiny.model(seed), {"weights": seed})
        for seed, name in enumerate(("base", "post"))
    }

    def evaluate(limit: int) -> dict:
        sample = Samples(tmp_path, tokenizer, text, limit).add
        evaluate_models(models, text, 2, limit, torch.device("cpu"), tmp_path, also=sample)
        return json.loads((tmp_path / "samples.json").read_text())

    found = evaluate(4)
    half = tiny.LENGTH // 2
    first = [text[index]["input_ids"].tolist() for index in (0, 2)]
    assert found["passages"] == [
        {"prompt": tokenizer.decode(ids[:half]), "text": tokenizer.decode(ids[half:])}
        for ids in first
    ]
    for seed, name in enumerate(models):
        model = tiny.model(seed).eval()
        for ids, said in zip(first, found["models"][name], strict=True):
            made = torch.tensor([ids[:half]])
            for _ in range(half):
                made = torch.cat([made, model(made).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            assert said == tokenizer.decode(made[0, half:])
    # What is measured is not loaded for its sample.
    (tmp_path / "samples.json").unlink()
    with pytest.raises(FileNotFoundError):
        evaluate(4)
    models["post"] = EvaluatedModel(lambda: tiny.model(2), {"weights": 2})
    assert evaluate(4)["models"].keys() == {"post"}
    # Other blocks, other passages: nothing stays of the earlier ones.
    again = evaluate(6)
    assert again["models"].keys() == {"base", "post"}
    assert again["passages"][1] != found["passages"][1]


def test_blocks_too_short_to_cut_have_no_sample(tmp_path: Path) -> None:
    Samples(tmp_path, tiny_tokenizer(), tiny.blocks(2), 0).add("base", tiny.model())
    assert not (tmp_path / "samples.json").exists()
