"""Scores of the units that a plan may tie, and whether its pairs are more alike than chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import torch

from sa_models.atomic_files import write_json
from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan, Unit
from sa_models.scores.activations import HeadOutputs
from sa_models.scores.gauge_invariant import FoldedNorm
from sa_models.scores.registry import OF_TEXT, weight_scores, weight_terms
from sa_models.scores.significance import LEVEL, Chance, PairTerms, chance
from sa_models.scores.significance_text import MIN_BLOCKS
from sa_models.scores.weight_cosine import Reader
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import converted
from train.common.progress import bar
from train.common.run_files import CHANCE_FILE
from train.data.calibration import calibration_inputs

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from train.data.blocks import Blocks
    from train.recipe.recipe import PlanSection


@dataclass
class CalibrationText:
    """What scores that need text are measured on.

    Attributes:
        model: the base with the plan's KV heads, without spans, fp32.
        batches: blocks of equal length, see
        :func:`sa_models.scores.attention_maps.measure_isotropy`.
    """

    model: LlamaForCausalLM
    batches: list[dict[str, torch.Tensor]]

    @cached_property
    def outputs(self) -> HeadOutputs:
        """Measured when first used, and kept."""
        with bar("head outputs") as advance:
            return HeadOutputs.measure(self.model, self.batches, advance)

    @property
    def blocks(self) -> int:
        return len(self.batches)

    def measured(self, names: Sequence[str]) -> list[Any]:
        """These attributes."""
        return [getattr(self, name) for name in names]


def score_units(
    section: PlanSection, reader: Reader, layout: HeadLayout, text: CalibrationText | None
) -> torch.Tensor:
    """The scores of all pairs of units that a recipe asks for, with a progress bar.

    Args:
        reader: the base's weights with the plan's KV heads.
        text: needed where ``section.scores_text``.

    Returns:
        float64 (layers * units, layers * units), row: target, column: source.

    Raises:
        PostshareError: see :func:`~sa_models.scores.gauge_invariant.aligned_scores`,
            :func:`~sa_models.scores.activations.output_scores` and
            :func:`~sa_models.scores.attention_maps.measure_isotropy`; or a score is no number.
    """
    with bar(f"comparing units ({section.score})") as advance:
        scores = _measure(section.score, section.fold_norm, reader, layout, text)(advance)
    wrong = int((~scores.isfinite()).sum())
    if wrong:
        raise PostshareError(
            f"score {section.score} is no number for {wrong:,} pairs of units: weights too large "
            "for float32, or documents of single tokens; choose another plan.score"
        )
    return scores


def _measure(
    score: str, fold_norm: bool, reader: Reader, layout: HeadLayout, text: CalibrationText | None
) -> Callable[[Progress], torch.Tensor]:
    if text is not None:
        found = OF_TEXT[score]
        measure, measured = resolve_name(found.matrix), text.measured(found.of)
        return lambda advance: measure(*measured, advance)
    folded = FoldedNorm(reader) if fold_norm else reader
    return lambda advance: weight_scores(folded, layout, score, advance)


def calibration_text(
    section: PlanSection, model: LlamaForCausalLM, blocks: Blocks
) -> CalibrationText:
    """What scores of text are measured on; the model as in :class:`CalibrationText`."""
    inputs = calibration_inputs(blocks, section.calibration_blocks, model.device)
    return CalibrationText(model, inputs)


# --- chance ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairChances:
    """Every pair that a plan ties, and how it compares with chance."""

    score: str
    seed: int
    pairs: tuple[tuple[Unit, Unit, Chance], ...]

    @property
    def significant(self) -> int:
        return sum(found.corrected <= LEVEL for _, _, found in self.pairs)

    @property
    def line(self) -> str:
        """What `postshare plan` says."""
        return (
            f"chance: {self.significant} of {len(self.pairs)} pairs beat the best of as many "
            f"scrambled sources ({LEVEL:.0%})"
        )

    def save(self, folder: Path) -> None:
        """Write it into the run folder."""
        value: dict[str, Any] = {
            "line": self.line,
            "score": self.score,
            "seed": self.seed,
            "level": LEVEL,
            "significant": self.significant,
            "pairs": [
                {"target": list(target), "source": list(source), **asdict(found)}
                for target, source, found in self.pairs
            ],
        }
        write_json(folder / CHANCE_FILE, value)


def pair_chances(
    section: PlanSection,
    reader: Reader,
    layout: HeadLayout,
    plan: SharingPlan,
    text: CalibrationText | None,
) -> PairChances | None:
    """P-values of the pairs as they are tied (to root sources), of the score they were chosen by.

    Corrected for the number of sources that a target had to choose from. None where a score of text
    has too few blocks to be shuffled.

    Args: see :func:`score_units`.
    """
    if text is not None and OF_TEXT[section.score].shuffles and text.blocks < MIN_BLOCKS:
        return None
    pairs = sorted({(tie.target, tie.source) for tie in plan.ties})
    terms, followers = _terms(section, reader, layout, text), plan.leader_of()
    found = []
    with bar("scrambling pairs") as advance:
        for done, (target, source) in enumerate(pairs, start=1):
            earlier = sum(layer not in followers for layer in range(target[0]))
            at = chance(terms(target, source), earlier * layout.units, section.seed)
            found.append((target, source, at))
            advance(done, len(pairs))
    return PairChances(section.score, section.seed, tuple(found))


def save_chances(
    section: PlanSection,
    base: Path,
    plan: SharingPlan,
    text: CalibrationText | None,
    folder: Path,
) -> None:
    """Compare the pairs that were chosen by a score with scrambled ones; write it to the folder."""
    if not section.scores:
        return
    weights = WeightsFolder(base)
    pooled = converted(weights, SharingPlan(kv_heads=plan.kv_heads))
    chances = pair_chances(section, pooled, plan.layout(weights.config), plan, text)
    if chances is not None:
        chances.save(folder)


def chance_line(section: PlanSection, folder: Path) -> str:
    """What the plan in this run folder has to say about chance."""
    file = folder / CHANCE_FILE
    if file.is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["line"])
    if section.scores_text:
        return f"chance: score {section.score} needs {MIN_BLOCKS} calibration blocks for p-values"
    return "chance: not measured, this plan was found by an earlier version"


def _terms(
    section: PlanSection, reader: Reader, layout: HeadLayout, text: CalibrationText | None
) -> PairTerms:
    if text is None:
        return weight_terms(
            FoldedNorm(reader) if section.fold_norm else reader, layout, section.score
        )
    found = OF_TEXT[section.score]
    return resolve_name(found.terms)(*text.measured(found.terms_of))
