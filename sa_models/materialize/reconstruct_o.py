"""Reconstruction of o by least squares: remaining heads make up for what sharing has changed.

Layer by layer, from the first one that the plan changes, the columns of o that are the layer's own
are solved for the update D that brings the residual stream after attention back to that of the
reference model:

    minimise over D   sum over tokens |r + D a|^2 + ridge * mean(a_i^2) * |D|^2,

where a is what the layer's own heads give to o in the changed model, and r how far its residual
stream lies from the reference's. Errors of the layers below are seen, and made up for as well. This
is the reconstruction of structured pruning (OSSCAR, 2403.12983; LLM Surgeon, 2312.17244) with the
choice already made. It is in closed form, needs no training, and stores nothing more.

Sums are float64. Held at a time: both models, the hidden states of the whole text in both, and one
square matrix of the size of o.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sa_models.calibration.partial_forward import Batch, Entered, Handed, enter, run_layer
from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlamaForCausalLM

RIDGE = 0.01
"""Relative to the mean square of an input of o."""


@dataclass(frozen=True)
class Rebuilt:
    """What one layer's reconstruction did.

    Attributes:
        before, after: squared distance of the residual streams after attention, relative to what
            the reference's attention adds; 0: equal.
    """

    layer: int
    before: float
    after: float


@torch.no_grad()
def reconstruct_(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    plan: SharingPlan,
    batches: Iterable[Batch],
    ridge: float = RIDGE,
    progress: Progress | None = None,
) -> list[Rebuilt]:
    """Solve o of every layer from the first changed one on, in place.

    Args:
        model: with the plan's structure, the plan materialized, in evaluation mode.
        reference: the model before it, of as many layers and the same hidden size.
        plan: tells which columns of o are the layer's own: those of removed units stay zero, those
            that are shared stay as they are.
        batches: calibration text, see :data:`~sa_models.calibration.partial_forward.Batch`.
        progress: called with (done, total) layers.

    Returns:
        one entry for every layer that was solved.

    Raises:
        PostshareError: no text, padding, or fewer tokens than a layer has columns to solve for.
    """
    texts = [_Text.begin(model, reference, batch) for batch in batches]
    layout = HeadLayout.from_config(model.config)
    own = own_columns(plan, layout)
    tokens = sum(text.changed.shape[:-1].numel() for text in texts)
    most = max((len(columns) for columns in own.values()), default=0)
    if tokens < most:
        raise PostshareError(
            f"reconstruction solves for {most} columns of o and has {tokens} tokens of calibration "
            "text; raise materialize.calibration_blocks"
        )
    found = []
    for layer in range(layout.layers):
        for text in texts:
            text.advance_reference(reference, layer)
        if layer in own:
            found.append(_solve(model, layer, own[layer].to(model.device), texts, ridge))
        for text in texts:
            text.changed = run_layer(model, layer, text.changed, text.entered, text.handed)
        if progress is not None:
            progress(layer + 1, layout.layers)
    return found


def own_columns(plan: SharingPlan, layout: HeadLayout) -> dict[int, torch.Tensor]:
    """{layer: columns of o that no other unit shares}, of the layers from the first changed one on.

    A layer of which no column is its own is left out.
    """
    effective = plan.effective()
    tied = [tie for tie in effective.ties if "o" in tie.projections]
    left_out = {*plan.removed, *(t.target for t in tied), *(t.source for t in tied)}
    width = layout.width("o")
    columns = {}
    for layer in range(_first_changed(effective), layout.layers):
        units = [unit for unit in range(layout.units) if (layer, unit) not in left_out]
        if units:
            starts = torch.tensor(units)[:, None] * width
            columns[layer] = (starts + torch.arange(width)).flatten()
    return columns


def _first_changed(plan: SharingPlan) -> int:
    if plan.kv_heads is not None:
        return 0
    changed = [unit[0] for unit in plan.removed] + [tie.target[0] for tie in plan.ties]
    for span in plan.spans:  # a kv span's leader takes the mean of keys and values
        changed.append(span.leader if span.share == "kv" else min(span.followers))
    return min(changed)


def _solve(
    model: LlamaForCausalLM, layer: int, columns: torch.Tensor, texts: list[_Text], ridge: float
) -> Rebuilt:
    """Update the columns of one layer's o; the layer has not run yet on `changed`."""
    o = _output(model, layer)
    size, hidden = len(columns), o.weight.shape[0]
    gram = torch.zeros(size, size, dtype=torch.float64, device=model.device)
    cross = torch.zeros(size, hidden, dtype=torch.float64, device=model.device)
    squares: Any = 0.0  # stay on the device
    added: Any = 0.0
    for text in texts:
        with _recorded(o) as seen:
            run_layer(model, layer, text.changed, text.entered, dict(text.handed))
        given = seen.given.double()[:, columns]
        missing = text.wanted.double() - (text.changed.flatten(0, 1) + seen.returned).double()
        gram += given.T @ given
        cross += given.T @ missing
        squares = squares + missing.square().sum()
        added = added + text.added
    scale = gram.diagonal().mean()
    damping = torch.where(scale > 0, ridge * scale, 1.0)  # of silent heads any: their update is 0
    damped = gram + damping * torch.eye(size, device=model.device)
    update = torch.linalg.solve(damped, cross)
    o.weight[:, columns] = (o.weight[:, columns].double() + update.T).to(o.weight.dtype)
    # |missing - given update|^2, without a second pass over the text
    left = squares + (update * (gram @ update - 2 * cross)).sum()
    return Rebuilt(layer, float(squares / added), float(left / added))


@dataclass
class _Text:
    """One batch on its way through both models.

    Attributes:
        changed, original: hidden states that enter the next layer, (rows, length, hidden).
        wanted: the reference's residual stream after attention, (tokens, hidden).
        added: squared norm of what the reference's attention has added to it.
    """

    changed: torch.Tensor
    original: torch.Tensor
    entered: Entered
    entered_reference: Entered
    handed: Handed = field(default_factory=dict)
    handed_reference: Handed = field(default_factory=dict)
    wanted: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    added: Any = 0.0

    @classmethod
    def begin(cls, model: LlamaForCausalLM, reference: LlamaForCausalLM, batch: Batch) -> _Text:
        (changed, entered), (original, of_reference) = (
            enter(model, batch),
            enter(reference, batch),
        )
        return cls(changed, original, entered, of_reference)

    def advance_reference(self, reference: LlamaForCausalLM, layer: int) -> None:
        with _recorded(_output(reference, layer)) as seen:
            leaving = run_layer(
                reference, layer, self.original, self.entered_reference, self.handed_reference
            )
        self.wanted = self.original.flatten(0, 1) + seen.returned
        self.added = seen.returned.double().square().sum()
        self.original = leaving


@dataclass
class _Seen:
    """What an o projection was given and has returned, (tokens, features)."""

    given: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    returned: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def _recorded(o: nn.Linear) -> Iterator[_Seen]:
    seen = _Seen()

    def record(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.given, seen.returned = args[0].flatten(0, -2), out.flatten(0, -2)

    handle = o.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


def _output(model: LlamaForCausalLM, layer: int) -> nn.Linear:
    return model.model.layers[layer].self_attn.o_proj
