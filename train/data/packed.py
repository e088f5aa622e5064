"""Documents laid end to end, and the blocks of text that are cut from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from sa_models.calibration.token_losses import IGNORED

Block = dict[str, torch.Tensor]


class BlockSource(Protocol):
    """The blocks of one source: `source[i]` is a dict of int64 tensors of shape [length]."""

    length: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Block: ...

    @property
    def tokens(self) -> Packed: ...

    def digest(self) -> str:
        """The same (hex) for the same documents."""
        ...


class Packed:
    """Documents laid end to end: one long sequence of numbers that is never copied.

    Token ids (int32), or what belongs to each of them. The numbers stay where they are, in the
    memory-mapped chunks of an Arrow table.
    """

    def __init__(self, chunks: Sequence[NDArray[Any]], lengths: NDArray[np.int64]) -> None:
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[:-1]

    @classmethod
    def from_table(cls, table: datasets.Dataset, name: str = "input_ids") -> Packed:
        """The lists of column `name`, one a document."""
        chunks, lengths = [], []
        for column in table.with_format("arrow")[:][name].chunks:
            chunks.append(column.flatten().to_numpy(zero_copy_only=True))
            lengths.append(column.value_lengths().to_numpy(zero_copy_only=False))
        empty = np.zeros(0, dtype=np.int64)
        return cls(chunks, np.concatenate([empty, *lengths]).astype(np.int64))

    def __len__(self) -> int:
        """The number of tokens."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.starts, append=len(self))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop)."""
        parts = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[index])
            base = end - len(self._chunks[index])
            parts.append(self._chunks[index][start - base : min(stop, end) - base])
            start, index = min(stop, end), index + 1
        return np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents begin in [start, stop), counted from `start`."""
        first, last = np.searchsorted(self.starts, [start, stop])
        return self.starts[first:last] - start

    def digest(self) -> str:
        """BLAKE2 (hex) of the numbers and of where documents begin, which reads all of them."""
        digest = hashlib.blake2b(self.starts.tobytes(), digest_size=16)
        for chunk in self._chunks:
            digest.update(np.ascontiguousarray(chunk).data)
        return digest.hexdigest()

    def largest_id(self) -> int:
        return max((int(chunk.max()) for chunk in self._chunks), default=-1)


class TextBlocks:
    """Every `length` tokens of `tokens` a block, whatever documents they belong to.

    `input_ids` and `labels`, and with `document_mask` also `position_ids`, which restart at every
    document; the first token of a document is then not predicted. The last incomplete block is left
    out. `said` is for the log.
    """

    def __init__(
        self, tokens: Packed, length: int, *, document_mask: bool = False, said: str = ""
    ) -> None:
        self.tokens, self.length, self.document_mask = tokens, length, document_mask
        self.said = said

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def digest(self) -> str:
        return self.tokens.digest()

    def __getitem__(self, index: int) -> Block:
        start = index * self.length
        stop = start + self.length
        input_ids = torch.from_numpy(self.tokens.read(start, stop).astype(np.int64))
        block = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.document_mask:
            starts = self.tokens.document_starts(start, stop)
            block["labels"][torch.from_numpy(starts)] = IGNORED
            position = np.arange(self.length)
            begun = np.zeros(self.length, dtype=np.int64)
            begun[starts] = starts
            block["position_ids"] = torch.from_numpy(position - np.maximum.accumulate(begun))
        return block
