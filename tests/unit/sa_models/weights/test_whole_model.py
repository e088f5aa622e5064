"""A model filled from a checked folder is, bit for bit, the one that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.weights.structure import convert
from sa_models.weights.whole_model import load_whole, open_stored
from tests.support.reference import dense, some_plan, tokens
from tests.unit.sa_models.weights.test_config_file import ROPES, SMALL

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3},
}
IDS = torch.arange(40)[None]


def saved(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "initializer_range": 0.2, **fields}))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.generation_config.max_length = 33
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def same(ours: LlamaForCausalLM, theirs: LlamaForCausalLM) -> None:
    assert type(ours) is type(theirs)
    for mine, other in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert list(mine) == list(other)
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype
            assert tensor.stride() == other[name].stride(), name
            assert torch.equal(tensor, other[name]), name
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == (theirs.lm_head.weight is theirs.model.embed_tokens.weight)
    assert ours.training == theirs.training is False
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert ours.name_or_path == theirs.name_or_path
    mine, other = ours.config.to_dict(), theirs.config.to_dict()
    assert {k for k in mine.keys() | other.keys() if mine.get(k) != other.get(k)} <= {"dtype"}
    with torch.no_grad():
        assert torch.equal(ours(IDS % 40).logits, theirs(IDS % 40).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_transformers_loads(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    reader = open_stored(saved(tmp_path, dtype, **KINDS[kind]))
    for attention in ("sdpa", "eager"):
        for through in (None, torch.bfloat16, torch.float16):
            theirs = LlamaForCausalLM.from_pretrained(
                tmp_path, dtype=through or torch.float32, attn_implementation=attention
            )
            same(load_whole(reader, attention, through=through), theirs.float())
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_whole(reader, dtype=torch.bfloat16)
    assert ours.config.dtype == torch.bfloat16
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32
    same(ours, theirs)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_those_of_transformers(tmp_path: Path, rope: str) -> None:
    parameters = {"rope_theta": 10000.0} | ROPES[rope]
    reader = open_stored(saved(tmp_path, torch.bfloat16, rope_parameters=parameters))
    for through in (None, torch.bfloat16):
        theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=through or torch.float32)
        ours = load_whole(reader, through=through)
        assert ours.model.rotary_emb.attention_scaling == theirs.model.rotary_emb.attention_scaling
        same(ours, theirs.float())


def test_mixed_dtypes_and_old_leftovers_load_as_before(tmp_path: Path) -> None:
    saved(tmp_path, torch.bfloat16)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors = {n: t.float() + 1e-4 if "norm" in n else t for n, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({old: torch.full((4,), 9.0)}, tmp_path / "old.safetensors")
    places["weight_map"][old] = "old.safetensors"
    index.write_text(json.dumps(places))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    same(load_whole(open_stored(tmp_path)), theirs)


def test_generation_comes_of_the_config_where_no_file_says(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.7}))
    ours = load_whole(open_stored(tmp_path))
    assert ours.generation_config.temperature == 0.7
    same(ours, LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["both, ties", "cla"])
def test_a_compact_folder_is_what_transformers_loads(tmp_path: Path, kind: str) -> None:
    plan = some_plan(kind, "gqa")
    model = convert(dense(), plan)
    if not plan.spans:
        model = SharedLlamaForCausalLM.from_materialized(model, plan)
    model.save_pretrained(tmp_path)
    theirs = SharedLlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="sdpa"
    )
    ours = load_whole(open_stored(tmp_path))
    same(ours, theirs)
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


def test_adapters_beside_the_weights_are_not_applied(tmp_path: Path) -> None:
    """As peft#1381: transformers would add it to what it loads, without a word."""
    saved(tmp_path)
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qv"]
    adapter = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape)
        for name in names
        for side, shape in (("A", (4, 32)), ("B", (32 if "q_proj" in name else 16, 4)))
    }
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]})
    )
    save_file(adapter, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    reader = open_stored(tmp_path)
    ours = load_whole(reader)
    assert torch.equal(ours(IDS).logits, expected)
    assert [n for n, _ in ours.named_parameters() if "lora" in n] == []
    (line,) = reader.notes()
    assert "adapter_config.json), which is not applied" in line


def test_weights_that_a_reader_changes_are_refused(tmp_path: Path) -> None:
    reader = open_stored(saved(tmp_path))
    reader.config.num_hidden_layers = 1
    with pytest.raises(PostshareError, match=r"holds, beyond the model, model\.layers\.1"):
        load_whole(reader)
    reader = open_stored(tmp_path)
    reader.config.intermediate_size = 16
    with pytest.raises(PostshareError, match=r"has shape \[24, 32\] where the model has \[16, 32"):
        load_whole(reader)


def test_float16_that_cannot_hold_a_weight_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    load_whole(open_stored(tmp_path))
    with pytest.raises(PostshareError, match=f"{name} has values that float16 cannot hold"):
        load_whole(open_stored(tmp_path), through=torch.float16)
