"""The header of a GGUF file: its shape as a Llama, and whether it can be read.

Imports no torch, so that a dry run answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_models.errors import PostshareError

SUFFIX = ".gguf"
INSTALL = "pip install gguf"
OWN = "take the folder that the file was made of"
_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_OF_LAYER = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)
_PLAIN = {"rope.scaling.type": "none", "rope.scale_linear": 1.0, "attention.sliding_window": 0}
"""Keys that change what a Llama computes, by the value that changes nothing."""
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file that holds a Llama.

    Attributes:
        config: fields of its LlamaConfig, with model_type and dtype.
        splits: how its tokenizer cuts text before merging (`tokenizer.ggml.pre`); "" where each
            tokenizer of its kind cuts alike, None where it has no tokenizer or does not say.
    """

    path: Path
    config: dict[str, Any]
    splits: str | None


def is_gguf(path: str) -> bool:
    """Whether a `model.path` names a GGUF file."""
    return path.endswith(SUFFIX) and not Path(path).expanduser().is_dir()


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header; of the weights, only that all are there.

    Raises:
        PostshareError: there is no such file, it is cut short or damaged, the package gguf is not
            installed, or it holds anything but a whole plain Llama.
    """
    if not path.is_file():
        raise PostshareError(f"{path} is no file here; correct the path")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise PostshareError(
            f"{path.name} is a GGUF file, and reading it needs the package gguf; {INSTALL}"
        ) from None
    try:
        reader = GGUFReader(path)
        values = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not (name.startswith("tokenizer.") and len(field.data) > 1)  # the vocabulary
        }
    except OSError as error:
        raise PostshareError(
            f"{path} cannot be read ({error.strerror or error}); give read access"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120]
        raise PostshareError(
            f"{path} cannot be read as GGUF: it is cut short, damaged, or has a quantization that "
            f"is not known ({reason}); copy it again, or {OWN}"
        ) from None
    kind = values.get("general.architecture")
    if kind != "llama":
        raise PostshareError(
            f"{path} is a {kind!r} model; only the Llama architecture ('llama') can be shared"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, values, tensors)
    for problem in _problems(values, set(tensors), config):
        raise PostshareError(f"{path} {problem}; {OWN}")
    config["dtype"] = _dtype({t.tensor_type.name for t in reader.tensors if len(t.shape) > 1})
    splits = values.get("tokenizer.ggml.pre")
    if values.get("tokenizer.ggml.model") == "llama":
        splits = ""
    return GgufFile(path, config, splits)


def _config(path: Path, values: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": "llama"}
    try:
        for name, field in _SIZES.items():
            config[field] = values[f"llama.{name}"]
        config["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
        epsilon = values["llama.attention.layer_norm_rms_epsilon"]
    except KeyError as error:
        raise PostshareError(f"{path} lacks {error.args[0]}, so is no whole Llama; {OWN}") from None
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = values.get("llama.attention.head_count_kv", heads)
    for field, size in config.items():
        if field != "model_type" and (type(size) is not int or size < 1):
            raise PostshareError(
                f"{path}: {field} is {str(size)[:40]}, not one size for all layers; {OWN}"
            )
    width = config["hidden_size"] // heads
    config["head_dim"] = values.get("llama.attention.key_length", width)
    config["rms_norm_eps"] = _short(epsilon)
    theta = _short(values.get("llama.rope.freq_base", 10000.0))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config["tie_word_embeddings"] = "output.weight" not in tensors
    for name, field in _IDS.items():
        if (token := values.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[field] = token
    return config


def _problems(values: dict[str, Any], names: set[str], config: dict[str, Any]) -> Iterator[str]:
    """What would be lost or is not there."""
    if values.get("split.count", 1) > 1:
        yield "is one of several parts"
    for key, plain in _PLAIN.items():
        if (value := values.get(f"llama.{key}", plain)) != plain:
            yield f"has {key} {value}, which reading it would lose"
    turned = values.get("llama.rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        yield f"rotates {turned} of {config['head_dim']} dimensions of a head"
    wanted = {"token_embd.weight", "output_norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        wanted |= {f"blk.{layer}.{part}.weight" for part in _OF_LAYER}
    if lost := sorted(names - wanted - {"output.weight"}):
        yield f"has {lost[0]}, which a plain Llama has not and reading it would lose"
    if missing := sorted(wanted - names):
        yield f"lacks {missing[0]}"


def _dtype(matrices: set[str]) -> str:
    """What holds the matrices as they are; what is quantized is rounded to bf16."""
    if "F32" in matrices:
        return "float32"
    return "float16" if "F16" in matrices else "bfloat16"


def _short(value: float) -> float:
    """1e-05 of its float32, which is 9.999999747378752e-06."""
    from numpy import float32

    return float(str(float32(value)))
