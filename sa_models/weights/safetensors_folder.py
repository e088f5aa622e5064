"""Safetensors folders, read lazily and written shard by shard.

Nothing here holds a whole model: a reader maps a file for as long as a tensor read from it lives, a
writer keeps at most one shard in memory. Every problem of a folder is found before its first tensor
is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from sa_models.atomic_files import follow_umask
from sa_models.errors import PostshareError
from sa_models.weights.parameter_shapes import llama_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_model_type(folder: str | os.PathLike[str]) -> str | None:
    """The ``model_type`` in the folder's config.json. Raises PostshareError when there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise PostshareError(
            f"{folder} has no config.json; give the folder of a Hugging Face Llama, or a hub name"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise PostshareError(f"{path} is not valid JSON ({error}); copy it again") from None


def read_config(folder: str | os.PathLike[str], model_type: str = "llama") -> LlamaConfig:
    """The folder's config.

    Raises:
        PostshareError: there is no readable ``config.json``, or it is not that of a Llama.
    """
    found = read_model_type(folder)
    if found != model_type:
        raise PostshareError(
            f"{folder} holds a {found!r} model; only the Llama architecture "
            f"(model_type {model_type!r}) can be used here"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise PostshareError(
            f"{Path(folder) / 'config.json'} is not a valid Llama config ({reason}); repair it"
        ) from None


class WeightsFolder:
    """The safetensors of a model folder: one file, or shards with an index.

    Args:
        path: local folder with ``config.json`` and safetensors.
        attention_only: check and expect only q, k, v and o (for matching heads, which needs
            nothing else).

    Raises:
        PostshareError: no safetensors, a missing, truncated or corrupt shard, or a config that
            disagrees with the weights (a name or a shape).
    """

    def __init__(self, path: str | os.PathLike[str], attention_only: bool = False) -> None:
        self.path = Path(path)
        self.config = self._read_config()
        self._shard_of = self._read_index()
        self._check_shards()
        expected = self._expected_shapes()
        if attention_only:
            expected = {name: s for name, s in expected.items() if ".self_attn." in name}
        self._check_against(expected)
        self._names = [name for name in expected if name in self._shard_of]

    def _read_config(self) -> LlamaConfig:
        return read_config(self.path)

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        return llama_shapes(self.config)

    def names(self) -> list[str]:
        """The model's parameter names, layer by layer."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._shapes[name][1]

    def shards(self) -> list[Path]:
        return [self.path / shard for shard in sorted(set(self._shard_of.values()))]

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, backed by the mapped file."""
        return self._handle(self._shard_of[name]).get_tensor(name)

    def slice(self, name: str) -> Any:
        """A safetensors slice: index it to read a part only."""
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
            raise _unreadable(self.path / shard, error) from None

    def _read_index(self) -> dict[str, str]:
        index = self.path / INDEX
        if index.is_file():
            try:
                shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError):
                shard_of = {}
            if not shard_of or not all(isinstance(shard, str) for shard in shard_of.values()):
                raise PostshareError(
                    f"{index} is not a valid safetensors index; download the file again"
                )
            return shard_of
        single = self.path / SINGLE
        if not single.is_file():
            other = sorted(self.path.glob("*.bin"))
            cure = (
                "convert them to safetensors"
                if other
                else f"put {SINGLE}, or shards with {INDEX}, into the folder"
            )
            found = f"only {other[0].name} (pickle) weights" if other else "no weights"
            raise PostshareError(f"{self.path} has {found}; {cure}")
        return dict.fromkeys(_keys(single), SINGLE)

    def _check_shards(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for shard in sorted(set(self._shard_of.values())):
            path = self.path / shard
            if not path.is_file():
                raise PostshareError(f"the shard {path} is missing; download or copy it again")
            inside = _headers(path)
            for name in (n for n, s in self._shard_of.items() if s == shard):
                if name not in inside:
                    raise PostshareError(
                        f"the index puts {name} into {path}, which does not hold it; "
                        "download the index and the shards again"
                    )
                self._shapes[name] = inside[name]

    def _check_against(self, expected: dict[str, tuple[int, ...]]) -> None:
        for name, shape in expected.items():
            if name not in self._shapes:
                raise PostshareError(
                    f"{self.path} has no weight {name}, which its config.json asks for; "
                    "use the config that belongs to these weights"
                )
            if self._shapes[name][0] != shape:
                raise PostshareError(
                    f"{self.path}: {name} has shape {list(self._shapes[name][0])}, its "
                    f"config.json says {list(shape)}; use the config that belongs to these weights"
                )
        known = set(self._expected_shapes()) | {"lm_head.weight"}
        for name in self._shapes:
            if name not in known and not name.endswith("rotary_emb.inv_freq"):
                raise PostshareError(
                    f"{self.path} holds {name}, which a Llama of its config.json does not have; "
                    "use the config that belongs to these weights"
                )


def _keys(path: Path) -> list[str]:
    return list(_headers(path))


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    try:
        with safe_open(path, framework="pt") as handle:
            found = {}
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                view = handle.get_slice(name)
                dtype = view.get_dtype()
                if dtype not in DTYPES:
                    raise PostshareError(
                        f"{path}: {name} is stored as {dtype}; use fp32, bf16 or fp16 weights"
                    )
                found[name] = (tuple(view.get_shape()), DTYPES[dtype])
            return found
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> PostshareError:
    reason = " ".join(str(error).split())
    return PostshareError(f"{path} is truncated or corrupt ({reason}); download or copy it again")


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
