"""Weight-only quantization of a model folder, in the form that torchao and transformers load.

The projections of the decoder layers are rounded to int8 or int4; embeddings, ``lm_head`` and norms
stay as they are. A compact folder stays compact: what is shared is rounded, and stored, once.

======  ==========================================================================================
int8    one scale for a row: torchao's ``Int8WeightOnlyConfig``; runs on the CPU as well
int4    one scale and zero for ``group_size`` inputs of a row, two weights in a byte: its
        ``Int4WeightOnlyConfig``, whose kernels are those of GPUs
======  ==========================================================================================
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sa_models.atomic_files import new_folder
from sa_models.configuration import SharedLlamaConfig
from sa_models.errors import PostshareError
from sa_models.export.manifest import (
    MANIFEST,
    WRITTEN_RECIPE,
    read_manifest,
    seal,
    write_manifest,
)
from sa_models.export.quantized_folder import is_projection, is_quantized, quantized_bytes
from sa_models.weights.compact_folder import CompactFolder
from sa_models.weights.companion_files import (
    copy_code,
    copy_generation_config,
    copy_terms,
    copy_tokenizer,
)
from sa_models.weights.config_file import read_model_type, read_values
from sa_models.weights.config_keys import write_values
from sa_models.weights.safetensors_files import SINGLE
from sa_models.weights.safetensors_folder import (
    WeightsFolder,
    save_tensors,
)

KINDS = ("int8", "int4")
GROUP_SIZE = 32
"""Inputs of a row that share a scale in int4, where nothing else is asked for."""


def quantize_folder(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    to: str,
    group_size: int | None = None,
) -> Path:
    """Write a dense or compact folder anew, with quantized projections. Holds them in memory.

    Args:
        source: a Llama or an export, in fp32, bf16 or fp16.
        to: one of :data:`KINDS`.
        folder: to make; it must not exist.
        group_size: of int4 alone; None: :data:`GROUP_SIZE`.

    Raises:
        PostshareError: torchao is missing, an argument is wrong, the source is quantized already, a
            projection has inputs that ``group_size`` does not divide, or the disk is full. Nothing
            half written stays.
    """
    source, folder = Path(source), Path(folder)
    _check_arguments(source, folder, to, group_size)
    compact = read_model_type(source) == SharedLlamaConfig.model_type
    weights = CompactFolder(source) if compact else WeightsFolder(source)
    size = None if to == "int8" else group_size or GROUP_SIZE
    if size is not None:
        _check_groups(weights, size)
    try:
        with new_folder(folder) as beside:
            _write(weights, beside, size)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PostshareError(
            f"{folder} could not be written ({reason}); free disk space or choose another folder"
        ) from error
    return folder


def _check_arguments(source: Path, folder: Path, to: str, group_size: int | None) -> None:
    if to not in KINDS:
        raise PostshareError(f"cannot quantize to {to!r}; use {' or '.join(KINDS)}")
    if to == "int8" and group_size is not None:
        raise PostshareError("int8 has one scale for a whole row; remove the group size")
    if group_size is not None and (group_size < 2 or group_size % 2):
        raise PostshareError(f"a group size of {group_size} is not even; use 32, or 64 or 128")
    if folder.exists():
        raise PostshareError(f"{folder} is there already; choose another folder or delete it")
    if is_quantized(source):
        raise PostshareError(
            f"{source} is quantized already; quantize the export that it was made from"
        )
    try:
        import torchao  # noqa: F401 - an optional extra
    except ImportError:
        raise PostshareError(
            "quantizing needs torchao; install it with pip install 'postshare[quantize]'"
        ) from None


def _check_groups(weights: WeightsFolder, group_size: int) -> None:
    inputs = {name: weights.shape(name)[1] for name in weights.names() if is_projection(name)}
    for name, count in inputs.items():
        if count % group_size:
            powers = (128, 64, 32, 16, 8, 4, 2)
            fitting = [size for size in powers if not any(n % size for n in inputs.values())]
            cure = f"use a group size of {fitting[0]}" if fitting else "quantize to int8"
            raise PostshareError(
                f"{name} has {count} inputs, which groups of {group_size} do not divide; {cure}"
            )


def _write(weights: WeightsFolder, folder: Path, group_size: int | None) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    state = {}
    for name, weight in weights.items():
        quantize = is_projection(name) and weight.numel() > 0  # a layer may own nothing
        state[name] = _quantized(weight, group_size) if quantize else weight
    tensors, metadata = flatten_tensor_state_dict(state)
    save_tensors(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / SINGLE,
        metadata={"format": "pt", **metadata},
    )
    copy_tokenizer(weights.path, folder)
    copy_terms(weights.path, None, folder)
    copy_generation_config([weights.path], folder)
    config = read_values(weights.path)
    config["quantization_config"] = _config(group_size)
    if isinstance(weights, CompactFolder):
        copy_code(weights.config, folder)  # an older export's code knows no quantized weights
        config["auto_map"] = weights.config.auto_map
    write_values(config, weights.config, folder)
    _describe(weights.path, folder, group_size)


def _quantized(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """A torchao tensor of a weight (rows, inputs)."""
    from torchao.quantization import Int4Tensor, Int8Tensor, PerRow

    if group_size is None:
        return Int8Tensor.from_hp(weight, PerRow())
    values, scale, zero = round_to_int4(weight, group_size)
    packed = values[:, ::2] & 0xF | values[:, 1::2] << 4
    return Int4Tensor(
        packed,
        scale.t().contiguous().to(weight.dtype),
        zero.t().contiguous().to(weight.dtype),
        [1, group_size],
        weight.shape,
    )


def round_to_int4(
    weight: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to nearest between the least and the largest weight of each group.

    torchao's own function for this layout comes with its GPU kernels; the numbers are the same.

    Args:
        weight: (rows, inputs).

    Returns:
        int8 values from -8 to 7, (rows, inputs); fp32 scale and zero, (rows, groups): a weight is
        ``value * scale + zero``.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    least, largest = groups.aminmax(dim=-1)
    scale = (largest - least).clamp(min=1e-6) / 15
    steps = ((groups - least[..., None]) / scale[..., None]).round().clamp(0, 15)
    return (steps - 8).to(torch.int8).flatten(1), scale, least + 8 * scale


def _config(group_size: int | None) -> dict[str, Any]:
    """``quantization_config`` of config.json, as transformers reads it."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kind = Int8WeightOnlyConfig() if group_size is None else Int4WeightOnlyConfig(group_size)
    return TorchAoConfig(kind).to_dict()


MEASURED = ("figures", "numbers")
"""Notes of a manifest that are of the weights as they were."""


def _describe(source: Path, folder: Path, group_size: int | None) -> None:
    """Write manifest and model card of a quantized export; another model has none."""
    if not (source / MANIFEST).is_file():
        return
    manifest = read_manifest(source)
    if (source / WRITTEN_RECIPE).is_file():
        shutil.copyfile(source / WRITTEN_RECIPE, folder / WRITTEN_RECIPE)
    notes = {name: value for name, value in manifest["notes"].items() if name not in MEASURED}
    facts = {
        name: value for name, value in manifest.items() if name not in ("source", "notes", "files")
    }
    facts["quantization"] = {"to": "int8" if group_size is None else "int4", "group": group_size}
    facts["tensors"] = {**manifest["tensors"], "bytes": quantized_bytes(folder)}
    write_manifest(folder, facts, seal(folder), sorted(source.glob("*.safetensors")), notes)


__all__ = ["quantize_folder", "round_to_int4"]
