"""Text of numbered words, a tokenizer with a token for each, and recipes on such text."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.data.blocks import Blocks
from train.recipe.recipe import Recipe, validate

WORDS = 60
BOS, EOS = 0, 1


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Word `w7` is id 9: a token for a word."""
    vocabulary = {"<s>": BOS, "</s>": EOS} | {f"w{i}": i + 2 for i in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def recipe(**data: Any) -> Recipe:
    evaluate = data.pop("evaluate", {})
    return validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "data": {"sequence_length": 4} | data,
            "plan": {"strategy": "none"},
            "train": {
                "steps": 5,
                "batch_size": 2,
                "micro_batch_size": 1,
                "learning_rate": 1e-3,
            },
            "evaluate": evaluate,
        }
    )


def flat(blocks: Blocks) -> list[int]:
    return [int(t) for i in range(len(blocks)) for t in blocks[i]["input_ids"]]
