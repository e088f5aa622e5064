"""Configs of Llamas with every type of rotary embedding that a config can name."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

ORIGINAL = {"original_max_position_embeddings": 32}
ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, **ORIGINAL},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        **ORIGINAL,
    },
}


def config(kind: str, **fields: Any) -> LlamaConfig:
    """A Llama of 64 positions with heads of 8, and a theta that no reader has as its default."""
    rope = {"rope_type": "default", "rope_theta": 500000.0, **ROPE_TYPES[kind]}
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**values, **fields}, rope_parameters=rope)
