"""Strategy auto, where the recipe reconstructs: what Basis Sharing would lose at as many bytes.

It is a control that auto names and cannot choose: its factors save no cache, and have no compact
form. It is measured beside the plans that are compared after reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sa_models.basis import basis_ranks, factorized
from sa_models.heads import HeadLayout
from train.controls import BASIS_LAYERS, basis_parameters
from train.evaluate import block_losses
from train.intervals import Interval
from train.loss_planning import calibration_batches, spread_blocks
from train.span_planning import bar

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sa_models.plan import SharingPlan
    from train.data import Blocks
    from train.recipe import Recipe


@dataclass(frozen=True)
class Factored:
    """Basis Sharing at as many stored parameters as the chosen plan.

    Attributes:
        parameters: of the factors of q, k and v of all layers.
        saved: parameters, as the plan's.
        loss: nats per token, untrained, on the text of the reconstruction.
        above: 95 % interval of how far the chosen plan's loss lies above it, over blocks.
    """

    parameters: int
    saved: int
    loss: float
    above: Interval

    @property
    def is_better(self) -> bool:
        """Than the chosen plan, by more than chance."""
        return self.above[0] > 0


def factor_parameters(recipe: Recipe, plan: SharingPlan, config: LlamaConfig) -> int | None:
    """Of the factors of q, k and v that store as much as the plan; None where it is no rival.

    That is where the budget is one of cache, the recipe has a structure of its own, or q, k and v
    hold too little.
    """
    budget = recipe.plan.budget
    if budget is None or budget.cache is not None:
        return None
    if recipe.spans is not None or recipe.heads.kv_heads is not None:
        return None
    saved = plan.savings(config).removed_parameters
    return basis_parameters(HeadLayout.from_config(config), saved)


def factored_losses(
    recipe: Recipe,
    parameters: int,
    load: Callable[[], LlamaForCausalLM],
    blocks: Blocks,
    device: torch.device,
) -> dict[str, Any]:
    """Block by block, as :class:`~train.evaluate.BlockLosses`; fitted and measured on the text of
    the reconstruction."""
    count = recipe.materialize.calibration_blocks
    model = load().to(device)  # type: ignore[arg-type]  # transformers' decorator hides it
    ranks = basis_ranks(HeadLayout.from_config(model.config), BASIS_LAYERS, parameters)
    text = calibration_batches(blocks, count, 1, device)
    with bar("factorizing") as advance:
        made = factorized(model, BASIS_LAYERS, ranks, text, advance).to(device)  # type: ignore[arg-type]
    del model
    measured = spread_blocks(blocks, count)
    return asdict(block_losses(made, measured, recipe.evaluate.batch_size, progress=False))
