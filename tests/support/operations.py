"""Operations of a piece of code, as they reach torch's dispatcher: on a GPU those that launch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts aten operations while it is entered, forward and backward: `computing` and `views`.

    An operation on a list (`_foreach_add_`, `stack`) is one. Views make no launch on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computing: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        view = function.is_view or function.name() == "aten::detach"
        (self.views if view else self.computing)[function.name()] += 1
        return function(*arguments, **(options or {}))
