"""Strategies loss and gradient: the units whose change costs least on calibration text.

The text is a few training blocks, spread evenly over all of them: a mixture, or a file that is in
some order, is seen as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from sa_models.atomic_files import write_json
from sa_models.calibration.partial_forward import Batch
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import SharingPlan
from sa_models.removal import dropped_layers
from sa_models.scores.registry import IMPORTANCES_OF_TEXT
from sa_models.search.actions import WHOLE, Action, as_plan, ordered
from sa_models.search.algorithms import (
    EvolutionOptions,
    Passes,
    SearchResult,
    Step,
    evolution_passes,
    evolve,
    greedy,
    greedy_passes,
)
from sa_models.search.measured_loss import MeasuredLoss
from sa_models.search.ranking import STABLE, Agreement, EstimatedRanking, Estimator
from sa_models.ties import Unit
from train.common.progress import bar, clock
from train.common.run_files import PARETO_PICTURE, SEARCH_CACHE, SEARCH_FILE
from train.planning.problem import PlanProblem, least_important_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

UNLIKE = 1.25
"""Ratio of the base's losses on two texts above which they are of different kinds."""
estimate_bar = partial(bar, "estimating the cost of every unit")
"""Of each estimate of a search: with much text, or pairs of many layers, it takes minutes."""


@dataclass(frozen=True)
class LossSearch:
    """What a search found, and what it took.

    Attributes:
        passes: forward passes over the calibration text that were needed, in whole models.
        estimates: forward and backward passes.
        bound: of both, stated before the search.
    """

    found: SearchResult
    agreement: Agreement
    blocks: int
    passes: float
    estimates: int
    bound: Passes
    seconds: float


def choose_by_importance(
    problem: PlanProblem, model: LlamaForCausalLM, batches: Sequence[Batch]
) -> SharingPlan:
    """Remove the units of least importance, as calibration text says.

    Args:
        model, batches: see :func:`search_plan`.
    """
    structure = problem.structure
    measure = resolve_name(IMPORTANCES_OF_TEXT[problem.section.strategy])
    with bar(f"importance ({problem.section.strategy})") as advance:
        importance = measure(model, batches, structure.leader_of(), advance)
    return replace(structure, removed=least_important_of(problem, importance))


def search_plan(
    problem: PlanProblem, model: LlamaForCausalLM, batches: Sequence[Batch], folder: Path
) -> tuple[SharingPlan, LossSearch]:
    """The plan of strategy loss.

    Args:
        model: with the structure, fp32, in evaluation mode, on the device that is to measure.
        batches: calibration text, on that device.
        folder: of the run; what has been measured is kept there, and used by a second start.
    """
    section, structure, space = problem.section, problem.structure, problem.space
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    measured = MeasuredLoss(model, batches, folder / SEARCH_CACHE)
    shares = space.shares if space.targets else ()
    estimator = Estimator(measured, shares, structure.leader_of(), estimate_bar)
    ranking = EstimatedRanking(space, measured, structure.leader_of(), estimator)
    with bar(f"searching ({section.search})") as advance:
        if section.search == "greedy":
            bound = greedy_passes(space.largest)
            found = greedy(space, measured, ranking, progress=advance)
        else:
            options = EvolutionOptions(seed=section.seed)
            bound = evolution_passes(space.largest, options)
            found = evolve(space, measured, ranking, options, advance)
    measured.restore()
    plan = replace(
        as_plan(found.state, problem.layout), kv_heads=structure.kv_heads, spans=structure.spans
    )
    assert ranking.agreement is not None
    return plan, LossSearch(
        found,
        ranking.agreement,
        sum(len(batch["input_ids"]) for batch in batches),
        measured.passes,
        ranking.estimates,
        bound,
        time.perf_counter() - started,
    )


def unstable(agreement: Agreement, blocks: int) -> str | None:
    """One line, where there is too little calibration text for a stable choice."""
    if agreement.is_stable:
        return None
    needed = agreement.blocks_needed(blocks)
    return (
        f"the choice is not stable: the halves of the {blocks} calibration blocks agree on "
        f"{agreement.common} of {agreement.units} units; "
        f"plan.calibration_blocks={needed} is expected to give {STABLE:.0%}"
    )


def dearer_note(found: SearchResult, problem: PlanProblem) -> str | None:
    """A sentence, where units are tied whose removal would cost less."""
    dearer = found.dearer_than_removal(problem.allowed.removable)
    if not dearer:
        return None
    tied = len({action.target for action in found.state if action.source is not None})
    removed = sum(found.removals[unit] for unit in dearer)
    cure = "; set plan.action to any or remove" if problem.section.action == "tie" else ""
    return (
        f"Note: of {tied} tied units {len(dearer)} would cost less if they were removed: an "
        f"estimated {removed:.4f} nats of loss instead of {sum(dearer.values()):.4f}{cure}."
    )


def unlike(calibration_loss: float, evaluation_loss: float) -> str | None:
    """One line, where the base finds the text of the choice much easier, or harder, than that of
    the evaluation.

    Args:
        calibration_loss, evaluation_loss: of the base on both, nats per token.
    """
    low, high = sorted((calibration_loss, evaluation_loss))
    if high <= UNLIKE * low:
        return None
    return (
        f"the base loses {calibration_loss:.2f} nats per token on the calibration text and "
        f"{evaluation_loss:.2f} on the evaluation text, {high / low:.1f} times as much on one: "
        "what costs least on the one need not on the other; choose on text of the same kind "
        "(data.train)"
    )


def search_table(
    found: SearchResult,
    layout: HeadLayout,
    start: str = "none (dense)",
    title: str = "chosen on calibration text",
) -> Table:
    """The chosen actions in the order they were taken, and what they cost, measured.

    Args:
        layout: with the plan's KV heads.
        start: what the search began with.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title)
    for column in ("loss", "perplexity, untrained", "vs dense", "parameters saved"):
        table.add_column(column, justify="right")
    base = math.exp(found.base_loss)
    table.add_row(start, f"{found.base_loss:.4f}", f"{base:.2f}", "", "")
    for step, saved in zip(found.path, parameters_along(found.path, layout), strict=True):
        more = f" and {len(step.actions) - 1} more" if len(step.actions) > 1 else ""
        table.add_row(
            f"{step.actions[0]}{more}",
            f"{step.loss:.4f}",
            f"{math.exp(step.loss):.2f}",
            f"{math.exp(step.loss) / base - 1:+.1%}",
            f"{saved:,}",
        )
    return table


def took_sentence(seconds: float, passes: float, blocks: int, estimates: int) -> str:
    """What a search took, in a sentence."""
    return (
        f"The search took {clock(seconds)}: {passes:,.0f} forward passes over {blocks} blocks, "
        f"{estimates} estimates."
    )


def bound_sentence(bound: Passes) -> str:
    """What a search takes at most."""
    return f"At most {bound.forward:,} forward passes and {bound.backward:,} estimates."


def parameters_along(path: Iterable[Step], layout: HeadLayout) -> list[int]:
    """Parameters saved after each step of a path; with the attention of a layer goes its norm."""
    saved, removed, along = 0, set[Unit](), list[int]()
    for step in path:
        for action in step.actions:
            unit = sum(map(layout.unit_parameters, action.projections or PROJECTIONS))
            saved += len(action.units(layout)) * unit
            removed |= set(action.units(layout)) if action.source is None else set()
        along.append(saved + layout.hidden_size * len(dropped_layers(removed, layout)))
    return along


def save_search(
    searched: LossSearch,
    problem: PlanProblem,
    size: int,
    folder: Path,
) -> None:
    """Write plan-search.json, and the picture of quality against bytes, into the run folder.

    Args:
        size: bytes of one exported parameter.
    """
    from train.planning.search.front_plot import save_pareto

    found, section = searched.found, problem.section
    removed = [0, *parameters_along(found.path, problem.layout)]
    value = {
        "search": section.search,
        "action": section.action,
        "calibration_blocks": searched.blocks,
        "base_loss": found.base_loss,
        "loss": found.loss,
        "path": [
            step_dict(step, count) for step, count in zip(found.path, removed[1:], strict=True)
        ],
        "loss_rises": rises_list(found),
        "dearer_than_removal": dearer_list(found, problem),
        "halves": halves_dict(searched.agreement),
        "states_measured": found.measured,
        "forward_passes": searched.passes,
        "forward_passes_at_most": searched.bound.forward,
        "estimates": searched.estimates,
        "seconds": searched.seconds,
    }
    write_json(folder / SEARCH_FILE, value)
    losses = [found.base_loss, *(step.loss for step in found.path)]
    parameters = problem.savings.stored_parameters
    save_pareto(removed, losses, parameters, size, folder / PARETO_PICTURE)


def step_dict(step: Step, parameters: int) -> dict[str, Any]:
    return {
        "actions": [action_dict(action) for action in step.actions],
        "loss": step.loss,
        "perplexity": math.exp(step.loss),
        "parameters_saved": parameters,
    }


def rises_list(found: SearchResult) -> list[dict[str, Any]]:
    """What every chosen action costs, and what the removal of a tied unit is estimated to cost."""
    return [
        {
            **action_dict(action),
            "loss_rise": finite(found.rises[action]),
            "removal_rise": finite(found.removals.get(action.target, math.nan)),
        }
        for action in ordered(found.state)
    ]


def dearer_list(found: SearchResult, problem: PlanProblem) -> list[list[int]]:
    """The tied units whose removal would cost less, as JSON."""
    return [list(unit) for unit in found.dearer_than_removal(problem.allowed.removable)]


def halves_dict(agreement: Agreement) -> dict[str, Any]:
    return {
        "units": agreement.units,
        "common": agreement.common,
        "correlation": agreement.correlation,
    }


def action_dict(action: Action) -> dict[str, Any]:
    """A dropped layer's target is [layer, null]."""
    layer, unit = action.target
    return {
        "action": action.kind,
        "target": [layer, None if unit == WHOLE else unit],
        "source": None if action.source is None else list(action.source),
        "projections": list(action.projections),
    }


def finite(value: float) -> float | None:
    """JSON has no nan: null."""
    return value if math.isfinite(value) else None
