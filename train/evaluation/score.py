"""The score of a model on a task: its distance from another's, and how sure that is.

A score is a ratio of two sums over items (windows of a text, questions of a task), or its
exponential. Its interval is the normal one of that ratio (the delta method): with a_i and b_i what
item i adds to the two sums, n items and r = sum a / sum b,

    variance = n / (n - 1) * sum of e_i^2,    e_i = (a_i - r b_i) / sum b.

Two models that answered the same items are compared item by item: e_i is then the difference of
their two (paired; what both find hard cancels). Otherwise their variances add up.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""Of the 95 % interval of the normal distribution."""

Kind = Literal["perplexity", "mean", "rounds", "size"]

PERPLEXITY = "perplexity"
"""The name of our own task, beside those of lm-eval."""


@dataclass(frozen=True)
class Score:
    """One number of one model.

    Attributes:
        kind: `perplexity` is the exponential of the ratio, `mean` the ratio itself. Of `rounds`
            the value is the median of `sums`, and its spread their quartiles; a `size` is exact.
        value: as it is reported.
        sums, weights: a_i and b_i of the items; empty where only the value is known.
        stderr: of a `mean` without items.
        items: hash of the items; scores with the same one are paired.
        stated: what the number depends on, for the reader.
    """

    task: str
    metric: str
    kind: Kind
    value: float
    sums: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    stderr: float | None = None
    items: str | None = None
    stated: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_items(
        cls,
        task: str,
        metric: str,
        kind: Literal["perplexity", "mean"],
        sums: Sequence[float],
        weights: Sequence[float],
        items: str,
        stated: dict[str, Any],
    ) -> Score:
        """A score from its items; what an item adds is in `sums`, what it counts in `weights`."""
        ratio = math.fsum(sums) / math.fsum(weights)
        value = math.exp(ratio) if kind == "perplexity" else ratio
        return cls(task, metric, kind, value, tuple(sums), tuple(weights), None, items, stated)

    @classmethod
    def of_rounds(
        cls, task: str, metric: str, rounds: Sequence[float], stated: dict[str, Any]
    ) -> Score:
        return cls(task, metric, "rounds", statistics.median(rounds), tuple(rounds), stated=stated)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Score:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(**{**value, "sums": tuple(value["sums"]), "weights": tuple(value["weights"])})

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high: 95 %, or the quartiles of rounds. None where nothing is known of it."""
        if self.kind == "rounds":
            return _quartiles(np.array(self.sums))
        spread = _spread(self)
        if spread is None:
            return None
        return _around(self.kind, math.log(self.value) if self.exp else self.value, spread)

    @property
    def exp(self) -> bool:
        return self.kind == "perplexity"


@dataclass(frozen=True)
class Change:
    """How far a score lies from the reference's.

    Attributes:
        value: relative (0.1 = 10 % above) but of `mean`, where it is the difference.
        interval: of it; None where it is exact or nothing is known.
        paired: whether the two were compared item by item.
    """

    value: float
    interval: tuple[float, float] | None
    paired: bool


def change(score: Score, reference: Score) -> Change | None:
    """The change from the reference; None where the two cannot be compared.

    Token-level perplexities of different tokens are no such two: their words are
    (`train.commands.evaluate.side_by_side`).
    """
    if score.kind in ("size", "rounds"):
        return _relative(score, reference)
    paired = score.items is not None and score.items == reference.items
    if not paired and score.exp and score.stated.get("level") == "token":
        return None
    if score.exp:
        centre = math.log(score.value) - math.log(reference.value)
    else:
        centre = score.value - reference.value
    spread = _paired_spread(score, reference) if paired else _both(score, reference)
    value = math.expm1(centre) if score.exp else centre
    if spread is None:
        return Change(value, None, paired)
    low, high = centre - Z * spread, centre + Z * spread
    return Change(value, (math.expm1(low), math.expm1(high)) if score.exp else (low, high), paired)


def item_hash(items: Sequence[object]) -> str:
    """One hash for a sequence of items that print what they are."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _relative(score: Score, reference: Score) -> Change:
    ratios = None
    if score.kind == "rounds" and len(score.sums) == len(reference.sums):
        ratios = np.array(score.sums) / np.array(reference.sums) - 1  # the same rounds, interleaved
    if ratios is None:
        return Change(score.value / reference.value - 1, None, False)
    return Change(float(np.median(ratios)), _quartiles(ratios), True)


def _quartiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def _errors(score: Score) -> NDArray[np.float64]:
    """e_i of the module's formula."""
    sums, weights = np.array(score.sums), np.array(score.weights)
    total = weights.sum()
    return (sums - sums.sum() / total * weights) / total


def _deviation(errors: NDArray[np.float64]) -> float | None:
    n = len(errors)
    return None if n < 2 else math.sqrt(n / (n - 1) * float(errors @ errors))


def _spread(score: Score) -> float | None:
    return _deviation(_errors(score)) if score.sums else score.stderr


def _paired_spread(score: Score, reference: Score) -> float | None:
    return _deviation(_errors(score) - _errors(reference))


def _both(score: Score, reference: Score) -> float | None:
    spreads = [_spread(one) for one in (score, reference)]
    known = [spread for spread in spreads if spread is not None]
    return math.hypot(*known) if len(known) == 2 else None


def _around(kind: Kind, centre: float, spread: float) -> tuple[float, float]:
    low, high = centre - Z * spread, centre + Z * spread
    return (math.exp(low), math.exp(high)) if kind == "perplexity" else (low, high)


def as_json(score: Score, reference: Score | None) -> dict[str, Any]:
    """What the JSON says of a score; items are counted, not listed."""
    value: dict[str, Any] = {
        "task": score.task,
        "metric": score.metric,
        "value": score.value,
        "interval": score.interval,
        "spread": "quartiles" if score.kind == "rounds" else "95 %",
        "count": len(score.sums) or None,
        "stated": score.stated,
    }
    if reference is not None:
        found = change(score, reference)
        value["change"] = None if found is None else asdict(found)
    return value


def as_models(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, Any]]:
    """For each model its name and scores, with their change from the first model's."""
    reference = next(iter(scores.values()))
    return [
        {
            "name": name,
            "scores": [
                as_json(score, None if at == 0 else base)
                for score, base in zip(own, reference, strict=True)
            ],
        }
        for at, (name, own) in enumerate(scores.items())
    ]
