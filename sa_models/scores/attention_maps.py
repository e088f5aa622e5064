"""Isotropy: how alike the attention maps of two layers are (Shared Attention, arXiv 2407.12866).

**Definition.** A row of a map is one query's post-softmax weights over its keys. The isotropy of
two layers is the cosine between their rows for the same query, head h with head h, averaged over
heads, rows and blocks (every row counts once). Rows with a single key are 1 for any two layers, so
they are left out: the first row of a block and, under document masks, of every document. It falls
as blocks get longer (weight spreads over more keys): compare numbers of equal block lengths only.

**Without the sink.** Much of a map's weight lies on the first token, whatever the text, and the
cosine of two such rows is near 1. So it is also measured with the first key (of the block; under
document masks, of the row's document) taken out of the rows. Then the second row has a single key
and is left out too, and so is, for a pair of layers, a row of which either has no weight left (its
remaining norm is 0). A pair that has no row left is nan.

Maps come from the eager attention of transformers, one block at a time: layers * heads * length^2
elements in the model's dtype. Products are float64, on slices of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import Unit
from sa_models.scores.weight_cosine import TIE_TOLERANCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 1 << 27

Maps = tuple[torch.Tensor, ...]
"""Attention maps of one block, (1, heads, length, length) for every layer."""


@dataclass(frozen=True)
class Isotropy:
    """Cosines between the attention maps of every two layers, as defined in this module.

    Attributes:
        maps: float64 (layers, layers), symmetric, ones on the diagonal, on the CPU.
        without_sink: the same, without the first key of every row.
    """

    maps: torch.Tensor
    without_sink: torch.Tensor


def measure_isotropy(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    progress: Progress | None = None,
    removed: Iterable[Unit] = (),
) -> Isotropy:
    """The isotropy of every two layers of a model on calibration text.

    Args:
        model: any Llama of transformers. Its training mode and attention are restored.
        batches: blocks without padding, ``{"input_ids": int64 (batch, length)}``; with document
            masks also ``"position_ids"``, which restart at every document. Other keys are ignored.
        progress: called with (done, total) after every block.
        removed: (layer, unit) of heads that are there as zeros: their maps count for no pair.

    Raises:
        PostshareError: no block of three tokens, padding, or a map that is not finite.
    """
    maps, without_sink = _RowCosines(), _RowCosines()
    group = HeadLayout.from_config(model.config).heads_per_unit
    left_out = [(layer, slice(unit * group, (unit + 1) * group)) for layer, unit in removed]

    def visit(attentions: Maps, keys: torch.Tensor) -> None:
        for chunk, visible in _row_chunks(attentions, keys):
            for layer, heads_of_unit in left_out:
                chunk[layer, heads_of_unit] = 0.0  # as any row without weight: not counted
            # (layers, heads, rows, keys) -> (layers, heads * rows, keys)
            heads = chunk.shape[1]
            maps.add(chunk.flatten(1, 2), (visible > 1).repeat(heads))
            _remove_sink_(chunk, visible)
            without_sink.add(chunk.flatten(1, 2), (visible > 2).repeat(heads))

    visit_maps(model, batches, visit, progress)
    return Isotropy(maps.mean(), without_sink.mean())


def head_similarity(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    leader: int,
    follower: int,
    *,
    sink: bool = True,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Mean cosine between the maps of every head of one layer and every head of another.

    The mean of its diagonal is the isotropy of the two layers (up to the rows that are left out).

    Args:
        model, batches, progress: see :func:`measure_isotropy`.
        sink: count the first key of every row.

    Returns:
        float64 (heads of the follower, heads of the leader), on the CPU.

    Raises:
        PostshareError: see :func:`measure_isotropy`; or a layer that the model does not have.
    """
    layers = model.config.num_hidden_layers
    for layer in (leader, follower):
        if not 0 <= layer < layers:
            raise PostshareError(
                f"the heads of layer {layer} are to be compared; the model has layers 0 to "
                f"{layers - 1}"
            )
    total = _RowCosines()

    def visit(attentions: Maps, keys: torch.Tensor) -> None:
        for chunk, visible in _row_chunks((attentions[leader], attentions[follower]), keys):
            if not sink:
                _remove_sink_(chunk, visible)
            total.add(chunk.flatten(0, 1), visible > (1 if sink else 2))

    visit_maps(model, batches, visit, progress)
    cosines = total.mean()
    heads = len(cosines) // 2
    return cosines[heads:, :heads].clone()


def unit_map_similarity(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    progress: Progress | None = None,
) -> torch.Tensor:
    """Mean cosine between the maps of every two units of a model, head h of a group with head h.

    Args:
        model, batches, progress: see :func:`measure_isotropy`.

    Returns:
        float64 (layers * units, layers * units), symmetric, ones on the diagonal, on the CPU.

    Raises:
        PostshareError: see :func:`measure_isotropy`.
    """
    units, total = HeadLayout.from_config(model.config).units, _RowCosines()

    def visit(attentions: Maps, keys: torch.Tensor) -> None:
        for chunk, visible in _row_chunks(attentions, keys):
            groups = chunk.unflatten(1, (units, -1)).flatten(0, 1)
            total.add(groups.flatten(1, 2), (visible > 1).repeat(groups.shape[1]))

    visit_maps(model, batches, visit, progress)
    return total.mean()


def best_head_map(similarity: torch.Tensor) -> tuple[int, ...]:
    """The leader's head that every head of the follower reads: the most similar one.

    Several heads may read the same one. Similarities within 1e-6 of the highest are ties; the
    lowest index wins.

    Args:
        similarity: (heads of the follower, heads of the leader), from :func:`head_similarity`.
    """
    highest = similarity.max(dim=1).values
    first = (similarity >= highest[:, None] - TIE_TOLERANCE).int().argmax(dim=1)
    return tuple(first.tolist())


# --- rows -----------------------------------------------------------------------------------------


class _RowCosines:
    """Sums of the cosines between the same rows of several units, and how many were summed."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    def add(self, rows: torch.Tensor, counted: torch.Tensor) -> None:
        """Add rows, float64 (units, rows, keys), of which those in bool (rows,) count."""
        norms = torch.linalg.vector_norm(rows, dim=-1)
        valid = (norms > 0) & counted
        scale = torch.where(valid, 1 / norms, 0)
        # A sum of cosines over rows is one product of the normalized, concatenated rows.
        normalized = (rows * scale[..., None]).flatten(1)
        ones = valid.to(rows.dtype)
        sums, counts = normalized @ normalized.T, ones @ ones.T
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts

    def mean(self) -> torch.Tensor:
        """float64 (units, units), symmetric, on the CPU; nan where no row was counted."""
        assert self._sums is not None
        assert self._counts is not None
        mean = (self._sums / self._counts).cpu()
        return mean.tril() + mean.tril(-1).T


def _row_chunks(
    attentions: Maps, keys: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The maps of one block, a range of rows at a time, and the number of keys of these rows.

    float64 (layers, heads, rows, keys up to the last row) and int64 (rows,).
    """
    heads, length = attentions[0].shape[1:3]
    size = max(1, CHUNK_BYTES // (8 * len(attentions) * heads * length))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield (
            # One device: a model may be spread over several.
            torch.stack(
                [
                    maps[0, :, start:stop, :stop].to(keys.device, torch.float64)
                    for maps in attentions
                ]
            ),
            keys[start:stop],
        )


def _remove_sink_(chunk: torch.Tensor, keys: torch.Tensor) -> None:
    """Set the weight on the first key of every row to 0."""
    length = chunk.shape[-1]
    last = torch.arange(length - len(keys), length, device=keys.device)
    first = last + 1 - keys
    index = first[:, None].expand(*chunk.shape[:-1], 1)
    chunk.scatter_(-1, index, 0.0)


# --- maps -----------------------------------------------------------------------------------------


@contextmanager
def _eager_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention (the others do not return maps) and no dropout, for a while."""
    implementation, training = model.config._attn_implementation, model.training
    try:
        model.set_attn_implementation("eager")
        model.eval()
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)


def visit_maps(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    visit: Callable[[Maps, torch.Tensor], None],
    progress: Progress | None,
) -> None:
    """Call ``visit(maps, keys)`` for every block, with int64 (length,) keys of every row.

    A callback: a loop over a generator would hold a block's maps while the next ones are made.
    """
    blocks = calibration_blocks(batches)
    with _eager_evaluation(model), torch.no_grad():
        for index, block in enumerate(blocks):
            inputs = {name: tensor.to(model.device) for name, tensor in block.items()}
            visit(_maps(model, inputs, index), _keys_per_row(inputs))
            if progress is not None:
                progress(index + 1, len(blocks))


def _maps(model: PreTrainedModel, inputs: dict[str, torch.Tensor], block: int) -> Maps:
    # The base model: the logits are not needed, and are large.
    maps = model.base_model(**inputs, output_attentions=True, use_cache=False).attentions
    if not maps or any(layer is None for layer in maps):
        raise PostshareError(
            f"{type(model).__name__} returns no attention maps; measure a LlamaForCausalLM"
        )
    for layer, values in enumerate(maps):
        if not values.isfinite().all():
            raise PostshareError(
                f"the attention map of layer {layer} is not finite on calibration block {block}; "
                "load the model in float32, or check its weights"
            )
    return maps


def _keys_per_row(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """int64 (length,): a causal row sees its document up to itself."""
    row = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)
    if "position_ids" not in inputs:
        return row + 1
    # As transformers finds packed documents: one begins wherever positions do not go on by one.
    positions = inputs["position_ids"][0]
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = positions.diff() != 1
    return row + 1 - torch.where(begins, row, 0).cummax(dim=0).values


def calibration_blocks(
    batches: Iterable[Mapping[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    """Every block as inputs of batch size 1.

    Raises:
        PostshareError: padding, or no block of three tokens.
    """
    blocks = []
    for batch in batches:
        if "attention_mask" in batch and not batch["attention_mask"].all():
            raise PostshareError(
                "calibration blocks have padding; pack the text into blocks of equal length"
            )
        names = [name for name in ("input_ids", "position_ids") if name in batch]
        blocks += [
            {name: batch[name][index : index + 1] for name in names}
            for index in range(len(batch["input_ids"]))
        ]
    if not any(block["input_ids"].shape[1] >= 3 for block in blocks):
        raise PostshareError(
            "there is no calibration block of at least 3 tokens to measure isotropy on; add text "
            "or raise data.sequence_length"
        )
    return blocks
