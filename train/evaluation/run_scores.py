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
from train.common.run_files import SCORES_FILE, SEARCH_FILE
from train.evaluation.figures import DecodeRatio
from train.evaluation.models import export_of
from train.evaluation.score import Score, as_models
from train.evaluation.speed import TASK as SPEED

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
    run: Path,
    scores: Mapping[str, Sequence[Score]],
    facts: Mapping[str, Any],
    formats: Sequence[Mapping[str, Any]] = (),
) -> Path | None:
    """Write the scores of a run's models into its folder; None where its export has no manifest.

    Args:
        scores: of each model; the first is the reference.
        facts: of the call, kept with each task.
        formats: see :func:`~train.evaluation.formats.format_rows`; kept with the speed.
    """
    weights = export_hash(run)
    if weights is None:
        return None
    file = run / SCORES_FILE
    tasks = _kept(file, weights)
    for task in dict.fromkeys(score.task for score in next(iter(scores.values()))):
        own = {name: [s for s in every if s.task == task] for name, every in scores.items()}
        tasks[task] = {**facts, "models": as_models(own)}
    if formats:
        tasks[SPEED]["formats"] = [*formats]
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


# --- decoding -------------------------------------------------------------------------------------


def measured_decode(run: Path) -> DecodeRatio | None:
    """What a run folder says of the time to decode with its export; None where it says nothing.

    `postshare evaluate RUN --tasks speed` times the export itself; else the search of strategy auto
    has timed its plan, untrained.
    """
    weights = export_hash(run)
    scores = {} if weights is None else _kept(run / SCORES_FILE, weights)
    try:
        search = json.loads((run / SEARCH_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        search = None
    return decode_ratio(scores, search)


def decode_ratio(scores: Mapping[str, Any], search: Any) -> DecodeRatio | None:
    """As :func:`measured_decode`.

    Args:
        scores: entries of ``task-scores.json`` by task, of the export that is there now.
        search: the value of ``plan-search.json``, if any.
    """
    if SPEED in scores:
        entry = scores[SPEED]
        shipped = entry["models"][-1]["scores"]
        faster = next(s["change"] for s in shipped if s["metric"] == "decode tokens/s")
        low, high = (1 / (1 + change) for change in reversed(faster["interval"]))
        return DecodeRatio(1 / (1 + faster["value"]), f"{entry['dtype']}, batch 1", (low, high))
    if not isinstance(search, dict) or search.get("decoding_noisy", True):
        return None
    chosen = [timed for timed in search.get("decoding", []) if timed.get("chosen")]
    if not chosen:
        return None
    ratio, half = chosen[0]["over_dense"], chosen[0]["spread"]
    return DecodeRatio(ratio, "float32, batch 1, untrained", (ratio - half, ratio + half))
