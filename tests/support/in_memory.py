"""Weights and tokens that lie in memory, where the packages read files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from train.data.blocks import Blocks
from train.data.packed import Packed, TextBlocks


@dataclass(frozen=True)
class InMemory:
    """Parameters by name, read as :class:`sa_models.scores.weight_cosine.Reader` says."""

    parameters: dict[str, torch.Tensor]

    def slice(self, name: str) -> torch.Tensor:
        return self.parameters[name].detach()


def packed(documents: Sequence[Sequence[int]]) -> Packed:
    """Token ids, BOS and EOS included where wanted."""
    chunks = [np.asarray(document, dtype=np.int32) for document in documents]
    return Packed(chunks, np.array([len(chunk) for chunk in chunks], dtype=np.int64))


def text_blocks(
    documents: Sequence[Sequence[int]], length: int, *, document_mask: bool = False
) -> Blocks:
    """Blocks of :func:`packed` documents."""
    return Blocks([TextBlocks(packed(documents), length, document_mask=document_mask)])
