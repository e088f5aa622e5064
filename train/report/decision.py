"""The rule of a verdict: whether what a run saves is worth what it costs, or cannot be told.

docs/report.md has it in words, with the reasons for its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from train.evaluation.bootstrap import Interval

PRICE = 0.1
"""Rise of perplexity that may be paid for what is saved: 1 % for 10 %."""
LEAST = 0.01
"""Share that has to be saved of something."""
SEED_NOISE = 0.002
"""Of a ratio of perplexities, where one seed was trained: two standard deviations between seeds of
one plan, the largest of the 10 plans of docs/methods.md that were trained with 2 or 3 seeds."""
UNKNOWN_NOISE = 0.02
"""Where not even the spread over the held-out text is known: ten times as much."""
ENOUGH_SEEDS = 3

RULE = (
    "The rule: worth it where perplexity rises by at most a tenth of what is saved (1% for 10%), "
    "of weights, KV cache or decode time, whichever is saved most. Not worth it where it rises by "
    f"more, where less than {LEAST:.0%} is saved of each, where decoding takes longer by more than "
    "is saved, or where a control that is as small is better. It cannot be told where the "
    "uncertainty leaves both open."
)


@dataclass(frozen=True)
class Decision:
    """What the chip says.

    Attributes:
        tone: ``good``, ``bad`` or empty.
        reason: sentences with the numbers that decided.
    """

    chip: str
    tone: str
    reason: str


@dataclass(frozen=True)
class Cost:
    """Rise of perplexity over the control, as a share.

    Attributes:
        low, high: with all uncertainty that is known.
        of: where these are from, for the reader.
    """

    value: float
    low: float
    high: float
    of: str

    @classmethod
    def measured(cls, value: float, bounds: Interval | None, seeds: int, trained: bool) -> Cost:
        """
        Args:
            bounds: 95 % interval of the difference of losses, in nats per token.
            seeds: that were trained.
            trained: whether a seed enters at all.
        """
        if bounds is None:
            noise = UNKNOWN_NOISE
            said = f"no interval is known, so {noise:.1%} either way"
            return cls(value, value - noise, value + noise, said)
        low, high = (math.expm1(bound) for bound in bounds)
        if not trained:
            return cls(value, low, high, "95 % over the held-out text")
        if seeds >= ENOUGH_SEEDS:
            return cls(value, low, high, f"95 % over the held-out text and {seeds} seeds")
        said = f"95 % over the held-out text, and {SEED_NOISE:.1%} for another seed"
        return cls(value, low - SEED_NOISE, high + SEED_NOISE, said)


def decide(
    saved: Mapping[str, float],
    decode: Interval | None,
    cost: Cost | None,
    better: str | None = None,
) -> Decision:
    """The first reason that applies.

    Args:
        saved: shares by name, of weights and cache.
        decode: the time of decoding over that of stock, from the lower to the upper end of its
            spread; None where it was not measured.
        cost: None where there is no control to compare with.
        better: a control that is as small and better, if any.
    """
    shares = dict(saved)
    if decode is not None:
        shares["decode time"] = 1 - decode[1]
    what, most = max(shares.items(), key=lambda item: item[1])
    if most < LEAST:
        return _no(f"It saves less than {LEAST:.0%} of weights, KV cache or decode time.")
    said = f"It saves {most:.1%} of the {what}"
    if decode is not None and decode[0] - 1 > most:
        return _no(f"{said}, and decoding takes at least {decode[0] - 1:.1%} longer.")
    if better is not None:
        return _no(f"{said}, but {better}, a control that is as small, is better.")
    allowed = PRICE * most
    said += f", for which perplexity may rise by {allowed:.2%}."
    if cost is None:
        return _open(f"{said} By how much it rises is not known: evaluate.continued is false.")
    said += f" It changes by {cost.low:+.2%} to {cost.high:+.2%} ({cost.of})."
    if cost.low > allowed:
        return _no(said)
    if cost.high <= allowed:
        return Decision("worth it", "good", said)
    return _open(
        f"{said} More seeds (postshare compare RECIPE --seeds 3) and more held-out text "
        "(evaluate.blocks) narrow that."
    )


def _no(reason: str) -> Decision:
    return Decision("not worth it", "bad", reason)


def _open(reason: str) -> Decision:
    return Decision("cannot be told", "", reason)
