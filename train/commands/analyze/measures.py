"""Measures of `postshare analyze`: isotropy, similarity, sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from sa_models.calibration.progress import Progress
from sa_models.calibration.token_losses import row_losses
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from sa_models.scores.attention_maps import Isotropy, measure_isotropy
from sa_models.scores.fisher import Sensitivity, estimate_sensitivity
from sa_models.scores.registry import SCORES
from sa_models.scores.weight_cosine import Matches, best_matches
from train.commands.analyze.model import Weights
from train.common.progress import bar
from train.planning.scores import CalibrationText, PairChances, pair_chances, score_units
from train.recipe.sections.plan import Budget, PlanSection

Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class LayerRises:
    """Measured: nats per token that the loss rises by when a layer's attention adds nothing.

    Attributes:
        base: loss of the model as it is, nats per token.
        rises: one for each layer.
    """

    base: float
    rises: tuple[float, ...]


@dataclass(frozen=True)
class Analysis:
    """All that was measured.

    Attributes:
        scores: float64 (units, units), row: target, column: source; nan where one of the two has
            no weights of its own.
        matches: the best source of every unit in an earlier layer; nan and -1 where there is none.
        chances: of these pairs; None where a score of text has too few blocks.
        units: estimated rise when one unit is removed; None where it was not asked for.
        layers: measured rise when a layer's attention is; None likewise.
    """

    layout: HeadLayout
    isotropy: Isotropy
    scores: torch.Tensor
    matches: Matches
    chances: PairChances | None
    units: Sensitivity | None
    layers: LayerRises | None


def analyze_model(
    model: LlamaForCausalLM,
    weights: Weights,
    batches: Batches,
    score: str,
    sensitivity: bool,
) -> Analysis:
    """Measure a model on calibration text, with progress bars.

    Args:
        model: see :func:`~train.commands.analyze.model.load_expanded`.
        weights: of the same folder.
        batches: blocks of equal length, int64 (1, length) each.
        score: one of ``plan.score`` (docs/scores.md).

    Raises:
        PostshareError: a score of text on a model with spans; an unknown score; or what the
            measures themselves refuse.
    """
    section = score_section(score)
    if section.scores_text and weights.plan.spans:
        raise PostshareError(
            f"score {score} is measured on models without spans; use one of weights, such as qk"
        )
    layout = weights.layout
    with bar("isotropy") as advance:
        isotropy = measure_isotropy(model, batches, advance, weights.plan.removed)
    text = CalibrationText(model, batches) if section.scores_text else None
    scores = score_units(section, weights, layout, text)
    for layer, unit in weights.absent_units():
        at = layer * layout.units + unit
        scores[at, :] = scores[:, at] = float("nan")
    matches = _matches(scores, layout)
    chances = pair_chances(section, weights, layout, _as_plan(matches, weights.plan), text)
    units = layers = None
    if sensitivity:
        followers = frozenset(weights.plan.leader_of())
        with bar("sensitivity of heads") as advance:
            units = estimate_sensitivity(model, batches, (), followers, advance)
        with bar("sensitivity of layers") as advance:
            layers = layer_rises(model, batches, advance)
    return Analysis(layout, isotropy, scores, matches, chances, units, layers)


def score_section(score: str) -> PlanSection:
    """A plan section that scores units by `score`. Raises PostshareError for an unknown one."""
    if score not in SCORES:
        raise PostshareError(f"--score {score}: unknown; use one of {', '.join(SCORES)}")
    return PlanSection(score=score, budget=Budget(ratio=0.5))


def layer_rises(
    model: LlamaForCausalLM, batches: Sequence[dict[str, torch.Tensor]], progress: Progress
) -> LayerRises:
    """The loss without the attention of each layer in turn, everything else as it is."""
    layers = len(model.model.layers)
    losses = [_loss(model, batches)]
    for layer in range(layers):
        projection = model.model.layers[layer].self_attn.o_proj
        handle = projection.register_forward_hook(lambda module, inputs, out: out * 0)
        try:
            losses.append(_loss(model, batches))
        finally:
            handle.remove()
        progress(layer + 1, layers)
    return LayerRises(losses[0], tuple(loss - losses[0] for loss in losses[1:]))


@torch.inference_mode()
def _loss(model: LlamaForCausalLM, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """Nats per predicted token: every token of a block but its first."""
    total, tokens = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        total += sum(row_losses(model, ids[:, 1:], input_ids=ids))
        tokens += ids.shape[1] - 1
    return total / tokens


def _matches(scores: torch.Tensor, layout: HeadLayout) -> Matches:
    """As :func:`best_matches`, where some units can be neither target nor source."""
    found = best_matches(scores.nan_to_num(nan=-torch.inf), layout)
    none = ~found.scores.isfinite()
    found.scores[none], found.sources[none] = float("nan"), -1
    return found


def _as_plan(matches: Matches, plan: SharingPlan) -> SharingPlan:
    """Every unit tied to its best source: what the chances are computed for."""
    ties = tuple(
        HeadTie((layer, unit), (source[0], source[1]), ("q", "k", "v"))
        for layer, row in enumerate(matches.sources.tolist())
        for unit, source in enumerate(row)
        if source[0] >= 0
    )
    return SharingPlan(ties=ties, spans=plan.spans)
