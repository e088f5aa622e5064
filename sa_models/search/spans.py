"""Spans by search: layers that reuse another's attention, by scores or by the published rule.

Spans here are contiguous (leader l, followers l+1 to l+k) and do not overlap: a layer belongs to at
most one span, as leader or as follower. Scores are additive over spans; for measured losses that is
an assumption, since each span is measured alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from math import inf, isfinite
from typing import TYPE_CHECKING, NamedTuple

from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError

if TYPE_CHECKING:
    import torch


class SpanChoice(NamedTuple):
    """A span that was found: 0-based layers, followers ascending."""

    leader: int
    followers: tuple[int, ...]

    def __str__(self) -> str:
        return f"span {self.leader} -> {list(self.followers)}"


Score = Callable[[int, tuple[int, ...]], float]
"""Called with (leader, followers); higher is better."""


def candidate_spans(
    layers: int, max_followers: int, skip_layers: Sequence[int] = ()
) -> list[SpanChoice]:
    """Every possible span, by leader, then by the number of followers.

    Args:
        layers: of the model.
        max_followers: of one span, at least 1.
        skip_layers: layers that are neither leader nor follower.

    Raises:
        PostshareError: max_followers below 1, or a layer to skip that the model does not have.
    """
    return [
        _span(leader, count)
        for start, stop in _runs(layers, max_followers, skip_layers)
        for leader in range(start, stop - 1)
        for count in range(1, min(max_followers, stop - 1 - leader) + 1)
    ]


def best_spans(
    score: Score | Mapping[SpanChoice, float],
    layers: int,
    followers: int,
    max_followers: int,
    skip_layers: Sequence[int] = (),
) -> list[SpanChoice]:
    """The spans with exactly ``followers`` followers and the highest sum of scores.

    Dynamic programming over the layers, in exact arithmetic. Of equal sums, the one whose followers
    lie later wins: the highest follower that only one of them has decides.

    Args:
        score: of every candidate, see :func:`candidate_spans`: a function, or its values.
        followers: in all spans together.

    Returns:
        Spans by leader, ascending.

    Raises:
        PostshareError: the budget cannot be met, or a score is missing or not finite.
    """
    _check_budget(followers, layers, max_followers, skip_layers)
    ending: dict[int, list[tuple[SpanChoice, Fraction]]] = {layer: [] for layer in range(layers)}
    for span in candidate_spans(layers, max_followers, skip_layers):
        ending[span.followers[-1]].append((span, _exact(score, span)))
    # best[n][count]: the best partial solution in layers 0 to n-1 with that many followers. The
    # comparison is (sum, followers from the highest down): adding the same span to two solutions
    # keeps their order, so the best of the parts are part of the best.
    best: list[dict[int, _Partial]] = [{0: _Partial(Fraction(0), (), ())}]
    for layer in range(layers):
        here = dict(best[layer])
        for span, value in ending[layer]:
            for count, below in best[span.leader].items():
                partial = below.plus(span, value)
                count += len(span.followers)
                if count <= followers and (count not in here or partial > here[count]):
                    here[count] = partial
        best.append(here)
    return list(best[layers][followers].spans)


def late_spans(
    layers: int, followers: int, max_followers: int, skip_layers: Sequence[int] = ()
) -> list[SpanChoice]:
    """The rule of the published Shared Attention models: late layers, the last one left alone.

    The layers just below the last follow, in spans of at most ``max_followers``, each led by the
    layer below it: 4 followers of 32 layers are 27-30, led by 26. The next span begins below that
    leader. (The release's second span, 23-26 led by 22, makes the first span's leader a follower;
    spans do not overlap here, so of 8 followers the others are 22-25, led by 21.)

    Returns:
        Spans by leader, ascending.

    Raises:
        PostshareError: the budget cannot be met.
    """
    skip_layers = sorted({*skip_layers, layers - 1})
    _check_budget(followers, layers, max_followers, skip_layers)
    spans: list[SpanChoice] = []
    wanted = followers
    for start, stop in reversed(_runs(layers, max_followers, skip_layers)):
        while wanted and stop - start >= 2:
            count = min(max_followers, wanted, stop - start - 1)
            stop -= count + 1
            wanted -= count
            spans.insert(0, _span(stop, count))
    return spans


def most_followers(layers: int, max_followers: int, skip_layers: Sequence[int] = ()) -> int:
    """The largest number of followers that non-overlapping spans can have."""
    # Of a run of n layers, one in every max_followers + 1, rounded up, does not follow.
    return sum(
        stop - start - -(-(stop - start) // (max_followers + 1))
        for start, stop in _runs(layers, max_followers, skip_layers)
    )


def isotropy_score(isotropy: torch.Tensor) -> Score:
    """Score of a span: the isotropy of each follower with the leader, summed.

    Args:
        isotropy: (layers, layers), ``maps`` or ``without_sink`` of
            :class:`~sa_models.scores.attention_maps.Isotropy`.
    """
    values = isotropy.tolist()
    return lambda leader, followers: sum(values[leader][follower] for follower in followers)


LossOf = Callable[[int, tuple[int, ...]], float]
"""Called with (leader, followers): the loss of the model with that one span, on some text."""

LEAST_RISE = 0.5
"""A span is expected to cost no less than this share of its rise on a part of the text."""


class MeasuredSpans:
    """The best spans by the loss, of which only those are measured that may be among the best.

    A longer span is expected to cost no less than its first followers alone, and no less than its
    last one with the layer below it as its leader; none less than :data:`LEAST_RISE` of what it
    costs on a part of the text, where one is given. Where the best spans by what is expected hold
    one that has not been measured, it is.

    Args:
        loss_of, base_loss: the loss with one span, and of the model without spans, on the same
            text.
        layers, max_followers, skip_layers: see :func:`candidate_spans`.
        progress: called with (measured at all, candidates) after every measurement.
        part: the same of a part of the text, which takes less time. Every span of one follower is
            measured on it, or without it on the whole text.

    Attributes:
        scores: of what has been measured: minus the rise of the loss.
    """

    def __init__(
        self,
        loss_of: LossOf,
        base_loss: float,
        layers: int,
        max_followers: int,
        skip_layers: Sequence[int] = (),
        progress: Progress | None = None,
        part: tuple[LossOf, float] | None = None,
    ) -> None:
        self._whole, self._progress = (loss_of, base_loss), progress
        self._limits = (max_followers, skip_layers)
        self._layers = layers
        self._candidates = candidate_spans(layers, *self._limits)
        self.scores: dict[SpanChoice, float] = {}
        self._part = part
        self._on_part: dict[SpanChoice, float] = {}

    def best(self, followers: int) -> list[SpanChoice]:
        """The spans with so many followers and the smallest sum of rises, by leader.

        Raises:
            PostshareError: the budget cannot be met, or a loss is not finite.
        """
        found = self.best_below(followers, inf)
        assert found is not None
        return found

    def best_below(self, followers: int, limit: float) -> list[SpanChoice] | None:
        """:meth:`best`, or None as soon as its sum of rises is expected to reach a limit.

        Raises:
            PostshareError: see :meth:`best`.
        """
        _check_budget(followers, self._layers, *self._limits)
        for span in self._candidates:
            if len(span.followers) == 1 and not self._known(span):
                self._measure(span)
        while True:
            expected = {span: self._expected(span) for span in self._candidates}
            found = best_spans(expected, self._layers, followers, *self._limits)
            if -sum(expected[span] for span in found) >= limit:
                return None
            missing = [self._first_unknown(span) for span in found if span not in self.scores]
            if not missing:
                return found
            for span in missing:
                self._measure(span)

    def _known(self, span: SpanChoice) -> bool:
        """Whether anything has been measured of it."""
        return span in self.scores or span in self._on_part

    def _measure(self, span: SpanChoice) -> None:
        """On the part of the text, if there is one, then on the whole."""
        on_part = self._part is not None and span not in self._on_part
        loss_of, base = self._part if self._part is not None and on_part else self._whole
        loss = loss_of(*span)
        if not isfinite(loss - base):
            raise PostshareError(
                f"the calibration loss is {loss} with {span} and {base} without; load the model "
                "in float32, or choose spans by isotropy"
            )
        (self._on_part if on_part else self.scores)[span] = base - loss
        if self._progress is not None:
            known = self.scores.keys() | self._on_part.keys()
            self._progress(len(known), len(self._candidates))

    def _expected(self, span: SpanChoice) -> float:
        """The score, or one that it is expected not to exceed."""
        if span in self.scores:
            return self.scores[span]
        bounds: list[float] = []
        if span in self._on_part:
            score = self._on_part[span]
            bounds.append(score * LEAST_RISE if score < 0 else score / LEAST_RISE)
        if len(span.followers) > 1:
            last = span.followers[-1]
            bounds.append(self._expected(SpanChoice(span.leader, span.followers[:-1])))
            bounds.append(self._expected(SpanChoice(last - 1, (last,))))
        return min(bounds)

    def _first_unknown(self, span: SpanChoice) -> SpanChoice:
        """The shortest beginning of a span of which nothing has been measured, or all of it."""
        parts = (
            SpanChoice(span.leader, span.followers[:count])
            for count in range(1, len(span.followers) + 1)
        )
        return next((part for part in parts if not self._known(part)), span)


class _Partial(NamedTuple):
    """Some spans; compared by the sum of their scores, then by their followers, highest first."""

    total: Fraction
    latest: tuple[int, ...]
    spans: tuple[SpanChoice, ...]

    def plus(self, span: SpanChoice, score: Fraction) -> _Partial:
        latest = span.followers[::-1] + self.latest
        return _Partial(self.total + score, latest, (*self.spans, span))


def _exact(score: Score | Mapping[SpanChoice, float], span: SpanChoice) -> Fraction:
    """The score of a span as a fraction: sums of floats would depend on their order."""
    value = score(*span) if callable(score) else score.get(span)
    if value is None or not isfinite(value):
        raise PostshareError(
            f"the score of {span} is {'missing' if value is None else value}; measure every "
            "candidate span, on text that is long enough"
        )
    return Fraction(float(value))


def _span(leader: int, followers: int) -> SpanChoice:
    return SpanChoice(leader, tuple(range(leader + 1, leader + 1 + followers)))


def _runs(layers: int, max_followers: int, skip_layers: Sequence[int]) -> list[tuple[int, int]]:
    """The ranges (start, stop) of layers between those that are skipped."""
    if max_followers < 1:
        raise PostshareError(f"a span has at most {max_followers} followers; allow at least 1")
    for layer in skip_layers:
        if not 0 <= layer < layers:
            raise PostshareError(
                f"spans are to skip layer {layer}; the model has layers 0 to {layers - 1}"
            )
    edges = [-1, *sorted(set(skip_layers)), layers]
    return [(a + 1, b) for a, b in pairwise(edges) if b > a + 1]


def _check_budget(
    followers: int, layers: int, max_followers: int, skip_layers: Sequence[int]
) -> None:
    most = most_followers(layers, max_followers, skip_layers)
    if not 1 <= followers <= most:
        limits = f"{layers} layers, {sorted(set(skip_layers))} left alone, at most {max_followers}"
        cure = "ask for a number in that range" if most else "leave fewer layers alone"
        possible = f"1 to {most} are possible" if most else "none is possible"
        raise PostshareError(
            f"spans are to have {followers} followers, {possible} ({limits} in a span); {cure}"
        )
