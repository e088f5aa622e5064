"""Scores that `postshare evaluate RUN` leaves in the run folder for its report: one entry a task.

A later call replaces the tasks that it measures and keeps the others. An entry names the weights
that it was measured on, so that it is never taken for numbers of a later export.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_models.atomic_files import write_json
from sa_models.errors import PostshareError
from sa_models.export.manifest import read_manifest
from train.common.run_files import SCORES_FILE
from train.evaluation.models import export_of
from train.evaluation.score import Score
from train.evaluation.table import as_models

VERSION = 1


def export_hash(run: Path) -> str | None:
    """One hash for the weights of a run's export, from its manifest; None where there is none."""
    try:
        export = export_of(run)
        files = None if export is None else read_manifest(export)["files"]
    except PostshareError:
        return None
    if files is None:
        return None
    hashes = [files[name]["sha256"] for name in sorted(files) if name.endswith(".safetensors")]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def add_scores(
    run: Path, scores: Mapping[str, Sequence[Score]], facts: Mapping[str, Any]
) -> Path | None:
    """Write the scores of a run's models into its folder; None where its export has no manifest.

    Args:
        scores: of each model; the first is the reference.
        facts: of the call, kept with each task.
    """
    weights = export_hash(run)
    if weights is None:
        return None
    file = run / SCORES_FILE
    tasks = _kept(file, weights)
    for task in dict.fromkeys(score.task for score in next(iter(scores.values()))):
        own = {name: [s for s in every if s.task == task] for name, every in scores.items()}
        tasks[task] = {**facts, "models": as_models(own)}
    write_json(file, {"version": VERSION, "export": weights, "tasks": tasks})
    return file


def _kept(file: Path, weights: str) -> dict[str, Any]:
    """Entries of the same weights that a file has; none where it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        known = value["version"] == VERSION and value["export"] == weights
        return dict(value["tasks"]) if known else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
