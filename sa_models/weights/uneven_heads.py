"""Llamas whose number of heads does not divide the hidden size, which transformers 5 refuses.

``LlamaConfig`` refuses them even where ``head_dim`` is stated (transformers issue 46082), although
``LlamaForCausalLM`` computes them. ``MistralConfig`` does not, and without a sliding window
``MistralForCausalLM`` computes what a Llama does, in every runtime that has Llamas. So such a model
is a Llama in memory, and a Mistral in its ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig

UNKNOWN_TO_MISTRAL = ("attention_bias", "mlp_bias", "pretraining_tp")


@strict
class UnevenLlamaConfig(LlamaConfig):
    """A LlamaConfig with any number of heads, in memory only; see :func:`written_config`."""

    def validate_architecture(self) -> None:
        """Whatever its heads: their size is stated."""


def config_class(values: Mapping[str, Any]) -> type[LlamaConfig]:
    """The class that takes the fields of a Llama's config: ``LlamaConfig``, unless its heads are
    uneven and their size is stated."""
    hidden, heads, size = (
        values.get(k) for k in ("hidden_size", "num_attention_heads", "head_dim")
    )
    whole = all(type(value) is int and value > 0 for value in (hidden, heads, size))
    return UnevenLlamaConfig if whole and hidden % heads else LlamaConfig  # type: ignore[operator]


def written_config(config: LlamaConfig) -> LlamaConfig | MistralConfig:
    """The config that goes into a ``config.json``: itself, or that of the same Mistral."""
    if not isinstance(config, UnevenLlamaConfig):
        return config
    left_out = ("model_type", "transformers_version", "sliding_window", *UNKNOWN_TO_MISTRAL)
    values = {k: v for k, v in config.to_dict().items() if k not in left_out}
    values["architectures"] = ["MistralForCausalLM"]
    return MistralConfig(**values, sliding_window=None)


def as_llama(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a ``config.json``; those of a Llama, where :func:`written_config` made them of
    one. Any other Mistral stays one."""
    no_window = values.get("sliding_window", 0) is None
    if values.get("model_type") != "mistral" or not no_window:
        return values
    if config_class(values) is LlamaConfig:
        return values
    kept = {key: value for key, value in values.items() if key != "sliding_window"}
    return kept | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
