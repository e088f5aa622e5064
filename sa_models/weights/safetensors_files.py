"""The safetensors files of a model folder: which they are, what they hold, what is wrong with them.

Only their headers are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from sa_models.errors import PostshareError
from sa_models.weights.config_file import POINTER, quantization_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
UNFINISHED = ("*.incomplete", "*.part", "*.partial", "*.tmp", "*.aria2", "*.crdownload")


class Stored(NamedTuple):
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def find_shards(folder: Path) -> dict[str, str]:
    """{tensor: file} of a folder. As in transformers, one file goes before an index of shards.

    Raises:
        PostshareError: there are none, or no readable index says where they are.
    """
    if (folder / SINGLE).is_file():
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    if (folder / INDEX).is_file():
        return read_index(folder / INDEX)
    raise PostshareError(f"{folder} has {_instead_of_weights(folder)}")


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file} of an index. Raises PostshareError where it is none."""
    try:
        shard_of = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        shard_of = {}
    if not shard_of or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise PostshareError(f"{path} is not a valid safetensors index; download the file again")
    return shard_of


def read_header(path: Path) -> dict[str, Stored]:
    """What a file holds, by name.

    Raises:
        PostshareError: the file is missing or damaged, or a tensor is of no float type.
    """
    if not path.is_file():
        raise PostshareError(f"the shard {path} is missing; download or copy it again")
    try:
        with safe_open(path, framework="pt") as handle:
            found = {}
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                view = handle.get_slice(name)
                dtype = view.get_dtype()
                if dtype not in DTYPES:
                    raise PostshareError(
                        f"{path}: {name} is stored as {dtype}; {_float_weights(path.parent)}"
                    )
                found[name] = Stored(tuple(view.get_shape()), DTYPES[dtype])
            return found
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> PostshareError:
    """What is wrong with a file that safetensors does not read."""
    reason = " ".join(str(error).split())
    cure = "download or copy it again (what a run has written: delete its folder, and start again)"
    try:
        with path.open("rb") as file:
            begin = file.read(len(POINTER))
    except OSError:
        begin = b"-"
    if not begin:
        reason = "it is empty"
    elif begin == POINTER:
        reason, cure = "a git-lfs pointer, not the weights", "run `git lfs pull` where it lies"
    return PostshareError(f"{path} is truncated or corrupt ({reason}); {cure}")


def _float_weights(folder: Path) -> str:
    method = quantization_of(folder) if (folder / "config.json").is_file() else None
    cure = "use fp32, bf16 or fp16 weights"
    return cure if method is None else f"{cure}, those that {method} has quantized"


def _instead_of_weights(folder: Path) -> str:
    """What a folder without weights has, and what to do."""
    here = f"put {SINGLE}, or shards with {INDEX}, into the folder"
    for pattern in UNFINISHED:
        if found := sorted(folder.glob(f"*.safetensors*{pattern[1:]}")):
            return f"only {found[0].name}, an unfinished download; download it again"
    if other := sorted(folder.glob("*.safetensors")):
        if "-of-" in other[0].name:
            return f"shards ({other[0].name}) but no {INDEX}; download that too"
        if other[0].name == "adapter_model.safetensors":
            return (
                "only an adapter (adapter_model.safetensors); merge it into its base with PEFT's "
                "merge_and_unload(), and save that"
            )
        return f"only {other[0].name}; {here}"
    for pattern in ("*.bin", "*.pth", "*.pt"):
        if pickles := sorted(folder.glob(pattern)):
            return f"only {pickles[0].name} (pickle) weights; convert them to safetensors"
    return f"no weights; {here}"


def misnamed(found: Collection[str], missing: str) -> str | None:
    """Why a parameter is missing among these names, and what to do; None: nobody knows.

    Args:
        missing: the name of the first parameter that is.
    """
    if missing == "lm_head.weight":
        return "set tie_word_embeddings: true there if its head is the embedding"
    if missing.removeprefix("model.") in found:
        return "it was saved as a LlamaModel; save the LlamaForCausalLM that it belongs to"
    module = missing.removesuffix(".weight")
    if any(name.endswith(f"{module}.base_layer.weight") for name in found):
        return "its adapters are not merged; save it after PEFT's merge_and_unload()"
    for name in found:
        if name.endswith(f".{missing}"):
            prefix = name.removesuffix(missing)
            return f"all names begin with {prefix!r}; save the model inside what wraps it"
    if "tok_embeddings.weight" in found:
        return "the names are Meta's; convert them with transformers' convert_llama_weights_to_hf"
    return None
