"""The loss of a model on calibration text, computed again from the layer that was changed.

The hidden states that enter every layer are kept, so that a change of layer l costs only layers l
to L. The same operations run on the same tensors as in a full forward pass: the loss is the same
number, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import create_causal_mask

from sa_models.cache import CACHE
from sa_models.calibration.token_losses import IGNORED, head_losses
from sa_models.errors import PostshareError
from sa_models.modeling import SharedLlamaModel

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Batch = Mapping[str, torch.Tensor]
"""``input_ids`` int64 (rows, length); perhaps ``labels`` (-100: not predicted; by default every
token but the first is) and ``position_ids``, which restart at every document."""


def rows_of(batches: Iterable[Batch]) -> list[Batch]:
    """The same text, every row a batch of its own."""
    return [
        {name: tensor[i : i + 1] for name, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]


Handed = dict[int, tuple[torch.Tensor, ...]]
"""What leaders hand to their followers, by the leader's layer."""


@dataclass(frozen=True)
class Entered:
    """What all layers get of one batch, beside the hidden states."""

    rotation: tuple[torch.Tensor, torch.Tensor]
    mask: Any
    positions: torch.Tensor
    targets: torch.Tensor
    """int64 (rows, length - 1): the tokens that are predicted, -100 where none is."""


def enter(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, Entered]:
    """The hidden states that enter layer 0, (rows, length, hidden), and what goes with them.

    Raises:
        PostshareError: padding, which calibration text must not have.
    """
    if "attention_mask" in batch and not batch["attention_mask"].all():
        raise PostshareError(
            "calibration blocks have padding; pack the text into blocks of equal length"
        )
    ids = batch["input_ids"].to(model.device)
    hidden = model.model.embed_tokens(ids)
    given = batch.get("position_ids")
    if given is None:
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    else:
        positions = given.to(ids.device)
    no_cache: dict[str, Any] = {CACHE: None}
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=hidden,
        attention_mask=None,
        position_ids=positions,
        **no_cache,
    )
    rotation = model.model.rotary_emb(hidden, position_ids=positions)
    targets = batch.get("labels", ids)[:, 1:].to(ids.device)
    return hidden, Entered(rotation, mask, positions, targets)


def run_layers(
    model: LlamaForCausalLM, hidden: torch.Tensor, entered: Entered, start: int = 0
) -> Iterable[torch.Tensor]:
    """The hidden states that leave layer ``start``, then those of every layer above it.

    Args:
        start: not a follower, nor a layer between a leader and its followers: see
            :meth:`Restart.first_layer`.
    """
    handed: Handed = {}
    for at in range(start, len(model.model.layers)):
        hidden = run_layer(model, at, hidden, entered, handed)
        yield hidden


def run_layer(
    model: LlamaForCausalLM, at: int, hidden: torch.Tensor, entered: Entered, handed: Handed
) -> torch.Tensor:
    """The hidden states that leave one layer.

    Args:
        handed: of the leaders below it; this layer adds its own, where it leads.
    """
    layer = model.model.layers[at]
    same = {
        "attention_mask": entered.mask,
        "position_ids": entered.positions,
        "use_cache": False,
    }
    if not isinstance(model.model, SharedLlamaModel):
        return layer(hidden, position_embeddings=entered.rotation, **same)
    span = model.model.spans[at]
    leader = () if span is None else handed[span.leader]
    leaving, given = layer(hidden, leader, False, entered.rotation, **same)
    if given:
        handed[at] = given
    return leaving


def summed_loss(model: LlamaForCausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of the nats of all predicted tokens, from what leaves the last layer."""
    hidden = model.model.norm(hidden)
    return sum(head_losses(model.lm_head, model.config.vocab_size, hidden, targets).tolist())


@dataclass(frozen=True)
class PartialRun:
    """What a changed model computes, from the lowest layer that has changed.

    Attributes:
        loss: nats per predicted token.
        leaving: the hidden states that leave layer ``start`` and every layer above it, by batch.
    """

    loss: float
    start: int
    leaving: list[list[torch.Tensor]]


class Restart:
    """A model and the hidden states that enter each of its layers on calibration text.

    Holds (layers + 1) * tokens * hidden elements in the model's dtype, on its device. A
    :class:`PartialRun` holds the part of as many that it has computed.

    Args:
        model: a Llama, stock or with spans, in evaluation mode.
        batches: calibration text; never shuffled, and read once.

    Attributes:
        loss: nats per predicted token of the model as it was last kept.
        tokens: predicted tokens.
        passes: forward passes so far, in whole models: a part of the layers counts as that part.

    Raises:
        PostshareError: nothing to predict, or padding.
    """

    def __init__(self, model: LlamaForCausalLM, batches: Iterable[Batch]) -> None:
        self.model = model
        self.layers = len(model.model.layers)
        self.passes = 0.0
        with torch.no_grad():
            entered = [enter(model, batch) for batch in batches]
        self._entered = [context for _, context in entered]
        self._hidden = [[hidden for hidden, _ in entered]]
        self._hidden += [[] for _ in range(self.layers)]
        self.tokens = sum(int((e.targets != IGNORED).sum()) for e in self._entered)
        if not self.tokens:
            raise PostshareError(
                "there is no token to predict in the calibration text; add text to data.train"
            )
        self.loss = self.keep(self.run_from(0))

    def first_layer(self, layer: int) -> int:
        """The layer to start at when ``layer`` has changed: a leader's tensors are not kept."""
        if isinstance(self.model.model, SharedLlamaModel):
            for span in self.model.model.plan.spans:
                if span.leader < layer <= max(span.followers):
                    return self.first_layer(span.leader)
        return layer

    @torch.no_grad()
    def run_from(self, layer: int) -> PartialRun:
        """The model where weights of ``layer`` and above have changed."""
        start, total = self.first_layer(layer), 0.0
        leaving: list[list[torch.Tensor]] = [[] for _ in range(start, self.layers)]
        for entering, entered in zip(self._hidden[start], self._entered, strict=True):
            for at, hidden in enumerate(run_layers(self.model, entering, entered, start)):
                leaving[at].append(hidden)
            total += summed_loss(self.model, leaving[-1][-1], entered.targets)
        self.passes += (self.layers - start) / self.layers
        return PartialRun(total / self.tokens, start, leaving)

    def keep(self, run: PartialRun) -> float:
        """The loss and the hidden states from now on are those of the changed model."""
        self._hidden[run.start + 1 :] = run.leaving
        self.loss = run.loss
        return self.loss

    @torch.no_grad()
    def loss_of(self, other: LlamaForCausalLM, layer: int) -> float:
        """Nats per predicted token of another model, the same as the kept one below ``layer``."""
        total = 0.0
        for hidden, entered in zip(self._hidden[layer], self._entered, strict=True):
            for leaving in run_layers(other, hidden, entered, layer):
                hidden = leaving
            total += summed_loss(other, hidden, entered.targets)
        self.passes += (self.layers - layer) / self.layers
        return total / self.tokens
