"""The sections of a recipe that say how much is shared and how the plan is found."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from sa_models.scores.registry import IMPORTANCES, IMPORTANCES_OF_TEXT, OF_TEXT, SCORES
from sa_models.search.budget import Counted, parse_share
from train.recipe.sections.base import (
    Count,
    PathName,
    Positive,
    Projections,
    Section,
    distinct,
)

MATCHED = ("cosine", "released", "random")
"""Strategies that give every target a source, by their weights or by chance."""
SCORED = ("cosine", "released")
"""Strategies that compare units by `plan.score`."""
REMOVING = IMPORTANCES
"""Strategies that choose units to remove."""
MEASURED = ("loss", "auto")
"""Strategies that choose changes by the loss on calibration text."""
CHOOSING = (*MATCHED, *MEASURED, *REMOVING, "basis")
"""Strategies that need a budget."""
if TYPE_CHECKING:
    Strategy = str
    Score = str
else:
    Strategy = Literal[(*MATCHED, *MEASURED, *REMOVING, "basis", "file", "none")]
    Score = Literal[SCORES]


def _share(text: str) -> str:
    parse_share(text)
    return text


Saved = Annotated[str, AfterValidator(_share)]


class Budget(Section):
    """How much to share."""

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of all units: floor(ratio * units) units are tied."""
    heads: Positive | None = None
    """Number of attention heads to tie; under GQA, those of whole KV groups."""
    parameters: Saved | None = None
    """What to save of the whole model's parameters, such as -10%; spans and KV heads count."""
    bytes: Saved | None = None
    """What to save of the exported bytes, such as -10%."""
    cache: Saved | None = None
    """What to save of the KV cache, such as -10%; by removed units, since tied ones keep theirs."""

    def _exactly_one(self) -> Iterator[str]:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            yield "takes exactly one of ratio, heads, parameters, bytes and cache; set one of them"

    rules = (_exactly_one,)

    @cached_property
    def share(self) -> tuple[Counted, Fraction] | None:
        """What is to be saved, and how much of it; None where units or heads are counted."""
        shares: dict[Counted, str | None] = {
            "parameters": self.parameters, "bytes": self.bytes, "cache": self.cache
        }  # fmt: skip
        return next(((name, parse_share(s)) for name, s in shares.items() if s is not None), None)

    @property
    def counted(self) -> Counted:
        """What the budget is stated in."""
        return "units" if self.share is None else self.share[0]


class PlanSection(Section):
    """How the sharing plan is found."""

    strategy: Strategy = "cosine"
    """cosine: best match, root-resolved; released: the published selection with its chains;
    random: control; loss: the changes that cost least on calibration text; auto: the same across
    removals, spans and KV groups, and, for bytes, ties and shared bases; magnitude, gradient:
    remove the units with the smallest weights, or the smallest |sum of weight * gradient| (pruning
    controls); basis: q, k and v of two adjacent layers on one basis (Basis Sharing); file:
    plan.path; none: share nothing."""
    score: Score = "qk"
    """What the similarity of two units is computed from (docs/scores.md; the paper's default is
    qk); attention, output and output_map are measured on training text."""
    share: Projections = ("q", "k", "v")
    """Projections that a target takes from its source."""
    action: Literal["tie", "remove", "any", "drop"] = "tie"
    """What becomes of the chosen units: tie: they take their source's weights; remove: they are
    pruned; any: whichever of the two costs less (strategy loss only); drop: whole layers lose their
    attention, the MLP stays (strategies loss, random, magnitude, gradient)."""
    search: Literal["greedy", "evolutionary"] = "greedy"
    """How strategy loss looks for the plan."""
    calibration_blocks: Annotated[int, Field(ge=2)] = 8
    """Training blocks on which strategies loss, auto and gradient measure (spread evenly), and the
    scores attention, output and output_map (the first ones, of each 512 tokens at most)."""
    budget: Budget | None = None
    """How much to tie or remove; needed by all strategies but file and none."""
    skip_layers: Annotated[
        tuple[Count, ...],
        Field(strict=False),
        AfterValidator(lambda v: tuple(sorted(distinct(v)))),
    ] = (0,)
    """Layers whose units are never targets."""
    uniform: bool = False
    """Remove as many units from every layer, so that what is left is a stock Llama with fewer
    heads (strategies loss, auto, random, magnitude, gradient; with action remove): the dense export
    has small tensors, and every runtime loads it. No layer is skipped."""
    objective: Literal["bytes", "cache", "speed", "all"] = "all"
    """What strategy auto saves under its budget. bytes: stored weights, by whatever costs least;
    cache: of keys and values; speed: what a step of decoding reads; all: the sum of them, as a
    server pays it. Ties and shared bases, which save weights alone, take part in bytes only."""
    basis_layers: Positive = 2
    """Adjacent layers on one basis, for strategy basis; 1: each layer has its own, of low rank."""
    alternatives: bool = False
    """Also search with strategy auto for as many bytes, and as much cache, as the plan saves, and
    say what it would choose and what that costs untrained; nothing else is made of it."""
    path: PathName | None = None
    """Plan JSON, for strategy file."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of strategy random, of the evolutionary search, and of the scrambled pairs that chosen
    ones are compared with."""
    fold_norm: bool = False
    """Fold the gain of each layer's input norm into q, k and v before they are compared."""

    def _budget(self) -> Iterator[str]:
        needs_budget = self.strategy in CHOOSING
        if needs_budget and self.budget is None:
            yield f"strategy {self.strategy} needs a budget; set plan.budget.ratio"
        if not needs_budget and self.budget is not None:
            yield f"strategy {self.strategy} ignores budget; set plan.budget=null"

    def _path(self) -> Iterator[str]:
        if self.strategy == "file" and self.path is None:
            yield "strategy file needs the plan; set plan.path"
        if self.strategy != "file" and self.path is not None:
            yield f"strategy {self.strategy} ignores path; set plan.strategy=file"

    def _action(self) -> Iterator[str]:
        strategy, action = self.strategy, self.action
        if strategy in REMOVING and not self.removes:
            yield f"strategy {strategy} chooses units to remove; set plan.action=remove"
        elif strategy == "basis" and action != "tie":
            yield "strategy basis ignores action; remove plan.action"
        elif strategy == "auto" and action != "tie":
            yield "strategy auto ignores action, it ties and removes; remove plan.action"
        elif action == "drop" and strategy not in ("loss", "random", *REMOVING):
            yield (
                f"strategy {strategy} drops no layers by itself; set plan.strategy to loss, "
                "random, magnitude or gradient, or remove plan.action"
            )
        elif action == "any" and strategy not in MEASURED:
            yield "action any needs measured losses to compare; set plan.strategy=loss"
        elif action == "remove" and strategy in ("released", "file", "none"):
            yield f"strategy {strategy} ignores action; remove plan.action"

    def _idle_options(self) -> Iterator[str]:
        strategy = self.strategy
        ignored = []
        if strategy != "loss":
            ignored.append("search")
        if not self.measures:
            ignored.append("calibration_blocks")
        if strategy in (*MEASURED, *REMOVING):
            ignored.append("score")
        if strategy in ("auto", "basis"):
            ignored.append("share")
        if strategy != "auto":
            ignored.append("objective")
        ignored.append("skip_layers" if strategy == "basis" else "basis_layers")
        if not self.scores:
            ignored.append("fold_norm")
        for name in ignored:
            if self.is_set(name):
                yield f"strategy {strategy} ignores {name}; remove plan.{name}"
        if self.alternatives and strategy in ("none", "auto", "basis"):
            yield (
                "alternatives are to plans of units, which strategy "
                f"{strategy} does not choose; remove plan.alternatives"
            )

    def _uniform(self) -> Iterator[str]:
        if not self.uniform:
            return
        if self.strategy not in (*MEASURED, *REMOVING, "random"):
            yield (
                f"uniform removes as many units from every layer, which strategy {self.strategy} "
                "does not; set plan.strategy=loss, or plan.uniform=false"
            )
        elif self.strategy != "auto" and self.action != "remove":
            yield (
                f"uniform: action {self.action} leaves layers that differ from a stock Llama's; "
                "set plan.action=remove, or plan.uniform=false"
            )
        if self.is_set("skip_layers") and self.skip_layers:
            yield "uniform takes as many units from every layer; remove plan.skip_layers"

    def _removal_shares_nothing(self) -> Iterator[str]:
        ignored = self.strategy in ("auto", "basis")  # as it is
        if self.removes and self.is_set("share") and not ignored:
            what = "a unit is" if self.action == "remove" else "all units of a layer are"
            yield f"action {self.action} ignores share, {what} removed whole; remove plan.share"

    def _fold_norm(self) -> Iterator[str]:
        if self.fold_norm and self.scores_text:
            yield (
                f"score {self.score} is measured on text, where the norm has its gain; remove "
                "plan.fold_norm"
            )

    def _basis_budget(self) -> Iterator[str]:
        budget = self.budget
        if self.strategy == "basis" and budget and (budget.parameters or budget.bytes) is None:
            yield (
                "strategy basis shares no heads and saves no cache; set plan.budget.parameters or "
                "plan.budget.bytes"
            )

    def _cache_budget(self) -> Iterator[str]:
        cache = self.budget is not None and self.budget.cache is not None
        if cache and self.action == "tie" and self.strategy not in ("auto", "basis"):
            yield (
                "budget.cache: a tied unit still caches keys and values of its own; set "
                "plan.action=remove, or use spans or heads.kv_heads"
            )

    rules = (
        _budget,
        _path,
        _action,
        _idle_options,
        _uniform,
        _removal_shares_nothing,
        _fold_norm,
        _basis_budget,
        _cache_budget,
    )

    @property
    def removes(self) -> bool:
        """Whether units are removed, singly or with their layer, and none is tied."""
        return self.action in ("remove", "drop")

    @property
    def may_tie(self) -> bool:
        """Whether strategy auto may tie units, and share bases, which saves bytes alone, and has
        no stock form that is as small."""
        return self.objective == "bytes" and not self.uniform

    @property
    def skipped(self) -> tuple[int, ...]:
        """The layers that are skipped: with `uniform` none."""
        return () if self.uniform else self.skip_layers

    @property
    def searches(self) -> bool:
        """Whether units are chosen by what their change does to the loss on calibration text."""
        return self.strategy in (*MEASURED, *IMPORTANCES_OF_TEXT)

    @property
    def scores(self) -> bool:
        """Whether units are compared by `score` at all."""
        return self.strategy in SCORED

    @property
    def scores_text(self) -> bool:
        """Whether that score is measured on calibration text."""
        return self.scores and self.score in OF_TEXT

    @property
    def measures(self) -> bool:
        """Whether calibration text is needed to choose units, or to name alternatives."""
        return self.searches or self.scores_text or self.alternatives
