"""Model folders of legal and illegal parts: the right numbers, or one line and nothing written.

Each folder is read as one process reads it (a whole model) and as ZeRO-3 and FSDP2 do (tensor by
tensor). What is right is a model of the same weights that never was in a file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from tests.support.fuzz import contents, fuzz
from train.models.base_model import load_dense
from train.models.sharded_source import base_source
from train.recipe.recipe import ModelSection

IDS = torch.tensor([[1, 5, 2, 30, 7, 7, 0, 12, 3, 9]])
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class Draft:
    """A folder before it is written: what its files will hold."""

    config: dict[str, Any]
    stored: dict[str, Tensor]
    shards: int = 1
    files: list[Callable[[Path], None]] = field(default_factory=list)
    """Written last, one after the other."""


Part = Callable[[Draft], None]


def of_config(**changes: Any) -> Part:
    def part(draft: Draft) -> None:
        draft.config.update(changes)

    return part


def with_file(name: str, content: str) -> Part:
    return lambda draft: draft.files.append(lambda folder: write(folder / name, content))


def write(file: Path, content: str) -> None:
    file.write_text(content, encoding="utf-8")


# --- what changes nothing -------------------------------------------------------------------------


def old_tables(draft: Draft) -> None:
    draft.stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)


def linked_files(draft: Draft) -> None:
    """As the hub's cache keeps them."""

    def link(folder: Path) -> None:
        blobs = folder / ".blobs"
        blobs.mkdir()
        for number, file in enumerate(sorted(f for f in folder.iterdir() if f.is_file())):
            file.rename(blobs / f"{number}")
            file.symlink_to(Path(".blobs") / f"{number}")

    draft.files.append(link)


def index_of_others(draft: Draft) -> None:
    draft.shards = 1
    others = {"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}
    with_file(INDEX, json.dumps(others))(draft)


LEGAL: dict[str, Part] = {
    "nothing": lambda draft: None,
    "old rotary tables": old_tables,
    "links": linked_files,
    "an adapter": with_file("adapter_config.json", json.dumps({"peft_type": "LORA", "r": 4})),
    "a field of others": of_config(some_field={"a": 1}),
    "no architectures": lambda draft: draft.config.pop("architectures", None),
    "another program's version": of_config(transformers_version="4.31.0"),
    "an index of other files": index_of_others,
    "a README": with_file("README.md", "---\nlicense: [\n"),
    "a pickle beside it": with_file("pytorch_model.bin", "no pickle"),
}

# --- what is wrong --------------------------------------------------------------------------------


def without(name: str) -> Part:
    def part(draft: Draft) -> None:
        del draft.stored[name]

    return part


def other_shape(draft: Draft) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    draft.stored[name] = draft.stored[name][:-1].clone()


def bad_value(name: str, value: float) -> Part:
    def part(draft: Draft) -> None:
        draft.stored[name] = draft.stored[name].clone()
        draft.stored[name].view(-1)[3] = value

    return part


def integers(draft: Draft) -> None:
    name = "model.norm.weight"
    draft.stored[name] = torch.ones(draft.stored[name].shape, dtype=torch.int8)


def another_head(draft: Draft) -> None:
    draft.config["tie_word_embeddings"] = True
    draft.stored[HEAD] = draft.stored[EMBEDDING] + 1


def prefixed(prefix: str) -> Part:
    def part(draft: Draft) -> None:
        draft.stored = {prefix + name: value for name, value in draft.stored.items()}

    return part


def backbone_alone(draft: Draft) -> None:
    """As `LlamaModel.save_pretrained` names them."""
    draft.stored = {
        name.removeprefix("model."): value for name, value in draft.stored.items() if name != HEAD
    }


def last_shard(change: Callable[[Path], Any]) -> Part:
    def part(draft: Draft) -> None:
        draft.files.append(lambda folder: change(sorted(folder.glob("model*.safetensors"))[-1]))

    return part


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def wrong_index(content: Callable[[dict[str, str]], Any]) -> Part:
    def part(draft: Draft) -> None:
        draft.shards = 2

        def rewrite(folder: Path) -> None:
            index = json.loads((folder / INDEX).read_text())
            write(folder / INDEX, json.dumps(content(index["weight_map"])))

        draft.files.append(rewrite)

    return part


def of_rope(**parameters: Any) -> Part:
    def part(draft: Draft) -> None:
        draft.config.pop("rope_scaling", None)
        draft.config["rope_parameters"] = {"rope_theta": 1e4, **parameters}

    return part


ILLEGAL: dict[str, Part] = {
    "a missing weight": without("model.layers.1.self_attn.k_proj.weight"),
    "no embedding": without(EMBEDDING),
    "another shape": other_shape,
    "a NaN": bad_value("model.layers.1.self_attn.k_proj.weight", float("nan")),
    "an infinity": bad_value("model.norm.weight", float("-inf")),
    "integers": integers,
    "an unknown weight": lambda draft: draft.stored.update({"model.extra": torch.ones(2)}),
    "a head of its own, tied": another_head,
    "_orig_mod.": prefixed("_orig_mod."),
    "module.": prefixed("module."),
    "no model.": backbone_alone,
    "a cut file": last_shard(cut),
    "an empty file": last_shard(lambda file: write(file, "")),
    "a pointer": last_shard(lambda file: write(file, POINTER)),
    "no file": last_shard(Path.unlink),
    "a folder for a file": last_shard(lambda file: (file.unlink(), file.mkdir())),
    "an index that is a list": wrong_index(lambda entries: [entries]),
    "an index without entries": wrong_index(lambda entries: {"weight_map": {}}),
    "an index of numbers": wrong_index(lambda entries: {"weight_map": dict.fromkeys(entries, 1)}),
    "an index that is mistaken": wrong_index(
        lambda entries: {"weight_map": dict.fromkeys(entries, max(entries.values()))}
    ),
    "no config": lambda draft: draft.files.append(lambda folder: (folder / "config.json").unlink()),
    "a config of no JSON": with_file("config.json", "{'model_type': 'llama'}"),
    "a config that is a list": with_file("config.json", "[]"),
    "a config in UTF-16": lambda draft: draft.files.append(
        lambda folder: (folder / "config.json").write_text("{}", encoding="utf-16")
    ),
    "another architecture": of_config(model_type="mistral"),
    "no model type": lambda draft: draft.config.pop("model_type"),
    "another activation": of_config(hidden_act="swish_foo"),
    "a pad token beyond": of_config(pad_token_id=32),
    "another rope": of_rope(rope_type="su"),
    "a rope without its factor": of_rope(rope_type="linear"),
    "heads that do not divide": of_config(num_attention_heads=4, num_key_value_heads=3),
    "no heads": of_config(num_attention_heads=0),
    "negative sizes": of_config(hidden_size=-16),
    "text for a number": of_config(num_hidden_layers="two"),
    "another vocabulary": of_config(vocab_size=33),
    "more layers": of_config(num_hidden_layers=3),
    "another width": of_config(intermediate_size=25),
}


# --- folders --------------------------------------------------------------------------------------

ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        }
    },
]


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 1), (2, 2)]))
    head_dim = draw(st.sampled_from([4, 8]))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": heads * (head_dim if draw(st.booleans()) else 6),
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "initializer_range": 0.3,
        **draw(st.sampled_from(ROPES)),
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    choice = {
        "seed": draw(st.integers(0, 3)),
        "dtype": draw(st.sampled_from(["float32", "bfloat16", "float16", "mixed"])),
        "shards": draw(st.integers(1, 3)),
        "stores the tied head": draw(st.booleans()),
        "legal": sorted(draw(st.sets(st.sampled_from(sorted(LEGAL)), max_size=3))),
        "illegal": draw(st.none() | st.sampled_from(sorted(ILLEGAL))),
    }
    return draw(shapes()), choice


def rounded(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    kinds = ["bfloat16", "float32"] if dtype == "mixed" else [dtype]
    return {
        name: value.to(getattr(torch, kinds[number % len(kinds)]))
        for number, (name, value) in enumerate(weights.items())
    }


def reference(config: dict[str, Any], seed: int, dtype: str) -> LlamaForCausalLM:
    """A model that never was in a file, of weights as the files will hold them."""
    torch.manual_seed(seed)
    model = (
        LlamaForCausalLM(LlamaConfig(**deepcopy(config), attn_implementation="eager"))
        .float()
        .eval()
    )
    model.load_state_dict(rounded(dict(model.state_dict()), dtype))
    return model


def make(folder: Path, config: dict[str, Any], choice: dict[str, Any]) -> LlamaForCausalLM:
    """Write the folder; returns what it should be read as."""
    model = reference(config, choice["seed"], choice["dtype"])
    stored = rounded(dict(model.state_dict()), choice["dtype"])
    if config["tie_word_embeddings"] and not choice["stores the tied head"]:
        stored.pop(HEAD, None)
    elif config["tie_word_embeddings"]:
        stored[HEAD] = stored[EMBEDDING].clone()
    draft = Draft(deepcopy(config), stored, choice["shards"])
    illegal = [] if choice["illegal"] is None else [ILLEGAL[choice["illegal"]]]
    for part in (*(LEGAL[name] for name in choice["legal"] if name != "links"), *illegal):
        part(draft)
    if "links" in choice["legal"]:
        LEGAL["links"](draft)
    write(folder / "config.json", json.dumps(draft.config))
    names = sorted(draft.stored)
    count = draft.shards
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = [SINGLE] if count == 1 else files
    home = {name: files[number % count] for number, name in enumerate(names)}
    for file in files:
        inside = {n: draft.stored[n].contiguous() for n in names if home[n] == file}
        save_file(inside, folder / file, metadata={"format": "pt"})
    if count > 1:
        write(folder / INDEX, json.dumps({"metadata": {}, "weight_map": home}))
    for change in draft.files:
        change(folder)
    return model


def whole(folder: Path) -> LlamaForCausalLM:
    return load_dense(folder, "eager").eval()


def by_tensor(folder: Path) -> LlamaForCausalLM:
    section = ModelSection(path=str(folder), attention="eager")
    source = base_source(section, SharingPlan())
    assert source is not None
    model = source.skeleton(torch.device("cpu")).to_empty(device="cpu").eval()
    # `to_empty` forgets buffers and ties.
    model.model.rotary_emb = type(model.model.rotary_emb)(source.config)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(source[name])
    return model


def check(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    config, choice = case
    with tempfile.TemporaryDirectory(prefix="model-") as made:
        folder = Path(made)
        expected = make(folder, config, choice)
        before = contents(folder)
        for read in (whole, by_tensor):
            try:
                model = read(folder)
            except PostshareError as error:
                said = str(error)
                assert choice["illegal"] is not None, f"{read.__name__} refuses: {said}"
                assert "\n" not in said
                assert "; " in said, f"no cure: {said}"
                continue
            assert choice["illegal"] is None, f"{read.__name__} takes {choice['illegal']}"
            with torch.no_grad():
                logits, right = model(IDS).logits, expected(IDS).logits
            torch.testing.assert_close(logits, right, rtol=0, atol=1e-6)
        assert contents(folder) == before
        shutil.rmtree(folder / ".blobs", ignore_errors=True)


@fuzz(400)
@given(cases())
def test_folders_are_read_right_or_refused_in_one_line(
    case: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    check(case)


@pytest.mark.more
@pytest.mark.timeout(1800)
@fuzz(1500)
@given(cases())
def test_further_folders(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    check(case)


@pytest.mark.parametrize("illegal", sorted(ILLEGAL))
@pytest.mark.parametrize("shards", [1, 2])
def test_each_illegal_part_alone_is_refused(illegal: str, shards: int) -> None:
    check((shape(), {**plain(shards), "illegal": illegal}))


@pytest.mark.parametrize("legal", sorted(LEGAL))
def test_each_legal_part_alone_is_read(legal: str) -> None:
    check((shape(), {**plain(2), "legal": [legal]}))


def shape() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }


def plain(shards: int) -> dict[str, Any]:
    return {
        "seed": 0,
        "dtype": "float32",
        "shards": shards,
        "stores the tied head": False,
        "legal": [],
        "illegal": None,
    }
