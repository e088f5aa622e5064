"""The evaluation of a run in wandb, and its exports with what they come from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_models.atomic_files import write_json
from train.data.local.files import STDLIB
from train.demo import DEMO_BASE
from train.demo.smollm2 import SMOLLM2
from train.tracking.dashboard_panels import evaluation_values
from train.tracking.wandb_run import CLOSING_SECONDS, EVALUATE, WandbRun, wandb_mode

if TYPE_CHECKING:
    from sa_models.plan import SharingPlan
    from train.recipe.recipe import Recipe

HUB = "https://huggingface.co"
OUTCOME_FILE = "wandb.json"
"""In a run folder: the wandb run of the outcome, and the hash of what it was told."""
UPLOAD_SECONDS = 3 * 3600.0
"""How long hashing and sending the exports may take; other ranks wait for four hours."""


def log_outcome(
    recipe: Recipe,
    group: str,
    plan: SharingPlan,
    summary: dict[str, Any] | None,
    exports: Mapping[str, Path],
) -> None:
    """Write a run of job type `evaluate`, unless this was told before. The main process alone.

    Its summary holds the numbers of ``summary.json``. With `wandb.upload` every export is an
    artifact of type model; online, base, data and plan are its inputs.

    Args:
        group: of the run, see :func:`train.tracking.wandb_run.plan_group`.
        summary: of ``summary.json``; None: the run shares nothing and has none.
        exports: folder of each kind.
    """
    section = recipe.wandb
    mode = wandb_mode(section)
    uploads = {k: f for k, f in exports.items() if f.is_dir()} if section.upload else {}
    if mode == "disabled" or (summary is None and not uploads):
        return
    values = evaluation_values(summary or {})
    origin = lineage(recipe, plan)
    told = [values, mode, origin, {k: _manifest(f) for k, f in uploads.items()}]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    file = recipe.folder / OUTCOME_FILE
    earlier = _read(file)
    if earlier.get("told") == digest:
        return
    run = WandbRun(EVALUATE, recipe, recipe.folder, group, earlier.get("run_id"))

    def tell(live: Any) -> None:
        live.summary.update(values)
        if uploads and mode == "online":
            for artifact in inputs(recipe, plan):
                live.use_artifact(artifact)
        for kind, folder in uploads.items():
            live.log_artifact(output(recipe, kind, folder, origin | values))

    seconds = UPLOAD_SECONDS if uploads else CLOSING_SECONDS
    run.act(tell, seconds)
    run.close(failed=False, seconds=seconds)
    if run.alive:
        write_json(file, {"run_id": run.run_id, "told": digest})


def lineage(recipe: Recipe, plan: SharingPlan) -> dict[str, Any]:
    """What the exports come from, as metadata: an offline run can have no input artifacts."""
    return {
        "recipe": recipe.name,
        "base_model": recipe.model.path,
        "base_revision": recipe.model.revision,
        "data": [source.path for source in recipe.data.train],
        "plan_sha256": plan.hash() if recipe.plans else None,
    }


def inputs(recipe: Recipe, plan: SharingPlan) -> list[Any]:
    """Artifacts of what the exports come from: base and data by reference, the plan as a file."""
    import wandb

    model, made = recipe.model, []
    if model.config is None:
        metadata: dict[str, Any] = {"revision": model.revision}
        made.append(_reference("model", model.path, f"{HUB}/{model.path}", metadata))
    for source in recipe.data.train:
        metadata = source.model_dump(mode="json")
        hub = f"{HUB}/datasets/{source.path}"
        made.append(_reference("dataset", source.path, hub, metadata))
    if recipe.plans:
        stored = wandb.Artifact(f"{recipe.name}-plan", "plan", metadata={"sha256": plan.hash()})
        stored.add_file(str(recipe.folder / "plan.json"))
        made.append(stored)
    return made


def output(recipe: Recipe, kind: str, folder: Path, metadata: dict[str, Any]) -> Any:
    """The artifact of an export; its files are read where they are, not copied first."""
    import wandb

    made = wandb.Artifact(f"{recipe.name}-{kind}", "model", metadata=metadata | {"format": kind})
    made.add_dir(str(folder), policy="immutable", skip_cache=True)
    return made


def _reference(kind: str, path: str, hub: str, metadata: dict[str, Any]) -> Any:
    """An artifact that says where something is: here, on the hub, or among what is shipped."""
    import wandb

    # A name may have letters, digits, dots, dashes and underscores.
    name = re.sub(r"[^\w.-]+", "-", path).strip("-")[-100:]
    made = wandb.Artifact(name, kind, metadata={"path": path, **metadata})
    local = Path(path).expanduser()
    if path not in (DEMO_BASE, SMOLLM2, STDLIB):
        address = local.resolve().as_uri() if local.exists() else hub
        made.add_reference(address, name=kind, checksum=False)
    return made


def _read(file: Path) -> dict[str, Any]:
    """What was told; where that cannot be read, it is told again, in another wandb run."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _manifest(folder: Path) -> str:
    """Of what an export holds: its manifest has the hash of every file."""
    file = folder / "manifest.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
