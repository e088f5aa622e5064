"""The objective of strategy auto: what a server pays for a plan, and what plans are compared by.

A server pays for the bytes of the weights that it stores, for those of the cache of the requests
that it serves at a time, and for the time of a step of decoding, which is bound by the bytes that
the step reads: the weights once, and the cache of every request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_models.plan import SharingPlan
from train.evaluation.decode_time import bytes_read

if TYPE_CHECKING:
    from train.planning.problem import PlanProblem

REQUESTS = 8
"""That are served at a time."""
CONTEXT = 4096
"""Tokens of each, or as many as the model has positions for."""

_NAMES = {
    "bytes": "the weights that are stored",
    "cache": "the KV cache of {requests} requests of {context:,} tokens",
    "speed": "what a step of decoding for {requests} requests of {context:,} tokens reads",
    "all": "stored weights, the KV cache of {requests} requests of {context:,} tokens, and what a "
    "step of decoding reads",
}


@dataclass(frozen=True)
class Payment:
    """What a server pays for a plan, in bytes.

    Attributes:
        weights: stored.
        cache: of :data:`REQUESTS` requests of :data:`CONTEXT` tokens.
        read: by one step of decoding for all of them.
    """

    weights: int
    cache: int
    read: int

    @classmethod
    def of(cls, plan: SharingPlan, config: Any, size: int = 2) -> Payment:
        """
        Args:
            config: of the base model.
            size: bytes of one element of weights and cache.
        """
        savings, tokens = plan.savings(config), REQUESTS * context_of(config)
        return cls(
            savings.bytes(size)[1],
            tokens * savings.stored_cache * size,
            bytes_read(plan, config, tokens, size),
        )

    def counted(self, objective: str) -> int:
        """What an objective counts of it: bytes, cache, speed, or all."""
        parts = {"bytes": self.weights, "cache": self.cache, "speed": self.read}
        return sum(parts.values()) if objective == "all" else parts[objective]


def context_of(config: Any) -> int:
    """Tokens of a request."""
    return min(CONTEXT, int(config.max_position_embeddings))


def saved_share(problem: PlanProblem, plan: SharingPlan) -> float:
    """The share of what a server pays for the problem's structure that a plan saves; 1 where plans
    are compared by their loss alone: objective bytes, of which the budget asks the same of all."""
    objective, config = problem.section.objective, problem.config
    if objective == "bytes":
        return 1.0
    before = Payment.of(problem.structure, config).counted(objective)
    return 1 - Payment.of(plan, config).counted(objective) / before


def cost(problem: PlanProblem, plan: SharingPlan, rise: float) -> float:
    """What plans that meet the budget are compared by: nats per token, for the share it saves.

    Args:
        rise: of the loss above that of the problem's structure, nats per token.
    """
    return rise_for(rise, saved_share(problem, plan))


def rise_for(rise: float, saved: float) -> float:
    """A rise of the loss for what is saved; a lower loss counts the more, the more is saved."""
    if rise <= 0:
        return rise * saved
    return rise / saved if saved > 0 else float("inf")


def most_rise(cost: float, saved: float) -> float:
    """The rise of the loss that comes to a cost (:func:`rise_for`) for what is saved."""
    if cost <= 0:
        return cost / saved if saved > 0 else float("-inf")
    return cost * saved


def objective_sentence(objective: str, plan: SharingPlan, config: Any, size: int) -> str:
    """What a plan comes to, by the objective that it was chosen by.

    Args:
        size: bytes of one exported element.
    """
    before, after = (
        Payment.of(one, config, size).counted(objective) for one in (SharingPlan(), plan)
    )
    what = _NAMES[objective].format(requests=REQUESTS, context=context_of(config))
    return (
        f"Objective {objective}: {what}: {after:,} bytes, {1 - after / before:.1%} less than the "
        f"{before:,} of the dense model."
    )
