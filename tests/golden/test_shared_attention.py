"""Shared Attention against the released implementation's numbers (its README defines them)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models import AttentionSpan, SharingPlan, cache_bytes
from sa_models.weights.structure import convert

PLAN = SharingPlan(spans=(AttentionSpan(1, (2, 3)),))
HIDDEN = 64


@pytest.fixture(scope="module")
def facts(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / "shared_attention_mha_2-3.json").read_text())


@pytest.fixture(scope="module")
def arrays(shared: Path) -> Any:
    return np.load(shared / "golden" / "shared_attention_mha_2-3.npz")


@pytest.fixture(scope="module")
def base(shared: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(shared / "models" / "stories260K-mha").eval()


@pytest.fixture(params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest, base: LlamaForCausalLM) -> Any:
    converted = convert(base, PLAN)
    converted.set_attn_implementation(request.param)
    return converted


@pytest.mark.parametrize("reuse_rows", [0, 16, 1000])
@torch.no_grad()
def test_logits_and_loss(
    model: Any, shared: Path, arrays: Any, facts: dict[str, Any], reuse_rows: int
) -> None:
    model.config.reuse_rows = reuse_rows
    ids = torch.from_numpy(np.load(shared / "golden" / "input_ids.npy"))
    out = model(ids, labels=ids)
    np.testing.assert_allclose(out.logits[:, ::16], arrays["logits_s16"], rtol=0, atol=1e-4)
    assert out.loss.item() == pytest.approx(facts["lm_loss"], abs=2e-6)


@pytest.mark.parametrize("reuse_rows", [0, 16])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
)
def test_greedy_tokens(
    model: Any, facts: dict[str, Any], options: dict[str, Any], reuse_rows: int
) -> None:
    model.config.reuse_rows = reuse_rows
    start = torch.tensor([[1]])
    story = model.generate(
        start, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    assert story[0].tolist() == facts["greedy_from_bos"]


def test_parameters(model: Any, base: LlamaForCausalLM, facts: dict[str, Any]) -> None:
    """The release drops the followers' k alone; their q is computed and thrown away there."""
    ours = sum(p.numel() for p in model.parameters())
    assert facts["n_params"] == sum(p.numel() for p in base.parameters()) - 2 * HIDDEN * HIDDEN
    assert ours == facts["n_params"] - 2 * HIDDEN * HIDDEN
    assert ours == PLAN.savings(base.config).stored_parameters
    names = {name for name, _ in model.named_parameters()}
    assert not names & set(facts["unexpected_keys"])


@torch.no_grad()
def test_the_cache_of_forty_tokens(model: Any, facts: dict[str, Any]) -> None:
    ids = torch.tensor([facts["greedy_from_bos"][:40]])
    layers = model(ids, use_cache=True).past_key_values.layers
    held = [[t.numel() for t in (layer.keys, layer.values) if t.numel()] for layer in layers]
    assert [len(tensors) for tensors in held] == facts["cache_tensors_per_layer"]
    assert sum(map(sum, held)) == facts["cache_elements_after_40"]
    size = cache_bytes(PLAN, model.config, batch=1, length=40, dtype=torch.float32)
    assert size == 4 * facts["cache_elements_after_40"]
