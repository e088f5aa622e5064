"""Safetensors folders, read lazily and written shard by shard.

Nothing here holds a whole model: a reader maps a file for as long as a tensor read from it lives, a
writer keeps at most one shard in memory. Every problem of a folder but a value that is no number is
found before its first tensor is used.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from sa_models.atomic_files import follow_umask
from sa_models.errors import PostshareError
from sa_models.weights.config_file import quantization_of, read_config
from sa_models.weights.parameter_shapes import llama_shapes
from sa_models.weights.safetensors_files import (
    INDEX,
    SINGLE,
    find_shards,
    misnamed,
    read_header,
    read_index,
    unreadable,
)

ADAPTER = "adapter_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COMPARED = 1 << 24
"""Elements of two tensors that are compared at a time."""
SETTLED_NS = 2_000_000_000
"""Age of a file in nanoseconds from which its time stamp tells it from the one before it."""


class WeightsFolder:
    """The safetensors of a model folder: one file, or shards with an index.

    Args:
        path: local folder with ``config.json`` and safetensors.
        attention_only: check and expect only q, k, v and o (for matching heads, which needs
            nothing else).

    Raises:
        PostshareError: no safetensors, a missing, truncated or corrupt shard, a config that cannot
            be built or disagrees with the weights (a name, a shape, a head that is tied and other
            than the embedding).
    """

    def __init__(self, path: str | os.PathLike[str], attention_only: bool = False) -> None:
        self.path = Path(path)
        self.config = self._read_config()
        self._shard_of = find_shards(self.path)
        self._check_shards()
        expected = self._expected_shapes()
        if attention_only:
            expected = {name: s for name, s in expected.items() if ".self_attn." in name}
        self._check_against(expected)
        self._check_tied_head()
        self._names = [name for name in expected if name in self._shard_of]

    def _read_config(self) -> LlamaConfig:
        return read_config(self.path)

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        return llama_shapes(self.config)

    def notes(self) -> list[str]:
        """What lies in the folder and is not read, a line each, for the user."""
        found = []
        if (self.path / ADAPTER).is_file():
            found.append(
                f"note: {self.path} has an adapter ({ADAPTER}), which is not applied: the weights "
                "are read as they are; if it belongs to them, merge it with PEFT's "
                "merge_and_unload()"
            )
        if (method := quantization_of(self.path)) is not None:
            found.append(
                f"note: {self.path / 'config.json'} asks for quantization ({method}), and the "
                "weights are not quantized: they are read as they are"
            )
        index = self.path / INDEX
        if set(self._shard_of.values()) == {SINGLE} and index.is_file():
            others = sorted(set(read_index(index).values()) - {SINGLE})
            if others:
                found.append(
                    f"note: {self.path} has {SINGLE} and an index of other files ({others[0]}): "
                    f"{SINGLE} is read, as in transformers"
                )
        return found

    def names(self) -> list[str]:
        """The model's parameter names, layer by layer."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def shards(self) -> list[Path]:
        return [self.path / shard for shard in sorted(set(self._shard_of.values()))]

    def left_over(self) -> int:
        """Bytes of what the files hold and the model has not: a tied head, old rotary tables."""
        others = self._stored.keys() - set(self._names)
        return sum(math.prod(self.shape(n)) * self.dtype(n).itemsize for n in others)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, backed by the mapped file.

        Raises:
            PostshareError: it has a value that is no finite number.
        """
        tensor = self._handle(self._shard_of[name]).get_tensor(name)
        require_finite(tensor, f"{self.path / self._shard_of[name]}: {name}")
        return tensor

    def slice(self, name: str) -> Any:
        """A safetensors slice: index it to read a part only, unchecked."""
        return self._handle(self._shard_of[name]).get_slice(name)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._names:
            yield name, self.read(name)

    def _handle(self, shard: str) -> Any:
        # Opened anew each time (about 1 ms): a mapping that outlives its tensors would keep every
        # page that was ever touched resident.
        try:
            return safe_open(self.path / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise unreadable(self.path / shard, error) from None

    def _check_shards(self) -> None:
        shards = sorted(set(self._shard_of.values()))
        inside = {shard: read_header(self.path / shard) for shard in shards}
        for name, home in self._shard_of.items():
            if name not in inside[home]:
                raise PostshareError(
                    f"the index puts {name} into {self.path / home}, which does not hold it; "
                    "download the index and the shards again"
                )
        self._stored = {name: inside[home][name] for name, home in self._shard_of.items()}
        for shard in shards:
            for name in inside[shard].keys() & self._shard_of.keys():
                places = [(self.path / s, name) for s in {shard, self._shard_of[name]}]
                if len(places) == 2 and not same_values(*places):
                    raise PostshareError(
                        f"{name} is in {places[0][0]} and, with other values, in {places[1][0]}; "
                        "download the index and the shards again"
                    )

    def _check_against(self, expected: dict[str, tuple[int, ...]]) -> None:
        fitting = "use the config that belongs to these weights"
        for name, shape in expected.items():
            if name not in self._stored:
                raise PostshareError(
                    f"{self.path} has no weight {name}, which its config.json asks for; "
                    f"{misnamed(self._stored, name) or fitting}"
                )
            if self.shape(name) != shape:
                raise PostshareError(
                    f"{self.path}: {name} has shape {list(self.shape(name))}, its "
                    f"config.json says {list(shape)}; {fitting}"
                )
        known = set(self._expected_shapes()) | {HEAD}
        for name in self._stored:
            if name not in known and not name.endswith("rotary_emb.inv_freq"):
                raise PostshareError(
                    f"{self.path} holds {name}, which a Llama of its config.json does not have; "
                    f"{fitting}"
                )

    def _check_tied_head(self) -> None:
        if not self.config.tie_word_embeddings or not {HEAD, EMBEDDING} <= self._stored.keys():
            return
        head, embedding = ((self.path / self._shard_of[n], n) for n in (HEAD, EMBEDDING))
        if self.shape(HEAD) != self.shape(EMBEDDING) or not same_values(head, embedding):
            raise PostshareError(
                f"{self.path}: config.json ties the head to the embedding, and the {HEAD} that is "
                f"stored is another than {EMBEDDING}; set tie_word_embeddings: false there"
            )


def require_finite(tensor: torch.Tensor, where: str) -> None:
    """Raises PostshareError, naming the first, where a tensor has values that are no numbers."""
    if tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax()):
        return
    wrong = ~tensor.isfinite()
    first = wrong.nonzero()[0].tolist()
    raise PostshareError(
        f"{where} has {int(wrong.sum()):,} of {tensor.numel():,} values that are no finite numbers "
        f"(the first at {first}: {float(tensor[tuple(first)])}); download the file again, or use a "
        "model that was saved before it broke"
    )


Place = tuple[Path, str]
"""A safetensors file, and a tensor in it."""


def same_values(one: Place, other: Place) -> bool:
    """Whether two tensors of one shape hold the same values, in whatever dtypes."""
    changed = [path.stat().st_ctime_ns for path, _ in (one, other)]
    stamped = [(*place, stamp) for place, stamp in zip((one, other), changed, strict=True)]
    # A file may be written twice in one tick of its file system's clock: only later is a stamp one.
    settled = time.time_ns() - max(changed) > SETTLED_NS
    return (_same_values if settled else _same_values.__wrapped__)(*stamped)


@lru_cache(maxsize=16)
def _same_values(*places: tuple[Path, str, int]) -> bool:
    handles = [safe_open(path, framework="pt") for path, _, _ in places]
    one, other = (h.get_slice(place[1]) for h, place in zip(handles, places, strict=True))
    shape = one.get_shape()
    if shape != other.get_shape():
        return False
    step = max(1, COMPARED // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0] if shape else 0, step):
        a, b = (view[start : start + step].nan_to_num() for view in (one, other))
        kind = torch.promote_types(a.dtype, b.dtype)
        if not torch.equal(a.to(kind), b.to(kind)):
            return False
    return True


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read as the umask says.

    Raises:
        OSError or SafetensorError: it cannot be written.
    """
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    follow_umask(path)


class ShardWriter:
    """Write tensors one at a time into safetensors shards of bounded size.

    Shards get their final names in :meth:`close`, when their number is known. One shard becomes
    ``model.safetensors``; several get an index, as transformers writes them.

    Args:
        folder: an existing folder.
        max_shard_bytes: a shard is closed before it would exceed this (a larger single tensor
            gets a shard of its own).
    """

    def __init__(self, folder: str | os.PathLike[str], max_shard_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue a tensor; writes the shard that is full, if any."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> list[Path]:
        """Write what is left, name the shards, write the index. Returns the weight files."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            os.replace(self._part(0), self.folder / SINGLE)
            return [self.folder / SINGLE]
        count = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            os.replace(self._part(i), self.folder / name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {
                key: names[i] for i, keys in enumerate(self._shards) for key in sorted(keys)
            },
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return [self.folder / name for name in names]

    def _part(self, i: int) -> Path:
        return self.folder / f"model-{i + 1:05d}.part.safetensors"

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        save_tensors(self._pending, path, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
