"""Safetensors folders: every broken one is refused with the file's name and a cure."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import ExpandedFolder
from sa_models.weights.parameter_shapes import llama_shapes
from sa_models.weights.safetensors_files import INDEX
from sa_models.weights.safetensors_folder import (
    ShardWriter,
    WeightsFolder,
    require_finite,
    save_tensors,
)
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


def edit_weights(folder: Path, **tensors: torch.Tensor) -> None:
    """Put tensors into a single file; dots of a name are `__`."""
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(path) | named, path, metadata={"format": "pt"})


def rename_weights(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_the_embedding(tmp_path: Path, dtype: torch.dtype) -> None:
    """As peft#3066: one engine would train an untied head, another a tied one."""
    save_llama(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].to(dtype)
    edit_weights(tmp_path, model__embed_tokens__weight=embedding)
    assert WeightsFolder(tmp_path).left_over() == 0
    edit_weights(tmp_path, lm_head__weight=embedding.float(), rotary_emb__inv_freq=torch.ones(3))
    folder = WeightsFolder(tmp_path)
    assert "lm_head.weight" not in folder.names()
    assert folder.left_over() == 4 * embedding.numel() + 12
    other = embedding.float().clone()
    other[-1, -1] += 1
    edit_weights(tmp_path, lm_head__weight=other)
    message = "the lm_head.weight that is stored is another than .*tie_word_embeddings: false there"
    refused(tmp_path, message)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert torch.equal(WeightsFolder(tmp_path).read("lm_head.weight"), other)
    edit_config(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lm_head__weight=embedding[:-1].clone())
    refused(tmp_path, message)


def test_a_compact_folder_with_another_head_is_refused(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "base", tie_word_embeddings=True)
    SharedLlamaForCausalLM.from_materialized(model, SharingPlan()).save_pretrained(tmp_path)
    edit_weights(tmp_path, lm_head__weight=torch.zeros(32, 16))
    with pytest.raises(PostshareError, match="tie_word_embeddings: false there"):
        ExpandedFolder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    save_llama(tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = load_file(tmp_path / "model.safetensors")[name].to(dtype)
    weight[3, 5] = weight[4, 0] = value
    edit_weights(tmp_path, **{name: weight})
    folder = WeightsFolder(tmp_path)
    folder.read("model.norm.weight")
    message = rf"{name} has 2 of 128 values .*\(the first at \[3, 5\]: {value}\); download"
    with pytest.raises(PostshareError, match=message) as caught:
        folder.read(name)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    with pytest.raises(PostshareError, match=name):
        dict(folder.items())


def test_largest_values_and_empty_tensors_are_numbers() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
        require_finite(ends, "here")
    require_finite(torch.empty(0, 16), "here")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"\(it is empty\); download or copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"git-lfs pointer.*run `git lfs pull`"),
        (b"<!DOCTYPE html>" * 9, r"\); download or copy it again"),
    ],
)
@pytest.mark.parametrize("shard_size", ["1GB", 3000])
def test_what_lies_in_the_place_of_weights_is_named(
    tmp_path: Path, content: bytes, reason: str, shard_size: int | str
) -> None:
    save_llama(tmp_path, shard_size)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_bytes(content)
    assert str(path) in refused(tmp_path, f"is truncated or corrupt .*{reason}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.safetensors.incomplete", "an unfinished download; download it again"),
        ("model.safetensors.part", "an unfinished download; download it again"),
        ("model-00001-of-00002.safetensors", r"shards .* but no model.safetensors.index.json; dow"),
        ("adapter_model.safetensors", r"only an adapter .*merge_and_unload\(\)"),
        ("consolidated.safetensors", "only consolidated.safetensors; put model.safetensors"),
        ("consolidated.00.pth", r"only consolidated.00.pth \(pickle\) weights; convert them"),
    ],
)
def test_a_folder_with_something_else_says_what(tmp_path: Path, name: str, reason: str) -> None:
    save_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refused(tmp_path, reason)


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (lambda n: n.removeprefix("model."), "it was saved as a LlamaModel; save the LlamaForCaus"),
        (lambda n: f"_orig_mod.{n}", "all names begin with '_orig_mod.'; save the model inside"),
        (lambda n: f"module.{n}", "all names begin with 'module.'"),
        (lambda n: f"base_model.model.{n}", "all names begin with 'base_model.model.'"),
        (lambda n: n.replace("q_proj.", "q_proj.base_layer."), "its adapters are not merged"),
        (lambda n: n.replace("model.embed_tokens", "tok_embeddings"), "the names are Meta's"),
        (lambda n: n.replace("lm_head", "score"), "set tie_word_embeddings: true there if"),
        (lambda n: n.replace("up_proj", "w3"), "use the config that belongs to these weights"),
    ],
)
def test_names_that_another_program_gives_have_a_cure(
    tmp_path: Path, change: Callable[[str], str], cure: str
) -> None:
    save_llama(tmp_path)
    rename_weights(tmp_path, change)
    refused(tmp_path, rf"has no weight \S+, which its config.json asks for; {cure}")


def test_the_method_of_quantized_weights_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    (line,) = WeightsFolder(tmp_path).notes()
    assert line.startswith(f"note: {tmp_path / 'config.json'} asks for quantization (gptq), and")
    edit_weights(tmp_path, model__norm__weight=torch.zeros(16, dtype=torch.uint8))
    refused(tmp_path, "stored as U8; use fp32, bf16 or fp16 weights, those that gptq has quantized")
    edit_weights(tmp_path, model__norm__weight=torch.zeros(16).to(torch.float8_e4m3fn))
    refused(tmp_path, "stored as F8_E4M3; use fp32")


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    sharded = save_llama(tmp_path, 3000)
    single = save_llama(tmp_path / "one", initializer_range=0.5)
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "model.safetensors")
    folder = WeightsFolder(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).get_parameter(name)
    assert torch.equal(folder.read(name), theirs)
    assert torch.equal(folder.read(name), single.get_parameter(name))
    assert not torch.equal(folder.read(name), sharded.get_parameter(name))
    (line,) = folder.notes()
    assert line.endswith("model.safetensors is read, as in transformers")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(WeightsFolder(tmp_path).read(name), sharded.get_parameter(name))
    assert WeightsFolder(tmp_path).notes() == []


def test_an_index_of_the_one_file_is_no_contradiction(tmp_path: Path) -> None:
    save_llama(tmp_path)
    names = dict.fromkeys(load_file(tmp_path / "model.safetensors"), "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert WeightsFolder(tmp_path).notes() == []


def test_a_tensor_in_two_shards_is_refused_unless_it_is_the_same(tmp_path: Path) -> None:
    """transformers takes the last, the index says another."""
    save_llama(tmp_path, 3000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    assert torch.equal(WeightsFolder(tmp_path).read(name), tensor)
    save_file(load_file(second) | {name: tensor + 1}, second)
    assert name in refused(tmp_path, "with other values, in .*download the index and the shards")


def test_shards_are_compared_again_once_one_is_written_again(tmp_path: Path) -> None:
    """The second may be as long as the first, and written in the same tick of the clock."""
    save_llama(tmp_path, 3000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    now = time.time_ns()
    for added in (0, 1):
        save_file(load_file(second) | {name: tensor + added}, second)
        os.utime(second, ns=(now, now))
        if not added:
            assert torch.equal(WeightsFolder(tmp_path).read(name), tensor)
    assert name in refused(tmp_path, "with other values")


def test_a_snapshot_of_links_reads_like_its_files(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "blobs", 3000)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    for name, tensor in WeightsFolder(snapshot).items():
        assert torch.equal(tensor, model.get_parameter(name))


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
