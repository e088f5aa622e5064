"""Safetensors folders: every broken one is refused with the file's name and a cure."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.weights.parameter_shapes import llama_shapes
from sa_models.weights.safetensors_folder import INDEX, ShardWriter, WeightsFolder, save_tensors
from tests.support import REPOSITORY


def save_llama(folder: Path, shard_size: int | str = "1GB", **fields: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    } | fields
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, message: str) -> str:
    with pytest.raises(PostshareError, match=message) as caught:
        WeightsFolder(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert ";" in text, "cause; cure"
    return text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", 3000])
def test_reads_what_was_saved(tmp_path: Path, tied: bool, shard_size: int | str) -> None:
    model = save_llama(tmp_path, shard_size, tie_word_embeddings=tied, mlp_bias=True)
    folder = WeightsFolder(tmp_path)
    assert (len(folder.shards()) > 1) == (shard_size == 3000)
    expected = dict(model.named_parameters())
    assert folder.names() == list(llama_shapes(model.config))
    assert sorted(folder.names()) == sorted(expected)
    for name, tensor in folder.items():
        assert torch.equal(tensor, expected[name])
        assert folder.shape(name) == tuple(tensor.shape)
        assert folder.dtype(name) == torch.float32
    assert torch.equal(
        folder.slice("model.layers.1.self_attn.o_proj.weight")[:, 4:8],
        expected["model.layers.1.self_attn.o_proj.weight"][:, 4:8],
    )


def test_attention_only_needs_nothing_else(tmp_path: Path) -> None:
    save_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "self_attn" in k}, path)
    names = [HeadLayout.parameter_name(layer, p) for layer in (0, 1) for p in PROJECTIONS]
    assert WeightsFolder(tmp_path, attention_only=True).names() == names
    refused(tmp_path, "has no weight model.embed_tokens.weight")


@pytest.mark.parametrize("shard_size", ["1GB", 3000])
def test_a_truncated_file_is_refused(tmp_path: Path, shard_size: int | str) -> None:
    save_llama(tmp_path, shard_size)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in refused(tmp_path, "truncated or corrupt")


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 4096])
def test_a_corrupt_header_is_refused(tmp_path: Path, content: bytes) -> None:
    save_llama(tmp_path, 3000)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(content)
    assert str(path) in refused(tmp_path, "truncated or corrupt")


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path, 3000)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.unlink()
    assert str(path) in refused(tmp_path, "is missing; download or copy it again")


def test_a_shard_that_vanishes_while_reading_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    folder = WeightsFolder(tmp_path)
    folder.shards()[0].unlink()
    with pytest.raises(PostshareError, match=r"model\.safetensors .*copy it again"):
        folder.read("model.norm.weight")


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path, 3000)
    path = tmp_path / INDEX
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(n for n, s in index["weight_map"].items() if s == shards[0])
    index["weight_map"][name] = shards[1]
    path.write_text(json.dumps(index))
    assert name in refused(tmp_path, "the index puts .* which does not hold it")
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        path.write_text(broken)
        refused(tmp_path, "is not a valid safetensors index")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \[8, 16\], .* says \[16, 16\]"),
        ({"num_hidden_layers": 3}, r"has no weight model.layers.2.self_attn.q_proj.weight"),
        ({"num_hidden_layers": 1}, r"holds model.layers.1\.\S+, which a Llama of its config"),
        ({"vocab_size": 40}, r"embed_tokens.weight has shape \[32, 16\], .* says \[40, 16\]"),
        ({"intermediate_size": 32}, r"gate_proj.weight has shape \[24, 16\]"),
        ({"num_attention_heads": 3}, "is not a valid Llama config"),
        ({"hidden_size": "wide"}, "is not a valid Llama config"),
        ({"num_key_value_heads": 3}, "do not divide into 3 KV groups"),
        ({"attention_bias": True}, "attention biases"),
        ({"model_type": "gpt2"}, "holds a 'gpt2' model; only the Llama architecture"),
        ({"model_type": None}, "holds a None model; only the Llama architecture"),
    ],
)
def test_a_config_that_disagrees_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save_llama(tmp_path)
    edit_config(tmp_path, **change)
    refused(tmp_path, message)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    save_llama(tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    assert "config.json" in refused(tmp_path, "is not valid JSON")


def test_folders_without_usable_weights_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "has no config.json")
    save_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "has no weights; put model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, r"only pytorch_model.bin \(pickle\) weights; convert them to safetensors")


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.zeros(16, dtype=torch.int8)
    save_file(tensors, path)
    assert str(path) in refused(tmp_path, "model.norm.weight is stored as I8; use fp32, bf16")


def test_shard_writer_bounds_its_shards(tmp_path: Path) -> None:
    sizes = [30, 30, 30, 500, 0, 10]
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    writer = ShardWriter(tmp_path, max_shard_bytes=280)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    files = writer.close()
    assert [sorted(load_file(file)) for file in files] == [
        ["t0", "t1"],
        ["t2"],
        ["t3"],
        ["t4", "t5"],
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(sizes)
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], tensors[name])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([INDEX, *(f.name for f in files)])


# --- who may read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_weights(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "one.safetensors", {"format": "pt"})
        writer = ShardWriter(tmp_path, 10)
        for name in "abc":
            writer.add(name, torch.ones(2))
        writer.close()
    finally:
        os.umask(before)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 5
    assert files[-1] == "one.safetensors"
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_no_other_module_writes_safetensors() -> None:
    """The library's own function leaves files that their owner alone may read."""
    calling = {
        path.relative_to(REPOSITORY).as_posix()
        for package in ("sa_models", "train")
        for path in (REPOSITORY / package).rglob("*.py")
        if "save_file" in path.read_text(encoding="utf-8")
    }
    assert calling == {"sa_models/weights/safetensors_folder.py"}
