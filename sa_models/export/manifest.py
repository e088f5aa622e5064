"""The manifest of an exported folder: what it was made from, and the hash of every file.

``manifest.json`` is written last, with the model card (``README.md``): a folder that has one is
finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sa_models.atomic_files import flush, write_json, write_text
from sa_models.errors import PostshareError
from sa_models.export.model_card import model_card
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.savings import PlanSavings

MANIFEST = "manifest.json"
CARD = "README.md"
WRITTEN_RECIPE = "recipe-as-written.yaml"
"""Not recipe.yaml, by which a run folder is known."""
VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What, with the source's weights, decides every byte of the exported tensors."""

    plan_sha256: str
    merge: str
    dtype: str
    shard_bytes: int
    leaders: str | None = None
    """How the leaders of ``kv`` spans were initialized, where there are any."""
    residual_sha256: str | None = None
    """Of the residuals' values before they were rounded to ``dtype``, where there are any."""
    gguf: str | None = None
    """The type of the matrices, in the folder of a GGUF file."""


def describe(
    kind: str,
    plan: SharingPlan,
    savings: PlanSavings,
    identity: Identity,
    parameters: int,
    nbytes: int,
    stock: HeadLayout | None = None,
) -> dict[str, Any]:
    """The part of the manifest that the plan and the base's config decide.

    Args:
        parameters, nbytes: stored in the folder.
        stock: of the dense form, where it has fewer heads.
    """
    size = {"float32": 4}.get(identity.dtype, 2)
    return {
        "version": VERSION,
        "format": kind,
        **asdict(identity),
        "tensors": {
            "parameters": parameters,
            "bytes": nbytes,
            "base_parameters": savings.base_parameters,
            "base_bytes": savings.base_parameters * size,
        },
        "heads": {
            "total": savings.heads,
            "tied": savings.tied_heads,
            "removed": savings.removed_heads,
            "dropped_layers": savings.dropped_layers,
            "effective_ratio": savings.effective_ratio,
            "stored_ratio": savings.stored_ratio,
        },
        "stock": None
        if stock is None
        else {
            "architecture": stock.stock_class,
            "heads": stock.heads,
            "kv_heads": stock.kv_heads,
            "tensor_parallel": stock.tensor_parallel,
        },
        "cache": {
            "bytes_per_token": savings.stored_cache * size,
            "base_bytes_per_token": savings.base_cache * size,
        },
        "dropped": sorted(HeadLayout.parameter_name(*where) for where in plan.absent()),
        "plan": plan.to_dict(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("postshare", "torch", "transformers")},
            "safetensors": _version("safetensors"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return None


def seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush every file to the disk. Returns {name: {"bytes", "sha256"}}."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _seal_file(path) for path in files}


def _seal_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_manifest(
    folder: Path,
    facts: Mapping[str, Any],
    files: Mapping[str, Any],
    source_shards: list[Path],
    notes: Mapping[str, Any],
) -> None:
    """Write the model card and the manifest, durably.

    Args:
        facts: from :func:`describe`.
        files: from :func:`seal`.
        source_shards: the files that the weights were read from.
        notes: see :func:`sa_models.export.export.export_model`.
    """
    manifest = {**facts, "source": _state(source_shards), "notes": dict(notes)}
    write_text(folder / CARD, model_card(manifest))
    manifest["files"] = {**files, CARD: _seal_file(folder / CARD)}
    write_json(folder / MANIFEST, manifest)


def update_notes(folder: str | os.PathLike[str], notes: Mapping[str, Any]) -> None:
    """Rewrite the model card of a finished folder with new notes (numbers measured since).

    Args:
        notes: replaces those of the same name, keeps the others.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    manifest["notes"] = {**manifest["notes"], **notes}
    write_text(folder / CARD, model_card(manifest))
    manifest["files"][CARD] = _seal_file(folder / CARD)
    write_json(folder / MANIFEST, manifest)


def read_manifest(
    folder: Path, cure: str = "give the folder of one, such as RUN/export/compact"
) -> dict[str, Any]:
    """Raises PostshareError, with the cure, when the folder is no finished export."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] == VERSION:
            return manifest
        reason = f"manifest version {manifest['version']!r}"
    except (OSError, ValueError, KeyError, TypeError):
        reason = f"it has no readable {MANIFEST}"
    raise PostshareError(f"{folder} is no finished export ({reason}); {cure}")


def recognize(folder: Path, identity: Identity, source_shards: list[Path]) -> bool:
    """Whether a finished folder was made from these very source files.

    False means that the source files have other sizes or times: the weights may still be equal.

    Raises:
        PostshareError: the folder is no finished export, one of another plan, merge, dtype or
            shard size, or a file of it is gone.
    """
    manifest = read_manifest(folder, "choose another folder or delete it")
    for key, value in asdict(identity).items():
        if manifest.get(key) != value:
            raise PostshareError(
                f"{folder} holds another export ({key} {manifest.get(key)!r}, not {value!r}); "
                "choose another folder or delete it"
            )
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise PostshareError(
                f"{path} is missing or has another size than its manifest says; "
                f"delete {folder} and export again"
            )
    return manifest["source"] == _state(source_shards)


def _state(files: list[Path]) -> dict[str, list[int]]:
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
