"""The sections of a recipe that change the structure of the model: KV heads and spans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from train.recipe.sections.base import Count, Positive, Section, distinct

Layers = Annotated[
    tuple[Count, ...], Field(strict=False), AfterValidator(lambda v: tuple(sorted(distinct(v))))
]


class HeadsSection(Section):
    """The number of heads."""

    kv_heads: Positive | None = None
    """KV heads of a layer (GQA; 1: MQA), mean-pooled from the base's; null: as in the base."""


class Span(Section):
    """One leader layer and its followers."""

    leader: Count
    """Layer whose attention weights, or keys and values, are reused."""
    followers: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Layers above it that reuse them."""
    share: Literal["attention", "kv"] = "attention"
    """attention: the leader's attention weights (SA); kv: its keys and values (CLA)."""
    head_map: (
        Annotated[
            tuple[Annotated[tuple[Count, ...], Field(strict=False)], ...], Field(strict=False)
        ]
        | None
    ) = None
    """For each follower, which head of the leader its head h reads; null: head h."""


def as_spans(value: Any) -> Any:
    """A bare list of spans as the section that it abbreviates."""
    return {"spans": value} if isinstance(value, list | tuple) else value


class SpansSection(Section):
    """Layers that reuse what another layer has computed."""

    strategy: Literal["listed", "isotropy", "loss", "late"] = "listed"
    """listed: spans.spans; isotropy: the most similar attention maps; loss: the smallest rise of
    the loss on calibration text; late: the layers below the last one, as published."""
    spans: Annotated[tuple[Span, ...], Field(strict=False, min_length=1)] | None = None
    """The spans, for strategy listed."""
    layers: Positive | None = None
    """How many layers become followers, for the other strategies."""
    share: Literal["attention", "kv"] = "attention"
    """What followers reuse, for the other strategies."""
    max_followers: Positive = 4
    """Most followers of one leader."""
    skip_layers: Layers = ()
    """Layers that are in no span."""
    sink: bool = True
    """Whether isotropy counts the first token, which most heads attend to."""
    match_heads: bool = False
    """Let each follower's head read the leader's head with the most similar attention map."""
    leaders: Literal["mean", "copy"] = "mean"
    """Keys and values of a kv span's leader: the mean over the layers it serves, or its own."""
    calibration_blocks: Positive = 8
    """Training blocks for losses and for attention maps (of their first 512 tokens)."""

    def _listed(self) -> Iterator[str]:
        listed = self.strategy == "listed"
        if listed and self.spans is None:
            yield "strategy listed needs the spans; set spans.spans, or another spans.strategy"
        elif listed and self.layers is not None:
            yield "strategy listed ignores layers; remove spans.layers"
        if not listed and self.spans is not None:
            yield f"strategy {self.strategy} finds the spans itself; remove spans.spans"
        if not listed and self.layers is None:
            yield f"strategy {self.strategy} needs the number of followers; set spans.layers"

    def _idle_options(self) -> Iterator[str]:
        searching = ("share", "max_followers", "skip_layers") if self.strategy == "listed" else ()
        measuring = () if self.measures else ("sink", "calibration_blocks")
        for name in (*searching, *measuring):
            if self.is_set(name):
                yield f"strategy listed ignores {name}; remove spans.{name}"

    def _leaders(self) -> Iterator[str]:
        if self.is_set("leaders") and "kv" not in self.shares:
            yield (
                "leaders is about the keys and values of kv spans, and there are none; remove "
                "spans.leaders"
            )

    def _maps(self) -> Iterator[str]:
        if self.match_heads and any(span.head_map for span in self.spans or ()):
            yield "match_heads and a head_map exclude each other; remove one of them"

    def _matching(self) -> Iterator[str]:
        if self.match_heads and "kv" in self.shares:
            yield (
                "match_heads compares attention maps, which kv spans do not share; set "
                "spans.match_heads=false"
            )

    rules = (_listed, _idle_options, _leaders, _maps, _matching)

    @property
    def shares(self) -> set[str]:
        """What the followers reuse."""
        return {self.share} if self.spans is None else {span.share for span in self.spans}

    @property
    def measures(self) -> bool:
        """Whether calibration text is needed: to choose spans, to compare them, to match heads."""
        return self.strategy != "listed" or self.match_heads


Spans = Annotated[
    SpansSection, BeforeValidator(as_spans, json_schema_input_type=SpansSection | list[Span])
]


def listed_structure(heads: HeadsSection, spans: SpansSection | None) -> SharingPlan:
    """The plan's structure as far as the recipe states it: KV heads, and listed spans."""
    listed = () if spans is None or spans.spans is None else spans.spans
    return SharingPlan(
        kv_heads=heads.kv_heads,
        spans=tuple(AttentionSpan(s.leader, s.followers, s.share, s.head_map) for s in listed),
    )
