"""Actions of a search: a unit is tied to a source or removed, a layer dropped; and what they save.

A state is a set of actions: layers that are dropped; or units, of which each is removed, or tied,
perhaps twice (q and k to one source, v and o to another). Sources are units that are themselves not
changed, so that a state is a valid plan without any chain to resolve.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from sa_models.ties import Unit

KINDS = ("tie", "remove")
Projections = tuple[str, ...]


WHOLE = -1
"""Stands for all units of a layer."""


@dataclass(frozen=True)
class Action:
    """One unit is tied to ``source`` for the named projections, or removed (no source).

    With the target (layer, :data:`WHOLE`) the layer is dropped: all its units are removed.
    """

    target: Unit
    source: Unit | None = None
    projections: Projections = ()

    @property
    def kind(self) -> str:
        if self.target[1] == WHOLE:
            return "drop"
        return "remove" if self.source is None else "tie"

    def units(self, layout: HeadLayout) -> tuple[Unit, ...]:
        """Those that it changes."""
        layer, unit = self.target
        return tuple((layer, u) for u in range(layout.units)) if unit == WHOLE else (self.target,)

    @property
    def key(self) -> tuple[Unit, Unit, Projections]:
        """Sorts actions, by target; removals before ties."""
        return (self.target, self.source or (-1, -1), self.projections)

    def __str__(self) -> str:
        if self.kind == "drop":
            return f"drop layer {self.target[0]}"
        if self.source is None:
            return f"remove {list(self.target)}"
        return str(HeadTie(self.target, self.source, self.projections))

    def to_list(self) -> list[Any]:
        source = None if self.source is None else list(self.source)
        return [list(self.target), source, "".join(self.projections)]

    @classmethod
    def from_list(cls, value: list[Any]) -> Action:
        target, source, projections = value
        return cls(
            (target[0], target[1]),
            None if source is None else (source[0], source[1]),
            tuple(projections),
        )


State = frozenset[Action]


def ordered(state: Iterable[Action]) -> list[Action]:
    """The actions in their canonical order."""
    return sorted(state, key=lambda action: action.key)


def as_plan(state: Iterable[Action], layout: HeadLayout) -> SharingPlan:
    """The plan of a state; two ties of a unit to one source are one tie of the plan."""
    actions = ordered(state)
    ties: dict[tuple[Unit, Unit], set[str]] = {}
    for a in actions:
        if a.source is not None:
            ties.setdefault((a.target, a.source), set()).update(a.projections)
    return SharingPlan(
        ties=tuple(
            HeadTie(target, source, tuple(p for p in PROJECTIONS if p in shared))
            for (target, source), shared in ties.items()
        ),
        removed=tuple(unit for a in actions if a.source is None for unit in a.units(layout)),
    )


@dataclass(frozen=True)
class Space:
    """The actions that a search chooses from, and how much they have to save.

    Attributes:
        targets: units that may be tied.
        removable: units that may be removed; a layer that is not emptiable keeps at least one.
        sources: units that may be sources, of targets in later layers.
        shares: the sets of projections that a tie may share, and what it saves then, in whatever
            the budget counts.
        removal_saves: what a removal saves; no less than the ties of a unit.
        needed: what a state has to save at least.
        twice: whether a tied unit may be tied again, for projections that it still has.
        droppable: layers that may be dropped, where no single units are changed.
        drop_saves: what a layer without attention saves, no less than anything else that is done to
            its units.
        emptiable: layers that may lose all their units, one after the other.
        uniform: units that every layer loses in a state that meets the budget, one after the other
            (:meth:`in_turn`), where all lose as many; 0: layers may differ.

    Raises:
        ValueError: layers to drop beside single units.
    """

    layout: HeadLayout
    targets: tuple[Unit, ...]
    removable: tuple[Unit, ...]
    sources: frozenset[Unit]
    shares: dict[Projections, int]
    removal_saves: int
    needed: int
    twice: bool = False
    droppable: tuple[int, ...] = ()
    drop_saves: int = 0
    uniform: int = 0
    emptiable: frozenset[int] = frozenset()
    _most: dict[State, int] = field(default_factory=dict, compare=False, repr=False)
    _left: dict[Projections, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.droppable and (self.targets or self.removable):
            raise ValueError("a space drops layers or changes single units, not both")

    @property
    def tie_saves(self) -> int:
        """What ties of one unit save at most."""
        return self._still_saves(())

    @property
    def least(self) -> int:
        """The least that an action saves."""
        saving = (*self.shares.values(), self.removal_saves, self.drop_saves)
        return min(saved for saved in saving if saved > 0)

    def saves(self, action: Action) -> int:
        if action.kind == "drop":
            return self.drop_saves
        return self.shares[action.projections] if action.kind == "tie" else self.removal_saves

    def saved(self, state: Iterable[Action]) -> int:
        state = [*state]
        gone = Counter(a.target[0] for a in state if a.source is None)
        emptied = sum(gone[layer] == self.layout.units for layer in self.emptiable)
        return sum(map(self.saves, state)) + emptied * self.emptied_saves

    @property
    def emptied_saves(self) -> int:
        """What the last unit of an emptied layer saves beyond :meth:`saves`: its norm goes too."""
        return self.drop_saves - self.layout.units * self.removal_saves if self.emptiable else 0

    def is_met(self, state: Iterable[Action]) -> bool:
        return self.saved(state) >= self.needed

    @property
    def largest(self) -> int:
        """Actions of a state that meets the budget, at most."""
        return math.ceil(self.needed / self.least)

    def room(self, layer: int) -> int:
        """Units that a layer loses at most, one after the other."""
        if layer in self.emptiable:
            return self.layout.units
        return min(self.uniform or self.layout.units, self.layout.units - 1)

    def most(self, state: State = frozenset()) -> int:
        """The most that can be saved, going on from a state."""
        if state not in self._most:
            self._most[state] = self._count_most(state)
        return self._most[state]

    def _still_saves(self, tied: Projections) -> int:
        """The most that further ties of a unit save, of which some projections are tied."""
        if tied not in self._left:
            more = self.twice or not tied
            self._left[tied] = max(
                (
                    saved + self._still_saves((*tied, *share))
                    for share, saved in self.shares.items()
                    if more and not set(share) & set(tied)
                ),
                default=0,
            )
        return self._left[tied]

    def _count_most(self, state: State) -> int:
        if self.droppable:
            return len(self.droppable) * self.drop_saves
        fixed = {a.target for a in state} | {a.source for a in state if a.source}
        removed = Counter(a.target[0] for a in state if a.source is None)
        tied, gone = set(self.targets), set(self.removable)
        total = self.saved(state)
        for unit in {a.target for a in state if a.source}:
            total += self._still_saves(tied_projections(state, unit))
        for layer in {unit[0] for unit in tied | gone}:
            here = [unit for unit in tied | gone if unit[0] == layer and unit not in fixed]
            removals = min(self.room(layer) - removed[layer], sum(unit in gone for unit in here))
            if 0 < removals == self.layout.units - removed[layer]:
                total += self.emptied_saves
            ties = sum(unit in tied for unit in here)
            # No removal saves less than a tie: as many removals as there may be, ties otherwise.
            total += removals * self.removal_saves
            total += min(ties, len(here) - removals) * self.tie_saves
        return total

    def allows(self, state: State, action: Action) -> bool:
        """Whether a state with this action is valid, and can still meet the budget."""
        if action.kind == "drop":
            left = action.target[0] in self.droppable and action not in state
            return left and self.most() >= self.needed
        changed = {a.target for a in state}
        sources = {a.source for a in state if a.source}
        if action.target in sources:
            return False
        if action.target in changed and not (
            action.source and self.may_tie_again(state, action.target, action.projections)
        ):
            return False
        if action.source is None:
            gone = sum(a.source is None and a.target[0] == action.target[0] for a in state)
            if action.target not in self.removable or gone >= self.room(action.target[0]):
                return False
        elif (
            action.source in changed
            or action.target not in self.targets
            or action.source not in self.sources
            or action.source[0] >= action.target[0]
        ):
            return False
        # It takes no more than two units, its target and its source, away from what can be saved
        # (or their layers, where these might be emptied).
        whole = self.drop_saves if self.emptiable else 0
        largest = max(self.tie_saves, self.removal_saves, whole)
        if self.most(state) - 2 * largest >= self.needed:
            return True
        return self.most(state | {action}) >= self.needed

    def in_turn(self, state: State, action: Action) -> bool:
        """Whether the action's layer is one of those that have lost fewest units so far: where all
        lose as many, the next unit of a layer waits for all others."""
        if not self.uniform:
            return True
        gone = Counter(a.target[0] for a in state)
        return gone[action.target[0]] == min(gone[layer] for layer in range(self.layout.layers))

    def may_tie_again(self, state: State, unit: Unit, share: Projections) -> bool:
        """Whether the unit is tied, and has all projections of ``share`` still."""
        tied = tied_projections(state, unit)
        return self.twice and bool(tied) and not set(tied) & set(share)

    def actions(self) -> Iterator[Action]:
        """Every action, in canonical order of targets."""
        for unit in sorted({*self.targets, *self.removable}):
            if unit in self.removable:
                yield Action(unit)
            if unit in self.targets:
                for source in sorted(self.sources):
                    if source[0] < unit[0]:
                        for share in self.shares:
                            yield Action(unit, source, share)
        for layer in self.droppable:
            yield Action((layer, WHOLE))


def tied_projections(state: Iterable[Action], unit: Unit) -> Projections:
    """The projections that a unit takes from sources, in a state."""
    return tuple(p for a in state if a.target == unit for p in a.projections)


def make_space(
    layout: HeadLayout,
    kinds: Iterable[str],
    share: Iterable[str],
    targets: Iterable[Unit],
    removable: Iterable[Unit],
    without: Iterable[int],
    unit_saves: tuple[int, int],
    needed: int,
    droppable: Iterable[int] = (),
    drop_saves: int = 0,
    uniform: int = 0,
    emptiable: Iterable[int] = (),
) -> Space:
    """A space with drops of layers; or with ties of one set of projections, removals, or both.

    Args:
        kinds: drop alone; or tie, remove, or both.
        targets, removable: units that may be tied, and removed.
        without: layers whose units are no sources.
        unit_saves: what a tie and a removal save.
        needed: more than :meth:`Space.most` can never be met.
        droppable, drop_saves: layers, and what a drop saves.
        uniform, emptiable: see :class:`Space`.
    """
    kinds, saved = {*kinds}, unit_saves[0]
    shared = tuple(p for p in PROJECTIONS if p in set(share))
    ties = "tie" in kinds and saved > 0
    return Space(
        layout=layout,
        targets=tuple(sorted(targets)) if ties else (),
        removable=tuple(sorted(removable)) if "remove" in kinds and unit_saves[1] else (),
        sources=_units(layout, without),
        shares={shared: saved} if ties else {},
        removal_saves=0 if "drop" in kinds else unit_saves[1],
        needed=needed,
        droppable=tuple(sorted(droppable)) if "drop" in kinds else (),
        drop_saves=drop_saves if "drop" in kinds or emptiable else 0,
        uniform=uniform,
        emptiable=frozenset(emptiable),
    )


def make_full_space(
    layout: HeadLayout,
    shares: dict[Projections, int],
    targets: Iterable[Unit],
    removable: Iterable[Unit],
    without: Iterable[int],
    removal_saves: int,
    needed: int,
    twice: bool,
    uniform: int = 0,
    emptiable: Iterable[int] = (),
    drop_saves: int = 0,
) -> Space:
    """A space with ties of several sets of projections, and removals.

    Args:
        shares: of them, those that save something count.
        twice: whether what two ties of a unit save adds up.
        targets, removable, without, needed, emptiable, drop_saves: see :func:`make_space`.
    """
    saving = {share: saved for share, saved in shares.items() if saved}
    return Space(
        layout=layout,
        targets=tuple(sorted(targets)) if saving else (),
        removable=tuple(sorted(removable)) if removal_saves else (),
        sources=_units(layout, without),
        shares=saving,
        removal_saves=removal_saves,
        needed=needed,
        twice=twice,
        drop_saves=drop_saves if emptiable else 0,
        uniform=uniform,
        emptiable=frozenset(emptiable),
    )


def _units(layout: HeadLayout, without: Iterable[int]) -> frozenset[Unit]:
    left_out = {*without}
    return frozenset(
        (layer, unit)
        for layer in range(layout.layers)
        if layer not in left_out
        for unit in range(layout.units)
    )
