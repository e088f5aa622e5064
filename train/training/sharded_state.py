"""The state of a training on disk: ranges of parameters and of their optimizer state.

One safetensors file a writer. A key is a parameter's name (fp32 master weights) or
`<name>.<state key>`; the header's `ranges` says which elements [start, stop) of how many the file
holds of each, and the state keys. A reader takes what its own ranges need from whichever files have
it: what any number of processes of any backend has written, any other reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from sa_models.errors import PostshareError
from sa_models.weights.safetensors_folder import save_tensors

if TYPE_CHECKING:
    from train.distributed.engines.base import Shard


@dataclass(frozen=True)
class Snapshot:
    """Copies on the CPU, of one moment between two steps, of what one rank holds."""

    tensors: dict[str, Tensor]
    ranges: dict[str, dict[str, Any]]

    def write(self, path: Path) -> None:
        """Raises OSError or SafetensorError when it cannot be written."""
        save_tensors(self.tensors, path, metadata={"ranges": json.dumps(self.ranges)})


def take_snapshot(shards: Mapping[str, Shard]) -> Snapshot:
    """Copy the master weights and optimizer state of every range that is not empty.

    Those of a whole parameter have its shape; others are flat.
    """
    tensors: dict[str, Tensor] = {}
    ranges: dict[str, dict[str, Any]] = {}
    for name, shard in shards.items():
        if shard.start == shard.stop:
            continue
        state = shard.read_state()
        shape = shard.shape if shard.whole else torch.Size([shard.stop - shard.start])
        for key, value in {name: shard.values, **_named(name, state)}.items():
            copy = value.detach().to("cpu", copy=True).contiguous()
            tensors[key] = copy.view(shape) if copy.shape == shard.values.shape else copy
        ranges[name] = {
            "start": shard.start,
            "stop": shard.stop,
            "of": shard.shape.numel(),
            "state": sorted(state),
        }
    return Snapshot(tensors, ranges)


def restore(shards: Mapping[str, Shard], files: Sequence[Path]) -> None:
    """Put the master weights and optimizer state of `files` into this rank's shards.

    Call `Engine.restored` afterwards, on all ranks.

    Raises:
        PostshareError: files and shards differ in the names or sizes of parameters, or in what the
            optimizer keeps.
    """
    with ExitStack() as stack:
        held: dict[str, list[_Piece]] = {}
        for path in files:
            handle = stack.enter_context(safe_open(path, framework="pt"))
            for name, entry in json.loads(handle.metadata()["ranges"]).items():
                held.setdefault(name, []).append(_Piece(path, handle, name, entry))
        # A compact layer whose units all lie elsewhere has a weight without elements.
        shards = {name: shard for name, shard in shards.items() if shard.shape.numel()}
        if different := set(held) ^ set(shards):
            raise PostshareError(
                f"{files[0].parent} and this run differ in {sorted(different)[0]}: only one of "
                "them trains it; restore train.trainable, or choose another output_dir"
            )
        for name, shard in shards.items():
            _restore_one(shard, held[name])


class _Piece:
    """What one file holds of one parameter."""

    def __init__(self, path: Path, handle: Any, name: str, entry: dict[str, Any]) -> None:
        self.path, self.handle, self.name = path, handle, name
        self.start, self.stop, self.of = entry["start"], entry["stop"], entry["of"]
        self.state: list[str] = entry["state"]

    def flat(self, key: str, start: int, stop: int) -> Tensor | None:
        """Elements [start, stop) of the parameter's; None where the tensor has another size."""
        view = self.handle.get_slice(key)
        shape = view.get_shape()
        if math.prod(shape) != self.stop - self.start or not shape:
            return None
        row = math.prod(shape[1:])
        first, last = (start - self.start) // row, -(-(stop - self.start) // row)
        skipped = start - self.start - first * row
        return view[first:last].reshape(-1)[skipped : skipped + stop - start]


def _restore_one(shard: Shard, pieces: list[_Piece]) -> None:
    if any(piece.of != shard.shape.numel() for piece in pieces):
        raise PostshareError(
            f"{pieces[0].path}: {shard.name} has {pieces[0].of} elements, the model's has "
            f"{shard.shape.numel()}; choose another output_dir"
        )
    if shard.start == shard.stop:
        return
    values = _collect(shard, pieces, shard.name)
    if values is None:
        raise PostshareError(f"{pieces[0].path}: {shard.name} has another size than its range")
    state = {}
    for key in pieces[0].state:
        full = f"{shard.name}.{key}"
        value = _collect(shard, pieces, full)
        if value is None:  # a scalar, or what 8-bit AdamW keeps of a whole parameter
            value = pieces[0].handle.get_tensor(full)
            if value.dim() and not (shard.whole and len(pieces) == 1):
                raise PostshareError(
                    f"{pieces[0].path}: {full} belongs to a whole parameter and cannot be split; "
                    "continue on one process or with launch/accelerate/ddp.yaml"
                )
        state[key] = value
    shard.restore(values, state)


def _collect(shard: Shard, pieces: list[_Piece], key: str) -> Tensor | None:
    """The shard's range of one tensor, put together from the files that have parts of it."""
    parts, at = [], shard.start
    for piece in sorted(pieces, key=lambda piece: piece.start):
        stop = min(piece.stop, shard.stop)
        if piece.start <= at < stop:
            part = piece.flat(key, at, stop)
            if part is None:
                return None
            parts.append(part)
            at = stop
    if at < shard.stop:
        raise PostshareError(
            f"{pieces[0].path.parent}: no file holds elements {at} to {shard.stop} of {key}; "
            "delete the folder to start from an earlier one"
        )
    return torch.cat(parts)


def _named(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in state.items()}
