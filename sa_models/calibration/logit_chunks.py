"""Logits some rows at a time: how many, and where a model's lm_head is called.

All logits of a batch, tokens times words of the vocabulary, are often the largest tensor of a
forward. What needs only a few numbers of each row computes them in lm_head's place.

Imports no torch, so that an estimate needs none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

CHUNK_ELEMENTS = 2**24
"""Logits that exist at a time on a CPU: 64 MiB in fp32, and a few temporaries of that size."""
GPU_CHUNK_ELEMENTS = 2**27
"""Likewise on a GPU, 512 MiB: each chunk also reads and writes the whole gradient of lm_head."""


def chunk_elements(device: str) -> int:
    """Of a type of device, such as "cpu"."""
    return CHUNK_ELEMENTS if device == "cpu" else GPU_CHUNK_ELEMENTS


def chunks(rows: int, vocabulary: int, device: str) -> Iterator[slice]:
    """Those of `rows` rows of logits that are worked on at a time."""
    size = max(1, chunk_elements(device) // vocabulary)
    for start in range(0, rows, size):
        yield slice(start, start + size)


@contextlib.contextmanager
def in_place_of(module: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within, calls of `module` compute `function`; its hooks, those of an engine, run as ever."""
    before = vars(module).get("forward")  # a library may have set one
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
