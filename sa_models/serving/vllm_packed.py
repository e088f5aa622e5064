"""Compact models without spans in vLLM, of the layers that vLLM itself fuses, splits and compiles.

vLLM (0.32 and newer) asks for each layer's number of heads, see
:mod:`~sa_models.serving.vllm_geometry`. Transformers' own field for it, ``per_layer_config``, would
make every reader of ``num_attention_heads`` fail.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModel
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM

from sa_models.configuration import SharedLlamaConfig
from sa_models.serving.packed_llama import (
    PackedLlamaConfig,
    PackedLlamaModel,
    packed_config,
    packed_weights,
)
from sa_models.serving.vllm_plugin import check_packed

AutoModel.register(PackedLlamaConfig, PackedLlamaModel, exist_ok=True)


class ServedPackedLlama(TransformersForCausalLM):
    """A compact export in vLLM, with one dense weight for each projection."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_packed(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        assert isinstance(self.config, SharedLlamaConfig)
        return super()._from_config_kwargs | {"config": packed_config(self.config)}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As in vLLM, of weights as a compact folder stores them."""
        return super().load_weights(packed_weights(weights, self.config))
