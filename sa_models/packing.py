"""Packed weights: for inference, one dense weight for a projection that is stored in parts.

A tied unit as a product of its own, and a product of two factors, cost time at every call. In
evaluation mode, without gradients, such a projection therefore computes with one dense weight: tied
units copied, factors multiplied. It is made at the first call, is no parameter and in no state
dict, and is made again when anything that it was made of has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class SourceLinear(nn.Linear):
    """A Linear whose weight others have copies of.

    Whoever takes ``weight`` may write into it through ``.data``, which leaves no trace in the
    tensor (PEFT merges that way): it counts how often it was taken.
    """

    taken = 0

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.__dict__["taken"] = self.taken + 1
        return super().__getattr__(name)

    @property
    def stored(self) -> torch.Tensor:
        """The weight, for those who only read it."""
        weight = self._parameters.get("weight")
        # Something else, such as a parametrization, gives it.
        return self.weight if weight is None else weight


class PackedWeight:
    """The dense weight of one projection, and what it was made of.

    Args:
        sources: the modules whose weights it is made of.
        make: makes it of them.
    """

    def __init__(self, sources: Sequence[SourceLinear], make: Callable[[], torch.Tensor]) -> None:
        self._sources = tuple(sources)
        self._make = make
        self._weight: torch.Tensor | None = None
        self._made_of: list[tuple[Any, ...]] = []

    def on(self, device: torch.device) -> torch.Tensor | None:
        """The weight, as its sources are now; None where they are not plain tensors there.

        A write through ``parameter.data`` is seen where the parameter was taken from its module
        for it; of one that was held since before, :meth:`drop` has to be told.
        """
        made_of = []
        for source in self._sources:
            weight = source._parameters.get("weight")
            if type(weight) is not nn.Parameter or weight.device != device:
                return None
            version = 0 if weight.is_inference() else weight._version
            made_of.append((weight, version, weight.data_ptr(), weight.dtype, source.taken))
        if self._weight is None or not _same(made_of, self._made_of):
            with torch.inference_mode(False), torch.no_grad():
                self._weight = self._make()
            self._made_of = made_of
        return self._weight

    def drop(self) -> None:
        """Forget it: the next call makes it again."""
        self._weight, self._made_of = None, []


def _same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    return len(one) == len(other) and all(
        a[0] is b[0] and a[1:] == b[1:] for a, b in zip(one, other, strict=True)
    )


def may_pack(module: nn.Module) -> bool:
    """Whether this call is one for inference. A compiled one cannot see what has changed."""
    return not (module.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
