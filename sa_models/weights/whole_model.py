"""A model whole in memory: built of a checked config, filled with checked tensors one by one.

`from_pretrained` has rules of its own for what lies in a folder (adapters, quantizers, which of two
sets of files); here it is what a reader has checked, as where no rank holds the whole model.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sa_models.configuration import SharedLlamaConfig
from sa_models.errors import PostshareError
from sa_models.modeling import SharedLlamaForCausalLM, set_parameter
from sa_models.projections import transpose_storage_
from sa_models.weights.compact_folder import CompactFolder, cast
from sa_models.weights.config_file import read_generation_config, read_model_type
from sa_models.weights.safetensors_folder import WeightsFolder

Model = TypeVar("Model", bound=LlamaForCausalLM)


class ParameterReader(Protocol):
    """A model's parameters by their names."""

    path: Path

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> torch.Tensor: ...


class ModelReader(ParameterReader, Protocol):
    """All that makes a model."""

    config: LlamaConfig


def open_stored(folder: str | os.PathLike[str]) -> WeightsFolder:
    """The tensors of a dense or a compact folder as it stores them. Raises PostshareError as
    they do."""
    compact = read_model_type(folder) == SharedLlamaConfig.model_type
    return CompactFolder(folder) if compact else WeightsFolder(folder)


def load_whole(
    reader: ModelReader,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    through: torch.dtype | None = None,
) -> LlamaForCausalLM:
    """The model of a folder, on the CPU and in evaluation mode: itself and one tensor in memory.

    Args:
        attention: transformers' name of an implementation.
        dtype: of the parameters.
        through: round the weights to this dtype first, as an export would store them.

    Raises:
        PostshareError: a value that is no number, or that ``through`` float16 cannot hold.
    """
    config = copy.deepcopy(reader.config)
    config.dtype, config._attn_implementation = dtype, attention
    kind: type[LlamaForCausalLM] = LlamaForCausalLM
    if isinstance(config, SharedLlamaConfig):
        kind = SharedLlamaForCausalLM
    model = skeleton(kind, config, torch.device("cpu"), reader.path)
    require_fitting(reader, dict(model.named_parameters()))
    for name, expected in list(model.named_parameters()):
        value = reader.read(name)
        if through is not None:
            value = cast(value, through, name)
        # A copy: what was read lies in the mapped file.
        set_parameter(model, name, nn.Parameter(value.to(dtype, copy=True)), expected)
    model.tie_weights()
    transpose_storage_(model)
    return model.eval()


def skeleton(kind: type[Model], config: LlamaConfig, device: torch.device, folder: Path) -> Model:
    """A model without weights: parameters on the meta device, buffers on ``device``.

    Args:
        folder: where its generation config may lie.

    Raises:
        PostshareError: the generation config cannot be read.
    """
    with torch.device("meta"):
        model = kind(config)
    # The one module with buffers; they are computed, and lie in no file.
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    model.generation_config = read_generation_config(config, folder)
    return model


def require_fitting(reader: ParameterReader, parameters: dict[str, nn.Parameter]) -> None:
    """Raises PostshareError: a reader has other names or shapes than a model's parameters."""
    found = set(reader.names())
    for what, names in (
        ("has no", parameters.keys() - found),
        ("holds, beyond the model,", found - parameters.keys()),
    ):
        if names:
            raise PostshareError(
                f"{reader.path} {what} {min(names)}; use the weights that belong to the "
                "config and the plan"
            )
    for name, parameter in parameters.items():
        if reader.shape(name) != tuple(parameter.shape):
            raise PostshareError(
                f"{reader.path}: {name} has shape {list(reader.shape(name))} where "
                f"the model has {list(parameter.shape)}; use the weights that belong to it"
            )
