"""Second moments of what projections are given on calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from .errors import PostshareError
from .isotropy import calibration_blocks
from .residual import Where
from .similarity import Progress


@torch.no_grad()
def input_moments(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    wanted: Iterable[Where],
    progress: Progress | None = None,
) -> dict[Where, torch.Tensor]:
    """The sum of x x^T over the inputs x of each projection, on the CPU.

    q, k and v of a layer are given the same, so that their tensor is one.

    Args:
        model: a dense Llama, or one with spans.
        batches: see :func:`~sa_models.isotropy.measure_isotropy`.
        wanted: projections that the model has.

    Returns:
        float64 (in_features, in_features) each.

    Raises:
        PostshareError: padding, no block of three tokens, or an input that is not finite.
    """
    blocks = calibration_blocks(batches)
    readers: dict[tuple[int, bool], list[Where]] = {}
    for layer, p in wanted:
        readers.setdefault((layer, p == "o"), []).append((layer, p))
    sums: dict[tuple[int, bool], torch.Tensor] = {}
    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        model.eval()
        for place, (where, *_) in readers.items():
            layer, p = where
            module = model.get_submodule(f"model.layers.{layer}.self_attn.{p}_proj")
            stack.enter_context(_summing(module, sums, place))
        for index, block in enumerate(blocks):
            inputs = {name: tensor.to(model.device) for name, tensor in block.items()}
            model.base_model(**inputs, use_cache=False)
            if progress is not None:
                progress(index + 1, len(blocks))
    if not all(bool(total.isfinite().all()) for total in sums.values()):
        raise PostshareError(
            "an input of a projection on calibration text is not finite; load the model in "
            "float32, or check its weights"
        )
    return {where: sums[place] for place, wheres in readers.items() for where in wheres}


def _summing(
    module: torch.nn.Module, sums: dict[tuple[int, bool], torch.Tensor], place: tuple[int, bool]
) -> torch.utils.hooks.RemovableHandle:
    """A hook, to be removed, that adds the moments of what a projection is given."""

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        product = (x.T @ x).double().cpu()
        sums[place] = sums[place] + product if place in sums else product

    return module.register_forward_pre_hook(add)
