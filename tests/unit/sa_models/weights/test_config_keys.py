"""config.json: what transformers 5 says of itself, and the keys of 4 beside it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sa_models.weights.config_keys import earlier_keys, write_config, write_values
from tests.support.rope_types import ROPE_TYPES, config


def written(made: LlamaConfig, folder: Path) -> dict[str, Any]:
    write_config(made, folder)
    return json.loads((folder / "config.json").read_text())


def test_a_plain_rotation_has_theta_and_no_scaling(tmp_path: Path) -> None:
    values = written(config("default", dtype=torch.bfloat16), tmp_path)
    assert values["rope_theta"] == 500000.0
    assert values["rope_scaling"] is None
    assert values["torch_dtype"] == values["dtype"] == "bfloat16"
    assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize("kind", [kind for kind in ROPE_TYPES if kind != "default"])
def test_a_scaling_is_that_of_the_config_without_theta(kind: str, tmp_path: Path) -> None:
    made = config(kind)
    values = written(made, tmp_path)
    assert values["rope_theta"] == 500000.0
    assert ROPE_TYPES[kind].items() <= values["rope_scaling"].items()
    assert "rope_theta" not in values["rope_scaling"]


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_transformers_5_reads_the_rotation_that_was_written(kind: str, tmp_path: Path) -> None:
    made = config(kind)
    values = written(made, tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["rope_theta"] == 500000.0
    assert made.rope_parameters.items() <= read.rope_parameters.items()
    x, positions = torch.zeros(1, 100, 1), torch.arange(100)[None]
    for one, other in zip(
        *(LlamaRotaryEmbedding(c)(x, positions) for c in (made, read)), strict=True
    ):
        assert torch.equal(one, other)
    again = tmp_path / "again"
    again.mkdir()
    for key in earlier_keys(made):
        assert written(read, again)[key] == values[key], "the same when it is written again"


def test_longrope_says_what_4_looks_for_elsewhere(tmp_path: Path) -> None:
    values = written(config("longrope"), tmp_path)
    assert values["original_max_position_embeddings"] == 32
    # 4 would take 64 / 32 = 2 for the factor, whatever the config says.
    expected = math.sqrt(1 + math.log(4.0) / math.log(32))
    assert values["rope_scaling"]["attention_factor"] == pytest.approx(expected, rel=1e-12)


def test_a_config_of_transformers_4_stays_as_it_is(tmp_path: Path) -> None:
    values = {
        "model_type": "llama",
        "rope_theta": 20000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "float16",
    }
    write_values(values, LlamaConfig(**copy.deepcopy(values)), tmp_path)  # which changes them
    values["rope_scaling"] |= {"rope_type": "linear"}  # as the later versions of 4 call it
    assert json.loads((tmp_path / "config.json").read_text()) == values


def test_a_yarn_without_a_factor_gets_the_ratio_of_its_lengths() -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": None,
        "original_max_position_embeddings": 16,
    }
    made = LlamaConfig(rope_parameters=rope, max_position_embeddings=64)
    assert earlier_keys(made)["rope_scaling"]["factor"] == 4.0
    assert made.rope_parameters["factor"] is None


def test_a_part_of_a_head_is_rotated_as_5_does() -> None:
    """Which leaves the part out for the plain rotation of a Llama."""
    plain = LlamaConfig(partial_rotary_factor=0.5)
    assert "partial_rotary_factor" not in earlier_keys(plain)
    scaled = LlamaConfig(
        partial_rotary_factor=0.5, rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    assert earlier_keys(scaled)["partial_rotary_factor"] == 0.5
    assert "partial_rotary_factor" not in earlier_keys(scaled)["rope_scaling"]
