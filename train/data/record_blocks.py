"""Whole records in blocks: each a document of its own, of which only the response is predicted.

Records are put into blocks of `length` tokens in their order, the next one beginning a new block
where it does not fit; none is cut in two. Positions restart at every record, from which
transformers builds a block-diagonal mask: no record attends to another. What remains of a block is
padding (token 0, never predicted), and a document too.

A record longer than a block is truncated at its end, as long as a token of a response remains;
one whose prompt fills the block is dropped. `RecordBlocks.said` counts both.
"""

from __future__ import annotations

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError
from train.data.packed import Block, Packed


class RecordBlocks:
    """The records of one source in blocks: int64 `input_ids`, `labels`, `position_ids` [length].

    Args:
        tokens: the ids of the records.
        predicted: int8, 1 for the tokens that are predicted; never the first of a record.
        prompts: tokens of each record before the first predicted one.

    Attributes:
        records: that are read.
        truncated, dropped: records that were too long (see the module).
    """

    def __init__(
        self, tokens: Packed, predicted: Packed, prompts: NDArray[np.int32], length: int
    ) -> None:
        self.tokens, self.length = tokens, length
        self._predicted = predicted
        lengths = tokens.lengths
        kept = np.flatnonzero(prompts < length)
        self.records, self.dropped = len(kept), len(prompts) - len(kept)
        self.truncated = int((lengths[kept] > length).sum())
        self._shortest_prompt = int(prompts.min(initial=np.iinfo(np.int32).max))
        self._starts = tokens.starts[kept]
        self._lengths = np.minimum(lengths[kept], length)
        self._firsts = first_records(self._lengths, length)

    @classmethod
    def from_table(cls, table: datasets.Dataset, length: int) -> RecordBlocks:
        """From what `train.data.instruct.record_table` gives."""
        prompts = np.asarray(
            table.select_columns("prompt").with_format("numpy")[:]["prompt"], dtype=np.int32
        )
        predicted = Packed.from_table(table, "predicted")
        return cls(Packed.from_table(table), predicted, np.asarray(prompts, np.int32), length)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, index: int) -> Block:
        input_ids = np.zeros(self.length, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        positions = np.zeros(self.length, dtype=np.int64)
        at = 0
        for record in range(self._firsts[index], self._firsts[index + 1]):
            start, size = int(self._starts[record]), int(self._lengths[record])
            ids = self.tokens.read(start, start + size)
            predicted = self._predicted.read(start, start + size)
            input_ids[at : at + size] = ids
            labels[at : at + size] = np.where(predicted, ids, IGNORED)
            positions[at : at + size] = np.arange(size)
            at += size
        positions[at:] = np.arange(self.length - at)
        block = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(values) for name, values in block.items()}

    def digest(self) -> str:
        return self.tokens.digest() + self._predicted.digest()

    @property
    def said(self) -> str:
        """What packing made of the records, for the log."""
        filled = self._lengths.sum() / max(1, len(self) * self.length)
        return (
            f"{self.records:,} records in {len(self):,} blocks of {self.length} tokens, "
            f"{filled:.1%} filled; {self.truncated:,} truncated to a block, {self.dropped:,} "
            "dropped because their prompt fills one"
        )

    def nothing(self, what: str, cure: str) -> PostshareError:
        """Why there is no block; `cure` where that is for want of records."""
        if self.dropped:
            return PostshareError(
                f"{what}: the prompts of all {self.dropped} records fill a block of {self.length} "
                f"tokens; set data.sequence_length above {self._shortest_prompt}"
            )
        return PostshareError(f"{what} has no records; {cure}")


def first_records(lengths: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The first record of each block, and their number: int64 [blocks + 1].

    `lengths`, none above `length`, are those of the records, which fill the blocks in their order.
    """
    ends = np.cumsum(lengths)
    firsts, used = [0], 0
    while firsts[-1] < len(lengths):
        firsts.append(int(np.searchsorted(ends, used + length, side="right")))
        used = int(ends[firsts[-1] - 1])
    return np.array(firsts, dtype=np.int64)
