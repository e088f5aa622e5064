"""One plan's ties merged in every way, untrained; docs/scores.md has the table.

    python tests/benchmarks/compare_merges.py RECIPE [a.b=c ...] --out rows.jsonl

The plan is the recipe's own, found (or read) in its run folder.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from sa_models.heads import HeadLayout
from sa_models.materialize.merge_calibrated import merge_on_text_
from sa_models.materialize.registry import MEASURED
from sa_models.materialize.ties import materialize_
from sa_models.plan import SharingPlan
from train.data.calibration import calibration_batches
from train.evaluation.perplexity import perplexity
from train.models.base_model import load_dense
from train.recipe.recipe import load_recipe
from train.stages.plan import make_plan
from train.stages.run import Run, base_of
from train.stages.start import begin

SHARES = ("qkvo", "qkv", "v")
MERGES = ("copy", "mean", "aligned_mean", "weighted_mean", "least_squares")


def measured(current: Run, plan: SharingPlan, merge: str) -> float:
    """Perplexity of the validation text with the plan's ties, untrained."""
    model = load_dense(base_of(current), current.recipe.model.attention)
    if merge in MEASURED:
        count = current.recipe.materialize.calibration_blocks
        text = calibration_batches(current.blocks[0], count, 1, model.device)
        merge_on_text_(model, plan, merge, text)
    layout = HeadLayout.from_config(model.config)
    materialize_(dict(model.named_parameters()), layout, plan, merge)
    section = current.recipe.evaluate
    return perplexity(
        model, current.blocks[1], section.batch_size, section.blocks, False
    ).perplexity


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    current = begin(load_recipe(given.recipe, given.overrides))
    make_plan(current)
    for share in SHARES:
        ties = tuple(replace(tie, projections=tuple(share)) for tie in current.plan.ties)
        for merge in MERGES:
            row = {"share": share, "merge": merge}
            row["perplexity"] = measured(current, replace(current.plan, ties=ties), merge)
            print(json.dumps(row), flush=True)
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
