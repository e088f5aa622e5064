"""Quantized folders, read as what their weights stand for. Needs no torchao.

See :mod:`sa_models.export.quantize` for how they are made.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.configuration import SharedLlamaConfig
from sa_models.errors import PostshareError
from sa_models.weights.config_file import quantization_of, read_config, read_model_type
from sa_models.weights.parameter_shapes import compact_shapes, llama_shapes
from sa_models.weights.safetensors_files import DTYPES, SINGLE
from sa_models.weights.whole_model import load_whole

PACKED = {"Int8Tensor": 1, "Int4Tensor": 2}
"""torchao's tensors that are read here: weights in a byte."""
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}


def is_quantized(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's weights are torchao's, as its config.json says.

    Raises:
        PostshareError: as :func:`~sa_models.weights.config_file.read_values`.
    """
    if quantization_of(folder) != "torchao":
        return False
    try:
        with safe_open(Path(folder) / SINGLE, framework="pt") as file:
            return any(file.get_slice(name).get_dtype() not in DTYPES for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return True


def is_projection(name: str) -> bool:
    """Whether a parameter is what quantization rounds: a matrix of a decoder layer."""
    inside = ".self_attn." in name or ".mlp." in name
    return inside and name.endswith(".weight")


def quantized_bytes(folder: Path) -> int:
    """Bytes of the tensors of a quantized folder, scales and zeros included."""
    with safe_open(folder / SINGLE, framework="pt") as file:
        views = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
    return sum(prod(view.get_shape()) * WIDTHS[view.get_dtype()] for view in views)


class QuantizedFolder:
    """Dense or compact weights, each read as the float tensor that it stands for.

    Attributes:
        config: that of the model, without its quantization.
        bytes: of the tensors as they are stored.

    Raises:
        PostshareError: the folder is damaged, was quantized in another way than
            ``postshare quantize`` does, or disagrees with its config.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        kind = read_model_type(path)
        self.config: LlamaConfig = read_config(path, str(kind))
        self._shapes = (
            compact_shapes(self.config, self.config.plan)
            if isinstance(self.config, SharedLlamaConfig)
            else llama_shapes(self.config)
        )
        try:
            with safe_open(self.path / SINGLE, framework="pt") as file:
                self._facts = {k: v for k, v in file.metadata().items() if "." in k}
            self.bytes = quantized_bytes(self.path)
        except (SafetensorError, OSError, AttributeError, KeyError) as error:
            raise PostshareError(
                f"{self.path} has no readable quantized weights ({error}); quantize it again"
            ) from None
        for name in self._shapes:
            self._check(name)

    def _check(self, name: str) -> None:
        kind = json.loads(self._facts.get(name, "{}")).get("_type")
        if kind not in (*PACKED, "Tensor"):
            raise PostshareError(
                f"{self.path}: {name} is missing, or quantized as {kind}, which is not read here; "
                "use a folder that `postshare quantize` made"
            )
        with safe_open(self.path / SINGLE, framework="pt") as file:
            stored = name if kind == "Tensor" else _part(name, "qdata")
            *rows, inputs = file.get_slice(stored).get_shape()
        found = (*rows, inputs * PACKED.get(kind, 1))
        if found != self._shapes[name]:
            raise PostshareError(
                f"{self.path}: {name} has shape {list(found)}, its config.json says "
                f"{list(self._shapes[name])}; use the config that belongs to these weights"
            )

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """The values of a tensor: fp32 where it is quantized, else as it is stored."""
        facts = json.loads(self._facts[name])
        with safe_open(self.path / SINGLE, framework="pt") as file:
            if facts["_type"] == "Tensor":
                return file.get_tensor(name)
            stored, scale, zero = (
                file.get_tensor(_part(name, part)) for part in ("qdata", "scale", "zero_point")
            )
        if facts["_type"] == "Int8Tensor":
            return (stored.float() - zero.float()) * scale.float()
        values = torch.stack((stored << 4 >> 4, stored >> 4), -1).flatten(1)  # low nibble first
        groups = values.float().unflatten(1, (scale.shape[0], -1))
        return (groups * scale.t().float()[..., None] + zero.t().float()[..., None]).flatten(1)


def _part(name: str, part: str) -> str:
    """Where torchao puts a part of a quantized tensor."""
    module, _, leaf = name.rpartition(".")
    return f"{module}._{leaf}_{part}"


def load_dequantized(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """The model that a quantized folder stands for, in one float dtype: it computes anywhere, and
    takes the memory of the model before it was quantized.

    Raises:
        PostshareError: as :class:`QuantizedFolder`.
    """
    return load_whole(QuantizedFolder(folder), "sdpa", dtype)


__all__ = ["QuantizedFolder", "is_quantized", "load_dequantized"]
