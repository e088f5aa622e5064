"""The sections of a recipe that change the structure of the model: KV heads and spans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from train.recipe.sections.base import Count, Positive, Section, distinct

if TYPE_CHECKING:
    pass

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

    @model_validator(mode="after")
    def _strategy_inputs(self) -> Self:
        listed = self.strategy == "listed"
        if listed != (self.spans is not None):
            raise ValueError(
                "strategy listed needs the spans; set spans.spans, or another spans.strategy"
                if listed
                else f"strategy {self.strategy} finds the spans itself; remove spans.spans"
            )
        if listed != (self.layers is None):
            raise ValueError(
                "strategy listed ignores layers; remove spans.layers"
                if listed
                else f"strategy {self.strategy} needs the number of followers; set spans.layers"
            )
        self._refuse_unused()
        if self.match_heads:
            self._check_matching()
        return self

    @property
    def shares(self) -> set[str]:
        """What the followers reuse."""
        return {self.share} if self.spans is None else {span.share for span in self.spans}

    def _check_matching(self) -> None:
        spans = self.spans or ()
        if any(span.head_map for span in spans):
            raise ValueError("match_heads and a head_map exclude each other; remove one of them")
        if "kv" in self.shares:
            raise ValueError(
                "match_heads compares attention maps, which kv spans do not share; set "
                "spans.match_heads=false"
            )

    def _refuse_unused(self) -> None:
        searching = ("share", "max_followers", "skip_layers") if self.strategy == "listed" else ()
        measuring = () if self.measures else ("sink", "calibration_blocks")
        for name in (*searching, *measuring):
            if self.is_set(name):
                raise ValueError(f"strategy listed ignores {name}; remove spans.{name}")
        if self.is_set("leaders") and "kv" not in self.shares:
            raise ValueError(
                "leaders is about the keys and values of kv spans, and there are none; remove "
                "spans.leaders"
            )

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
