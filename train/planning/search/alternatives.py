"""The alternatives to a plan: what strategy auto would choose for as many bytes, or as much cache.

The search alone, on calibration text: nothing is reconstructed or trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_models.atomic_files import write_json
from sa_models.calibration.partial_forward import Batch
from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.search.budget import share_of
from train.common.run_files import ALTERNATIVES_FILE
from train.planning.problem import PlanProblem
from train.planning.search.auto_result import in_words
from train.planning.search.auto_search import search_auto
from train.planning.search.auto_space import check_auto
from train.recipe.sections.plan import Budget, PlanSection

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FOR = {"parameters": "as many bytes", "cache": "as much cache"}
"""What an alternative saves as much of as the plan, by what its budget counts."""


@dataclass(frozen=True)
class Alternative:
    """What strategy auto chose.

    Attributes:
        counted: a key of :data:`FOR`.
        share: of the whole model's that is saved, such as ``-5.7%``.
        plan: in words; None where no plan meets the budget.
        rise: of the perplexity on calibration text, untrained: 0.01 is 1 % above the dense model.
    """

    counted: str
    share: str
    plan: str | None
    rise: float | None

    def sentence(self) -> str:
        wanted = f"for {FOR[self.counted]} ({float(self.share[:-1]):.1f}%)"
        if self.plan is None or self.rise is None:
            return f"{wanted}: nothing meets the budget"
        return f"{wanted}: {self.plan}, {self.rise:+.1%}"


def budgets(plan: SharingPlan, config: Any, residual: int = 0) -> dict[str, str]:
    """The share of parameters and of the cache that a plan saves, where it saves any.

    Args:
        config: of the base model.
        residual: parameters of the plan's residuals.
    """
    savings = plan.savings(config)
    saved = {
        "parameters": (savings.removed_parameters - residual, savings.base_parameters),
        "cache": (savings.base_cache - savings.stored_cache, savings.base_cache),
    }
    return {counted: share_of(*of) for counted, of in saved.items() if of[0] > 0}


def search_alternative(
    counted: str,
    share: str,
    section: PlanSection,
    model: LlamaForCausalLM,
    batches: Sequence[Batch],
    folder: Path,
) -> Alternative:
    """
    Args:
        section: of the plan that this is the alternative to; the layers that it skips are kept.
        model: dense, fp32, in evaluation mode, on the device that measures; it is left unchanged.
        batches: calibration text, on that device.
        folder: of the run, whose measurements are used and added to.
    """
    auto = PlanSection(
        strategy="auto",
        objective="bytes" if counted == "parameters" else "cache",
        budget=Budget.model_validate({counted: share}),
        skip_layers=section.skipped,
    )
    problem = PlanProblem(auto, model.config)
    try:
        check_auto(problem)
    except PostshareError:
        return Alternative(counted, share, None, None)
    found = search_auto(problem, model, batches, folder)
    rise = math.expm1(found.chosen.points[-1].loss - found.base.loss)
    return Alternative(counted, share, in_words(found.plan, model.config), rise)


def save_alternatives(alternatives: Sequence[Alternative], rise: float, folder: Path) -> None:
    """
    Args:
        rise: of the plan itself, as :attr:`Alternative.rise`.
    """
    found = [asdict(alternative) for alternative in alternatives]
    write_json(folder / ALTERNATIVES_FILE, {"rise": rise, "alternatives": found})


def alternatives_lines(folder: Path) -> list[str]:
    """What :func:`save_alternatives` has kept, in words; nothing where it has not."""
    file = folder / ALTERNATIVES_FILE
    if not file.is_file():
        return []
    value = json.loads(file.read_text(encoding="utf-8"))
    return [
        "what auto would do (untrained, perplexity on calibration text; this plan "
        f"{value['rise']:+.1%}):",
        *(f"  {Alternative(**each).sentence()}" for each in value["alternatives"]),
    ]
