"""A recipe's spans: listed, late layers, by isotropy, or by the loss on calibration text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from sa_models.atomic_files import write_json
from sa_models.plan import SharingPlan
from sa_models.scores.attention_maps import (
    Isotropy,
    best_head_map,
    head_similarity,
    measure_isotropy,
)
from sa_models.search import spans as span_search
from sa_models.search.measured_loss import MeasuredLoss
from sa_models.search.spans import SpanChoice
from sa_models.spans import AttentionSpan, ranges
from train.common.progress import bar
from train.common.run_files import ISOTROPY_PICTURE, SPANS_FILE
from train.data.blocks import Blocks
from train.data.calibration import calibration_batches, calibration_inputs

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.recipe.recipe import Recipe
    from train.recipe.sections.structure import SpansSection


@dataclass(frozen=True)
class Choice:
    """Spans that a strategy picks, and what they cost untrained on the calibration text."""

    strategy: str
    spans: tuple[AttentionSpan, ...]
    isotropy: float
    """Mean over the followers, each with its leader."""
    loss: float
    """Nats per token."""


@dataclass(frozen=True)
class SpanMeasurements:
    """What the measurements say; :attr:`choices` begins with the strategy of the recipe."""

    spans: tuple[AttentionSpan, ...]
    isotropy: Isotropy
    blocks: int
    """Training blocks that were measured: fewer than asked for, where there are fewer."""
    base_loss: float
    choices: tuple[Choice, ...]
    candidates: dict[SpanChoice, float]
    """Rise of the loss, of the spans that strategy loss measured."""


def late_is_possible(section: SpansSection, config: LlamaConfig) -> bool:
    """Whether the published rule, which leaves the last layer alone, has so many followers."""
    layers = config.num_hidden_layers
    skipped = sorted({*section.skip_layers, layers - 1})
    assert section.layers is not None
    return section.layers <= span_search.most_followers(layers, section.max_followers, skipped)


def late_choices(section: SpansSection, config: LlamaConfig) -> list[SpanChoice]:
    """The published rule."""
    assert section.layers is not None
    return span_search.late_spans(
        config.num_hidden_layers, section.layers, section.max_followers, section.skip_layers
    )


def searched_spans(
    section: SpansSection, config: LlamaConfig, score: span_search.Score | dict[SpanChoice, float]
) -> list[SpanChoice]:
    """The spans with the highest sum of scores."""
    assert section.layers is not None
    return span_search.best_spans(
        score, config.num_hidden_layers, section.layers, section.max_followers, section.skip_layers
    )


def as_spans(choices: list[SpanChoice], share: str) -> tuple[AttentionSpan, ...]:
    return tuple(AttentionSpan(leader, followers, share) for leader, followers in choices)


class SpanFinder:
    """Measures spans on calibration text: training blocks, evenly spread.

    Args:
        model: the base with the plan's KV heads, fp32; on the device that is to measure.
        cache: file of what has been measured, which a second start reads.
    """

    def __init__(
        self, recipe: Recipe, model: LlamaForCausalLM, blocks: Blocks, cache: Path
    ) -> None:
        assert recipe.spans is not None
        self.section = recipe.spans
        self.model = model.eval()
        self.blocks = blocks
        self.count = min(len(blocks), self.section.calibration_blocks)
        text = calibration_batches(blocks, self.count, recipe.evaluate.batch_size, model.device)
        self._measured = MeasuredLoss(self.model, text, cache)

    def find(self, listed: tuple[AttentionSpan, ...]) -> SpanMeasurements:
        """Measure, choose, and compare with the other ways to choose.

        Args:
            listed: the recipe's own spans, for strategy listed (heads may still be matched).
        """
        section, config = self.section, self.model.config
        with bar("isotropy") as advance:
            isotropy = measure_isotropy(self.model, self._inputs(), advance)
        used = isotropy.maps if section.sink else isotropy.without_sink
        base_loss = self.loss(())
        by_isotropy = span_search.isotropy_score(used)
        options: dict[str, tuple[AttentionSpan, ...]] = {}
        rises: dict[SpanChoice, float] = {}
        if section.strategy == "listed":
            options["listed"] = listed
        else:
            found = {"isotropy": searched_spans(section, config, by_isotropy)}
            if section.strategy == "loss":
                found["loss"], scores = self._by_loss(base_loss)
                rises = {span: -score for span, score in scores.items()}
            if late_is_possible(section, config):
                found["late"] = late_choices(section, config)
            options = {name: as_spans(spans, section.share) for name, spans in found.items()}
        if section.match_heads:
            options = {name: self._with_head_maps(spans) for name, spans in options.items()}
        choices = []
        with bar("comparing spans") as advance:
            for done, (name, spans) in enumerate(options.items(), start=1):
                followers = [(s.leader, f) for s in spans for f in s.followers]
                mean = sum(by_isotropy(leader, (f,)) for leader, f in followers) / len(followers)
                choices.append(Choice(name, spans, mean, self.loss(spans)))
                advance(done, len(options))
        choices.sort(key=lambda choice: choice.strategy != section.strategy)
        return SpanMeasurements(
            choices[0].spans, isotropy, self.count, base_loss, tuple(choices), rises
        )

    def loss(self, spans: tuple[AttentionSpan, ...]) -> float:
        """Calibration loss (nats per token) with these spans, untrained."""
        if not spans:
            return self._measured(frozenset())
        return self._measured.of_structure(SharingPlan(spans=spans), self.section.leaders)

    def _by_loss(self, base_loss: float) -> tuple[list[SpanChoice], dict[SpanChoice, float]]:
        """The spans that cost least, and the scores of those that were measured."""
        section = self.section
        assert section.layers is not None
        with bar("measuring spans") as advance:
            measured = span_search.MeasuredSpans(
                lambda leader, followers: self.loss(
                    (AttentionSpan(leader, followers, section.share),)
                ),
                base_loss,
                self.model.config.num_hidden_layers,
                section.max_followers,
                section.skip_layers,
                advance,
            )
            return measured.best(section.layers), measured.scores

    def _with_head_maps(self, spans: tuple[AttentionSpan, ...]) -> tuple[AttentionSpan, ...]:
        pairs = sum(len(span.followers) for span in spans)
        mapped = []
        with bar(f"matching the heads of {pairs} layers") as advance:
            done = 0
            for span in spans:
                rows = []
                for follower in span.followers:
                    similarity = head_similarity(
                        self.model, self._inputs(), span.leader, follower, sink=self.section.sink
                    )
                    rows.append(best_head_map(similarity))
                    done += 1
                    advance(done, pairs)
                mapped.append(replace(span, head_map=tuple(rows)))
        return tuple(mapped)

    def _inputs(self) -> list[dict[str, torch.Tensor]]:
        return calibration_inputs(self.blocks, self.count, self.model.device)


def spans_table(found: SpanMeasurements) -> Table:
    """The strategies side by side: what they pick, how alike the maps are, what it costs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("spans", "followers", "isotropy", "perplexity, untrained", "vs dense"):
        table.add_column(column, justify="left" if column in ("spans", "followers") else "right")
    base = math.exp(found.base_loss)
    table.add_row("none (dense)", "", "", f"{base:.2f}", "")
    for choice in found.choices:
        value = math.exp(choice.loss)
        followers = ", ".join(f"{s.leader} -> {ranges(s.followers)}" for s in choice.spans)
        table.add_row(
            choice.strategy,
            followers,
            f"{choice.isotropy:.3f}",
            f"{value:.2f}",
            f"{value / base - 1:+.1%}",
        )
    return table


def save_spans(found: SpanMeasurements, folder: Path) -> None:
    """Write the measurements as JSON and draw the isotropy, into the run folder."""
    from train.planning.plan_maps import save_isotropy

    value: dict[str, Any] = {
        "calibration_blocks": found.blocks,
        "base_loss": found.base_loss,
        "choices": [
            {
                "strategy": choice.strategy,
                "spans": [span.to_dict() for span in choice.spans],
                "isotropy": choice.isotropy,
                "loss": choice.loss,
            }
            for choice in found.choices
        ],
        "candidates": [
            {"leader": span.leader, "followers": list(span.followers), "loss_rise": rise}
            for span, rise in found.candidates.items()
        ],
        "isotropy": {
            "maps": as_lists(found.isotropy.maps),
            "without_sink": as_lists(found.isotropy.without_sink),
        },
    }
    write_json(folder / SPANS_FILE, value)
    save_isotropy(found.isotropy, found.spans, folder / ISOTROPY_PICTURE)


def as_lists(matrix: torch.Tensor) -> list[list[float | None]]:
    """JSON has no nan: null."""
    return [[None if math.isnan(v) else v for v in row] for row in matrix.tolist()]
