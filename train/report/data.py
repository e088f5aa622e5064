"""The data of a report, from a run folder: all that is there, and a note for what is not.

A run may be half finished, killed while it wrote, or of an earlier version. Whatever can be read
is; whatever cannot becomes one line of :attr:`RunData.notes`, which the report shows on top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from train.common.run_files import (
    BLOCKS_FILE,
    CHANCE_FILE,
    PLAN_FILE,
    PROVENANCE_FILE,
    RECIPE_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    SEARCH_FILE,
    SPANS_FILE,
    SUMMARY_FILE,
)
from train.evaluation.figures import Figures
from train.evaluation.perplexity import BlockLosses
from train.evaluation.run_scores import VERSION, decode_ratio, export_hash
from train.recipe.recipe import Recipe, load_recipe

Json = dict[str, Any]
TRAININGS = {"continued": "continued", "post": ".", "heal": "heal"}
"""Trainings of a run, and their folders in it."""
LABELS = {"continued": "the control (continued)", "post": "post-training", "heal": "healing"}
CONFIGS = ("export/compact", "export/dense", "weights", "continued/weights")
"""Folders of a run whose config.json tells the model's shape."""
SUMMARY_KEYS = {
    "perplexity": {"base", "continued", "direct", "post"},
    "heads": {"requested_ratio", "effective_ratio", "total", "tied", "removed"},
    "parameters": {"base", "stored", "adapter", "stored_ratio"},
    "structure": {"kv_heads", "spans", "basis"},
    "cache": {"base_elements_per_token", "stored_elements_per_token"},
    "bytes": {"base", "compact", "adapter", "dense"},
    "figures": {"weight_bytes", "stock_cache_bytes", "context", "decode", "perplexity"},
}


@dataclass(frozen=True)
class Training:
    """What one training wrote down.

    Attributes:
        columns: float64 (rows,) by key of metrics.jsonl; nan where a row lacks it or holds null.
        result: result.json; None while it is not finished.
        backend: of run.json: how it was launched.
    """

    name: str
    columns: dict[str, NDArray[np.float64]]
    result: Json | None
    backend: Json | None

    @property
    def steps(self) -> NDArray[np.float64]:
        return self.columns["step"]

    def has(self, key: str) -> bool:
        return key in self.columns and bool(np.isfinite(self.columns[key]).any())


@dataclass(frozen=True)
class Pairs:
    """pairs.jsonl: (rows,) steps, and (rows, ties, projections) distances, nan where none."""

    steps: NDArray[np.float64]
    distance: NDArray[np.float64]


@dataclass(frozen=True)
class RunData:
    """All that a run folder says; None or empty where it says nothing.

    Attributes:
        recipe: None where it is of a version that this one cannot read.
        layout: of the model with the plan's KV heads.
        blocks: evaluation-blocks.json, by model.
        scores: task-scores.json, by task.
        samples: samples.json.
        figures: of the summary, with the time of decoding that is known now.
        notes: what is missing or damaged, one line each.
    """

    folder: Path
    name: str
    recipe: Recipe | None
    recipe_text: str
    plan: SharingPlan | None
    layout: HeadLayout | None
    summary: Json | None
    blocks: dict[str, BlockLosses]
    trainings: dict[str, Training]
    pairs: Pairs | None
    chance: Json | None
    spans: Json | None
    search: Json | None
    scores: Json | None
    samples: Json | None
    figures: Figures | None
    provenance: Json | None
    notes: tuple[str, ...]


@dataclass
class FolderReader:
    """Reads files of one folder; what is damaged is noted, what is missing is None."""

    folder: Path
    notes: list[str] = field(default_factory=list)

    def json(self, name: str, keys: Iterable[str] = ()) -> Any:
        """The value of a JSON file, which must be an object with these keys."""
        value = self._value(name)
        if value is None or (isinstance(value, dict) and set(keys) <= value.keys()):
            return value
        self.notes.append(f"{name} is not what this version writes; it is left out")
        return None

    def json_list(self, name: str, keys: Iterable[str]) -> Any:
        """The value of a JSON file, which must be a list of objects with these keys."""
        value = self._value(name)
        if value is None or (
            isinstance(value, list)
            and all(isinstance(row, dict) and set(keys) <= row.keys() for row in value)
        ):
            return value
        self.notes.append(f"{name} is not what this version writes; it is left out")
        return None

    def _value(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self.notes.append(f"{name} cannot be read ({error}); it is left out")
            return None

    def rows(self, name: str) -> list[Json]:
        """The rows of a .jsonl file by step; lines that are no rows are left out, and noted."""
        try:
            lines = (self.folder / name).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        rows, bad = [], []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
            else:
                bad.append(number)
        if bad == [len(lines)]:
            self.notes.append(
                f"{name}: the last line is broken, as a killed run leaves it; it is left out, and "
                "the run repairs it when it is started again"
            )
        elif bad:
            self.notes.append(
                f"{name}: {len(bad)} of {len(lines)} lines are no rows (line {bad[0]} first)"
            )
        return rows


def read_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        PostshareError: there is no such folder, or it is no run folder.
    """
    require_run(folder)
    reader = FolderReader(folder)
    recipe, plan = _recipe(reader), _plan(reader)
    provenance = reader.json(PROVENANCE_FILE, ("base", "starts"))
    trainings = {name: t for name in TRAININGS if (t := _training(reader, name)) is not None}
    summary, search, scores = _summary(reader), reader.json(SEARCH_FILE), _scores(reader)
    reader.notes[:0] = _unfinished(folder, recipe, trainings)
    return RunData(
        folder=folder,
        name=recipe.name if recipe else folder.resolve().name,
        recipe=recipe,
        recipe_text=(folder / RECIPE_FILE).read_text(encoding="utf-8", errors="replace"),
        plan=plan,
        layout=_layout(reader, plan, provenance),
        summary=summary,
        blocks=_blocks(reader),
        trainings=trainings,
        pairs=_pairs(reader),
        chance=reader.json(CHANCE_FILE, ("line", "pairs")),
        spans=reader.json(SPANS_FILE, ("candidates", "isotropy")),
        search=_search(reader, search),
        scores=scores,
        samples=_samples(reader),
        figures=_figures(summary, scores, search),
        provenance=provenance,
        notes=tuple(reader.notes),
    )


def require_run(folder: Path) -> None:
    """Raises PostshareError unless this is a run folder."""
    if not folder.exists():
        near = Path("runs") / folder.name
        hint = f"did you mean {near}?" if near.is_dir() else "give a folder that a run has written"
        raise PostshareError(f"there is no folder {folder}; {hint}")
    if not (folder / RECIPE_FILE).is_file():
        raise PostshareError(
            f"{folder} is no run folder (it has no {RECIPE_FILE}); give one that `postshare run` "
            "has written, such as runs/demo"
        )


# --- the parts of a run ---------------------------------------------------------------------------


def _recipe(reader: FolderReader) -> Recipe | None:
    try:
        return load_recipe(reader.folder / RECIPE_FILE)
    except PostshareError as error:
        reader.notes.append(f"the recipe is shown as it is, this version cannot read it ({error})")
        return None


def _search(reader: FolderReader, value: Json | None) -> Json | None:
    """What the search found: of strategy auto, the candidate that was chosen."""
    if value is None:
        return None
    if value.get("search") != "auto":
        return reader.json(SEARCH_FILE, ("loss_rises", "base_loss"))
    whole = reader.json(SEARCH_FILE, ("base_loss", "chosen", "candidates")) or {}
    chosen = [c for c in whole.get("candidates", []) if c.get("name") == whole["chosen"]]
    # A structure alone has no units whose change was measured.
    rises = chosen[0].get("loss_rises") if chosen else None
    return None if rises is None else {"base_loss": whole["base_loss"], "loss_rises": rises}


def _scores(reader: FolderReader) -> Json | None:
    """What `postshare evaluate RUN` has measured on the weights that are exported now."""
    value = reader.json(SCORES_FILE, ("version", "export", "tasks"))
    if value is None:
        return None
    if value["version"] != VERSION or value["export"] != export_hash(reader.folder):
        reader.notes.append(
            f"{SCORES_FILE} is of another export, and is left out; `postshare evaluate "
            f"{reader.folder}` measures this one"
        )
        return None
    return value["tasks"]


def _figures(summary: Json | None, scores: Json | None, search: Json | None) -> Figures | None:
    if summary is None:
        return None
    decode = None if summary["parameters"]["adapter"] else decode_ratio(scores or {}, search)
    return replace(Figures.from_dict(summary["figures"]), decode=decode)


def _samples(reader: FolderReader) -> Json | None:
    """Of models that have continued every passage."""
    value = reader.json(SAMPLES_FILE, ("passages", "models"))
    try:
        texts = [value["passages"], *value["models"].values()] if value else []
        if all(len(of_one) == len(texts[0]) for of_one in texts):
            return value
    except (AttributeError, TypeError):
        pass
    reader.notes.append(f"{SAMPLES_FILE} is not what this version writes; it is left out")
    return None


def _summary(reader: FolderReader) -> Json | None:
    value = reader.json(SUMMARY_FILE, (*SUMMARY_KEYS, "tokens", "seconds"))
    if value is None:
        return None
    if all(isinstance(value[k], dict) and n <= value[k].keys() for k, n in SUMMARY_KEYS.items()):
        return value
    reader.notes.append(
        f"{SUMMARY_FILE} is of an earlier version, and is left out; `postshare evaluate` with the "
        "run's recipe writes it anew"
    )
    return None


def _plan(reader: FolderReader) -> SharingPlan | None:
    if not (reader.folder / PLAN_FILE).is_file():
        return None
    try:
        return SharingPlan.load(reader.folder / PLAN_FILE)
    except PostshareError as error:
        reader.notes.append(f"{PLAN_FILE} is left out: {error}")
        return None


def _layout(
    reader: FolderReader, plan: SharingPlan | None, provenance: Json | None
) -> HeadLayout | None:
    """From what the run's first start wrote down, else from a model that the run has written."""
    shapes = [provenance["base"]] if provenance else []
    for name in CONFIGS:
        if name == "export/dense" and plan is not None and plan.removed:
            continue  # it may have fewer heads
        shapes.append(reader.json(f"{name}/config.json", ("num_hidden_layers", "hidden_size")))
    for shape in filter(None, shapes):
        try:
            config = SimpleNamespace(**{"num_key_value_heads": None, **shape})
            return (plan or SharingPlan()).layout(config)
        except (AttributeError, TypeError, PostshareError):
            continue
    if plan is not None:
        reader.notes.append(
            "the plan is not drawn: nothing here tells the model's shape; start the run again"
        )
    return None


def _training(reader: FolderReader, name: str) -> Training | None:
    where = TRAININGS[name]
    prefix = "" if where == "." else f"{where}/"
    rows = reader.rows(f"{prefix}metrics.jsonl")
    if not rows:
        return None
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: np.array([_number(row.get(key)) for row in rows]) for key in keys}
    launched = reader.json(f"{prefix}run.json", ("backend",))
    return Training(
        name=name,
        columns=columns,
        result=reader.json(f"{prefix}result.json", ("steps", "tokens", "seconds")),
        backend=launched and launched["backend"],
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _pairs(reader: FolderReader) -> Pairs | None:
    rows = reader.rows("pairs.jsonl")
    if not rows:
        return None
    try:
        distance = np.array([row["distance"] for row in rows], dtype=np.float64)  # null becomes nan
    except (KeyError, ValueError, TypeError):
        distance = np.empty(0)
    if distance.ndim != 3:
        reader.notes.append("pairs.jsonl is not what this version writes; it is left out")
        return None
    return Pairs(np.array([float(row["step"]) for row in rows]), distance)


def _blocks(reader: FolderReader) -> dict[str, BlockLosses]:
    value = reader.json(BLOCKS_FILE) or {}
    try:
        return {n: BlockLosses(tuple(b["nats"]), tuple(b["tokens"])) for n, b in value.items()}
    except (KeyError, TypeError):
        reader.notes.append(f"{BLOCKS_FILE} is not what this version writes; it is left out")
        return {}


def _unfinished(folder: Path, recipe: Recipe | None, trainings: dict[str, Training]) -> list[str]:
    """What a run still has to do, if anything."""
    notes = []
    for name, training in trainings.items():
        if training.result is None:
            wanted = planned_steps(recipe, name)
            of = f" of {wanted:,}" if wanted else ""
            notes.append(f"{LABELS[name]} is not finished: step {int(training.steps[-1]):,}{of}")
    if not (folder / SUMMARY_FILE).is_file() and (recipe is None or recipe.plans):
        notes.append("the models have not been evaluated yet: there is no verdict")
    if notes:
        notes[-1] += "; the command that started the run goes on with it"
    return notes


def planned_steps(recipe: Recipe | None, training: str) -> int | None:
    """Steps of a training, where the recipe says so."""
    if recipe is None or recipe.train.steps is None:
        return None
    heal = recipe.materialize.heal_steps
    return {"post": recipe.train.steps, "heal": heal, "continued": recipe.steps}[training]
