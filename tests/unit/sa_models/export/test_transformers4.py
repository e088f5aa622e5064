"""Exports as transformers 4 reads them; `make test-transformers` installs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from sa_models.entry import NEEDED
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support import REPOSITORY
from tests.support.exports import export, load, printed
from tests.support.rope_types import ROPE_TYPES, config
from train.demo import demo_base_path

SITE = REPOSITORY / ".site" / "transformers" / "4"
PLAN = SharingPlan((HeadTie((1, 0), (0, 1), ("q", "k", "v")), HeadTie((2, 1), (0, 1), ("o",))))
TEXT = "def f(x):\n    return x + 1  # <|a|>"
pytestmark = pytest.mark.skipif(
    not (SITE.parent / ".installed").is_file(),
    reason=f"{SITE} is absent: run make test-transformers",
)

READ = """
import json, sys
from pathlib import Path
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
)
assert transformers.__version__.startswith("4.57."), transformers.__version__
transformers.logging.set_verbosity_error()
found, logits = {}, {}
for name in sys.argv[2:]:
    folder = Path(name)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is transformers.LlamaForCausalLM
    with torch.no_grad():
        logits[folder.parent.name] = model.eval()(torch.arange(100)[None] % 64).logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    configs = [
        LlamaConfig.from_dict(json.loads((folder.with_name(kind) / "config.json").read_text()))
        for kind in ("dense", "compact")
    ]
    GenerationConfig.from_pretrained(folder).validate(strict=True)
    found[folder.parent.name] = {
        "theta": [config.rope_theta for config in configs],
        "scaling": [config.rope_scaling for config in configs],
        "dtype": [str(config.dtype) for config in configs],
        "generation": model.generation_config.eos_token_id,
        "ids": tokenizer(sys.argv[1])["input_ids"],
        "special": tokenizer.additional_special_tokens,
        "chat": tokenizer.apply_chat_template([{"content": "x"}], tokenize=False),
    }
for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
    try:
        load(folder.with_name("compact"), trust_remote_code=True)
    except ImportError as error:
        found.setdefault("refused", []).append(str(error))
save_file(logits, "logits.safetensors")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of a model with each rope type; their tokenizer was saved by transformers 5."""
    home = tmp_path_factory.mktemp("exports")
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a|>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(home / "tokenizer")
    found = {}
    for kind in ROPE_TYPES:
        torch.manual_seed(0)
        source = home / kind / "source"
        LlamaForCausalLM(config(kind, eos_token_id=[2, 3])).save_pretrained(source)
        export(WeightsFolder(source), PLAN, home / kind, tokenizer=home / "tokenizer")
        found[kind] = home / kind
    return found


@pytest.fixture(scope="module")
def read(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with transformers 4 finds in them, its logits included."""
    work = tmp_path_factory.mktemp("work")
    dense = [path / "dense" for path in folders.values()]
    found = printed(READ, work, TEXT, *dense, PYTHONPATH=str(SITE))
    return json.loads(found) | {"logits": load_file(work / "logits.safetensors")}


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_the_dense_export_computes_the_same_there(
    kind: str, folders: dict[str, Path], read: dict[str, Any]
) -> None:
    with torch.no_grad():
        expected = load(folders[kind] / "dense").eval()(torch.arange(100)[None] % 64).logits
    assert float(expected.std()) > 0.3
    assert float((read["logits"][kind] - expected).abs().max()) <= 1e-5


def test_rope_types_are_told_apart_by_their_logits(read: dict[str, Any]) -> None:
    """Else the comparison above would pass for a config that is not read."""
    plain = read["logits"]["default"]
    for kind in set(ROPE_TYPES) - {"default"}:
        assert float((read["logits"][kind] - plain).abs().max()) > 0.01, kind


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_it_reads_theta_scaling_and_dtype(kind: str, read: dict[str, Any]) -> None:
    """Of the compact config as well, from which tools compute sizes."""
    found = read[kind]
    assert found["theta"] == [500000.0] * 2
    for scaling in found["scaling"]:
        if kind == "default":
            assert scaling is None
        else:
            assert ROPE_TYPES[kind].items() <= scaling.items()
    assert found["dtype"] == ["torch.float32"] * 2
    assert found["generation"] == [2, 3]


def test_it_reads_the_tokenizer(folders: dict[str, Path], read: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["yarn"] / "dense")
    assert "<|a|>" in tokenizer.convert_ids_to_tokens(tokenizer(TEXT)["input_ids"])
    assert read["yarn"]["ids"] == tokenizer(TEXT)["input_ids"]
    assert read["yarn"]["special"] == ["<|a|>"]
    assert read["yarn"]["chat"] == "x!"


def test_a_compact_export_says_which_version_it_needs(read: dict[str, Any]) -> None:
    assert len(read["refused"]) == 2
    for line in read["refused"]:
        assert f"needs transformers {NEEDED} or newer, and this is 4.57." in line
        assert "\n" not in line


FEWER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MistralForCausalLM
logits = {}
for name in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is MistralForCausalLM
    with torch.no_grad():
        logits[Path(name).parent.name] = model.eval()(torch.arange(100)[None] % 64).logits
save_file(logits, "logits.safetensors")
"""


def test_fewer_heads_compute_the_same_there(tmp_path: Path) -> None:
    """3 heads of a hidden size that they do not divide, by the name of Mistral; every rope type."""
    folders = []
    for kind in ROPE_TYPES:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config(kind, num_key_value_heads=4))
        model.save_pretrained(tmp_path / kind / "source")
        removed = tuple((layer, layer) for layer in range(3))
        source = WeightsFolder(tmp_path / kind / "source")
        made = export(source, SharingPlan(removed=removed), tmp_path / kind)
        folders.append(made.paths["dense"])
    printed(FEWER, tmp_path, *folders, PYTHONPATH=str(SITE))
    found = load_file(tmp_path / "logits.safetensors")
    for folder in folders:
        with torch.no_grad():
            expected = load(folder).eval()(torch.arange(100)[None] % 64).logits
        assert float((found[folder.parent.name] - expected).abs().max()) <= 1e-5
