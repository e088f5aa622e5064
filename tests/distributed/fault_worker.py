"""Runs on every rank: the main job, with one thing wrong on one rank.

fault_worker.py FAULT RECIPE [key=value ...]
"""

from __future__ import annotations

import functools
import os
import sys
import time

from transformers import LlamaModel

from train.cli import launched
from train.training import loop, objective

RANK = int(os.environ.get("RANK", "0"))
LAST = int(os.environ.get("WORLD_SIZE", "1")) - 1
STEP = 3


def stuck_data() -> None:
    """The last rank's source never gives its fourth micro-batch."""
    read = loop.read_ahead

    def wrapped(*arguments: object) -> object:
        for number, batch in enumerate(read(*arguments)):  # type: ignore[arg-type]
            if number == STEP and RANK == LAST:
                time.sleep(1000)
            yield batch

    loop.read_ahead = wrapped  # type: ignore[assignment]


def slow_then_nan() -> None:
    """Rank 1's model takes a second longer for each forward, and the loss of the 11th is nan."""
    forward, losses, calls = LlamaModel.forward, objective.token_losses, [0]

    @functools.wraps(forward)
    def wrapped(*arguments: object, **options: object) -> object:
        if RANK == 1:
            time.sleep(1)
        return forward(*arguments, **options)  # type: ignore[arg-type]

    def measured(*given: object) -> object:
        calls[0] += 1
        value = losses(*given)  # type: ignore[arg-type]
        return value * float("nan") if RANK == 1 and calls[0] == 11 else value

    LlamaModel.forward = wrapped  # type: ignore[assignment]
    objective.token_losses = measured  # type: ignore[assignment]


if __name__ == "__main__":
    fault, *arguments = sys.argv[1:]
    globals()[fault]()
    launched(arguments)
