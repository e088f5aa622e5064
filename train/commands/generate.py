"""`postshare generate MODEL...`: how models continue the same prompts, greedily."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sa_models.errors import PostshareError
from train.common.console import plain_console
from train.evaluation.models import find_models, open_folder, read_device
from train.models.samples import greedy

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "def is_even(number):\n",
)
"""Without any of one's own: knowledge, a sentence, and what the shipped recipes train on."""


def generate(
    arguments: Sequence[str],
    prompts: Sequence[str] | None = None,
    tokens: int = 32,
    device: str | None = None,
) -> None:
    """Print each prompt and what each model makes of it, in fp32 on a CPU and bf16 elsewhere.

    Args:
        arguments: models, as `postshare evaluate` takes them: of a run all that it has.
        tokens: the most that are added.

    Raises:
        PostshareError: an argument names no model; a prompt is empty, or has no room to go on.
    """
    prompts = prompts or PROMPTS
    logging.disable_progress_bar()  # transformers' own bars would tear our lines
    place = read_device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    models = find_models(arguments)
    for model in models:
        positions = int(open_folder(model.folder).config.max_position_embeddings)
        _check(model.load_tokenizer(), prompts, tokens, positions, model.name)
    made: dict[str, list[str]] = {}
    for model in models:
        tokenizer = model.load_tokenizer()
        loaded = model.load(dtype, place)
        made[model.name] = [continued(loaded, tokenizer, prompt, tokens) for prompt in prompts]
        del loaded
        gc.collect()
    console, width = plain_console(), max(map(len, made))
    for at, prompt in enumerate(prompts):
        console.print(Text(f"\n{prompt.strip()!r}", "bold"), soft_wrap=True)
        for name, texts in made.items():
            console.print(Text(f"  {name:<{width}}  {texts[at]!r}"), soft_wrap=True)


def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int
) -> str:
    """What follows a prompt, the likeliest token each time, up to the end of the text."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = greedy(model, ids, tokens, tokenizer.eos_token_id or 0)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def _check(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    positions: int,
    name: str,
) -> None:
    for prompt in prompts:
        length = len(tokenizer(prompt)["input_ids"])
        if length == 0:
            raise PostshareError("--prompt is empty; write the beginning of a text")
        if length + tokens > positions:
            raise PostshareError(
                f"a prompt of {length} tokens and {tokens} more exceed the {positions} positions "
                f"of {name}; shorten it, or lower --tokens"
            )
