"""Rivals of a run, from `postshare compare` of its recipe, where its folder is beside the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_models.errors import PostshareError
from train.common.run_files import COMPARED_RECIPE, COMPARISON_FILE, RECIPE_FILE, SUMMARY_FILE
from train.evaluation.bootstrap import Interval, interval, mean_loss
from train.evaluation.perplexity import BlockLosses
from train.evaluation.summary import read_block_losses
from train.recipe.identity import run_identity
from train.recipe.recipe import Recipe, load_recipe
from train.report.data import FolderReader

CONTINUED = "continued"


@dataclass(frozen=True)
class Rivals:
    """comparison.json of the run's own recipe.

    Attributes:
        rows: as :func:`train.commands.compare.results.as_json` writes them.
    """

    folder: Path
    rows: list[dict[str, Any]]

    def above(self, control: str) -> tuple[float, Interval, int] | None:
        """How far the recipe's loss lies above a control's (nats per token), its 95 % interval, and
        the number of seeds.

        None where the control is no part of the comparison, or its seeds are not the recipe's.
        """
        if not {COMPARED_RECIPE, control} <= {row["name"] for row in self.rows}:
            return None
        own = _losses(self.folder / COMPARED_RECIPE)
        theirs = _losses(self.folder / control)
        if control == CONTINUED:  # each run of the recipe has its own
            theirs = _losses(self.folder / COMPARED_RECIPE, CONTINUED)
        if not own or len(own) != len(theirs):
            return None
        return mean_loss(own) - mean_loss(theirs), interval(own, theirs), len(own)

    def better(self) -> str | None:
        """The best control that stores no more weights and cache than the recipe, where it is
        better than the recipe by more than chance."""
        rows = {row["name"]: row for row in self.rows}
        own = rows.pop(COMPARED_RECIPE, None)
        cache = self._cache(COMPARED_RECIPE)
        if own is None or own["bytes"] is None or cache is None:
            return None
        for row in sorted(rows.values(), key=lambda row: row["loss"]):
            held = self._cache(row["name"])
            if row["bytes"] is None or held is None or row["bytes"] > own["bytes"] or held > cache:
                continue
            found = self.above(row["name"])
            if found is not None and found[1][0] > 0:
                return str(row["name"])
        return None

    def _cache(self, name: str) -> int | None:
        """Elements of the cache for a token, of the runs of a row; None where it has none."""
        summary = FolderReader(self.folder / name / "seed-0").json(SUMMARY_FILE, ("cache",))
        return None if summary is None else summary["cache"]["stored_elements_per_token"]


def find_rivals(folder: Path, recipe: Recipe | None) -> tuple[Rivals | None, list[str]]:
    """The comparison that holds this run, or that lies beside it; and notes of what is wrong."""
    folder = folder.resolve()
    inside = folder.parent.parent if folder.parent.name == COMPARED_RECIPE else None
    for place in filter(None, (inside, folder.with_name(f"{folder.name}-compare"))):
        if not (place / COMPARISON_FILE).is_file():
            continue
        reader = FolderReader(place)
        rows = reader.json_list(COMPARISON_FILE, ("name", "loss", "perplexity", "bytes"))
        if rows is None:
            return None, reader.notes
        if not _same(recipe, place / COMPARED_RECIPE / "seed-0"):
            return None, [f"the comparison in {place.name} is of another recipe; it is left out"]
        return Rivals(place, rows), []
    return None, []


def _same(recipe: Recipe | None, first: Path) -> bool:
    """Whether the first run of a comparison is of this recipe, whatever its seed."""
    if recipe is None:
        return False
    try:
        theirs = run_identity(load_recipe(first / RECIPE_FILE))
    except PostshareError:
        return False
    return {**theirs, "seed": 0} == {**run_identity(recipe), "seed": 0}


def _losses(folder: Path, model: str = "post") -> list[BlockLosses]:
    """Of a model of every seed that has been evaluated."""
    seeds = sorted(folder.glob("seed-*"), key=lambda seed: int(seed.name.removeprefix("seed-")))
    return [found[model] for seed in seeds if model in (found := read_block_losses(seed))]
