"""Compact exports of d6d4790 (tests/data/export-d6d4790): loaded and measured as then."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sa_models.export.export import export_model
from sa_models.export.manifest import read_manifest
from sa_models.modeling import SharedLlamaForCausalLM, SharedLlamaModel
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import ExpandedFolder, open_weights
from sa_models.weights.companion_files import AUTO_MAP
from tests.support.exports import printed
from tests.support.transformers_versions import HAS_DUMMY_LAYERS
from train.cli import main

EARLIER = Path(__file__).resolve().parents[3] / "data" / "export-d6d4790"
MODELS = ("heads", "basis")


def rms_norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm in the input's precision; the library's is in float32 whatever the input."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", MODELS)
def test_its_files_are_those_of_its_manifest(name: str) -> None:
    folder = EARLIER / name / "compact"
    manifest = read_manifest(folder)
    assert set(manifest["files"]) == {file.name for file in folder.iterdir()} - {"manifest.json"}
    for file, facts in manifest["files"].items():
        assert facts == {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)}


@pytest.mark.parametrize("name", MODELS)
def test_its_plan_is_read_and_written_as_it_was(name: str, tmp_path: Path) -> None:
    folder = EARLIER / name
    plan = SharingPlan.load(folder / "plan.json")
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    manifest = read_manifest(folder / "compact")
    assert plan.hash() == manifest["plan_sha256"]
    assert ExpandedFolder(folder / "compact").plan == plan
    savings = plan.savings(open_weights(folder / "compact").config)
    assert savings.stored_parameters == manifest["tensors"]["parameters"]
    assert savings.base_parameters == manifest["tensors"]["base_parameters"]


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_the_logits_that_it_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    model, info = AutoModelForCausalLM.from_pretrained(
        EARLIER / name / "compact", output_loading_info=True, trust_remote_code=False
    )
    assert type(model) is SharedLlamaForCausalLM
    assert not any(info.values()), info
    expected = load_file(EARLIER / name / "logits.safetensors")
    with torch.no_grad():
        logits = model.double().eval()(expected["input_ids"]).logits
    assert expected["logits"].std() > 5
    assert (logits - expected["logits"]).abs().max() <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_its_hidden_states_lead_to_these_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ``AutoModel``, which its config does not name; the embeddings are tied."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    model = AutoModel.from_pretrained(EARLIER / name / "compact", trust_remote_code=False)
    assert type(model) is SharedLlamaModel
    expected = load_file(EARLIER / name / "logits.safetensors")
    with torch.no_grad():
        hidden = model.double().eval()(expected["input_ids"]).last_hidden_state
        logits = hidden @ model.embed_tokens.weight.t()
    assert (logits - expected["logits"]).abs().max() <= 1e-6


def test_expanded_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the factors; what has a span no stock Llama computes."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    weights = ExpandedFolder(EARLIER / "basis" / "compact")
    model = LlamaForCausalLM(weights.config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            product = weights.factor_names(name) is not None
            parameter.copy_(weights.product(name) if product else weights.read(name))
        expected = load_file(EARLIER / "basis" / "logits.safetensors")
        logits = model(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_exported_again_its_weights_are_the_same_file(name: str, tmp_path: Path) -> None:
    source = ExpandedFolder(EARLIER / name / "compact")
    again = export_model(
        source,
        source.plan,
        tmp_path,
        dtype=torch.bfloat16,
        shard_bytes=10**9,
        formats=["compact"],
        tokenizer=source.path,
    ).paths["compact"]
    for file in ("model.safetensors", "tokenizer.json"):
        assert sha256(again / file) == sha256(source.path / file), file
    then, now = (json.loads((f / "config.json").read_text()) for f in (source.path, again))
    assert now | {"transformers_version": then["transformers_version"]} == then | {
        # What transformers 4 reads, and the entry of the modeling files.
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "auto_map": AUTO_MAP,
        "packed": True,  # a field since then
    }


def test_evaluate_measures_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EARLIER)
    found = tmp_path / "evaluation.json"
    options = ["--text", "text.txt", "--output", str(found), "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *(f"{name}/compact" for name in MODELS), *options])
    assert ended.value.code == 0
    then, now = (
        [score for model in json.loads(file.read_text())["models"] for score in model["scores"]]
        for file in (EARLIER / "evaluation.json", found)
    )
    assert [score["metric"] for score in now] == [score["metric"] for score in then]
    assert [score["stated"] for score in now] == [score["stated"] for score in then]
    for one, other in zip(now, then, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-4), one["metric"]


WITHOUT_PACKAGE = """
import sys
sys.modules["sa_models"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/compact", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    expected = load_file(f"{folder}/logits.safetensors")
    with torch.no_grad():
        logits = model.float().eval()(expected["input_ids"]).logits
    print((logits - expected["logits"]).abs().max().item())
"""


@pytest.mark.skipif(not HAS_DUMMY_LAYERS, reason="the files of that time need transformers 5.23")
def test_its_own_modeling_files_still_load(tmp_path: Path) -> None:
    """Those of then, under today's transformers, in a process without the package.

    In float32: the logits reach 40, and are 2e-5 off those in float64.
    """
    output = printed(WITHOUT_PACKAGE, tmp_path, EARLIER, *MODELS)
    apart = [float(line) for line in output.split()]
    assert len(apart) == len(MODELS)
    assert max(apart) <= 2e-4
