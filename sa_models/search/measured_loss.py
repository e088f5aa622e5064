"""The measured loss of any state of a search, cached in a file that a later search reads.

Every measurement is one line of JSON, under the hash of the model and of the calibration text: a
search that was stopped goes on where it was, one that has finished costs nothing, and measurements
of another model or text are never taken for these.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sa_models.calibration.partial_forward import Batch, PartialRun, Restart
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout, unit_view
from sa_models.plan import SharingPlan
from sa_models.search.actions import WHOLE, Action, State, ordered
from sa_models.search.structures import lowest_changed
from sa_models.weights.structure import Leaders, convert

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def identity(model: LlamaForCausalLM, batches: Iterable[Batch]) -> str:
    """SHA-256 (hex) of config, parameters and calibration text."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    digest.update(str(model.config._attn_implementation).encode())
    named: list[tuple[str, torch.Tensor]] = [*model.named_parameters()]
    named += [(f"batch.{i}.{n}", t) for i, b in enumerate(batches) for n, t in sorted(b.items())]
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


class Cache:
    """Values by key, kept in a file of JSON lines where one is given.

    Raises:
        PostshareError: a line that is not one of this cache, other than a last one that was cut
            off when its process was killed.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self._values: dict[str, Any] = {}
        if path is None or not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        if lines[-1]:  # cut off: what follows begins on a new line
            os.truncate(path, len(text.encode()) - len(lines[-1].encode()))
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                key, value, of = entry["key"], entry["value"], entry["of"]
            except (ValueError, KeyError, TypeError):
                raise PostshareError(
                    f"{path} line {number} is no measurement; delete the file to measure again"
                ) from None
            if of == identity:
                self._values[key] = value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of a key, computed and written when it is not there."""
        if key not in self._values:
            self.put(key, compute())
        return self._values[key]

    def put(self, key: str, value: Any) -> None:
        """Keep a value that is not there yet."""
        self._values[key] = value
        if self.path is not None:
            line = json.dumps({"of": self.identity, "key": key, "value": value}, allow_nan=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def state_key(state: Iterable[Action]) -> str:
    """The canonical name of a state."""
    return "loss " + json.dumps([a.to_list() for a in ordered(state)], separators=(",", ":"))


class MeasuredLoss:
    """state -> nats per predicted token on calibration text, exactly those of a full forward pass.

    A call computes the layers from the lowest one in which the state differs from the *base*
    state (at first: nothing changed); see :class:`~sa_models.calibration.partial_forward.Restart`.
    Nothing is computed before it is needed. The model's weights are changed in place, and restored
    by :meth:`restore`.

    Args:
        model: a Llama with the structure of the plan, in evaluation mode.
        batches: calibration text.
        path: of the cache.

    Raises:
        PostshareError: of a call: the loss of the state is not finite.
    """

    def __init__(
        self, model: LlamaForCausalLM, batches: Sequence[Batch], path: Path | None = None
    ) -> None:
        self.model, self.batches = model, batches
        self.layout = HeadLayout.from_config(model.config)
        self.cache = Cache(path, identity(model, batches))
        self._parameters = dict(model.named_parameters())
        self._originals: dict[tuple[Action, str], torch.Tensor] = {}
        self._applied: State = frozenset()
        self._base: State = frozenset()
        self._kept: State | None = None
        self._last: tuple[State, PartialRun] | None = None
        self._held: tuple[State, PartialRun] | None = None
        self._restart: Restart | None = None

    @property
    def passes(self) -> float:
        """Forward passes over the calibration text so far, in whole models."""
        return 0.0 if self._restart is None else self._restart.passes

    def __call__(self, state: State) -> float:
        return float(self.cache.get(state_key(state), lambda: self._finite(state)))

    def rebase(self, state: State) -> None:
        """The state from which later measurements start."""
        self._base = state

    def hold(self, state: State) -> None:
        """Keep what was computed last, if it was for this state: it is the best one so far."""
        if self._last is not None and self._last[0] == state:
            self._held = self._last

    def of_structure(self, plan: SharingPlan, leaders: Leaders = "mean") -> float:
        """The loss with the spans and KV heads of a plan, as they are converted.

        The model's weights are restored. A loss that is not finite is not cached.
        """
        value = {"plan": plan.to_dict(), "leaders": leaders}
        key = "structure " + json.dumps(value, separators=(",", ":"))
        if key not in self.cache:
            self.rebase(frozenset())
            self._measure(frozenset())
            self.restore()
            assert self._restart is not None
            other = convert(self.model, plan, leaders).eval()
            loss = self._restart.loss_of(other, lowest_changed(plan))
            if not math.isfinite(loss):
                return loss
            self.cache.put(key, loss)
        return float(self.cache[key])

    def at(self, state: State) -> LlamaForCausalLM:
        """The model itself, with a state in its weights."""
        self._apply(state)
        return self.model

    def at_base(self) -> LlamaForCausalLM:
        """The model itself, with the base state in its weights."""
        return self.at(self._base)

    def restore(self) -> None:
        """Undo all changes of the weights."""
        self._apply(frozenset())

    def _finite(self, state: State) -> float:
        if not math.isfinite(loss := self._measure(state)):
            first, *others = [f"with '{action}'" for action in ordered(state)] or ["of the model"]
            more = f" and {len(others)} more" if others else ""
            raise PostshareError(
                f"the calibration loss {first}{more} is {loss}; check that the weights of "
                "model.path are finite"
            )
        return loss

    def _measure(self, state: State) -> float:
        if self._restart is None:
            self._apply(self._base)
            self._restart = Restart(self.model, self.batches)
            self._kept = self._base
        assert self._kept is not None
        if self._kept != self._base:
            self._restart.keep(self._run_of_base())
            self._kept, self._last, self._held = self._base, None, None
        if state == self._kept:
            return self._restart.loss
        self._last = None  # not to be held beside the next
        self._last = state, self._run(state)
        return self._last[1].loss

    def _run_of_base(self) -> PartialRun:
        if self._held is not None and self._held[0] == self._base:
            return self._held[1]
        return self._run(self._base)

    def _run(self, state: State) -> PartialRun:
        assert self._restart is not None
        assert self._kept is not None
        self._apply(state)
        return self._restart.run_from(lowest(state ^ self._kept))

    @torch.no_grad()
    def _apply(self, state: State) -> None:
        """Sources are unchanged units, so that the order of the changes does not matter."""
        for action in self._applied - state:
            for p in action.projections or ("o",):
                self._slice(action.target, p).copy_(self._originals.pop((action, p)))
        for action in state - self._applied:
            for p in action.projections or ("o",):
                target = self._slice(action.target, p)
                self._originals[action, p] = target.clone()
                if action.source is None:
                    target.zero_()
                else:
                    target.copy_(self._slice(action.source, p))
        self._applied = state

    def _slice(self, unit: tuple[int, int], projection: str) -> torch.Tensor:
        name = self.layout.parameter_name(unit[0], projection)
        view = unit_view(self._parameters[name], self.layout, projection)
        return view if unit[1] == WHOLE else view[unit[1]]


def lowest(actions: Iterable[Action]) -> int:
    """The lowest layer that the actions change."""
    return min(action.target[0] for action in actions)


__all__ = ["Cache", "MeasuredLoss", "identity", "lowest", "state_key"]
