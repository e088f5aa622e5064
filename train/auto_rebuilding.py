"""Strategy auto, where the recipe reconstructs: the best plans are compared after it.

Untrained, a tie costs less than a removal. Reconstruction, which solves the columns of o that are a
layer's own, makes up for a removal better: it leaves all other columns free, a tie of o does not.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sa_models.plan import SharingPlan
from sa_models.plan_measure import Cache, identity
from train.auto_budgets import REBUILT
from train.auto_planning import AutoSearched, Candidate
from train.data import Blocks
from train.evaluate import BlockLosses, block_losses
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
    """The best few candidates again, with their loss after reconstruction, the chosen one first.

    That is the best one as it is, of those whose loss then is not above the lowest by more than
    two standard errors of the difference over blocks: a smaller difference tells nothing. The
    others follow by their loss, and behind them those that were not reconstructed.

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

    def measure(plan: SharingPlan) -> dict[str, Any]:
        model = on_text(recipe, plan, load(), blocks, device).to(device)  # type: ignore[arg-type]
        measured = spread_blocks(blocks, section.calibration_blocks)
        return asdict(block_losses(model, measured, recipe.evaluate.batch_size, progress=False))

    tried: list[tuple[Candidate, BlockLosses]] = []
    for candidate in searched.candidates[:REBUILT]:
        plan = candidate.plan
        options = {"plan": plan.to_dict(), "merge": section.merge, "leaders": recipe.leaders}
        key = "rebuilt blocks " + json.dumps(options, separators=(",", ":"))
        found = cache.get(key, partial(measure, plan))
        losses = BlockLosses(tuple(found["nats"]), tuple(found["tokens"]))
        tried.append((replace(candidate, rebuilt=losses.perplexity.loss), losses))
    first = tried[_chosen([losses for _, losses in tried])][0]
    rest = sorted((c for c, _ in tried if c is not first), key=lambda c: c.rebuilt or 0.0)
    return replace(
        searched,
        candidates=(first, *rest, *searched.candidates[REBUILT:]),
        seconds=searched.seconds + time.perf_counter() - started,
    )


def _chosen(tried: Sequence[BlockLosses]) -> int:
    """The first that cannot be told from the one of the lowest loss."""
    lowest = min(tried, key=lambda losses: losses.perplexity.loss)
    return next(
        at
        for at, losses in enumerate(tried)
        if losses.perplexity.loss - lowest.perplexity.loss <= 2 * _standard_error(losses, lowest)
    )


def _standard_error(one: BlockLosses, other: BlockLosses) -> float:
    """Of the difference of their losses per token, from its spread over blocks."""
    apart = [a - b for a, b in zip(one.nats, other.nats, strict=True)]
    if len(apart) < 2:
        return math.inf
    return math.sqrt(len(apart)) * statistics.stdev(apart) / sum(one.tokens)
