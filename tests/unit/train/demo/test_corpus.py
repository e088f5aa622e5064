from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.support.in_memory import text_blocks
from train.demo import corpus, demo_base_path
from train.demo.corpus import Document, in_validation, stdlib_documents, without_near_duplicates
from train.demo.tokenizer import train_tokenizer
from train.evaluation.perplexity import perplexity
from train.recipe.recipe import load_recipe


@pytest.fixture(scope="module")
def train() -> list[Document]:
    return stdlib_documents("train")


@pytest.fixture(scope="module")
def validation() -> list[Document]:
    return stdlib_documents("validation")


def test_split_is_by_module_and_deterministic(
    train: list[Document], validation: list[Document]
) -> None:
    names = [document["name"] for document in train + validation]
    assert len(set(names)) == len(names)
    assert [d["name"] for d in train] == sorted(d["name"] for d in train)
    assert all(in_validation(document["name"]) for document in validation)
    assert not any(in_validation(document["name"]) for document in train)
    characters = [sum(len(d["text"]) for d in side) for side in (train, validation)]
    assert 0.05 < characters[1] / sum(characters) < 0.09
    assert characters[0] > 4_000_000
    families = [{d["name"].split(".")[0] for d in side} for side in (train, validation)]
    assert not families[0] & families[1]
    assert len(families[1]) >= 10
    stamp = corpus.stdlib_stamp()
    corpus._documents.cache_clear()
    assert stdlib_documents("train") == train
    assert corpus.stdlib_stamp() == stamp


def test_renamed_modules_stay_on_their_side() -> None:
    """Across versions: datetime became _pydatetime, pathlib a package."""
    for old, new in [
        ("datetime", "_pydatetime"),
        ("decimal", "_pydecimal"),
        ("pathlib", "pathlib._local"),
        ("io", "_pyio"),
        ("argparse", "argparse.sub"),
    ]:
        assert in_validation(old) == in_validation(new)
    assert in_validation("argparse")
    assert not in_validation("inspect")


def test_only_source_text_is_taken(train: list[Document], validation: list[Document]) -> None:
    out = {"test", "idlelib", "lib2to3", "tkinter", "ensurepip", "encodings", "pydoc_data"}
    for document in train + validation:
        parts = document["name"].split(".")
        assert parts[0] not in out
        assert not {"test", "tests", "site-packages", "__pycache__"} & set(parts)
        assert document["text"].strip()


def test_missing_and_unreadable_modules_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "abc.py").write_text("'''Abstract base classes.'''\n")
    (tmp_path / "ast.py").write_bytes(b"# \xff\xfe not UTF-8\n")
    (tmp_path / "cgi.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (tmp_path / "mine.py").write_text("'''Not of the standard library.'''\n")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("'''JSON.'''\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "abc.py").write_text("'''Other.'''\n")
    found = dict(corpus._texts(corpus._modules(tmp_path)))
    assert sorted(found) == ["abc", "cgi", "json"]
    assert found["cgi"].endswith("# é\n")


# --- near-duplicates: counted here by other means than in the package ---------------------------


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text)
    return {tuple(words[i : i + 12]) for i in range(max(1, len(words) - 11))}


def test_no_training_document_overlaps_with_validation(
    train: list[Document], validation: list[Document]
) -> None:
    held = [shingles(document["text"]) for document in validation]
    everything = set().union(*held)
    common_total = total = 0
    for document in train:
        own = shingles(document["text"])
        common = own & everything
        common_total, total = common_total + len(common), total + len(own)
        for other in held:
            assert len(common & other) <= 0.05 * min(len(own), len(other)), document["name"]
    assert common_total / total < 0.002


def document(name: str, *pieces: str) -> Document:
    return {"name": name, "text": "\n".join(pieces)}


def passage(seed: int, words: int) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(f"t{i}" for i in draw.integers(0, 10**9, words))


def test_planted_duplicates_are_dropped() -> None:
    held = [document("held", passage(1, 1000)), document("tiny", passage(2, 60))]
    kept = [
        document("own", passage(3, 900)),
        document("quote", passage(4, 900), passage(1, 30)),  # 19 shared shingles of about 900
    ]
    dropped = [
        document("copy", passage(1, 1000)),
        document("reworked", passage(5, 500), passage(1, 200), passage(6, 500)),
        document("part", passage(1, 40)),  # wholly inside a validation document
        document("around", passage(7, 5000), passage(2, 60)),  # a small one wholly inside it
    ]
    both = [kept[0], *dropped, kept[1]]
    assert without_near_duplicates(both, held) == kept


# --- tokenizer and base -------------------------------------------------------------------------


def test_tokenizer_is_deterministic_and_lossless() -> None:
    tokenizer, again = train_tokenizer(), train_tokenizer()
    serialized = tokenizer.backend_tokenizer.to_str()
    assert serialized == again.backend_tokenizer.to_str()
    assert len(tokenizer) == 2048
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = "def f(self):\n\treturn 1234  # héllo ☃ \u0000\n\n\n    class  A: 'x'  \n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(demo_base_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_base_path())


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[list[int]]:
    texts = [document["text"] for document in documents]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [[tokenizer.bos_token_id, *e.ids, tokenizer.eos_token_id] for e in encodings]


def test_base_is_what_its_recipe_says(base: LlamaForCausalLM) -> None:
    config = base.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (8, 8)
    assert config.num_key_value_heads == 8
    assert config.tie_word_embeddings
    recipe = load_recipe("demo_base")
    assert recipe.model.config is not None
    stored = json.loads((demo_base_path() / "config.json").read_text())
    assert {name: stored[name] for name in recipe.model.config} == recipe.model.config
    size = sum(file.stat().st_size for file in demo_base_path().glob("*.safetensors"))
    assert 2e6 < size < 8e6


def test_base_beats_a_unigram_model_threefold(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Document],
    validation: list[Document],
) -> None:
    counts = Counter(token for ids in encode(tokenizer, train) for token in ids)
    held = text_blocks(encode(tokenizer, validation), 256)
    every = max(1, len(held) // 24)
    chosen = [held[index] for index in range(0, len(held), every)]
    total, vocabulary = sum(counts.values()), base.config.vocab_size
    nll = [
        -math.log((counts[token] + 1) / (total + vocabulary))
        for block in chosen
        for token in block["input_ids"][1:].tolist()
    ]
    unigram = math.exp(sum(nll) / len(nll))
    subset = text_blocks([block["input_ids"].tolist() for block in chosen], 256)
    result = perplexity(base, subset, 8, progress=False)
    assert result.tokens == len(nll)
    assert 3 * result.perplexity <= unigram, (result.perplexity, unigram)
