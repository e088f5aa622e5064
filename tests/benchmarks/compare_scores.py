"""Plans chosen by every score, untrained, at the same budget; docs/scores.md has the table.

    python tests/benchmarks/compare_scores.py RECIPE [a.b=c ...] --out rows.jsonl

Rows are appended as they are measured, and what the file holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from sa_models.heads import HeadLayout
from sa_models.materialize.ties import materialize_
from sa_models.plan import SharingPlan
from sa_models.scores.registry import weight_terms
from sa_models.scores.significance import LEVEL, chance
from sa_models.weights.safetensors_folder import WeightsFolder
from train.distributed.engines.start import start
from train.evaluation.perplexity import perplexity
from train.models.base_model import load_dense
from train.planning.find import find_ties
from train.planning.problem import PlanProblem
from train.planning.scores import calibration_text, pair_chances
from train.recipe.recipe import load_recipe
from train.stages.plan import measured_model
from train.stages.run import Run, base_of

SCORES = (
    "qk",
    "qk_aligned",
    "vo",
    "output",
    "attention",
    "qkvo_aligned",
    "output_map",
    "qkv",
    "softmax",
)
SHARES = ("qkv", "qkvo")


class Comparison:
    def __init__(self, recipe: str, overrides: list[str], out: Path) -> None:
        self.recipe = load_recipe(recipe, overrides)
        self.current = Run(self.recipe, start(self.recipe))
        self.base, self.out = base_of(self.current), out
        self.weights = WeightsFolder(self.base)
        self.layout = HeadLayout.from_config(self.weights.config)
        self.done = {}
        if out.exists():
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            self.done = {row["name"]: row for row in rows}

    def run(self) -> None:
        self.row("base", lambda: {"qkv": self.loss(SharingPlan())})
        for score in SCORES:
            self.row(score, lambda score=score: self.chosen(score, fold=False))
        for seed in range(3):
            self.row(f"random {seed}", lambda seed=seed: self.random(seed))
        for score in ("qk", "qk_aligned", "qkvo_aligned"):
            self.row(f"{score} folded", lambda score=score: self.chosen(score, fold=True))
        for score in ("qk", "vo"):
            for merge in ("copy", "mean", "aligned_mean", "absorb"):
                self.row(f"{score} {merge}", lambda s=score, m=merge: self.merged(s, m))

    def row(self, name, measure) -> None:
        if name not in self.done:
            values = {"name": name, **measure()}
            print(json.dumps(values), flush=True)
            with self.out.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def chosen(self, score: str, fold: bool) -> dict[str, float]:
        update = {"strategy": "cosine", "score": score, "fold_norm": fold}
        section = self.recipe.plan.model_copy(update=update)
        begun, text = time.perf_counter(), None
        if section.scores_text:
            model = measured_model(self.current, self.base, SharingPlan())
            text = calibration_text(section, model, self.current.blocks[0])
        plan, _ = find_ties(PlanProblem(section, self.weights.config), self.weights, text)
        scored = time.perf_counter()
        chances = pair_chances(section, self.weights, self.layout, plan, text)
        return {
            "significant": chances.significant,
            "pairs": len(chances.pairs),
            "score_seconds": scored - begun,
            "chance_seconds": time.perf_counter() - scored,
            **self.losses(plan),
        }

    def merged(self, score: str, merge: str) -> dict[str, float]:
        """Another merge of the same pairs, with q, k, v shared, and with v alone."""
        section = self.recipe.plan.model_copy(update={"score": score})
        plan, _ = find_ties(PlanProblem(section, self.weights.config), self.weights)
        return {share: self.loss(shared(plan, share), merge) for share in ("qkv", "v")}

    def random(self, seed: int) -> dict[str, float]:
        section = self.recipe.plan.model_copy(update={"strategy": "random", "seed": seed})
        plan, _ = find_ties(PlanProblem(section, self.weights.config), self.weights)
        pairs = {(tie.target, tie.source) for tie in plan.ties}
        found = {}
        for score in ("qk", "qk_aligned", "vo"):
            terms = weight_terms(self.weights, self.layout, score)
            found[f"alike by {score}"] = sum(chance(terms(*p), 1).p <= LEVEL for p in pairs)
        return {"pairs": len(pairs), **found, **self.losses(plan)}

    def losses(self, plan: SharingPlan) -> dict[str, float]:
        return {share: self.loss(shared(plan, share)) for share in SHARES}

    def loss(self, plan: SharingPlan, merge: str = "copy") -> float:
        """Perplexity of the validation text with the plan's ties, untrained."""
        model = load_dense(self.base, self.recipe.model.attention)
        materialize_(dict(model.named_parameters()), self.layout, plan, merge)
        section = self.recipe.evaluate
        blocks = self.current.blocks[1]
        return perplexity(model, blocks, section.batch_size, section.blocks, False).perplexity


def shared(plan: SharingPlan, projections: str) -> SharingPlan:
    """The same pairs, sharing these projections."""
    return SharingPlan(tuple(replace(t, projections=tuple(projections)) for t in plan.ties))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    Comparison(given.recipe, given.overrides, given.out).run()
