"""Samples of text: how each model of a run continues the same held-out passages, greedily."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sa_models.atomic_files import write_json
from train.common.run_files import SAMPLES_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from train.data.blocks import Blocks

PASSAGES = 2
PROMPT, ADDED = 32, 32
"""Tokens of a passage that are given, and the most that are added: seconds, beside a perplexity."""


class Samples:
    """`samples.json` of a run folder: the passages, and how each model goes on.

    A model is asked when its perplexity is measured, since it is in memory then; one that is
    measured already is not loaded for this.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        blocks: Blocks,
        limit: int | None = None,
    ) -> None:
        """
        Args:
            limit: as many blocks are evaluated (None = all): passages are from these.
        """
        count = len(blocks) if limit is None else min(limit, len(blocks))
        self.file, self.tokenizer = folder / SAMPLES_FILE, tokenizer
        ends = {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
        parts = min(PASSAGES, count)
        cut = [
            passage(
                (
                    blocks[index]["input_ids"].tolist()
                    for index in range(part * count // parts, (part + 1) * count // parts)
                ),
                ends,
            )
            for part in range(parts)
        ]
        self.prompts = torch.tensor([given for given, _ in cut])
        self.added = min((len(after) for _, after in cut), default=0)
        self.passages = [
            {"prompt": self._text(given), "text": self._text(after)} for given, after in cut
        ]

    def add(self, name: str, model: PreTrainedModel) -> None:
        """Write down how a model goes on; its training mode is restored."""
        if not self.added:
            return
        was_training = model.training
        model.eval()
        made = greedy(model, self.prompts, self.added, self.tokenizer.eos_token_id or 0)
        model.train(was_training)
        models = self._others() | {name: [self._text(row) for row in made.tolist()]}
        write_json(self.file, {"passages": self.passages, "models": models})

    def _others(self) -> dict[str, list[str]]:
        """What the file holds of these very passages; nothing where it cannot be read."""
        try:
            value: Any = json.loads(self.file.read_text(encoding="utf-8"))
            return dict(value["models"]) if value["passages"] == self.passages else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def passage(blocks: Iterable[list[int]], ends: set[Any]) -> tuple[list[int], list[int]]:
    """The tokens that are given and those after them, of blocks of token ids.

    From the first document that begins in a block and has room for both there, else from the
    beginning of the first block.

    Args:
        blocks: of one length, at least one.
        ends: ids at which documents end or begin.
    """
    first = None
    for ids in blocks:
        given = min(PROMPT, len(ids) // 2)
        after = min(ADDED, len(ids) - given)
        first = first or (ids[:given], ids[given : given + after])
        for at in range(1, len(ids) - given - after + 1):
            if ids[at - 1] in ends and not ends & {*ids[at : at + given]}:
                return ids[at : at + given], ids[at + given : at + given + after]
    assert first is not None
    return first


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: torch.Tensor, added: int, pad: int) -> torch.Tensor:
    """What follows prompts of one length, the likeliest token each time, up to the end of a text.

    Args:
        prompts: int64 (prompts, tokens).
        added: the most tokens that are added.
        pad: the token after the end of a text.

    Returns:
        int64 (prompts, at most ``added``).
    """
    inputs = prompts.to(model.device)
    made: torch.Tensor = model.generate(  # type: ignore[operator]  # of a mixin
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=added,
        do_sample=False,
        pad_token_id=pad,
    )
    return made[:, prompts.shape[1] :].cpu()
