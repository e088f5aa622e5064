"""Scores between units on calibration text: what they attend to, and what they write.

* ``attention``: the cosine of the two units' attention maps, row by row, head by head, averaged
  (:func:`sa_models.scores.attention_maps.unit_map_similarity`).
* ``output``: the cosine of what the two units add to the residual stream, over all calibration
  tokens at once: sum_t <y_t, y'_t> / (norms), y = O h, h the head outputs of the unit.
* ``output_map``: how much of a target's output a linear map of the source's head outputs gives.
  M = argmin sum_t |h'_t - M h_t|^2 by least squares, one M for a KV group, whose heads are samples
  of their own; the score is R^2 = 1 - |O' (h' - M h)|^2 / |O' h'|^2 (in a group: every head's
  sample through the o of all its heads). It is not symmetric.

``output`` and ``output_map`` do not change with a head's gauge. Every layer sees its own
activations, those of the unshared model. Memory: the head outputs of all calibration tokens
(tokens * layers * heads * head_dim * 4 bytes; 2.1 GB for Llama-2-7B and 4,096 tokens), one chunk of
features of at most 1 GiB, and Gram matrices of two layers at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import Unit
from sa_models.scores import weight_cosine
from sa_models.scores.attention_maps import calibration_blocks
from sa_models.scores.significance import PairTerms, Terms, over
from sa_models.scores.weight_cosine import Parts, cosines, gram_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-10
"""Added to a source's Gram matrix, relative to its mean diagonal: dead directions stay dead."""


@dataclass(frozen=True)
class HeadOutputs:
    """What the heads of every layer return on calibration text, before o.

    Attributes:
        layout: the model's attention shape.
        heads: float32 (layers, tokens, heads * head_dim), on the CPU.
        o: {layer: weight of o, (hidden_size, heads * head_dim)}.
    """

    layout: HeadLayout
    heads: torch.Tensor
    o: Mapping[int, torch.Tensor]

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, torch.Tensor]],
        progress: Progress | None = None,
    ) -> HeadOutputs:
        """Run a dense Llama over calibration text.

        Args:
            batches: see :func:`~sa_models.scores.attention_maps.measure_isotropy`.

        Raises:
            PostshareError: padding, no block of three tokens, or an output that is not finite.
        """
        layout, blocks = HeadLayout.from_config(model.config), calibration_blocks(batches)
        tokens = sum(block["input_ids"].shape[1] for block in blocks)
        heads = torch.empty(layout.layers, tokens, layout.heads * layout.head_dim)
        projections = [
            model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
            for layer in range(layout.layers)
        ]
        training, start = model.training, 0
        with ExitStack() as stack:
            stack.callback(model.train, training)
            model.eval()
            for index, block in enumerate(blocks):
                stop = start + block["input_ids"].shape[1]
                with ExitStack() as hooks:
                    for layer, projection in enumerate(projections):
                        hooks.enter_context(_keeping(projection, heads[layer, start:stop]))
                    inputs = {name: tensor.to(model.device) for name, tensor in block.items()}
                    model.base_model(**inputs, use_cache=False)
                start = stop
                if progress is not None:
                    progress(index + 1, len(blocks))
        if not bool(heads.isfinite().all()):
            raise PostshareError(
                "a head's output on calibration text is not finite; load the model in float32, or "
                "check its weights"
            )
        o = {n: p.get_parameter("weight").detach().float().cpu() for n, p in enumerate(projections)}
        return cls(layout, heads, o)

    def written(self, layer: int, start: int, stop: int) -> torch.Tensor:
        """What every unit of a layer adds to the residual stream, (units, tokens, hidden_size)."""
        width = self.layout.width("o")
        h = self.heads[layer, start:stop].unflatten(1, (-1, width)).transpose(0, 1)
        return h @ self.o[layer].t().unflatten(0, (-1, width))

    def o_of(self, unit: Unit) -> torch.Tensor:
        """The columns of o of one unit's heads, float64 (heads_per_unit, hidden_size, head_dim)."""
        width = self.layout.width("o")
        columns = self.o[unit[0]][:, unit[1] * width : (unit[1] + 1) * width].double()
        return columns.unflatten(1, (-1, self.layout.head_dim)).transpose(0, 1)

    def written_by(self, unit: Unit) -> torch.Tensor:
        """What one unit adds, float64 (tokens, hidden_size)."""
        width = self.layout.width("o")
        part = slice(unit[1] * width, (unit[1] + 1) * width)
        return self.heads[unit[0]][:, part].double() @ self.o[unit[0]][:, part].double().t()


def _keeping(projection: torch.nn.Module, into: torch.Tensor) -> torch.utils.hooks.RemovableHandle:
    """A hook, to be removed, that copies what a projection is given."""

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        into.copy_(inputs[0][0])

    return projection.register_forward_pre_hook(keep)


def output_scores(outputs: HeadOutputs, progress: Progress | None = None) -> torch.Tensor:
    """Score ``output`` of every two units, as :func:`~sa_models.scores.weight_cosine.unit_scores`;
    0 of one that writes nothing on the calibration text."""
    layout, tokens = outputs.layout, outputs.heads.shape[1]
    row = 4 * layout.layers * layout.units * layout.hidden_size
    step = max(1, min(tokens, weight_cosine.CHUNK_BYTES // row))

    def items() -> Iterator[torch.Tensor]:
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            layers = [outputs.written(n, start, stop) for n in range(layout.layers)]
            yield torch.stack(layers).flatten(2).flatten(0, 1)

    return cosines(gram_matrix(Parts(-(-tokens // step), items()), layout, progress))


def output_terms(outputs: HeadOutputs) -> PairTerms:
    """The terms of score ``output``: its features are those of the residual stream."""

    def terms(target: Unit, source: Unit) -> Terms:
        a, b = outputs.written_by(target), outputs.written_by(source)
        values = over((a * b).sum(0), a.norm() * b.norm())
        return Terms(torch.zeros(0, len(values), dtype=torch.complex128), values)

    return terms


def output_map_scores(outputs: HeadOutputs, progress: Progress | None = None) -> torch.Tensor:
    """Score ``output_map``: float64 (all units, all units), row: target, column: source; 0 where
    one of them returns, or the target writes, nothing on the calibration text."""
    layout = outputs.layout
    total, units, d = layout.layers * layout.units, layout.units, layout.head_dim
    factors, weights, norms = [], [], []
    for layer in range(layout.layers):
        h = _samples(outputs, layer)
        own = h.mT @ h  # (units, head_dim, head_dim)
        scale = own.diagonal(dim1=1, dim2=2).mean(1)
        ridge = torch.where(scale > 0, RIDGE * scale, 1.0)  # of silent heads any
        o = outputs.o[layer].double().unflatten(1, (units, -1, d)).permute(1, 2, 0, 3)
        factors.append(torch.linalg.cholesky(own + ridge[:, None, None] * torch.eye(d)))
        weights.append((o.mT @ o).sum(1))
        norms.append((weights[-1] * own).sum((1, 2)))
    scores = torch.empty(total, total, dtype=torch.float64)
    for a in range(layout.layers):
        h = _samples(outputs, a).mT.flatten(0, 1)  # (units * head_dim, samples)
        for b in range(layout.layers):
            c = h @ _samples(outputs, b).transpose(0, 1).flatten(1)
            c = c.view(units, d, units, d).permute(0, 2, 1, 3)  # (targets, sources, d, d)
            # With the source's Gram matrix L L', explained = tr(O'O C (L L')^-1 C').
            c = torch.linalg.solve_triangular(factors[b].mT, c, upper=True, left=False)
            explained = (c * (weights[a][:, None] @ c)).sum((2, 3))
            scores[a * units : (a + 1) * units, b * units : (b + 1) * units] = torch.where(
                norms[a][:, None] > 0, explained / norms[a][:, None], 0.0
            )
        if progress is not None:
            progress(a + 1, layout.layers)
    return scores


def _samples(outputs: HeadOutputs, layer: int) -> torch.Tensor:
    """Head outputs of every unit, each query head of a group a sample of its own.

    float64 (units, tokens * heads_per_unit, head_dim).
    """
    layout = outputs.layout
    h = outputs.heads[layer].unflatten(1, (layout.units, layout.heads_per_unit, layout.head_dim))
    return h.permute(1, 0, 2, 3).flatten(1, 2).double()
