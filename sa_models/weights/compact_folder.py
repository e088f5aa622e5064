"""Compact folders, read tensor by tensor: as they are stored, and as the dense Llama they equal.

:class:`ExpandedFolder` puts shared units back everywhere they are used, and zeros where units were
removed (of a dropped layer also its norm, all ones). It reads like a
:class:`~sa_models.weights.safetensors_folder.WeightsFolder`, holds one tensor at a time, and knows
nothing of modules: the arithmetic of where a unit lies is written here a second time, so that
comparing it with
:class:`~sa_models.materialize.reader.MaterializedReader` verifies an export.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import LlamaConfig

from sa_models.basis import FACTORED, basis_name, coefficients_name
from sa_models.configuration import SharedLlamaConfig
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.weights.config_file import read_config, read_model_type
from sa_models.weights.parameter_shapes import compact_shapes, expanded_shapes
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.uneven_heads import config_class

LAST_NORM = "model.norm.weight"
"""A tensor that every folder stores."""


class DenseReader(Protocol):
    """Dense Llama weights by name, in the order of the layers."""

    path: Path
    config: LlamaConfig

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> torch.Tensor: ...
    def slice(self, name: str) -> Any: ...
    def shards(self) -> list[Path]: ...


def open_weights(path: str | os.PathLike[str]) -> WeightsFolder | ExpandedFolder:
    """Open a dense or a compact folder as dense weights. Raises PostshareError as they do."""
    if read_model_type(path) == SharedLlamaConfig.model_type:
        return ExpandedFolder(path)
    return WeightsFolder(path)


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in ``dtype``. Raises PostshareError where fp16 would turn a value infinite."""
    value = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(value).all()):
        raise PostshareError(
            f"{name} has values that float16 cannot hold; export with dtype bfloat16 or float32"
        )
    return value


def features_of(view: Any, axis: int, start: int, stop: int) -> torch.Tensor:
    """Rows (axis 1: columns) ``start`` to ``stop`` (exclusive) of a projection or its slice."""
    return view[:, start:stop] if axis else view[start:stop]


class CompactFolder(WeightsFolder):
    """The safetensors of a compact folder as they are stored: own units only.

    Raises:
        PostshareError: as :class:`~sa_models.weights.safetensors_folder.WeightsFolder`; or a plan
        that does not fit.
    """

    config: SharedLlamaConfig

    def _read_config(self) -> SharedLlamaConfig:
        config = read_config(self.path, SharedLlamaConfig.model_type)
        assert isinstance(config, SharedLlamaConfig)
        return config

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        return compact_shapes(self.config, self.config.plan)


class Run(NamedTuple):
    """Consecutive features ``start:stop`` of a dense projection, stored from ``first`` on in the
    compact tensor of layer ``owner``."""

    owner: int
    start: int
    stop: int
    first: int

    def continues(self, owner: int, start: int, first: int) -> bool:
        """Whether features from ``start`` on, stored there, go on where this run ends."""
        return (owner, start, first) == (self.owner, self.stop, self.first + self.stop - self.start)


class ExpandedFolder:
    """A compact folder read as the dense Llama that it equals (with spans: without what followers
    do not have).

    Of a plan with a basis the dense weights are the products of the factors, computed in float64
    and rounded once: they equal what the two factors compute to rounding.

    Args:
        dtype: that the stored tensors are rounded to before anything is made of them; None: as they
            are stored.

    Attributes:
        files: the compact tensors as they are stored.
        plan: the plan of its config.
        config: the dense ``LlamaConfig``.

    Raises:
        PostshareError: as :class:`CompactFolder`.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        self.path = Path(path)
        self._dtype = dtype
        self.files = CompactFolder(path)
        self.plan = self.files.config.plan
        self.config = dense_config(self.files.config)
        self._layout = HeadLayout.from_config(self.config)
        self._shapes = expanded_shapes(self.config, self.plan)
        self._source_of = self.plan.sources()
        self._removed = set(self.plan.removed)
        self._own = self.plan.own_units(self._layout)
        self._lost = self.plan.dropped_names(self._layout)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        stored = LAST_NORM if name in self._lost else (self.factor_names(name) or (name,))[0]
        return self._dtype or self.files.dtype(stored)

    def shards(self) -> list[Path]:
        return self.files.shards()

    def read(self, name: str) -> torch.Tensor:
        """The dense tensor, in the dtype of the folder or of this reader."""
        if self.factor_names(name) is not None:
            return self.product(name).to(self.dtype(name))
        where = HeadLayout.parse_name(name)
        if where is None and name in self._lost:
            return torch.ones(self.shape(name), dtype=self.dtype(name))
        if where is None or (name not in self._lost and self.files.shape(name) == self.shape(name)):
            return self.stored(name)
        return self._assemble(*where, 0, self._layout.units)

    def stored(self, name: str) -> torch.Tensor:
        """A compact tensor. Raises PostshareError when float16 cannot hold it."""
        tensor = self.files.read(name)
        return tensor if self._dtype is None else cast(tensor, self._dtype, name)

    def product(self, name: str) -> torch.Tensor:
        """The product of a dense weight's factors, float64."""
        coefficients, basis = (self.stored(n).double() for n in self.factor_names(name) or ())
        return coefficients @ basis

    def factor_names(self, name: str) -> tuple[str, str] | None:
        """Coefficients and basis of a dense weight, by their names; None where it is stored."""
        where = HeadLayout.parse_name(name)
        if self.plan.basis is None or where is None or where[1] not in FACTORED:
            return None
        first, _ = self.plan.basis.place(*where)
        return coefficients_name(*where), basis_name(first, where[1])

    def slice(self, name: str) -> Any:
        """As ``safetensors``' slice: index it to read a part only (whole units are read)."""
        where = HeadLayout.parse_name(name)
        made = self.factor_names(name) is not None or (where is None and name in self._lost)
        if self._dtype is not None or made:
            return self.read(name)
        return self.files.slice(name) if where is None else _ExpandedSlice(self, *where)

    def _assemble(self, layer: int, projection: str, first: int, last: int) -> torch.Tensor:
        """The rows (o: columns) of units ``first`` to ``last`` (exclusive); zeros of removed."""
        axis = self._layout.axis(projection)
        runs = self._runs(layer, projection, first, last)
        shape = list(self._layout.shape(projection))
        shape[axis] = (last - first) * self._layout.width(projection)
        name = self._layout.parameter_name(layer, projection)
        dense = torch.zeros(shape, dtype=self.dtype(name))
        stored = {
            owner: self.files.slice(self._layout.parameter_name(owner, projection))
            for owner in {run.owner for run in runs}
        }
        for owner, start, stop, begin in runs:
            part = features_of(stored[owner], axis, begin, begin + stop - start)
            dense.narrow(axis, start, stop - start).copy_(cast(part, dense.dtype, name))
        return dense

    def _runs(self, layer: int, projection: str, first: int, last: int) -> list[Run]:
        width = self._layout.width(projection)
        runs: list[Run] = []
        for unit in range(first, last):
            if (layer, unit) in self._removed:
                continue
            owner, stored = self._source_of.get((layer, unit, projection), (layer, unit))
            start = (unit - first) * width
            at = self._own[owner][projection].index(stored) * width
            last_run = runs[-1] if runs else None
            if last_run and last_run.continues(owner, start, at):
                runs[-1] = last_run._replace(stop=start + width)
            else:
                runs.append(Run(owner, start, start + width, at))
        return runs


class _ExpandedSlice:
    """Part of one expanded projection: ``[start:stop]`` of q, k, v, ``[:, start:stop]`` of o."""

    def __init__(self, folder: ExpandedFolder, layer: int, projection: str) -> None:
        self._folder, self._where = folder, (layer, projection)
        self._width = folder._layout.width(projection)
        self._axis = folder._layout.axis(projection)
        self._features = folder._layout.units * self._width

    def __getitem__(self, key: slice | tuple[slice, slice]) -> torch.Tensor:
        if isinstance(key, tuple) != bool(self._axis):
            raise IndexError(f"{self._where}: only whole features can be sliced, not {key}")
        start, stop, _ = (key[1] if isinstance(key, tuple) else key).indices(self._features)
        first, last = start // self._width, -(-stop // self._width)
        part = self._folder._assemble(*self._where, first, last)
        return part.narrow(self._axis, start - first * self._width, stop - start)


DROPPED = ("model_type", "auto_map", "sharing", "reuse_rows", "packed", "transformers_version")


def dense_config(config: LlamaConfig) -> LlamaConfig:
    """The stock ``LlamaConfig`` of a compact model's config (or a copy of a dense one's)."""
    values = config.to_dict()
    for key in DROPPED:
        values.pop(key, None)
    values["architectures"] = ["LlamaForCausalLM"]
    return config_class(values)(**values)
