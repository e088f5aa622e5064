"""Sums of x x' over calibration text: what projections are given, in second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sa_models.calibration.partial_forward import Batch, rows_of
from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.ties import Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Where = tuple[int, str]
"""(layer, projection)."""


def run_text(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    visit: Callable[[torch.Tensor, torch.Tensor], None],
    progress: Progress | None = None,
) -> None:
    """Run a model over calibration text, row by row, without dropout.

    Args:
        batches: see :data:`~sa_models.calibration.partial_forward.Batch`.
        visit: called with the logits (1, length, vocabulary) of a row and its targets, int64
            (1, length - 1), -100 where none is predicted.
        progress: called with (done, total) rows.

    Raises:
        PostshareError: no row of text, or padding.
    """
    rows = rows_of(batches)
    if not rows:
        raise PostshareError("there is no calibration text; give at least one block of it")
    training = model.training
    try:
        model.eval()
        for done, row in enumerate(rows, start=1):
            if "attention_mask" in row and not row["attention_mask"].all():
                raise PostshareError(
                    "calibration blocks have padding; pack the text into blocks of equal length"
                )
            given = {n: t.to(model.device) for n, t in row.items() if n != "labels"}
            targets = row.get("labels", row["input_ids"])[:, 1:].to(model.device)
            visit(model(**given, use_cache=False).logits, targets)
            if progress is not None:
                progress(done, len(rows))
    finally:
        model.train(training)


class InputGrams:
    """Sums over tokens of x x', float64.

    Args:
        device: where the sums are kept; None: with the model.

    Attributes:
        of_layer: {layer: (hidden_size, hidden_size)}, of the normed hidden states that q, k and v
            read.
        of_unit: {unit: (width, width)}, of what its heads give to o.
        of_output: {layer: (inputs, inputs)}, of what all heads of a layer give to o.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Iterable[int] = (),
        units: Iterable[Unit] = (),
        outputs: Iterable[int] = (),
        device: torch.device | str | None = None,
    ) -> None:
        self._model, self._layers, self._units = model, sorted(layers), sorted(units)
        self._outputs, self._device = sorted(outputs), device or model.device
        self._width = HeadLayout.from_config(model.config).width("o")
        self.of_layer: dict[int, torch.Tensor] = {}
        self.of_unit: dict[Unit, torch.Tensor] = {}
        self.of_output: dict[int, torch.Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Add up what every forward pass meanwhile shows."""
        with ExitStack() as stack:
            for layer in self._layers:
                norm = self._model.get_submodule(f"model.layers.{layer}.input_layernorm")
                stack.enter_context(norm.register_forward_hook(self._normed(layer)))
            for layer in sorted({*self._outputs, *(layer for layer, _ in self._units)}):
                o = self._model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
                stack.enter_context(o.register_forward_pre_hook(self._mixed(layer)))
            yield

    def _normed(self, layer: int) -> Callable[..., None]:
        return lambda module, given, out: self._add(self.of_layer, layer, out)

    def _mixed(self, layer: int) -> Callable[..., None]:
        def mixed(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            if layer in self._outputs:
                self._add(self.of_output, layer, given[0])
            for at in self._units:
                if at[0] == layer:
                    mine = given[0].narrow(-1, at[1] * self._width, self._width)
                    self._add(self.of_unit, at, mine)

        return mixed

    def _add(self, sums: dict[Any, torch.Tensor], key: Any, rows: torch.Tensor) -> None:
        x = rows.detach().flatten(0, -2).double()
        product = (x.T @ x).to(self._device)
        sums[key] = sums[key] + product if key in sums else product


@torch.no_grad()
def input_moments(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    wanted: Iterable[Where],
    progress: Progress | None = None,
) -> dict[Where, torch.Tensor]:
    """The sum of x x' over the inputs x of each projection, on the CPU.

    q, k and v of a layer are given the same, so that their tensor is one.

    Args:
        model: a dense Llama, or one with spans.
        wanted: projections that the model has.

    Returns:
        float64 (in_features, in_features) each.

    Raises:
        PostshareError: see :func:`run_text`; or an input is not finite.
    """
    wanted = list(wanted)
    grams = InputGrams(
        model,
        layers={layer for layer, p in wanted if p != "o"},
        outputs={layer for layer, p in wanted if p == "o"},
        device="cpu",
    )
    with grams.recording():
        run_text(model, batches, lambda logits, targets: None, progress)
    sums = (grams.of_layer, grams.of_output)
    if not all(bool(total.isfinite().all()) for kind in sums for total in kind.values()):
        raise PostshareError(
            "an input of a projection on calibration text is not finite; load the model in "
            "float32, or check its weights"
        )
    return {(at, p): (grams.of_output if p == "o" else grams.of_layer)[at] for at, p in wanted}
