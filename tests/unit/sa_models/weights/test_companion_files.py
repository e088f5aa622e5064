"""What goes with the weights: fetched from the hub and passed on by exports, in one list."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sa_models.errors import PostshareError
from sa_models.export.manifest import read_manifest
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.companion_files import (
    FETCHED,
    TERMS,
    TOKENIZER_FILES,
    companions,
    copy_terms,
    copy_tokenizer,
    licence_of,
    write_tokenizer,
)
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support import small_models
from tests.support.exports import export
from train.demo import demo_base_path

PASSED_ON = (
    "LICENSE",
    "LICENSE.txt",
    "License.md",
    "LICENCE",
    "MODEL_LICENSE",
    "COPYING",
    "NOTICE",
    "Notice.txt",
    "THIRD_PARTY_NOTICES",
    "USE_POLICY.md",
    "acceptable_use_policy.md",
    "LICENSES/Apache-2.0.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
LEFT = ("README.md", "config.json", "train.log", "optimizer.pt", "modeling_llama.py", "a/LICENSE")


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"of": "{name}"}}')
    return folder


def names(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_what_is_passed_on_is_fetched_and_nothing_else(tmp_path: Path) -> None:
    folder = fill(tmp_path, *PASSED_ON, *LEFT)
    found = [f.relative_to(folder).as_posix() for f in companions(folder, TOKENIZER_FILES)]
    found += [f.relative_to(folder).as_posix() for f in companions(folder, TERMS)]
    assert sorted(found) == sorted(PASSED_ON)
    # As huggingface_hub chooses: a pattern is compared with the whole name.
    weights = ("model.safetensors", "model.safetensors.index.json", "config.json")
    for name in (*PASSED_ON, *weights, "generation_config.json", "README.md"):
        assert any(fnmatch(name, pattern) for pattern in FETCHED), name
    for name in ("optimizer.pt", "modeling_llama.py", "pytorch_model.bin"):
        assert not any(fnmatch(name, pattern) for pattern in FETCHED), name


@pytest.mark.parametrize(
    ("card", "terms", "said"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A", "LICENSE", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE.txt\n---\n",
            "LICENSE.txt",
            {"license": "other", "license_name": "llama2", "license_link": "LICENSE.txt"},
        ),
        (
            "# no front matter",
            "LICENSE.md",
            {"license": "other", "license_name": "of-the-base", "license_link": "LICENSE.md"},
        ),
        ("---\nlicense: [\n---\n", None, {}),
        (None, None, {}),
    ],
)
def test_the_licence_is_the_bases(
    card: str | None, terms: str | None, said: dict[str, str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    if card is not None:
        (model / "README.md").write_text(card)
    if terms is not None:
        (model / terms).write_text("terms")
    made = tmp_path / "made"
    made.mkdir()
    copy_terms(model, None, made)
    assert licence_of(model, made) == said


def test_links_of_a_snapshot_become_files(tmp_path: Path) -> None:
    blobs, snapshot, made = tmp_path / "blobs", tmp_path / "snapshot", tmp_path / "made"
    blobs.mkdir()
    made.mkdir()
    wanted = ("LICENSE", "tokenizer.json", "additional_chat_templates/rag.jinja")
    for at, name in enumerate(wanted):
        (blobs / str(at)).write_text(f"content {at}")
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(at))
    copy_tokenizer(snapshot, made)
    copy_terms(snapshot, None, made)
    shutil.rmtree(blobs)
    assert {name: (made / name).read_text() for name in names(made)} == {
        name: f"content {at}" for at, name in enumerate(wanted)
    }


def test_two_licences_of_one_name_are_both_kept(tmp_path: Path) -> None:
    model, tokenizer, made = (tmp_path / name for name in ("model", "tokenizer", "made"))
    for folder in (model, tokenizer, made):
        folder.mkdir()
    (model / "LICENSE").write_text("of the model")
    (tokenizer / "LICENSE").write_text("of the tokenizer")
    for folder in (model, tokenizer):
        (folder / "NOTICE").write_text("the same")
    copy_terms(model, tokenizer, made)
    assert {name: (made / name).read_text() for name in names(made)} == {
        "LICENSE": "of the model",
        "tokenizer-LICENSE": "of the tokenizer",
        "NOTICE": "the same",
    }


def test_all_forms_have_the_licence_and_a_card_of_their_own(tmp_path: Path) -> None:
    base = small_models.dense(tmp_path / "base")
    terms = {"LICENSE": "terms", "USE_POLICY.md": "policy", "README.md": "the card of the base"}
    template = {"chat_template.jinja": "{{ messages }}", "additional_chat_templates/t.jinja": "t"}
    (base / "additional_chat_templates").mkdir()
    for name, text in (terms | template).items():
        (base / name).write_text(text)
    plan = SharingPlan((HeadTie((1, 0), (0, 0), ("q", "k", "v")),))
    made = export(WeightsFolder(base), plan, tmp_path / "export", tokenizer=base)
    for path in made.paths.values():
        for name, text in (terms | template).items():
            if name == "README.md":
                assert "the card of the base" not in (path / name).read_text()
            else:
                assert (path / name).read_text() == text
                assert name in read_manifest(path)["files"]
    tokenizer = AutoTokenizer.from_pretrained(made.paths["dense"])
    assert tokenizer.chat_template == {"default": "{{ messages }}", "t": "t"}


def test_another_tokenizer_leaves_the_licence_of_the_base(tmp_path: Path) -> None:
    base = small_models.dense(tmp_path / "base")
    trained = small_models.dense(tmp_path / "trained", seed=1)
    (base / "LICENSE").write_text("terms")
    (base / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    plan = SharingPlan((HeadTie((1, 0), (0, 0), ("q", "k", "v")),))
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    made = export(WeightsFolder(trained), plan, tmp_path / "export", base=base, tokenizer=tokenizer)
    for path in made.paths.values():
        assert (path / "LICENSE").read_text() == "terms"
        assert json.loads((path / "generation_config.json").read_text())["temperature"] == 0.6
        assert (path / "tokenizer.json").is_file()


# --- tokenizer_config.json ------------------------------------------------------------------------


def test_a_tokenizer_of_transformers_5_gets_the_names_of_4(tmp_path: Path) -> None:
    origin, made = tmp_path / "origin", tmp_path / "made"
    made.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a|>", "<|b|>"]})
    tokenizer.save_pretrained(origin)
    then = json.loads((origin / "tokenizer_config.json").read_text())
    assert then["tokenizer_class"] == "TokenizersBackend"
    write_tokenizer(origin, made)
    now = json.loads((made / "tokenizer_config.json").read_text())
    assert now["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert now["additional_special_tokens"] == ["<|a|>", "<|b|>"]
    assert "extra_special_tokens" not in now
    read, again = (AutoTokenizer.from_pretrained(folder) for folder in (origin, made))
    text = "def f(x):\n    return <|a|> x + 1</s> <|b|>"
    assert read(text)["input_ids"] == again(text)["input_ids"]
    assert read.extra_special_tokens == again.extra_special_tokens == ["<|a|>", "<|b|>"]
    assert read.special_tokens_map == again.special_tokens_map
    assert sorted(read.all_special_ids) == sorted(again.all_special_ids)


def test_a_tokenizer_of_transformers_4_is_copied_as_it_is(tmp_path: Path) -> None:
    origin, made = tmp_path / "origin", tmp_path / "made"
    origin.mkdir()
    made.mkdir()
    text = '{"tokenizer_class":   "LlamaTokenizer", "legacy": false}'
    (origin / "tokenizer_config.json").write_text(text)
    (origin / "tokenizer.model").write_bytes(b"\x00\x01")
    write_tokenizer(origin, made)
    assert (made / "tokenizer_config.json").read_text() == text
    assert (made / "tokenizer.model").read_bytes() == b"\x00\x01"


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_tokenizer_config_that_is_no_json_is_one_line(text: str, tmp_path: Path) -> None:
    origin = fill(tmp_path / "origin", "tokenizer.json")
    (origin / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PostshareError, match="is not valid JSON") as caught:
        write_tokenizer(origin, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PostshareError, match="has no tokenizer"):
        write_tokenizer(fill(tmp_path / "origin", "LICENSE"), tmp_path)
    write_tokenizer(None, tmp_path)
    assert names(tmp_path) == {"origin/LICENSE"}
