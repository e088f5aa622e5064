"""Packed weights: for inference, one dense weight for a projection that is stored in parts.

A tied unit as a product of its own, and a product of two factors, cost time at every call. In
evaluation mode, without gradients, such a projection therefore computes with one dense weight: tied
units copied, factors multiplied. It is made at the first call, is no parameter and in no state
dict, and is made again when anything that it was made of has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import nn


class SourceLinear(nn.Linear):
    """A Linear whose weight others have copies of.

    Whoever takes ``weight`` may write into it through ``.data``, which leaves no trace in the
    tensor (PEFT merges that way): it counts how often it was taken.
    """

    taken = 0

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not torch.compiler.is_compiling():  # what is compiled reads alone
            self.__dict__["taken"] = self.taken + 1
        return super().__getattr__(name)

    @property
    def stored(self) -> torch.Tensor:
        """The weight, for those who only read it."""
        weight = self._parameters.get("weight")
        # Something else, such as a parametrization, gives it.
        return self.weight if weight is None else weight


class _Source(NamedTuple):
    """A weight as it was when it was copied.

    Attributes:
        held: an alias of the weight, so that its memory is not given to another one.
    """

    module: SourceLinear
    weight: torch.Tensor
    held: torch.Tensor
    version: int
    address: int
    taken: int

    @classmethod
    def of(cls, module: SourceLinear, weight: torch.Tensor) -> _Source:
        version, address = weight._version, weight.data_ptr()
        return cls(module, weight, weight.detach(), version, address, module.taken)


class PackedWeight:
    """The dense weight of one projection, and what it was made of.

    Args:
        sources: the modules whose weights it is made of.
        make: makes it of them.
    """

    def __init__(self, sources: Sequence[SourceLinear], make: Callable[[], torch.Tensor]) -> None:
        self._sources = tuple(sources)
        self._make = make
        self.weight: torch.Tensor | None = None
        self._made_of: list[_Source] = []

    def on(self, device: torch.device) -> torch.Tensor | None:
        """The weight, as its sources are now; None where they are not plain tensors there.

        A write through ``parameter.data`` is seen where the parameter was taken from its module
        for it; of one that was held since before, :meth:`drop` has to be told.
        """
        # Decoding comes here for every projection of every token.
        for module, weight, _, version, address, taken in self._made_of:
            if (
                module._parameters.get("weight") is not weight
                or weight._version != version
                or weight.data_ptr() != address
                or module.taken != taken
            ):
                self.drop()
                break
        if self.weight is None or self.weight.device != device:
            self._pack(device)
        return self.weight

    def _pack(self, device: torch.device) -> None:
        self.drop()
        made_of = []
        for source in self._sources:
            weight = source._parameters.get("weight")
            # Those of torchao, FSDP2 and offloading are other types, or elsewhere.
            if type(weight) is not nn.Parameter or weight.device != device or weight.is_inference():
                return
            made_of.append(_Source.of(source, weight))
        self._made_of = made_of
        with torch.inference_mode(False), torch.no_grad():
            self.weight = self._make()

    def drop(self) -> None:
        """Forget it: the next call makes it again."""
        self.weight, self._made_of = None, []


class Packing(nn.Module):
    """A projection that computes with a :class:`PackedWeight` in inference.

    Attributes:
        packs: whether it does: see :func:`set_packed_`.
    """

    packs = True
    _packed: PackedWeight

    def packed_on(self, device: torch.device) -> torch.Tensor | None:
        """The packed weight, where this call is one for inference and its sources are there.

        A compiled call cannot see what has changed.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self._packed.on(device) if self.packs else None

    @property
    def packed_bytes(self) -> int:
        """Held beside the stored weights at the moment."""
        weight = self._packed.weight
        return 0 if weight is None else weight.nbytes

    def train(self, mode: bool = True) -> Self:
        """As in torch. What was packed is dropped."""
        self._packed.drop()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        self._packed.drop()  # copies and pickles make their own
        return super().__getstate__()


def set_packed_(model: nn.Module, packed: bool) -> None:
    """Whether the projections of a compact model pack their weights for inference."""
    for module in model.modules():
        if isinstance(module, Packing):
            module.packs = packed
