"""Tokenizers are those of their files, or refused in one line; nobody is asked anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from sa_models.errors import PostshareError
from train.demo import demo_base_path
from train.models.tokenizer import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_base_path() / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path | str, message: str) -> None:
    with pytest.raises(PostshareError, match=message) as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "cause; cure"


def test_tokens_are_those_of_the_file(folder: Path) -> None:
    text = "Every stage reads files, and writes files."
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(str(folder))
    assert loaded(text, add_special_tokens=False)["input_ids"] == stored.encode(text).ids
    assert loaded.name_or_path == str(folder)
    (folder / "config.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(str(folder))(text)["input_ids"] == stored.encode(text).ids


def test_a_class_that_makes_other_tokens_than_the_file_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    refused(folder, r"BertTokenizer, the class .* other tokens than tokenizer\.json .*set token")
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert len(load_tokenizer(str(folder))) == 2048


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json is not valid JSON .*copy it again"),
        ("tokenizer.json", "", r"tokenizer\.json is not valid JSON"),
        ("tokenizer.json", "[]", "holds no object"),
        ("tokenizer.json", POINTER, r"a git-lfs pointer, not the file\); run `git lfs pull`"),
        ("tokenizer.json", "{}", r"KeyError: 'added_tokens'.*folder with tokenizer\.json"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', r"AttributeError.*model\.tokenizer"),
        ("tokenizer_config.json", '{"model_max_length": "a"}', r"TypeError.*model\.tokenizer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "no tokenizer can be"),
        ("special_tokens_map.json", '{"eos_token": 5}', "Special token eos_token has to be"),
        ("config.json", "{", r"config\.json' is not a valid JSON file"),
    ],
)
def test_broken_files_are_refused(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    refused(folder, message)


def test_a_model_that_tokenizers_does_not_know_is_refused(folder: Path) -> None:
    """Which it says by `Exception`, of no class of its own."""
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["type"] = "Other"
    (folder / "tokenizer.json").write_text(json.dumps(value))
    refused(folder, "did not match any variant")


def test_code_of_a_tokenizer_is_never_run_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "tokenization_own.py").write_text("raise SystemExit('run')")
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    )
    refused(folder, r"its own code \(auto_map\) is never run: set model\.tokenizer to a folder")


def test_missing_files_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, r"has no tokenizer \(tokenizer\.json, .*set model\.tokenizer to a folder with")
    (folder / "vocab.json").write_text('{"a": 0}')
    refused(folder, r"no tokenizer can be loaded from .*set model\.tokenizer to a folder with")
    (folder / "tokenizer.model").write_bytes(b"no sentencepiece")
    refused(folder, r"tokenizer\.model alone needs sentencepiece .*save it anew")


def test_what_the_hub_refuses_has_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def gated(*_: Any, **__: Any) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", gated)
    refused("a/b", r"gated.*huggingface\.co/a/b.*postshare prepare")

    def custom(*_: Any, **__: Any) -> None:
        raise ValueError("Please pass the argument `trust_remote_code=True`")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", custom)
    refused("a/b", r"never run: set model\.tokenizer to one with tokenizer\.json")
