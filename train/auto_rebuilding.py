"""Strategy auto, where the recipe reconstructs: the best plans are compared after it.

Untrained, a tie costs less than a removal. Reconstruction, which solves the columns of o that are a
layer's own, makes up for a removal better: it leaves all other columns free, a tie of o does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sa_models.plan import SharingPlan
from sa_models.plan_measure import Cache, identity
from train.auto_budgets import REBUILT
from train.auto_planning import AutoSearched
from train.data import Blocks
from train.evaluate import block_losses
from train.loss_planning import SEARCH_CACHE, calibration_batches, spread_blocks
from train.materializing import on_text

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from train.recipe import Recipe


def compare_rebuilt(
    searched: AutoSearched,
    recipe: Recipe,
    load: Callable[[], LlamaForCausalLM],
    blocks: Blocks,
    device: torch.device,
    folder: Path,
) -> AutoSearched:
    """The best few candidates again, best first by their loss after reconstruction; the others
    behind them.

    The loss is that of the text of the reconstruction, ``materialize.calibration_blocks``. One
    reconstruction of the base each: two models are held. What has been measured stays in the run
    folder's cache.

    Args:
        load: the base, fp32, on the CPU.
        folder: of the run.

    Raises:
        PostshareError: as :func:`~sa_models.reconstruction.reconstruct_`: too little text.
    """
    started, section = time.perf_counter(), recipe.materialize
    text = calibration_batches(blocks, section.calibration_blocks, 1, torch.device("cpu"))
    cache = Cache(folder / SEARCH_CACHE, identity(load(), text))

    def measure(plan: SharingPlan) -> float:
        model = on_text(recipe, plan, load(), blocks, device).to(device)  # type: ignore[arg-type]
        chosen = spread_blocks(blocks, section.calibration_blocks)
        losses = block_losses(model, chosen, recipe.evaluate.batch_size, progress=False)
        return losses.perplexity.loss

    tried = []
    for candidate in searched.candidates[:REBUILT]:
        plan = candidate.plan
        options = {"plan": plan.to_dict(), "merge": section.merge, "leaders": recipe.leaders}
        key = "rebuilt " + json.dumps(options, separators=(",", ":"))
        loss = float(cache.get(key, partial(measure, plan)))
        tried.append((loss, replace(candidate, rebuilt=loss)))
    tried.sort(key=lambda pair: pair[0])
    first = tuple(candidate for _, candidate in tried)
    took = searched.seconds + time.perf_counter() - started
    return replace(searched, candidates=first + searched.candidates[REBUILT:], seconds=took)
