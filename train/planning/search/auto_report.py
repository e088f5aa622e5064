"""The report of strategy auto: tables, plan-search.json, and the front as a picture.

Quality is the perplexity on calibration text, untrained, without the slope of that text: what
plans are compared by. The front holds every measured plan that no other beats in both bytes and
quality; a few of its plans are timed.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from sa_models.atomic_files import write_json
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.weights.structure import Leaders
from train.common.pareto import pareto
from train.common.progress import bar
from train.common.run_files import PARETO_PICTURE, SEARCH_FILE
from train.evaluation.decode_time import bytes_read, decode_time
from train.planning.problem import PlanProblem
from train.planning.search.auto_result import (
    BASIS,
    AutoResult,
    Candidate,
    Factored,
    Point,
    Timed,
    in_words,
)
from train.planning.search.loss_search import (
    dearer_list,
    halves_dict,
    parameters_along,
    rises_list,
    search_table,
    step_dict,
)
from train.planning.search_page import cost_line

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

TIMED = 6
"""Plans of the front that are timed, at most, beside the dense model."""


NOISY = 0.25
"""Spread of a ratio of times, above which the bytes that are read say more than the time."""


def pareto_points(searched: AutoResult, config: LlamaConfig) -> list[Point]:
    """The measured plans that no other beats in bytes and quality, fewest parameters saved first.

    The chosen plan is one of them or has an equal, except where the budget counts something else or
    plans were compared after reconstruction.
    """
    points = searched.points
    placed = np.array([(-_removed(point, config), point.expected) for point in points])
    return [points[index] for index in reversed(pareto(placed))]


def time_front(
    searched: AutoResult,
    dense: LlamaForCausalLM,
    prompt: torch.Tensor,
    leaders: Leaders,
    config: LlamaConfig,
    size: int,
) -> list[Timed]:
    """Decode with a few plans of the front, evenly spread, the chosen one and Basis Sharing, last.

    Args:
        dense: the base model, without any structure. Its attention weights get memory of their
            own, as those of the models that it is compared with have: what was loaded may be pages
            of a file.
        prompt: int64 (1, context).
        size: bytes of one exported parameter.
    """
    chosen = searched.chosen.points[-1]
    shared = [p for p in pareto_points(searched, config) if _removed(p, config)]
    picked = spread([p for p in shared if p.plan != chosen.plan], TIMED - 1)
    points = sorted([*picked, chosen], key=lambda p: _removed(p, config))
    wanted: list[tuple[SharingPlan, Point | None]] = [(p.plan, p) for p in (searched.base, *points)]
    if searched.factored is not None:
        wanted.append((searched.factored.plan, None))
    timed: list[Timed] = []
    context = prompt.shape[1]
    for name, parameter in dense.named_parameters():
        if HeadLayout.parse_name(name) is not None:
            parameter.data = parameter.data.clone()
    with bar("timing the front") as advance:
        for done, (plan, point) in enumerate(wanted, start=1):
            decode = decode_time(dense, plan, prompt, leaders)
            read = bytes_read(plan, config, context, size)
            timed.append(Timed(plan, point, decode, read, context))
            gc.collect()  # the projections of a compact model refer to each other
            advance(done, len(wanted))
    # A machine's pace drifts from plan to plan; the ratios do not, and all are of one dense model.
    dense_seconds = statistics.median(t.decode.seconds / t.decode.ratio for t in timed)
    return [
        replace(t, decode=replace(t.decode, seconds=t.decode.ratio * dense_seconds)) for t in timed
    ]


def is_noisy(front: Sequence[Timed]) -> bool:
    """Whether the machine did so much else that times cannot be compared."""
    return statistics.median(timed.decode.spread for timed in front) > NOISY


def spread(points: Sequence[Point], count: int) -> list[Point]:
    """So many of them at equal distances, the last among them."""
    if len(points) <= count:
        return list(points)
    return [points[(i + 1) * len(points) // count - 1] for i in range(count)]


def _removed(point: Point, config: Any) -> int:
    return point.plan.savings(config).removed_parameters


# --- tables ---------------------------------------------------------------------------------------


def compared_table(searched: AutoResult, config: LlamaConfig) -> Table:
    """Every plan that meets the budget, the best candidate first, Basis Sharing last."""
    factored = searched.factored
    taken = factored is not None and factored.taken
    table = _table("compared on calibration text", "what it does", "parameters saved")
    for column in ("perplexity without slope", "vs dense"):
        table.add_column(column, justify="right")
    best = factored.loss if factored is not None and taken else searched.chosen.rebuilt
    if best is not None:
        table.add_column("reconstructed vs chosen", justify="right", min_width=13)
    base = searched.base
    rebuilt = [] if best is None else [_above(searched.base_rebuilt, best)]
    table.add_row(in_words(base.plan, config), "", "", _ppl(base.expected), "", *rebuilt)
    for number, candidate in enumerate(searched.candidates):
        point = candidate.points[-1]
        table.add_row(
            f"{candidate.name}{' (chosen)' if number == 0 and not taken else ''}",
            in_words(point.plan, config),
            f"{_removed(point, config):,}",
            _ppl(point.expected),
            _versus(point, base),
            *([] if best is None else [_above(candidate.rebuilt, best)]),
        )
    if factored is not None and best is not None:
        name = f"{BASIS}{' (chosen)' if taken else ''}"
        what = in_words(factored.plan, config)
        table.add_row(name, what, f"{factored.saved:,}", "", "", _above(factored.loss, best))
    return table


def cost_table(searched: AutoResult, config: LlamaConfig) -> Table:
    """What every choice of the best candidate costs, in the order in which they were made."""
    chosen = searched.chosen
    title = "chosen on calibration text"
    if searched.plan != chosen.plan:
        title = f"the best but Basis Sharing: {chosen.name}"
    start = in_words(chosen.plan.structure(), config)
    if chosen.found is not None:
        return search_table(chosen.found, chosen.plan.layout(config), start, title)
    table = _table(title, "parameters saved", "vs dense")
    point = chosen.points[-1]
    table.add_row(start, f"{_removed(point, config):,}", _versus(point, searched.base))
    return table


def front_table(front: Sequence[Timed], config: LlamaConfig, size: int) -> Table:
    """Quality against bytes, and against the time of decoding a token."""
    context = front[0].context
    table = _table("quality against bytes and time", "bytes stored", "perplexity without slope")
    table.add_column(f"ms a token after {context}, fp32", justify="right")
    table.add_column("vs dense", justify="right")
    table.add_column("bytes read for it", justify="right")
    for timed in front:
        stored = timed.plan.savings(config).bytes(size)[1]
        decode = timed.decode
        table.add_row(
            in_words(timed.plan, config),
            f"{stored:,}",
            "" if timed.point is None else _ppl(timed.point.expected),
            f"{1000 * decode.seconds:.2f}",
            f"{decode.ratio - 1:+.1%} ± {decode.spread:.1%}",
            f"{timed.read:,}",
        )
    return table


def chosen_lines(searched: AutoResult) -> list[str]:
    """What was taken of how many candidates, and what it costs, in lines of the terminal."""
    factored, rebuilt = searched.factored, _rebuilt(searched)
    if factored is not None and factored.taken and searched.base_rebuilt is not None:
        name, cost = BASIS, cost_line(factored.loss, searched.base_rebuilt)
    else:
        name = searched.chosen.name
        cost = cost_line(searched.chosen.expected, searched.base.expected)
    of = len(searched.candidates)
    many = "the only candidate" if of == 1 else f"of {of} candidates"
    return [f"chosen    {name}, {many}{rebuilt}", cost]


def factored_note(factored: Factored, other: SharingPlan, config: LlamaConfig) -> str:
    """What Basis Sharing being better means for the run, in a sentence.

    Args:
        other: the best of the other plans.
    """
    low, high = (f"{math.expm1(bound):.1%}" for bound in factored.above)
    better = f"untrained, by {low} to {high} of perplexity (95 %)"
    if factored.taken:
        return (
            f"Basis Sharing is chosen: it is better than {in_words(other, config)} at as many "
            f"bytes, {better}. It saves no KV cache; where that counts, set plan.objective=all."
        )
    return (
        f"Note: Basis Sharing at as many bytes is better than this plan, {better}; it saves no KV "
        "cache, and is chosen where the budget is one of bytes or parameters."
    )


def left_out_note(searched: AutoResult) -> str | None:
    """The structures that were not measured or not searched to the end, and why, in a sentence."""
    named = [*searched.left_out, *(f"{name} (given up)" for name in searched.given_up)]
    if not named:
        return None
    return (
        "Left out, as their parts alone are expected to cost what the best plan does: "
        f"{', '.join(named)}."
    )


def _rebuilt(searched: AutoResult) -> str:
    count = len({c.plan for c in searched.candidates if c.rebuilt is not None})
    return f"; {count} reconstructed" if count else ""


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for column in columns:
        words = column == "what it does"
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _ppl(loss: float) -> str:
    return f"{math.exp(loss):.2f}"


def _above(loss: float | None, best: float) -> str:
    """Of perplexities on one text, which is not that of the other columns."""
    return "" if loss is None else f"{math.exp(loss - best) - 1:+.2%}"


def _versus(point: Point, base: Point) -> str:
    return f"{math.exp(point.expected - base.expected) - 1:+.1%}"


# --- files ----------------------------------------------------------------------------------------


def save_auto(
    searched: AutoResult, front: Sequence[Timed], problem: PlanProblem, size: int, folder: Path
) -> None:
    """Write plan-search.json, and the picture of the front, into the run folder.

    Args:
        problem: with the structure of the best candidate.
        size: bytes of one exported parameter.
    """
    from train.planning.search.front_plot import save_front

    config = problem.config
    on_front, noisy = pareto_points(searched, config), is_noisy(front)
    chosen = searched.chosen.points[-1]
    value = {
        "search": "auto",
        "calibration_blocks": searched.blocks,
        "base_loss": searched.base.loss,
        "loss": chosen.loss,
        "expected_loss": chosen.expected,
        "chosen": BASIS if searched.plan.basis else searched.chosen.name,
        "dearer_than_removal": dearer_list(searched.found, problem) if searched.found else [],
        "candidates": [_candidate_dict(c, config) for c in searched.candidates],
        "base_reconstructed_loss": searched.base_rebuilt,
        "factored": None if searched.factored is None else _factored_dict(searched.factored),
        "structures": [point_dict(p, config, size) for p in searched.structures],
        "structures_left_out": searched.left_out,
        "searches_given_up": searched.given_up,
        "front": [point_dict(p, config, size) for p in on_front],
        "decoding": [
            {
                **_timed_dict(timed, config, size),
                "chosen": timed.plan == searched.plan,
                "context": timed.context,
                "seconds": timed.decode.seconds,
                "over_dense": timed.decode.ratio,
                "spread": timed.decode.spread,
                "bytes_read": timed.read,
            }
            for timed in front
        ],
        "decoding_noisy": noisy,
        "forward_passes": searched.passes,
        "forward_passes_at_most": searched.bound.forward,
        "estimates": searched.estimates,
        "estimates_at_most": searched.bound.backward,
        "seconds": searched.seconds,
    }
    write_json(folder / SEARCH_FILE, value)
    save_front(searched, on_front, front, noisy, config, size, folder / PARETO_PICTURE)


def _factored_dict(factored: Factored) -> dict[str, Any]:
    return asdict(factored) | {"plan": factored.plan.to_dict()}


def _candidate_dict(candidate: Candidate, config: LlamaConfig) -> dict[str, Any]:
    point, found = candidate.points[-1], candidate.found
    value: dict[str, Any] = {
        "name": candidate.name,
        "plan": point.plan.to_dict(),
        "saved": point.saved,
        "loss": point.loss,
        "expected_loss": point.expected,
        "reconstructed_loss": candidate.rebuilt,
    }
    if found is not None:
        along = parameters_along(found.path, point.plan.layout(config))
        steps = zip(found.path, along, strict=True)
        value["path"] = [step_dict(step, saved) for step, saved in steps]
        value["loss_rises"] = rises_list(found)
        value["states_measured"] = found.measured
    if candidate.agreement is not None:
        value["halves"] = halves_dict(candidate.agreement)
    return value


def _timed_dict(timed: Timed, config: LlamaConfig, size: int) -> dict[str, Any]:
    if timed.point is not None:
        return point_dict(timed.point, config, size)
    return {
        "plan": in_words(timed.plan, config),
        "origin": BASIS,
        **_stored_dict(timed.plan, config, size),
    }


def _stored_dict(plan: SharingPlan, config: LlamaConfig, size: int) -> dict[str, Any]:
    savings = plan.savings(config)
    return {
        "parameters_saved": savings.removed_parameters,
        "bytes": savings.bytes(size)[1],
        "cache_elements_per_token": savings.stored_cache,
    }


def point_dict(point: Point, config: LlamaConfig, size: int) -> dict[str, Any]:
    return {
        "plan": in_words(point.plan, config),
        "origin": point.origin,
        **_stored_dict(point.plan, config, size),
        "loss": point.loss,
        "expected_loss": point.expected,
        "perplexity": math.exp(point.expected),
    }
