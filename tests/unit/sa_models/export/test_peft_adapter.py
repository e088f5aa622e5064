"""Residuals as PEFT adapters: what PEFT loads computes what was fitted, on every shape of heads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models.calibration.input_moments import input_moments
from sa_models.errors import PostshareError
from sa_models.export.export import export_model
from sa_models.export.manifest import read_manifest
from sa_models.export.peft_adapter import (
    insert_,
    load_adapter,
    plain_name,
    save_adapter,
    wrapped_name,
)
from sa_models.materialize.low_rank_residual import Pair, low_rank
from sa_models.materialize.low_rank_residual import lost as lost_weights
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.residual_shapes import residual_parameters, residual_shapes
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.reference import SHAPES, Reference, dense, shared, some_plan, tokens

torch.set_num_threads(1)


def plan_of(shape: str) -> SharingPlan:
    """Ties of all projections and of some, two targets in one projection, a removed unit."""
    if shape == "mqa":
        ties = (HeadTie((2, 0), (0, 0), ("q", "k", "v", "o")), HeadTie((4, 0), (1, 0), ("v",)))
        return SharingPlan(ties)
    ties = (
        HeadTie((2, 0), (0, 1), ("q", "k", "v", "o")),
        HeadTie((2, 2), (1, 0), ("q", "o")),
        HeadTie((5, 1), (2, 1), ("k", "v")),
    )
    return SharingPlan(ties, removed=((4, 1), (5, 0)))


def fitted(
    model: LlamaForCausalLM, folder: Path, plan: SharingPlan, rank: int
) -> dict[tuple[int, str], Pair]:
    """Whitened residuals of a model, which is saved into the folder."""
    model.save_pretrained(folder)
    before = WeightsFolder(folder)
    after = MaterializedReader(before, plan)
    wheres = residual_shapes(plan, model.config)
    moments = input_moments(model, [{"input_ids": tokens()}], wheres)
    generator = torch.Generator().manual_seed(0)
    return {
        where: low_rank(lost_weights(before, after, plan, *where), rank, moments[where], generator)
        for where in wheres
    }


def with_residual(
    model: LlamaForCausalLM, plan: SharingPlan, pairs: dict[tuple[int, str], Pair]
) -> Reference:
    """The reference, head by head, in which every tied slice has its part of B A added."""
    reference = Reference.of(model, plan)
    size = {"q": reference.group, "k": 1, "v": 1, "o": reference.group}
    for (layer, p), pair in pairs.items():
        product = pair.b.double() @ pair.a.double()
        heads, at = getattr(reference, p), 0
        for unit in range(reference.kv_heads):
            if (layer, unit) in plan.removed:
                continue
            for n in range(unit * size[p], (unit + 1) * size[p]):
                part = slice(at, at + reference.head_dim)
                heads[layer][n] = heads[layer][n] + (
                    product[:, part] if p == "o" else product[part]
                )
                at += reference.head_dim
    return reference


@torch.no_grad()
def test_moments_are_those_of_the_inputs() -> None:
    model = dense("odd")
    batches = [{"input_ids": tokens(2, 9)}, {"input_ids": tokens(1, 5, seed=7)}]
    found = input_moments(model, batches, [(3, "q"), (3, "v"), (3, "o"), (0, "k")])
    assert found[3, "q"] is found[3, "v"]
    expected = torch.zeros(30, 30, dtype=torch.float64)
    for batch in batches:
        for row in batch["input_ids"]:
            hidden = Reference.of(model, SharingPlan())(row[None]).hidden[3][0]
            norm = model.model.layers[3].input_layernorm.weight.double()
            x = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
            expected += x.T @ x
    torch.testing.assert_close(found[3, "q"], expected, rtol=1e-4, atol=1e-4)
    assert found[3, "o"].shape == (36, 36)
    assert float((found[0, "k"] - expected).norm()) > 1  # another layer's


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_peft_loads_what_was_fitted(shape: str, tmp_path: Path) -> None:
    model, plan = dense(shape), plan_of(shape)
    pairs = fitted(model, tmp_path / "base", plan, 2)
    result = export_model(
        WeightsFolder(tmp_path / "base"), plan, tmp_path / "out",
        dtype=torch.float32, shard_bytes=10**9, residual=pairs,
    )  # fmt: skip
    compact = AutoModelForCausalLM.from_pretrained(tmp_path / "out/compact")
    plain = compact(tokens()).logits
    adapted = PeftModel.from_pretrained(compact, str(tmp_path / "out/adapter")).eval()
    expected = with_residual(model, plan, pairs)(tokens()).logits.float()
    found = adapted(tokens()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((plain - expected).abs().max()) > 1e-2
    stock, info = LlamaForCausalLM.from_pretrained(tmp_path / "out/dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert float((stock(tokens()).logits - found).abs().max()) <= 1e-5
    stored = residual_parameters(plan, model.config, 2)
    assert result.bytes["adapter"] == 4 * stored
    tensors = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == stored
    assert read_manifest(tmp_path / "out/adapter")["tensors"]["parameters"] == stored
    # The same numbers while it is trained.
    training = shared(model, plan)
    insert_(training, pairs)
    assert float((training(tokens()).logits - found).abs().max()) <= 1e-5


@torch.no_grad()
def test_with_spans_there_is_no_dense_form(tmp_path: Path) -> None:
    model, plan = dense("gqa"), some_plan("both, ties", "gqa")
    wheres = residual_shapes(plan, model.config)
    assert set(wheres) == {
        (2, "q"), (2, "k"), (2, "v"), (2, "o"), (1, "v"), (1, "o"), (4, "q"), (5, "o"),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    pairs = {
        where: Pair(torch.randn(3, size[1], generator=generator), torch.randn(size[0], 3) / 10)
        for where, size in wheres.items()
    }
    model.save_pretrained(tmp_path / "base")
    export_model(
        WeightsFolder(tmp_path / "base"), plan, tmp_path / "out", formats=["compact"],
        dtype=torch.float32, shard_bytes=10**9, residual=pairs,
    )  # fmt: skip
    compact = AutoModelForCausalLM.from_pretrained(tmp_path / "out/compact")
    adapted = PeftModel.from_pretrained(compact, str(tmp_path / "out/adapter")).eval()
    expected = with_residual(model, plan, pairs)(tokens()).logits.float()
    torch.testing.assert_close(adapted(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_full_rank_brings_everything_back(tmp_path: Path) -> None:
    """One tied unit in a projection, and a rank of its size: the base model computes again."""
    model = dense("gqa")  # heads of 4, units of 2 heads
    plan = SharingPlan((HeadTie((3, 1), (1, 0), ("k", "v")),))
    compact = shared(model, plan)
    insert_(compact, fitted(model, tmp_path, plan, 4))
    assert float((compact(tokens()).logits - model(tokens()).logits).abs().max()) <= 1e-4
    assert float((shared(model, plan)(tokens()).logits - model(tokens()).logits).abs().max()) > 1e-2


@torch.no_grad()
def test_two_adapters_on_one_base(tmp_path: Path) -> None:
    model, plan = dense("odd"), plan_of("odd")
    compact = shared(model, plan)
    expected = {}
    for name, rank in (("small", 1), ("large", 4)):
        pairs = fitted(model, tmp_path / "base", plan, rank)
        (tmp_path / name).mkdir()
        save_adapter(tmp_path / name, pairs)
        expected[name] = with_residual(model, plan, pairs)(tokens()).logits.float()
    adapted = PeftModel.from_pretrained(
        copy.deepcopy(compact), str(tmp_path / "small"), adapter_name="small"
    )
    adapted.load_adapter(str(tmp_path / "large"), adapter_name="large")
    for name in ("large", "small", "large"):
        adapted.set_adapter(name)
        found = adapted(tokens()).logits
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)
    assert float((expected["small"] - expected["large"]).abs().max()) > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(adapted(tokens()).logits, compact(tokens()).logits)


@pytest.mark.parametrize("safe", [False, True])
def test_it_cannot_be_merged_into_the_compact_model(safe: bool, tmp_path: Path) -> None:
    """A tied unit has no rows there to merge into: PEFT stops, and has changed nothing."""
    model, plan = dense("gqa"), plan_of("gqa")
    compact = shared(model, plan)
    before = {n: p.detach().clone() for n, p in compact.named_parameters()}
    pairs = fitted(model, tmp_path / "base", plan, 2)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", pairs)
    adapted = PeftModel.from_pretrained(compact, str(tmp_path / "adapter"))
    with pytest.raises(RuntimeError, match="must match the size"):
        adapted.merge_and_unload(safe_merge=safe)
    after = {plain_name(n): p for n, p in compact.named_parameters() if "lora" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())


def test_bf16_exports_agree(tmp_path: Path) -> None:
    """The dense folder is compact expanded + B A of the stored values, rounded once."""
    model, plan = dense("odd"), plan_of("odd")
    pairs = fitted(model, tmp_path / "base", plan, 3)
    source = WeightsFolder(tmp_path / "base")
    options = {"dtype": torch.bfloat16, "shard_bytes": 10**9, "residual": pairs}
    export_model(source, plan, tmp_path / "out", **options)
    stored = load_adapter(tmp_path / "out/adapter")
    files = {
        kind: load_file(tmp_path / "out" / kind / "model.safetensors")
        for kind in ("compact", "dense")
    }
    name = "model.layers.2.self_attn.q_proj.weight"  # units 0 and 2 are tied, 1 is kept: 12 rows
    q0, q1 = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    compact = files["compact"]
    rows = torch.cat([compact[q0][12:24], compact[name], compact[q1][:12]])
    pair = stored[2, "q"]
    assert pair.a.dtype == torch.bfloat16
    expected = (rows.float() + pair.b.float() @ pair.a.float()).bfloat16()
    assert torch.equal(files["dense"][name], expected)
    # Layer 5 has lost its first unit: zeros in the dense form, no feature of the residual.
    k5 = files["dense"]["model.layers.5.self_attn.k_proj.weight"]
    assert not k5[:6].any()
    assert stored[5, "k"].b.shape == (12, 3)
    export_model(source, plan, tmp_path / "out", **options)  # recognizes its own
    options["residual"] = {where: Pair(p.a * 2, p.b) for where, p in pairs.items()}
    with pytest.raises(PostshareError, match="residual_sha256"):
        export_model(source, plan, tmp_path / "out", **options)


def test_a_dense_export_that_lacks_the_residual_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = dense("gqa"), plan_of("gqa")
    pairs = fitted(model, tmp_path / "base", plan, 2)
    monkeypatch.setattr("sa_models.export.job.ExportJob.dense", property(lambda job: job.weights))
    with pytest.raises(PostshareError, match="differs from the materialized weights"):
        export_model(
            WeightsFolder(tmp_path / "base"), plan, tmp_path / "out",
            dtype=torch.float32, shard_bytes=10**9, residual=pairs,
        )  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PostshareError, match="no readable PEFT adapter"):
        load_adapter(tmp_path)
    save_adapter(tmp_path, {(1, "q"): Pair(torch.ones(2, 4), torch.ones(6, 2))})
    assert load_adapter(tmp_path)[1, "q"].a.shape == (2, 4)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 16'))
    with pytest.raises(PostshareError, match="is no residual"):
        load_adapter(tmp_path)


def test_names_with_and_without_an_adapter() -> None:
    name, mlp = "model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight"
    wrapped = wrapped_name(name, {(3, "q"): None})
    assert wrapped == "model.layers.3.self_attn.q_proj.base_layer.weight"
    assert plain_name(wrapped) == name
    assert wrapped_name(name, {(2, "q"): None}) == name
    assert wrapped_name(mlp, {(3, "q"): None}) == mlp
