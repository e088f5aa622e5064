"""The heads of a compact model's layers, and the class that serves it, as vLLM asks for them."""

from __future__ import annotations

from transformers import LlamaConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from sa_models.configuration import SharedLlamaConfig
from sa_models.serving.packed_llama import is_packable, layer_configs

PACKED = "PackedLlamaForCausalLM"
"""The architecture of plans whose layers are vLLM's own, see
:mod:`sa_models.serving.vllm_packed`."""


class SharedLlamaGeometry(ModelArchConfigConvertorBase):
    """The heads of each layer, and the class that serves the plan."""

    def __init__(self, hf_config: SharedLlamaConfig, *others: object, **named: object) -> None:
        super().__init__(hf_config, *others, **named)
        if is_packable(hf_config):
            hf_config.architectures = [PACKED]  # where vLLM looks the class up

    def get_per_layer_hf_configs(self) -> list[tuple[LlamaConfig, LlamaConfig]] | None:
        """Of every layer; None where the plan needs our modules, which know their heads."""
        if not is_packable(self.hf_config):
            return None
        return [(each, each) for each in layer_configs(self.hf_config)]
