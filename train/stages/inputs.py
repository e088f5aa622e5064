"""The stamp of a run's inputs: what the base's weights and the text held when the run began.

A recipe names files; what lies in them may change between two starts. The stamp is kept in the run
folder, and a run does not go on with other weights or another text.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_models.errors import PostshareError
from sa_models.weights.config_file import read_values
from sa_models.weights.safetensors_folder import WeightsFolder
from train.common.files import file_hash
from train.common.progress import bar

if TYPE_CHECKING:
    from train.data.blocks import Blocks
    from train.recipe.recipe import Recipe

INPUTS_FILE = "inputs.json"
SLOW = 10**9
"""Bytes from which on hashing them shows its progress."""
HELD_OUT = "data.validation."
"""How the keys of texts begin that no weight depends on."""
Stamp = dict[str, dict[str, Any]]
"""What each input held, by its key of the recipe."""

_UNREAD = ("transformers_version", "_name_or_path")
"""Fields of a config.json that change when it is saved again, and decide nothing."""


def stamp_inputs(
    recipe: Recipe,
    base: Path | None,
    teacher: Path | None,
    blocks: tuple[Blocks, Blocks] | None,
    known: Stamp,
) -> Stamp:
    """What the inputs of a command hold now; `known` is the stamp in the run folder.

    Args:
        base, teacher: folders of models; None where there is none.
        blocks: None where the command reads no text.
    """
    models = {"model": base, "distill.teacher": None if teacher == base else teacher}
    stamp = {
        key: stamp_weights(folder, known.get(key, {}))
        for key, folder in models.items()
        if folder is not None
    }
    return stamp if blocks is None else {**stamp, **_stamp_text(recipe, blocks)}


def stamp_weights(folder: Path, known: dict[str, Any]) -> dict[str, Any]:
    """SHA-256 (hex) of each weight file and of what config.json says; where the folder is.

    A file whose size and time of change are those that `known`, an earlier stamp, has of it is not
    read again; nor is one in the cache of the hub, which is named by its hash.
    """
    earlier = known.get("files", {})
    files: dict[str, Any] = {"config.json": {"sha256": _config_hash(folder)}}
    shards = WeightsFolder(folder).shards()
    total, done = sum(shard.stat().st_size for shard in shards), 0
    with bar(f"hashing {folder.name}", of_bytes=True, lines=4, shown=total >= SLOW) as show:
        for shard in shards:
            stat, blob = shard.stat(), shard.resolve()
            looks = {"bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}
            before = earlier.get(shard.name, {})
            if all(before.get(key) == value for key, value in looks.items()):
                digest = before["sha256"]
            elif blob.parent.name == "blobs" and len(blob.name) == 64:
                digest = blob.name
            else:
                digest = file_hash(shard)
            files[shard.name] = {**looks, "sha256": digest}
            show(done := done + stat.st_size, total)
    return {"path": str(folder), "files": files}


def _stamp_text(recipe: Recipe, blocks: tuple[Blocks, Blocks]) -> Stamp:
    """The tokens of each source. Of a streamed validation text: none, as its length may change."""
    data = recipe.data
    uses = [("train", data.train, blocks[0])]
    if not data.streaming:
        uses.append(("validation", data.validation or data.train, blocks[1]))
    stamps: Stamp = {}
    for use, sources, held in uses:
        for index, source in enumerate(sources):
            stamps[f"data.{use}.{index}"] = {"path": source.path, **held.stamp(index)}
    return stamps


def changed(known: Stamp, now: Stamp) -> dict[str, str]:
    """What no longer holds what it held: a phrase for each input, by its key."""
    found = {}
    for key in sorted(known.keys() & now.keys()):
        before, after = known[key], now[key]
        if "files" in after:
            names = sorted(before["files"].keys() | after["files"].keys())
            hashes = [
                [stamp["files"].get(name, {}).get("sha256") for name in names]
                for stamp in (before, after)
            ]
            other = [name for name, a, b in zip(names, *hashes, strict=True) if a != b]
            if other:
                more = f" and {len(other) - 1} other files" if len(other) > 1 else ""
                found[key] = f"{key} {after['path']} has another {other[0]}{more}"
        elif before["tokens_hash"] != after["tokens_hash"]:
            counts = f"{before['tokens']:,} tokens then, {after['tokens']:,} now"
            found[key] = f"{key} {after['path']} reads otherwise: {counts}"
    return found


def read_stamp(folder: Path) -> Stamp:
    """The stamp in a run folder; empty where there is none.

    Raises:
        PostshareError: the file is damaged.
    """
    file = folder / INPUTS_FILE
    if not file.is_file():
        return {}
    try:
        stamp = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): dict(value) for key, value in stamp.items()}
    except (ValueError, AttributeError, TypeError):
        raise PostshareError(
            f"{file} is damaged; delete it to take the inputs as they are now for the run's"
        ) from None


def _config_hash(folder: Path) -> str:
    said = {key: value for key, value in read_values(folder).items() if key not in _UNREAD}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
