"""Merges that weigh units by what they do on calibration text.

Targets are brought into their source's gauge first, as ``aligned_mean`` does. W_i are then the
slices that become one, of the source and of the targets that share it with it:

* ``weighted_mean`` (Fisher merging, 2111.09832): W = sum_i F_i W_i / sum_i F_i, element by element,
  F_i the diagonal of the empirical Fisher information: the mean over calibration blocks of the
  squared gradient of a block's log-likelihood, in the source's gauge.
* ``least_squares`` (RegMean, 2212.09849): the W whose outputs come closest to those of every W_i on
  the inputs X_i of its own layer, argmin sum_i |X_i W' - X_i W_i'|^2: the W with
  W (sum_i G_i) = sum_i W_i G_i, G_i = X_i' X_i. For q, k and v, X_i is the normed hidden state; for
  o what the unit's heads return, in the source's gauge of v.

Where text says nothing both are the plain mean: F has a floor, G a ridge. Everything is computed in
float64 and rounded once. Memory: a float64 F for every merged slice; or hidden_size^2 float64
elements for every layer with a merged q, k or v (Llama-2-7B: 134 MB each).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from sa_models.calibration.input_moments import InputGrams, run_text
from sa_models.calibration.partial_forward import Batch
from sa_models.calibration.progress import Progress
from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout, unit_view
from sa_models.materialize.merge import (
    Gauge,
    Member,
    Slices,
    check_merge,
    gauges,
    groups,
    merge_group,
)
from sa_models.materialize.registry import MEASURED, Merge
from sa_models.materialize.ties import unit
from sa_models.plan import SharingPlan
from sa_models.ties import Unit

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FLOOR = 1e-6
"""Of F relative to its mean, and of the diagonal of G relative to its mean."""
_DUAL = {"q": "k", "k": "q", "v": "o", "o": "v"}
"""A gradient changes with the gauge as the other projection of the pair does."""

Where = tuple[str, Unit]


def merge_on_text_(
    model: LlamaForCausalLM,
    plan: SharingPlan,
    merge: Merge,
    batches: Iterable[Batch],
    progress: Progress | None = None,
) -> None:
    """Make the units of every tie one, in place, as calibration text says.

    Args:
        model: with the plan's structure; gradients, modes and what trains are as before after it.
        plan: validated; a ``released`` plan is reduced to its effective ties. Without ties there
            is nothing to do.
        merge: ``weighted_mean`` or ``least_squares``.
        batches: calibration text, see :data:`~sa_models.calibration.partial_forward.Batch`; taken a
        row at a time.
        progress: called with (done, total) rows.

    Raises:
        PostshareError: see :func:`~sa_models.materialize.merge.check_merge`; no text, padding, or
            nothing on it to weigh a unit by.
    """
    check_merge(plan, merge)
    if not plan.ties:
        return
    layout, parameters = HeadLayout.from_config(model.config), dict(model.named_parameters())

    def read(projection: str, at: Unit) -> torch.Tensor:
        return unit(parameters, layout, projection, *at).detach()

    found = groups(plan.effective().ties)
    gauge_of: dict[tuple[str, Unit], Gauge] = {}
    merged: set[Where] = set()
    for group in found:
        gauge_of |= {(group.pair, at): g for at, g in gauges(group, layout.head_dim, read).items()}
        for p in group.pair:
            sharing = [target for target, shared in group.targets if p in shared]
            merged |= {(p, at) for at in (group.source, *sharing) if sharing}
    measured: _Measured = resolve_name(MEASURED[merge])(model, layout, merged, gauge_of)
    with measured.recording():
        run_text(model, batches, measured.add, progress)
    new: Slices = {}
    for group in found:
        new |= merge_group(group, merge, layout.head_dim, read, measured.average)
    with torch.no_grad():
        for (p, at), value in new.items():
            unit(parameters, layout, p, *at).copy_(value)


class _Measured(Protocol):
    def recording(self) -> AbstractContextManager[Any]: ...
    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None: ...
    def average(self, projection: str, members: list[Member]) -> torch.Tensor: ...


class Fisher:
    """Sums over rows of squared gradients: {(projection, unit): float64 (width, hidden_size)}."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        layout: HeadLayout,
        merged: set[Where],
        gauge_of: Mapping[tuple[str, Unit], Gauge],
    ) -> None:
        self._model, self._layout, self._gauge_of = model, layout, gauge_of
        self._merged = sorted(merged)
        named = dict(model.named_parameters())
        names = {layout.parameter_name(layer, p) for p, (layer, _) in merged}
        self._parameters = {name: named[name] for name in names}
        self.sums: Slices = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Gradients of the merged projections alone, for a while."""
        before = [(p, p.requires_grad) for p in self._model.parameters()]
        try:
            self._model.requires_grad_(False)
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        flat = logits[:, :-1].float().flatten(0, 1)
        loss = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        names = list(self._parameters)
        found = torch.autograd.grad(loss, [self._parameters[name] for name in names])
        by_name = dict(zip(names, found, strict=True))
        for p, at in self._merged:
            whole = by_name[self._layout.parameter_name(at[0], p)]
            gradient = unit_view(whole, self._layout, p)[at[1]].double()
            gauge = self._gauge_of.get((_pair(p), at))
            if gauge is not None:
                gradient = gauge.apply(_DUAL[p], gradient)
            square = gradient.square()
            self.sums[p, at] = self.sums[p, at] + square if (p, at) in self.sums else square

    def average(self, projection: str, members: list[Member]) -> torch.Tensor:
        if not any(bool(member.rows.any()) for member in members):
            return members[0].rows.clone()
        weights = [self.sums[projection, member.unit] for member in members]
        mean = float(torch.stack([w.mean() for w in weights]).mean())
        if not 0 < mean < float("inf"):
            raise _nothing_to_weigh(projection, members)
        weights = [w + FLOOR * mean for w in weights]
        total = torch.stack([w * m.rows for w, m in zip(weights, members, strict=True)]).sum(0)
        return total / torch.stack(weights).sum(0)


class Inputs:
    """The inputs of all projections that are merged."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        layout: HeadLayout,
        merged: set[Where],
        gauge_of: Mapping[tuple[str, Unit], Gauge],
    ) -> None:
        layers = {layer for p, (layer, _) in merged if p != "o"}
        units = [at for p, at in merged if p == "o"]
        self._grams = InputGrams(model, layers, units)
        self.recording = self._grams.recording

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """The hooks have seen all that is needed."""

    def average(self, projection: str, members: list[Member]) -> torch.Tensor:
        if not any(bool(member.rows.any()) for member in members):
            return members[0].rows.clone()
        left: torch.Tensor | float = 0.0
        right: torch.Tensor | float = 0.0
        for member in members:
            if projection == "o" and not bool(self._grams.of_unit[member.unit].any()):
                continue  # its head returns nothing, so that its o has no say
            gram = self._gram(projection, member)
            ridge = FLOOR * float(gram.diagonal().mean())
            if not 0 < ridge < float("inf"):
                raise _nothing_to_weigh(projection, members)
            gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            # q, k, v read x by their columns; o, which lies transposed, by its rows.
            product = gram @ (member.rows if projection == "o" else member.rows.T)
            left, right = left + gram, right + product
        if not isinstance(left, torch.Tensor):
            raise _nothing_to_weigh(projection, members)
        solution = torch.linalg.solve(left, right)
        return solution if projection == "o" else solution.T.contiguous()

    def _gram(self, projection: str, member: Member) -> torch.Tensor:
        if projection != "o":
            return self._grams.of_layer[member.unit[0]]
        gram = self._grams.of_unit[member.unit]
        if member.gauge is None:
            return gram
        return member.gauge.apply("v", member.gauge.apply("v", gram).T.contiguous()).T


def _pair(projection: str) -> str:
    return "qk" if projection in "qk" else "vo"


def _nothing_to_weigh(projection: str, members: list[Member]) -> PostshareError:
    return PostshareError(
        f"calibration text says nothing finite about {projection} of unit {list(members[0].unit)} "
        "and those that share it; give more text, or set materialize.merge=aligned_mean"
    )
