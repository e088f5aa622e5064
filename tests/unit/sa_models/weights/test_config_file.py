"""Configs: what cannot be built is refused when it is read, with the reason; the rest is read as
transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from sa_models.errors import PostshareError
from sa_models.weights.config_file import quantization_of, read_config, read_model_type

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 2.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def write(folder: Path, **values: Any) -> Path:
    content = LlamaConfig(**SMALL).to_dict() | {"architectures": ["LlamaForCausalLM"]} | values
    content = {key: value for key, value in content.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def refused(folder: Path, message: str) -> str:
    with pytest.raises(PostshareError, match=message) as caught:
        read_config(folder)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "cause; cure"
    return str(caught.value)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("legacy", [False, True])
def test_is_read_as_transformers_reads_it(tmp_path: Path, rope: str, legacy: bool) -> None:
    values: dict[str, Any] = {"rope_parameters": {"rope_theta": 10000.0} | ROPES[rope]}
    if legacy:
        scaling = {key: value for key, value in ROPES[rope].items() if key != "rope_theta"}
        values = {
            "rope_parameters": "absent",
            "rope_scaling": scaling or None,
            "rope_theta": 500.0,
            "torch_dtype": "bfloat16",
            "dtype": "absent",
        }
    write(tmp_path, **values, pad_token_id=-1, own_key=[1])
    ours, theirs = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert type(ours) is type(theirs) is LlamaConfig
    assert ours.to_dict() == theirs.to_dict()
    assert ours.name_or_path == theirs.name_or_path == str(tmp_path)
    assert ours.rope_parameters["rope_type"] == ROPES[rope].get("rope_type", "default")
    assert ours.dtype == (torch.bfloat16 if legacy else None)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"pad_token_id": 40}, "pad_token_id is 40, and vocab_size 40"),
        ({"pad_token_id": -41}, "pad_token_id is -41, and vocab_size 40"),
        ({"pad_token_id": "0"}, "pad_token_id"),
        ({"hidden_act": "swish_foo"}, "hidden_act is 'swish_foo', which transformers does not"),
        ({"hidden_act": 3}, "hidden_act is 3"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        ({"vocab_size": 0}, "vocab_size is 0, and has to be a positive integer"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": 32.0}, r"hidden_size is 32\.0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"head_dim": 5}, "6 features are rotated and a head has 5|even rotary dimension"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"sliding_window": 0.5}, r"sliding_window is 0\.5"),
        ({"is_heterogeneous": True}, "is_heterogeneous is no field of a config"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"attention_dropout": 1.5}, r"attention_dropout is 1\.5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"mlp_bias": 3}, "mlp_bias"),
        ({"torch_dtype": "float33", "dtype": None}, "float33"),
        ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, "layers of different shapes"),
        ({"is_causal": 64}, "TypeError"),
        ({"layer_types": ["sliding_attention"] * 2}, "AttributeError"),
        ({"id2label": {"x": "y"}}, "invalid literal"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    said = refused(write(tmp_path, **values), reason)
    assert said.startswith(f"{tmp_path / 'config.json'} is not a valid Llama config (")
    assert said.endswith("; repair it")


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"type": "su", "factor": 2.0}, "rope_type is 'su'; transformers has default, linear"),
        ({"rope_type": 3}, "rope_type is 3"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "ZeroDivisionError|no rotation comes of"),
        ({"rope_type": "linear", "factor": -2.0}, "no rotation comes of rope_parameters"),
        ({"rope_type": "linear", "factor": "2"}, "TypeError"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        (ROPES["llama3"] | {"low_freq_factor": 0}, "ZeroDivisionError"),
        (ROPES["longrope"] | {"short_factor": [1.0, 2.0, 3.0]}, "RuntimeError"),
        (ROPES["yarn"] | {"partial_rotary_factor": 0.5}, "4 features are rotated and a head has 8"),
        ("linear", "TypeError|AttributeError|rope_parameters"),
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_broken_rope_parameters_are_refused(
    tmp_path: Path, rope: Any, reason: str, key: str
) -> None:
    values = {"rope_parameters": "absent", key: rope}
    refused(write(tmp_path, **values), reason)


def test_what_is_no_llama_is_refused(tmp_path: Path) -> None:
    for kind in ("mistral", "qwen2", "gpt2", None, 3):
        refused(write(tmp_path, model_type=kind), f"holds a {kind!r} model; only the Llama")
        with pytest.raises(PostshareError, match="only the Llama"):
            read_config(tmp_path, str(kind))
    refused(write(tmp_path, model_type="shared_llama"), "holds a 'shared_llama' model")


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert str(file) in refused(tmp_path, r"a git-lfs pointer, not the file\); run `git lfs pull`")
    file.write_text("[" * 100_000)
    refused(tmp_path, "is not valid JSON")
    file.unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, r"holds an adapter and no model .*merge_and_unload\(\)")
    with pytest.raises(PostshareError, match="holds an adapter and no model"):
        read_model_type(tmp_path)


def test_a_generation_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "generation_config.json"
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "is not valid JSON"),
        ('{"max_new_tokens": "many"}', "says what cannot be about generation .*repair it"),
    ):
        file.write_text(content)
        assert str(file) in refused(tmp_path, message)
    file.write_text('{"temperature": 0.6, "do_sample": false}')  # Llama 2's own
    read_config(tmp_path)
    file.unlink()
    refused(write(tmp_path, max_new_tokens="many"), "is not a valid Llama config .*TypeError")


def test_keys_by_which_others_are_loaded_are_left_out(tmp_path: Path) -> None:
    """Exports would hand them on."""
    write(
        tmp_path,
        quantization_config={"quant_method": "gptq", "bits": 4},
        transformers_weights="other.safetensors",
        return_dict=False,
    )
    config = read_config(tmp_path)
    assert config.return_dict
    assert not {"quantization_config", "transformers_weights"} & config.to_dict().keys()
    assert quantization_of(tmp_path) == "gptq"
    assert quantization_of(write(tmp_path, quantization_config=3)) == "unknown"
    assert quantization_of(write(tmp_path)) is None
