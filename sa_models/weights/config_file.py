"""The config.json of a model folder, read and checked: what is built of it can be built.

It is read here and nowhere else, so that all that follows (shapes, scores, a model in memory, one
that is split up as it is read) speaks of the same model.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlamaConfig

from sa_models.configuration import SharedLlamaConfig
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.weights.uneven_heads import UnevenLlamaConfig, as_llama

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
QUANTIZATION = "quantization_config"
KINDS: dict[str, type[LlamaConfig]] = {
    "llama": LlamaConfig,
    SharedLlamaConfig.model_type: SharedLlamaConfig,
}
UNREAD = (QUANTIZATION, "transformers_weights", "fusion_config")
"""Keys by which transformers would read other files, or build other modules, than a Llama's."""
UNBUILT = ("model_type", "architectures", "auto_map", "sharing", "reuse_rows", "packed")
"""Keys that change nothing in a stock layer."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
POINTER = b"version https://git-lfs"
# What Llama's classes raise at values that they cannot take.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def read_model_type(folder: str | os.PathLike[str]) -> str | None:
    """The ``model_type`` of the folder's config.json, that of a Llama with uneven heads
    (:mod:`~sa_models.weights.uneven_heads`) included. Raises PostshareError when there is none."""
    return as_llama(read_values(folder)).get("model_type")


def read_values(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's config.json as it is written. Raises PostshareError when it cannot be read."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise PostshareError(
                f"{folder} holds an adapter and no model (no config.json); merge it into its base "
                "with PEFT's merge_and_unload(), save that, and give its folder"
            )
        raise PostshareError(
            f"{folder} has no config.json; give the folder of a Hugging Face Llama, or a hub name"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises PostshareError: it holds none, or cannot be read."""
    try:
        content = path.read_bytes()
        value = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason, cure = str(error), "copy it again"
        if isinstance(error, ValueError) and content.startswith(POINTER):
            reason, cure = "a git-lfs pointer, not the file", "run `git lfs pull` where it lies"
        raise PostshareError(f"{path} is not valid JSON ({reason}); {cure}") from None
    if not isinstance(value, dict):
        raise PostshareError(f"{path} is not valid JSON (it holds no object); copy it again")
    return value


def read_config(folder: str | os.PathLike[str], model_type: str = "llama") -> LlamaConfig:
    """The folder's config, of which a model can be built.

    Keys by which transformers would look for other weights or quantize them are left out.

    Raises:
        PostshareError: there is no readable ``config.json``; it is not that of a Llama; or it, or
            ``generation_config.json``, has a value that transformers' Llama cannot take.
    """
    written = read_values(folder)
    values = as_llama(written)
    found = values.get("model_type")
    if found != model_type or found not in KINDS:
        raise PostshareError(
            f"{folder} holds a {found!r} model; only the Llama architecture "
            f"(model_type {model_type!r}) can be used here"
        )
    for key in UNREAD:
        values.pop(key, None)
    # How its model is asked is not the file's to say.
    values |= {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
    try:
        kind = KINDS[found]
        _check_values(values, kind)
        kind = kind if values is written else UnevenLlamaConfig
        layer = json.dumps({k: v for k, v in values.items() if k not in UNBUILT})
        config = kind.from_dict(values, name_or_path=str(folder))
        _check_buildable(layer)
    except REFUSALS as error:
        raise PostshareError(
            f"{Path(folder) / CONFIG} is not a valid Llama config ({_reason(error)}); repair it"
        ) from None
    read_generation_config(config, Path(folder))
    return config


def read_generation_config(config: LlamaConfig, folder: Path) -> GenerationConfig:
    """The folder's ``generation_config.json``, or what its config says about generation.

    Raises:
        PostshareError: the file cannot be read, or transformers refuses a value in it.
    """
    if not (folder / CONFIG).is_file():
        return GenerationConfig.from_model_config(config)
    own = (folder / GENERATION_CONFIG).is_file()
    path = folder / (GENERATION_CONFIG if own else CONFIG)
    read_json(path)
    try:
        options: dict[str, Any] = {}
        if not own:
            options = {"config_file_name": CONFIG, "_from_model_config": True}
        return GenerationConfig.from_pretrained(folder, **options)
    except (*REFUSALS, OSError) as error:
        raise PostshareError(
            f"{path} says what cannot be about generation ({_reason(error)}); repair it"
        ) from None


def quantization_of(folder: str | os.PathLike[str]) -> str | None:
    """The method by which the folder's config.json says that it is quantized; None: by none.

    Raises:
        PostshareError: as :func:`read_values`.
    """
    value = read_values(folder).get(QUANTIZATION)
    if value is None:
        return None
    return str(value.get("quant_method", "unknown")) if isinstance(value, dict) else "unknown"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    plain = isinstance(error, (ValueError, StrictDataclassError))
    return text if plain and text else f"{type(error).__name__}: {text}"


def _check_values(values: dict[str, Any], kind: type[LlamaConfig]) -> None:
    """Raises ValueError for what Llama's classes take silently, or refuse without its name."""
    from transformers.activations import ACT2FN

    for key in values:
        own = inspect.getattr_static(kind, key, None)
        if callable(own) or (isinstance(own, property) and own.fset is None):
            raise ValueError(f"{key} is no field of a config")

    for key in SIZES:
        value = values.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{key} is {value!r}, and has to be a positive integer")
    for key, low, high in (("rms_norm_eps", 0.0, 1.0), ("attention_dropout", 0.0, 1.0)):
        value = values.get(key)
        if value is not None and not (_is_number(value) and low <= value < high):
            raise ValueError(f"{key} is {value!r}, and has to be a number from {low:g} to {high:g}")
    if values.get("per_layer_config"):
        raise ValueError("per_layer_config makes layers of different shapes")
    activation = values.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise ValueError(f"hidden_act is {activation!r}, which transformers does not have")
    padding, vocabulary = values.get("pad_token_id"), values.get("vocab_size", 32000)
    if type(padding) is int and vocabulary and not -vocabulary <= padding < vocabulary:
        raise ValueError(f"pad_token_id is {padding}, and vocab_size {vocabulary}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)  # a run reads the configs of its few models again and again
def _check_buildable(written: str) -> None:
    """Build one layer without weights, and the rotary table, and ask them for two tokens.

    Args:
        written: the values of a config that transformers takes, as JSON.

    Raises:
        ValueError: a rotary table of which no model computes; or whatever Llama's classes raise.
        PostshareError: as :meth:`HeadLayout.from_config`.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

    config = UnevenLlamaConfig.from_dict(json.loads(written))  # a stock Llama, whatever its heads
    rope: Any = config.rope_parameters
    rotation = rope["rope_type"]
    if rotation != "default" and rotation not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(("default", *ROPE_INIT_FUNCTIONS))
        raise ValueError(f"rope_type is {rotation!r}; transformers has {known}")
    rotary = LlamaRotaryEmbedding(config)
    table, scaling = rotary.inv_freq, rotary.attention_scaling
    if table.ndim != 1 or 2 * len(table) != config.head_dim:
        raise ValueError(
            f"{2 * table.numel()} features are rotated and a head has {config.head_dim}: "
            f"rope_parameters are {rope}"
        )
    if not (float(table.min()) >= 0 and 0 < float(table.max()) < math.inf and _is_number(scaling)):
        raise ValueError(f"no rotation comes of rope_parameters {rope}")
    HeadLayout.from_config(config)
    config.num_hidden_layers = 1
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}  # others read values
    config._attn_implementation = "sdpa"
    with torch.device("meta"), torch.no_grad():
        LlamaForCausalLM(config)(torch.zeros(1, 2, dtype=torch.long), use_cache=True)
