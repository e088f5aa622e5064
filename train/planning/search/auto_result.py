"""The result of strategy auto: measured plans, those that meet the budget, and the one it took."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from sa_models.plan import SharingPlan
from sa_models.search.algorithms import Passes, SearchResult
from sa_models.search.ranking import Agreement
from train.evaluation.bootstrap import Interval
from train.evaluation.decode_time import DecodeTime

BASIS = "Basis Sharing"


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
        rebuilt: nats per token after reconstruction, see :mod:`train.planning.search.auto_rebuild`.
    """

    name: str
    points: tuple[Point, ...]
    found: SearchResult | None = None
    agreement: Agreement | None = None
    rebuilt: float | None = None

    @property
    def plan(self) -> SharingPlan:
        return self.points[-1].plan

    @property
    def expected(self) -> float:
        return self.points[-1].expected


@dataclass(frozen=True)
class Factored:
    """Basis Sharing at as many stored parameters as the best plan of ties, removals, spans and KV
    groups.

    Attributes:
        plan: with its basis.
        saved: parameters, no fewer than the other plan's.
        loss: nats per token, untrained, on the text of the reconstruction.
        above: 95 % interval of how far the loss of the best other plan lies above it, over blocks.
        taken: whether it is the chosen plan.
    """

    plan: SharingPlan
    saved: int
    loss: float
    above: Interval
    taken: bool

    @property
    def is_better(self) -> bool:
        """Than that plan, by more than chance."""
        return self.above[0] > 0


@dataclass(frozen=True)
class AutoResult:
    """What was compared, and what it took.

    Attributes:
        base: the model with the recipe's own structure, or without any.
        candidates: the chosen one first.
        structures: that were tried, measured alone.
        bound: of passes and estimates, stated before the search.
        base_rebuilt: nats per token of the base on the text of the reconstruction, where there is
            one; with the recipe's own structure, which is reconstructed then.
        factored: Basis Sharing beside them, see :mod:`train.planning.search.auto_rebuild`.
        left_out: structures that were not measured, as their parts cost as much as the best plan.
        given_up: searches, of whole layers or in a structure, that were not finished, for the same
            reason.
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
    left_out: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()

    @property
    def plan(self) -> SharingPlan:
        """What was chosen in the end."""
        if self.factored is not None and self.factored.taken:
            return self.factored.plan
        return self.chosen.plan

    @property
    def found(self) -> SearchResult | None:
        """The search of units that the plan comes from; None: a structure alone, or a basis."""
        return self.chosen.found if self.plan == self.chosen.plan else None

    @property
    def chosen(self) -> Candidate:
        """The best of the candidates."""
        return self.candidates[0]

    @property
    def points(self) -> list[Point]:
        """Everything that was measured whole, the base first."""
        steps = [point for candidate in self.candidates for point in candidate.points]
        return list(dict.fromkeys((self.base, *self.structures, *steps)))


@dataclass(frozen=True)
class Timed:
    """A plan that was decoded with.

    Attributes:
        point: of the front; None for Basis Sharing, whose loss is that of another text.
        decode: of one token after ``context`` others.
        read: bytes that it reads, as exported.
    """

    plan: SharingPlan
    point: Point | None
    decode: DecodeTime
    read: int
    context: int


def in_words(plan: SharingPlan, config: LlamaConfig) -> str:
    """`3 heads removed, 2 KV groups tied in qk, span 2 -> [3] (kv)`."""
    name = plan.layout(config).unit_name
    parts = [f"{counted(len(plan.removed), name)} removed"] if plan.removed else []
    for share in dict.fromkeys("".join(tie.projections) for tie in plan.ties):
        count = sum("".join(tie.projections) == share for tie in plan.ties)
        parts.append(f"{counted(count, name)} tied in {share}")
    parts += [str(span) for span in plan.spans]
    if plan.kv_heads is not None:
        parts.append(f"{plan.kv_heads} KV heads")
    if plan.basis is not None:
        parts.append(f"q, k, v of {plan.basis.layers} layers on one basis")
    return ", ".join(parts) or "none (dense)"


def counted(count: int, name: str) -> str:
    """Units by their name, which is a plural."""
    return f"{count} {name if count != 1 else name.removesuffix('s')}"
