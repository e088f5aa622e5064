"""`postshare compare`: a recipe beside its controls, at the same tokens, with several seeds.

Every model is a run of its own, in `runs/<name>-compare/<control>/seed-<k>`, so that a comparison
that was stopped goes on where it stood, and each of its runs can be looked at as any other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sa_models.atomic_files import write_json
from sa_models.errors import PostshareError
from sa_models.weights.safetensors_folder import WeightsFolder
from train.commands.compare import results
from train.commands.compare.controls import CONTROLS, Target, changed, check, variant
from train.commands.compare.plot import save_picture
from train.commands.compare.results import Entry
from train.common.run_files import COMPARED_RECIPE, COMPARISON_FILE, SUMMARY_FILE
from train.distributed.engines import start as engines
from train.evaluation.perplexity import BlockLosses
from train.evaluation.summary import bytes_of, parameters_of, read_block_losses
from train.planning.check import check_plan
from train.recipe.precision import with_precisions_of
from train.recipe.recipe import Recipe
from train.report.page import write_report
from train.stages import pipeline
from train.stages.plan import make_plan
from train.stages.run import Run, base_of
from train.stages.start import begin

PARETO_PICTURE = "comparison.png"
REFERENCE = "continued"


@dataclass(frozen=True)
class Planned:
    """One run of a comparison."""

    control: str
    seed: int
    recipe: Recipe


def compare(recipe: Recipe, seeds: int, names: Sequence[str] | None = None) -> None:
    """Run the recipe and its controls, print the table, write it and its picture.

    Args:
        seeds: runs of each, with the seeds recipe.seed + 0, 1, ...
        names: of :data:`~train.commands.compare.controls.CONTROLS`; None: all that exist for this
        recipe.

    Raises:
        PostshareError: an unknown control, a recipe that cannot be compared, or what any of the
            runs raises. Everything is checked before the first training.
    """
    check(recipe)
    asked = _asked(names)
    folder = recipe.folder.with_name(f"{recipe.folder.name}-compare")
    first = _first(recipe, folder)
    recipe = with_precisions_of(recipe, first.recipe)  # all compute in one, on any machine
    runs = _plan_runs(recipe, first, folder, seeds, asked)
    began = time.perf_counter()
    for done, run in enumerate(runs):
        left = (time.perf_counter() - began) / done * (len(runs) - done) if done else None
        about = f", about {left / 60:.0f} min left" if left else ""
        first.say("", f"[{done + 1}/{len(runs)}] {run.control}, seed {run.recipe.seed}{about}")
        pipeline.stages(run.recipe)
    first.on_main(lambda: _conclude(first, runs, folder))
    engines.shutdown()


def _asked(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(CONTROLS)
    for name in names:
        if name not in CONTROLS:
            raise PostshareError(
                f"compare: there is no control {name!r}; known: {', '.join(CONTROLS)}"
            )
    return [
        COMPARED_RECIPE,
        *(name for name in CONTROLS if name in names and name != COMPARED_RECIPE),
    ]


def _first(recipe: Recipe, folder: Path) -> Run:
    """The recipe's first run, with its plan: what it saves is what the controls may save."""
    current = begin(
        changed(recipe, COMPARED_RECIPE, {}, 0, str(folder / COMPARED_RECIPE / "seed-0")),
        trains=True,
    )
    make_plan(current)
    return current


def _plan_runs(
    recipe: Recipe, first: Run, folder: Path, seeds: int, asked: Sequence[str]
) -> list[Planned]:
    assert recipe.steps is not None
    residual = recipe.residual.parameters(first.plan, first.config) if recipe.residual else 0
    target = Target(first.plan, first.config, recipe.steps, residual)
    runs = []
    for name in asked:
        for seed in range(seeds):
            into = str(folder / name / f"seed-{seed}")
            made = variant(CONTROLS[name], recipe, target, seed, into)
            if made is None:
                first.say(f"note: no control {name}: {CONTROLS[name].why_not}")
                break
            runs.append(Planned(name, seed, made))
    base = base_of(first)

    def check_all() -> None:
        for run in runs:
            check_plan(run.recipe, WeightsFolder(base))

    first.on_main(check_all)
    return runs


# --- what came of it ------------------------------------------------------------------------------


def _conclude(first: Run, runs: Sequence[Planned], folder: Path) -> None:
    entries = collect(runs)
    write_json(folder / COMPARISON_FILE, results.as_json(entries, REFERENCE))
    save_picture(entries, REFERENCE, folder / PARETO_PICTURE)
    controls = [entry.name for entry in entries[3:] if entry.name != COMPARED_RECIPE]
    first.say("", results.table(entries, REFERENCE))
    if controls:
        first.say(results.verdict(entries, COMPARED_RECIPE, controls))
    page = write_report([first.folder])  # anew: now there is something to compare with
    first.say("", f"{folder / COMPARISON_FILE}", f"{folder / PARETO_PICTURE}", f"{page}")


def collect(runs: Sequence[Planned]) -> list[Entry]:
    """The rows of the comparison: base, continued, direct, the recipe, and the controls."""
    by_control: dict[str, list[Planned]] = {}
    for run in runs:
        by_control.setdefault(run.control, []).append(run)
    own = by_control[COMPARED_RECIPE]
    losses = {run.seed: read_block_losses(run.recipe.folder) for run in own}
    summary = _summary(own[0])
    base, direct = (
        (parameters_of(summary, name), bytes_of(summary, name)) for name in ("base", "direct")
    )
    entries = [
        Entry("base", "untouched", (losses[0]["base"],), *base),
        Entry(REFERENCE, "trained on, nothing shared", _of(own, "continued"), *base),
        Entry("direct", "the recipe's plan, untrained", (losses[0]["direct"],), *direct),
    ]
    for name, group in by_control.items():
        found = _summary(group[0])
        size = parameters_of(found, "post"), bytes_of(found, "post")
        entries.append(Entry(name, CONTROLS[name].what, _of(group, "post"), *size))
    return entries


def _of(runs: Sequence[Planned], model: str) -> tuple[BlockLosses, ...]:
    return tuple(read_block_losses(run.recipe.folder)[model] for run in runs)


def _summary(run: Planned) -> dict:
    return json.loads((run.recipe.folder / SUMMARY_FILE).read_text(encoding="utf-8"))
