"""Reconstruction of o by least squares: remaining heads make up for what sharing has changed.

Layer by layer, from the first one that the plan changes, the columns of o that are the layer's own
are solved for the update D that brings the residual stream after attention back to that of the
reference model:

    minimise over D   sum over tokens w |r + D a|^2 + ridge * mean(w a_i^2) * |D|^2,

where a is what the layer's own heads give to o in the changed model, r how far its residual stream
lies from the reference's, and w = 1 / (mean square of the reference's stream), by which the norm
that follows divides. Errors of the layers below are seen, and made up for as well. This is the
reconstruction of structured pruning (OSSCAR, 2403.12983; LLM Surgeon, 2312.17244) with the choice
already made. It is in closed form, needs no training, and stores nothing more.

The ridge of a layer is the one of `RIDGES` with the least error on text that was not fitted, in
`FOLDS` turns; a layer in which none is better than no update stays as it is. A fixed small ridge
fits the calibration text, and what is lost on other text can be more than is won: see
docs/reconstruction.md.

Sums are float64. Held at a time: both models, the hidden states of the whole text in both, and
`FOLDS` pairs of matrices of the size of o.
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
from sa_models.materialize.registry import KEEPS_SOURCES, Merge
from sa_models.plan import SharingPlan

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlamaForCausalLM

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Relative to the weighted mean square of an input of o."""
FOLDS = 4


@dataclass(frozen=True)
class Rebuilt:
    """What one layer's reconstruction did.

    Attributes:
        before, after: squared distance of the residual streams after attention on the text, each
            token by its weight, relative to what the reference's attention adds; 0: equal.
        ridge: that was used; None: the layer stays as it was.
    """

    layer: int
    before: float
    after: float
    ridge: float | None


@torch.no_grad()
def reconstruct_(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    plan: SharingPlan,
    batches: Iterable[Batch],
    ridge: float | None = None,
    progress: Progress | None = None,
    merge: Merge = "copy",
) -> list[Rebuilt]:
    """Solve o of every layer from the first changed one on, in place.

    Args:
        model: with the plan's structure, the plan materialized, in evaluation mode.
        reference: the model before it, of as many layers and the same hidden size.
        plan: tells which columns of o are the layer's own: those of removed units stay zero, those
            that are shared stay as they are.
        batches: calibration text, see :data:`~sa_models.calibration.partial_forward.Batch`.
        ridge: of all layers; None: each layer's own is chosen.
        progress: called with (done, total) layers.
        merge: how ties were made; by most, sources have changed too.

    Returns:
        one entry for every layer that was solved.

    Raises:
        PostshareError: no text, padding, or fewer tokens than a layer has columns to solve for.
    """
    texts = [_Text.begin(model, reference, batch) for batch in batches]
    _set_folds(texts)
    layout = HeadLayout.from_config(model.config)
    own = own_columns(plan, layout, merge)
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


def own_columns(
    plan: SharingPlan, layout: HeadLayout, merge: Merge = "copy"
) -> dict[int, torch.Tensor]:
    """{layer: columns of o that no other unit shares}, of the layers from the first changed one on.

    A layer of which no column is its own is left out.
    """
    effective = plan.effective()
    tied = [tie for tie in effective.ties if "o" in tie.projections]
    left_out = {*plan.removed, *(t.target for t in tied), *(t.source for t in tied)}
    width = layout.width("o")
    columns = {}
    for layer in range(_first_changed(effective, merge), layout.layers):
        units = [unit for unit in range(layout.units) if (layer, unit) not in left_out]
        if units:
            starts = torch.tensor(units)[:, None] * width
            columns[layer] = (starts + torch.arange(width)).flatten()
    return columns


def _first_changed(plan: SharingPlan, merge: Merge) -> int:
    if plan.kv_heads is not None:
        return 0
    changed = [unit[0] for unit in plan.removed] + [tie.target[0] for tie in plan.ties]
    if merge not in KEEPS_SOURCES:
        changed += [tie.source[0] for tie in plan.ties]
    for span in plan.spans:  # a kv span's leader takes the mean of keys and values
        changed.append(span.leader if span.share == "kv" else min(span.followers))
    return min(changed)


def _set_folds(texts: list[_Text]) -> None:
    """Deal the sequences out in turn; where they are too few, cut each into pieces."""
    sequences = sum(len(text.changed) for text in texts)
    number = 0
    for text in texts:
        rows, length = text.changed.shape[:2]
        if sequences >= FOLDS:
            of_rows = (torch.arange(rows) + number) % FOLDS
            folds = of_rows[:, None].expand(rows, length)
        else:
            folds = (torch.arange(length) * FOLDS // length).expand(rows, length)
        text.folds = folds.flatten().to(text.changed.device)
        number += rows


def _solve(
    model: LlamaForCausalLM,
    layer: int,
    columns: torch.Tensor,
    texts: list[_Text],
    ridge: float | None,
) -> Rebuilt:
    """Update the columns of one layer's o; the layer has not run yet on `changed`."""
    o = _output(model, layer)
    sums = _Sums.zeros(len(columns), o.weight.shape[0], model.device)
    added: Any = 0.0  # stays on the device
    for text in texts:
        with _recorded(o) as seen:
            run_layer(model, layer, text.changed, text.entered, dict(text.handed))
        given = seen.given.double()[:, columns]
        missing = text.wanted.double() - (text.changed.flatten(0, 1) + seen.returned).double()
        size = text.wanted.double().square().mean(-1) + model.config.rms_norm_eps
        sums.add(given, missing, 1 / size, text.folds)
        added = added + (text.added / size).sum()
    gram, cross, squares = sums.gram.sum(0), sums.cross.sum(0), sums.squares.sum()
    chosen = sums.best_ridge() if ridge is None else ridge
    before = float(squares / added)
    if chosen is None:
        return Rebuilt(layer, before, before, None)
    scale = gram.diagonal().mean()
    damping = torch.where(scale > 0, chosen * scale, 1.0)  # of silent heads any: their update is 0
    update = torch.linalg.solve(gram + damping * torch.eye(len(gram), device=model.device), cross)
    o.weight[:, columns] = (o.weight[:, columns].double() + update.T).to(o.weight.dtype)
    # |missing - given update|^2, without a second pass over the text
    left = squares + (update * (gram @ update - 2 * cross)).sum()
    return Rebuilt(layer, before, float(left / added), chosen)


@dataclass
class _Sums:
    """The least squares problem of a layer, by folds of the text; float64.

    Attributes:
        gram: sum of w a a^T, (folds, columns, columns).
        cross: sum of w a r^T, (folds, columns, hidden).
        squares: sum of w |r|^2, (folds,).
    """

    gram: torch.Tensor
    cross: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def zeros(cls, columns: int, hidden: int, device: torch.device) -> _Sums:
        shapes = ((FOLDS, columns, columns), (FOLDS, columns, hidden), (FOLDS,))
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add(
        self, given: torch.Tensor, missing: torch.Tensor, weight: torch.Tensor, folds: torch.Tensor
    ) -> None:
        """Tokens of one batch: (tokens, columns), (tokens, hidden), (tokens,), (tokens,)."""
        weighted = given * weight[:, None]
        distance = missing.square().sum(-1) * weight
        for fold in range(FOLDS):
            at = folds == fold
            self.gram[fold] += weighted[at].T @ given[at]
            self.cross[fold] += weighted[at].T @ missing[at]
            self.squares[fold] += distance[at].sum()

    def best_ridge(self) -> float | None:
        """By the error on each fold of what the others give; None: no update is better."""
        errors = torch.zeros(len(RIDGES), dtype=torch.float64)
        gram, cross = self.gram.sum(0), self.cross.sum(0)
        for held_gram, held_cross, squares in zip(self.gram, self.cross, self.squares, strict=True):
            fitted = gram - held_gram
            scale = fitted.diagonal().mean()
            scale = torch.where(scale > 0, scale, 1.0)
            values, basis = torch.linalg.eigh(fitted)
            turned = basis.T @ (cross - held_cross)
            held_gram, held_cross = basis.T @ held_gram @ basis, basis.T @ held_cross
            for index, ridge in enumerate(RIDGES):
                update = turned / (values.clamp_min(0) + ridge * scale)[:, None]
                change = (update * (held_gram @ update - 2 * held_cross)).sum()
                errors[index] += float(squares + change)
        best = int(errors.argmin())
        return RIDGES[best] if errors[best] < float(self.squares.sum()) else None


@dataclass
class _Text:
    """One batch on its way through both models.

    Attributes:
        changed, original: hidden states that enter the next layer, (rows, length, hidden).
        wanted: the reference's residual stream after attention, (tokens, hidden).
        added: squared norm of what the reference's attention has added to it, (tokens,).
        folds: the fold of each token, (tokens,).
    """

    changed: torch.Tensor
    original: torch.Tensor
    entered: Entered
    entered_reference: Entered
    handed: Handed = field(default_factory=dict)
    handed_reference: Handed = field(default_factory=dict)
    wanted: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    added: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    folds: torch.Tensor = field(default_factory=lambda: torch.empty(0))

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
        self.added = seen.returned.double().square().sum(-1)
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
