"""What strategy auto found: measured plans, those that meet the budget, and the one it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa_models.plan import SharingPlan
from sa_models.search.algorithms import Found, Passes
from sa_models.search.ranking import Agreement

if TYPE_CHECKING:
    from train.planning.auto_factors import Factored


@dataclass(frozen=True)
class Point:
    """A measured plan.

    Attributes:
        origin: the search that it comes from.
        saved: in what the budget counts, structure included.
        loss: measured, nats per token.
        slope: of the calibration text, to be taken off.
        structured: whether spans or KV heads were tried, which are no small change.
    """

    origin: str
    plan: SharingPlan
    saved: int
    loss: float
    slope: float
    structured: bool = False

    @property
    def expected(self) -> float:
        """The loss without the slope: what candidates are compared by.

        The first order of a change as large as a structure may promise a loss below that of the
        dense model, by far: it is charged where it was in the favour of the structure, and never
        credited.
        """
        return self.loss - (min(self.slope, 0.0) if self.structured else self.slope)


@dataclass(frozen=True)
class Candidate:
    """A plan that meets the budget.

    Attributes:
        found: what the search of units found; None where the structure alone meets the budget.
        points: after every step; the last is the plan.
        rebuilt: nats per token after reconstruction, see :mod:`train.planning.auto_rebuild`.
    """

    name: str
    points: tuple[Point, ...]
    found: Found | None = None
    agreement: Agreement | None = None
    rebuilt: float | None = None

    @property
    def plan(self) -> SharingPlan:
        return self.points[-1].plan

    @property
    def expected(self) -> float:
        return self.points[-1].expected


@dataclass(frozen=True)
class AutoSearched:
    """What was compared, and what it took.

    Attributes:
        base: the model with the recipe's own structure, or without any.
        candidates: the chosen one first.
        structures: that were tried, measured alone.
        bound: of passes and estimates, stated before the search.
        base_rebuilt: nats per token of the base on the text of the reconstruction, where there is
            one; with the recipe's own structure, which is reconstructed then.
        factored: Basis Sharing beside them, see :mod:`train.planning.auto_factors`.
    """

    base: Point
    candidates: tuple[Candidate, ...]
    structures: tuple[Point, ...]
    blocks: int
    passes: float
    estimates: int
    bound: Passes
    seconds: float
    base_rebuilt: float | None = None
    factored: Factored | None = None

    @property
    def plan(self) -> SharingPlan:
        """What was chosen in the end."""
        if self.factored is not None and self.factored.taken:
            return self.factored.plan
        return self.chosen.plan

    @property
    def chosen(self) -> Candidate:
        """The best of the candidates."""
        return self.candidates[0]

    @property
    def points(self) -> list[Point]:
        """Everything that was measured whole, the base first."""
        steps = [point for candidate in self.candidates for point in candidate.points]
        return list(dict.fromkeys((self.base, *self.structures, *steps)))
