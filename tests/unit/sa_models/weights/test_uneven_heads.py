"""Llamas whose heads do not divide the hidden size: Llamas in memory, Mistrals in config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
)

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.weights.config_file import read_config, read_model_type
from sa_models.weights.config_keys import write_config
from sa_models.weights.uneven_heads import UnevenLlamaConfig, config_class

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "vocab_size": 31,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("rope", [None, LLAMA3])
def test_what_is_written_computes_what_the_llama_computes(
    tmp_path: Path, rope: dict[str, Any] | None
) -> None:
    config = config_class(SIZES)(**SIZES, rope_parameters=rope)
    assert type(config) is UnevenLlamaConfig
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    write_config(config, tmp_path)
    stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    assert type(stock) is MistralForCausalLM
    stock.load_state_dict(model.state_dict())
    ids = torch.randint(31, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (stock(ids).logits - model(ids).logits).abs().max() <= 1e-6
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["sliding_window"] is None
    assert written["architectures"] == ["MistralForCausalLM"]
    assert "mlp_bias" not in written


def test_is_read_as_the_llama_that_it_was(tmp_path: Path) -> None:
    config = UnevenLlamaConfig(**SIZES, rope_parameters=LLAMA3)
    write_config(config, tmp_path)
    read = read_config(tmp_path)
    assert read_model_type(tmp_path) == "llama"
    assert HeadLayout.from_config(read) == HeadLayout(2, 32, 6, 3, 4)
    for key in (*SIZES, "rope_parameters"):
        assert getattr(read, key) == getattr(config, key), key
    write_config(read, tmp_path)  # and again
    assert read_config(tmp_path).to_dict() == read.to_dict()


@pytest.mark.parametrize(
    "values",
    [{"sliding_window": 8}, {"sliding_window": "absent"}, {"num_attention_heads": 8}],
)
def test_any_other_mistral_stays_one(tmp_path: Path, values: dict[str, Any]) -> None:
    write_config(UnevenLlamaConfig(**SIZES), tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
    assert read_model_type(tmp_path) == "mistral"
    with pytest.raises(PostshareError, match="holds a 'mistral' model; only the Llama"):
        read_config(tmp_path)
