"""What vLLM is told of a plan's layers, with stand-ins for the parts of vLLM that ask."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from sa_models import SharingPlan
from sa_models.modeling import compact_config
from sa_models.serving import vllm_plugin
from tests.support.reference import dense, some_plan


class Convertor:
    """vLLM's, of version 0.32: as much of it as is overridden."""

    def __init__(self, hf_config: Any, hf_text_config: Any, revision: str | None = None) -> None:
        self.hf_config, self.hf_text_config, self.revision = hf_config, hf_text_config, revision

    def get_per_layer_hf_configs(self) -> Any: ...

    def convert(self) -> list[tuple[int, int]]:
        """(heads, KV heads) of each layer, each by a convertor of its own, as vLLM does it."""
        layers = self.get_per_layer_hf_configs()
        if layers is None:
            return []
        texts = [type(self)(*both).hf_text_config for both in layers]
        return [(text.num_attention_heads, text.num_key_value_heads) for text in texts]


class EarlierConvertor:
    """One without layers."""


class Registry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def register_model(self, name: str, where: str) -> None:
        self.models[name] = where


def stand_in(monkeypatch: pytest.MonkeyPatch, convertor: type) -> tuple[Registry, ModuleType]:
    vllm, utils = ModuleType("vllm"), ModuleType("vllm.transformers_utils")
    convertors = ModuleType("vllm.transformers_utils.model_arch_config_convertor")
    registry = Registry()
    vllm.ModelRegistry = registry  # type: ignore[attr-defined]
    convertors.ModelArchConfigConvertorBase = convertor  # type: ignore[attr-defined]
    convertors.MODEL_ARCH_CONFIG_CONVERTORS = {}  # type: ignore[attr-defined]
    utils.model_arch_config_convertor = convertors  # type: ignore[attr-defined]
    for module in (vllm, utils, convertors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "sa_models.serving.vllm_geometry", raising=False)
    return registry, convertors


def geometry(monkeypatch: pytest.MonkeyPatch, plan: SharingPlan) -> tuple[Any, Any]:
    """The config, and what is said of its layers, as the plugin sets vLLM up."""
    registry, convertors = stand_in(monkeypatch, Convertor)
    vllm_plugin.register()
    config = compact_config(dense("gqa").config, plan)
    said = convertors.MODEL_ARCH_CONFIG_CONVERTORS["shared_llama"](config, config, revision="main")
    where, name = registry.models[config.architectures[0]].split(":")
    assert importlib.util.find_spec(where) is not None
    assert name in ("ServedSharedLlama", "ServedPackedLlama")
    return config, said.convert()


def test_removals_are_told_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SharingPlan(removed=((1, 0), (2, 0), (2, 3)))
    config, layers = geometry(monkeypatch, plan)
    assert config.architectures == ["PackedLlamaForCausalLM"]
    assert layers == [(8, 4), (6, 3), (4, 2), (8, 4), (8, 4), (8, 4)]


def test_spans_stay_with_our_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    config, layers = geometry(monkeypatch, some_plan("both", "gqa"))
    assert config.architectures == ["SharedLlamaForCausalLM"]
    assert layers == []


def test_an_earlier_vllm_serves_every_plan_by_our_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, convertors = stand_in(monkeypatch, EarlierConvertor)
    vllm_plugin.register()
    assert convertors.MODEL_ARCH_CONFIG_CONVERTORS == {}
    assert list(registry.models) == ["SharedLlamaForCausalLM"]
