"""The slope of a change of attention: its first order on calibration text, whatever the change is.

With g(t) the gradient of the summed loss where attention has added its output, and o(t), o'(t) that
output before and after the change, both computed from the inputs of the unchanged model, the slope
is the sum over layers and tokens of <g(t), o'(t) - o(t)>, per predicted token. For removals and
ties it is the sum of the first orders of :mod:`~sa_models.scores.fisher`; spans and pooled KV heads
have one too, so that what the text says by chance is taken off all of them alike
(see :mod:`~sa_models.search.algorithms`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sa_models.calibration.partial_forward import Batch, Entered, enter, rows_of, run_layers
from sa_models.calibration.progress import Progress
from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError
from sa_models.modeling import SharedLlamaModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Change:
    """A change of a model's attention.

    Attributes:
        model: called for the changed model, which may hold the weights of the unchanged one.
        layers: that are changed, the leaders of changed followers included.
    """

    model: Callable[[], LlamaForCausalLM]
    layers: frozenset[int]


@dataclass
class _Seen:
    """The attentions of one row in the unchanged model, by layer; (1, rows, hidden) each."""

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)


def slopes(
    original: Callable[[], LlamaForCausalLM],
    changes: Sequence[Change],
    batches: Iterable[Batch],
    progress: Progress | None = None,
) -> list[float]:
    """The slope of every change, nats per predicted token: one backward pass over the text.

    Args:
        original: called, before every row, for the unchanged model in evaluation mode.
        batches: calibration text; taken a row at a time.
        progress: called with (done, total) rows.

    Raises:
        PostshareError: no token to predict, or padding.
    """
    rows = rows_of(batches)
    sums: list[Any] = [0.0] * len(changes)
    tokens = 0
    for done, row in enumerate(rows, start=1):
        seen, entered = _record(original(), row)
        tokens += int((entered.targets != IGNORED).sum())
        for at, change in enumerate(changes):
            sums[at] += _along(change.model(), sorted(change.layers), seen, entered)
        if progress is not None:
            progress(done, len(rows))
    if not tokens:
        raise PostshareError(
            "there is no token to predict in the calibration text; add text to data.train"
        )
    return [float(total) / tokens for total in sums]


def _record(model: LlamaForCausalLM, row: Batch) -> tuple[_Seen, Entered]:
    """What the attentions take and give, and the gradient of what they give."""
    seen = _Seen()

    def enters(at: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.inputs[at] = (args[0] if args else kwargs["hidden_states"]).detach()

    def gives(at: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.outputs[at] = output.detach()
        output.register_hook(partial(seen.gradients.__setitem__, at))

    handles: list[Any] = []
    for at, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        handles += [
            attention.register_forward_pre_hook(partial(enters, at), with_kwargs=True),
            attention.o_proj.register_forward_hook(partial(gives, at)),
        ]
    try:
        with _no_weight_gradients(model), torch.enable_grad():
            hidden, entered = enter(model, row)
            *_, hidden = run_layers(model, hidden.detach().requires_grad_(), entered)
            logits = model.lm_head(model.model.norm(hidden))[0, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            targets = entered.targets[0]
            F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen, entered


@contextmanager
def _no_weight_gradients(model: LlamaForCausalLM) -> Iterator[None]:
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


@torch.no_grad()
def _along(model: LlamaForCausalLM, layers: Sequence[int], seen: _Seen, entered: Entered) -> Any:
    """Sum of <gradient, change of the output> over the layers' attentions and the row's tokens."""
    shared = isinstance(model.model, SharedLlamaModel)
    handed: dict[int, tuple[torch.Tensor, ...]] = {}
    same = {
        "position_embeddings": entered.rotation,
        "attention_mask": entered.mask,
        "position_ids": entered.positions,
    }
    total: Any = 0.0  # stays on the device
    for at in layers:
        attention, given = model.model.layers[at].self_attn, seen.inputs[at]
        if shared:
            span = model.model.spans[at]
            leader = () if span is None else handed[span.leader]
            output, _, handed[at] = attention(given, leader, False, **same)
        else:
            output, _ = attention(given, **same)
        change = (output - seen.outputs[at]).double()
        total = total + (seen.gradients[at].double() * change).sum()
    return total


__all__ = ["Change", "slopes"]
