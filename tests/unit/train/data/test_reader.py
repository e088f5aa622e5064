"""The reader of blocks: rows in order, no more of them in memory than a batch has."""

from __future__ import annotations

import torch

from train.data.calibration import MAP_LENGTH, calibration_batches, calibration_inputs
from train.data.reader import read_batches


class Counted:
    """Blocks of one number each, which tell when they were read."""

    def __init__(self, total: int, length: int = 3) -> None:
        self.total, self.length = total, length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        row = torch.full((self.length,), index)
        return {"input_ids": row, "labels": -row}


def test_a_batch_is_read_when_it_is_its_turn() -> None:
    blocks = Counted(10)
    batches = read_batches(blocks, [7, 1, 4, 2, 9], 2)  # type: ignore[arg-type]
    assert blocks.read == []
    first = next(batches)
    assert blocks.read == [7, 1]
    assert first["input_ids"].tolist() == [[7] * 3, [1] * 3]
    assert first["labels"].tolist() == [[-7] * 3, [-1] * 3]
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == [[4, 2], [9]]


def test_calibration_text_is_spread() -> None:
    blocks = Counted(10, MAP_LENGTH + 5)
    batches = calibration_batches(blocks, 4, 3, "cpu")  # type: ignore[arg-type]
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == [[0, 2, 5], [7]]
    assert len(calibration_batches(blocks, 99, 4, "cpu")) == 3  # type: ignore[arg-type]
    inputs = calibration_inputs(blocks, 2, torch.device("cpu"))  # type: ignore[arg-type]
    assert [batch.keys() for batch in inputs] == [{"input_ids"}, {"input_ids"}]
    assert [batch["input_ids"].shape for batch in inputs] == [(1, MAP_LENGTH)] * 2
    assert [int(batch["input_ids"][0, 0]) for batch in inputs] == [0, 5]
