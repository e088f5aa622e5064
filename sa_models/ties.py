"""Head ties: a unit takes the weights of another, for the named projections.

This file imports no torch: it also travels inside compact exports.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import PostshareError
from .heads import PROJECTIONS, HeadLayout

Unit = tuple[int, int]
"""(layer, unit), both 0-based. A unit is a head under MHA and a KV group under GQA and MQA."""


@dataclass(frozen=True)
class HeadTie:
    """The target unit takes the weights of the source unit, for the named projections."""

    target: Unit
    source: Unit
    projections: tuple[str, ...]
    score: float | None = None

    def __str__(self) -> str:
        return f"tie {list(self.target)} <- {list(self.source)} ({''.join(self.projections)})"


def resolve_roots(ties: Iterable[HeadTie]) -> tuple[HeadTie, ...]:
    """Follow every tie's source to a unit that is itself no target, projection by projection.

    Ties must be free of cycles (sources in strictly earlier layers always are). A tie whose
    projections end at different roots becomes several ties. Scores are kept: they are those of
    the pair that was matched.
    """
    ties = tuple(ties)
    source_of = {(tie.target, p): tie.source for tie in ties for p in tie.projections}
    resolved = []
    for tie in ties:
        by_root: dict[Unit, list[str]] = {}
        for projection in tie.projections:
            root = tie.source
            for _ in range(len(ties)):
                if (root, projection) not in source_of:
                    break
                root = source_of[(root, projection)]
            else:
                raise PostshareError(f"{tie}: the ties form a cycle; a source must be no target")
            by_root.setdefault(root, []).append(projection)
        resolved += [
            HeadTie(tie.target, root, tuple(ps), tie.score) for root, ps in by_root.items()
        ]
    return tuple(resolved)


# --- reading and checking -------------------------------------------------------------------------


def is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def refuse_unknown(value: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(value) - known)
    if unknown:
        raise PostshareError(f"{where} has an unknown key {unknown[0]!r}; known: {sorted(known)}")


def read_unit(value: Any, where: str) -> Unit:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(is_index, value)):
        raise PostshareError(f"{where} is {value!r}; give [layer, unit], both integers from 0")
    return value[0], value[1]


def read_tie(index: int, value: Any) -> HeadTie:
    where = f"plan.ties[{index}]"
    if not isinstance(value, dict):
        raise PostshareError(f"{where} is {value!r}; give target, source and projections")
    refuse_unknown(value, {"target", "source", "projections", "score"}, where)
    for key in ("target", "source", "projections"):
        if key not in value:
            raise PostshareError(f"{where} has no {key!r}; give target, source and projections")
    projections, score = value["projections"], value.get("score")
    if not isinstance(projections, list) or not all(isinstance(p, str) for p in projections):
        raise PostshareError(f"{where}.projections is {projections!r}; give a list of q, k, v, o")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise PostshareError(f"{where}.score is {score!r}; give a number or null")
    return HeadTie(
        target=read_unit(value["target"], f"{where}.target"),
        source=read_unit(value["source"], f"{where}.source"),
        projections=tuple(projections),
        score=score,
    )


def check_ties(ties: Iterable[HeadTie], layout: HeadLayout, chains: bool) -> None:
    """Check ties against the model's attention shape; ``chains`` allows them (a released plan).

    Raises:
        PostshareError: see :meth:`~sa_models.plan.SharingPlan.validate`.
    """
    ties = tuple(ties)
    for tie in ties:
        check_range(f"{tie}: the target", tie.target, layout)
        check_range(f"{tie}: the source", tie.source, layout)
        _check_projections(tie)
        if tie.target == tie.source:
            raise PostshareError(f"{tie}: a unit cannot be its own source; remove the tie")
    _check_once(ties)
    _check_chains(ties, chains)


def _check_once(ties: Iterable[HeadTie]) -> None:
    seen: dict[tuple[Unit, str], HeadTie] = {}
    for tie in ties:
        for projection in tie.projections:
            other = seen.setdefault((tie.target, projection), tie)
            if other is not tie:
                raise PostshareError(
                    f"{tie}: {projection} of this target is already tied by '{other}'; "
                    "keep one of the two"
                )


def _check_chains(ties: Iterable[HeadTie], chains: bool) -> None:
    for projection in PROJECTIONS:
        source_of = {tie.target: tie.source for tie in ties if projection in tie.projections}
        for tie in ties:
            if projection not in tie.projections or tie.source not in source_of:
                continue
            unit, path = tie.source, [tie.target]
            while unit in source_of and unit not in path:
                path.append(unit)
                unit = source_of[unit]
            if unit in path:
                raise PostshareError(
                    f"{tie}: the {projection} ties form a cycle through {list(unit)}; "
                    "point every tie at a unit that is no target"
                )
            if not chains:
                raise PostshareError(
                    f"{tie}: the source is itself a target for {projection}; "
                    f"point the tie at the root source {list(unit)}"
                )


def check_range(which: str, unit: Unit, layout: HeadLayout) -> None:
    """Raises PostshareError, which begins with ``which``: the model has no such unit."""
    layer, index = unit
    if not 0 <= layer < layout.layers:
        raise PostshareError(
            f"{which} layer {layer} is out of range; the model has layers 0 to {layout.layers - 1}"
        )
    if not 0 <= index < layout.units:
        kind = "heads" if layout.heads_per_unit == 1 else f"KV groups of {layout.heads_per_unit}"
        raise PostshareError(
            f"{which} unit {index} is out of range; a layer of this model has "
            f"{layout.units} units ({kind}), 0 to {layout.units - 1}"
        )


def _check_projections(tie: HeadTie) -> None:
    for projection in tie.projections:
        if projection not in PROJECTIONS:
            raise PostshareError(f"{tie}: unknown projection {projection!r}; use q, k, v or o")
    if not tie.projections:
        raise PostshareError(f"{tie}: no projection is named; give at least one of q, k, v, o")
    if len(set(tie.projections)) != len(tie.projections):
        raise PostshareError(f"{tie}: a projection is named twice; name each once")
