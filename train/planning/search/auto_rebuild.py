"""Strategy auto, where the recipe reconstructs: the best plans are compared after it.

Reconstruction, which solves the columns of o that are a layer's own, makes up for a removal better
than for a tie: it leaves all other columns free, a tie of o does not. So the two may change places.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sa_models.plan import SharingPlan
from sa_models.search.measured_loss import Cache, identity
from train.common.run_files import SEARCH_CACHE
from train.data.blocks import Blocks
from train.data.calibration import calibration_batches, spread_blocks
from train.evaluation.bootstrap import interval
from train.evaluation.perplexity import BlockLosses, block_losses
from train.models.materialize import on_text
from train.planning.basis import saving_plan
from train.planning.search.auto_result import AutoResult, Factored
from train.planning.search.auto_space import HOPELESS, REBUILT
from train.planning.search.objective import cost, rise_for, saved_share

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.planning.problem import PlanProblem
    from train.recipe.recipe import Recipe


def compare_rebuilt(
    searched: AutoResult,
    recipe: Recipe,
    problem: PlanProblem,
    load: Callable[[], LlamaForCausalLM],
    blocks: Blocks,
    device: torch.device,
    folder: Path,
) -> AutoResult:
    """The best few candidates again, with their loss after reconstruction, the chosen one first.

    That is the best one as it is, of those that then cannot be told from the one that costs least:
    a 95 % interval of the difference, over blocks, reaches what the other may cost for what it
    saves (nothing, where the objective is bytes). The others follow by their loss, and behind
    them those that were not reconstructed. Searches that ended with one plan count once.

    The loss is that of the text of the reconstruction, ``materialize.calibration_blocks``. One
    reconstruction of the base each: two models are held. What has been measured stays in the run
    folder's cache. Where nothing is left to compare, nothing is reconstructed.

    Basis Sharing at as many parameters as the chosen one is measured beside them, where it is a
    rival, and taken where it is better: `factored` of the result.

    Args:
        load: the base, fp32, on the CPU.
        folder: of the run.

    Raises:
        PostshareError: as :func:`~sa_models.materialize.reconstruct_o.reconstruct_`: too little
        text.
    """
    started, section = time.perf_counter(), recipe.materialize
    plans = _promising(searched, problem)
    if len(plans) == 1 and rival(recipe, plans[0], problem.config) is None:
        return searched
    text = calibration_batches(blocks, section.calibration_blocks, 1, torch.device("cpu"))
    base = load()
    cache, config = Cache(folder / SEARCH_CACHE, identity(base, text)), base.config
    del base

    def measure(plan: SharingPlan) -> dict[str, Any]:
        model = load()
        if plan != SharingPlan():
            model = on_text(recipe, plan, model, blocks, device)
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides it
        measured = spread_blocks(blocks, section.calibration_blocks)
        losses = block_losses(model, measured, recipe.evaluate.batch_size, progress=False)
        del model
        gc.collect()  # the projections of a compact model refer to each other
        return asdict(losses)

    def losses_of(plan: SharingPlan) -> BlockLosses:
        options = {"plan": plan.to_dict(), "merge": section.merge, "leaders": recipe.leaders}
        key = "rebuilt blocks " + json.dumps(options, separators=(",", ":"))
        found = cache.get(key, partial(measure, plan))
        return BlockLosses(tuple(found["nats"]), tuple(found["tokens"]))

    tried = {plan: losses_of(plan) for plan in plans}
    base_loss = losses_of(searched.base.plan).perplexity.loss
    shares = [saved_share(problem, plan) for plan in tried]
    chosen = list(tried)[_chosen([*tried.values()], shares, base_loss)]
    factored = None
    if (basis := rival(recipe, chosen, config)) is not None:
        losses = losses_of(basis)
        saved = basis.savings(config).removed_parameters
        above = interval([tried[chosen]], [losses]) if len(losses.tokens) > 1 else (0.0, 0.0)
        taken = above[0] > 0 and may_take(recipe)
        factored = Factored(basis, saved, losses.perplexity.loss, above, taken)
    rebuilt = [
        replace(c, rebuilt=tried[c.plan].perplexity.loss)
        for c in searched.candidates
        if c.plan in tried
    ]
    costs = {p: cost(problem, p, of.perplexity.loss - base_loss) for p, of in tried.items()}
    rebuilt.sort(key=lambda c: (c.plan != chosen, costs[c.plan], c.rebuilt))
    rest = [c for c in searched.candidates if c.plan not in tried]
    return replace(
        searched,
        candidates=(*rebuilt, *rest),
        base_rebuilt=base_loss,
        factored=factored,
        seconds=searched.seconds + time.perf_counter() - started,
    )


def _promising(searched: AutoResult, problem: PlanProblem) -> list[SharingPlan]:
    """The best few plans as they are, without those that reconstruction will not save."""
    base = searched.base.expected
    costs: dict[SharingPlan, float] = {}
    for candidate in searched.candidates:
        costs.setdefault(candidate.plan, cost(problem, candidate.plan, candidate.expected - base))
    best = min(costs.values())
    near = [plan for plan in costs if best <= 0 or costs[plan] <= HOPELESS * best]
    return near[:REBUILT]


def _chosen(tried: Sequence[BlockLosses], shares: Sequence[float], base_loss: float) -> int:
    """The first that cannot be told from the one that costs least; one block tells nothing.

    Args:
        shares: that each saves, see :func:`~train.planning.search.objective.saved_share`: so many
            times the rise of the best may another rise.
    """
    rises = [losses.perplexity.loss - base_loss for losses in tried]
    costs = [rise_for(*both) for both in zip(rises, shares, strict=True)]
    best = costs.index(min(costs))
    if len(tried[best].tokens) < 2:
        return 0
    allowed = [max(rises[best], 0.0) * (share / shares[best] - 1) for share in shares]
    worse = (
        interval([losses], [tried[best]])[0] > more
        for losses, more in zip(tried, allowed, strict=True)
    )
    return next(at for at, is_worse in enumerate(worse) if not is_worse)


def rival(recipe: Recipe, plan: SharingPlan, config: LlamaConfig) -> SharingPlan | None:
    """Basis Sharing that stores no more than the plan; None where it is no rival.

    That is where the objective is not bytes or the budget is one of cache, the recipe has a
    structure of its own or a penalty, which pulls units, or q, k and v hold too little.
    """
    budget = recipe.plan.budget
    on_cache = budget is None or budget.counted == "cache"
    if on_cache or not recipe.plan.may_tie or recipe.penalized or recipe.changes_structure:
        return None
    return saving_plan(config, plan.savings(config).removed_parameters)


def may_take(recipe: Recipe) -> bool:
    """Whether the budget is met without changing a head."""
    budget = recipe.plan.budget
    return budget is not None and budget.counted in ("parameters", "bytes")
