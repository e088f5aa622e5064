"""The other ranks, as far as agreeing with them goes."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """What agreeing needs of an engine: who there is, and sums over them."""

    rank: int
    world: int
    device: torch.device

    def all_reduce_(self, tensor: Tensor) -> Tensor: ...
    def reduce_max(self, value: Any) -> Any: ...
    def reduce_sum(self, value: Any) -> Any: ...
