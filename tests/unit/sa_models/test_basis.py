"""Basis Sharing: the optimum against singular values of outputs, the plan, the compact export."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models.basis import SharedBasis, basis_of, factor_sizes, parameter_range
from sa_models.errors import PostshareError
from sa_models.export.export import ExportResult, export_model
from sa_models.export.manifest import read_manifest
from sa_models.heads import HeadLayout
from sa_models.materialize.shared_basis import factorize, factorized
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.compact_folder import CompactFolder, ExpandedFolder
from sa_models.weights.safetensors_folder import ShardWriter, WeightsFolder
from tests.support.gauge import tiny, tokens


def text(blocks: int = 9) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(blocks=blocks)}]


def full(layout: HeadLayout, size: int) -> SharingPlan:
    """The rank of the stacked weights themselves."""
    groups = [min(size, layout.layers - at) for at in range(0, layout.layers, size)]
    ranks = [tuple(min(layout.hidden_size, n * layout.shape(p)[0]) for n in groups) for p in "qkv"]
    return SharingPlan(basis=SharedBasis(size, *ranks))


def some(layout: HeadLayout, size: int = 2, share: float = 0.6) -> SharingPlan:
    basis = basis_of(layout, size, int(share * parameter_range(layout, size)[1]))
    assert basis is not None
    return SharingPlan(basis=basis)


def write(model: SharedLlamaForCausalLM, folder: Path, shard_bytes: int = 10**9) -> Path:
    folder.mkdir()
    model.config.save_pretrained(folder)
    writer = ShardWriter(folder, shard_bytes)
    for name, parameter in model.named_parameters():
        writer.add(name, parameter.detach())
    writer.close()
    return folder


def exact(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Its logits, computed in float64."""
    return copy.deepcopy(model).double()(ids).logits


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_error_is_that_of_the_best_outputs_of_this_rank(rank: int) -> None:
    """Eckart and Young: the tail of the singular values of the outputs, which are not whitened."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    x[:, :4] *= 20  # without whitening other directions would be kept
    weights = [torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (7, 7, 5)]
    basis, coefficients = factorize(weights, x.T @ x, rank)
    assert basis.shape == (rank, 12)
    wanted = x @ torch.cat(weights).T
    pairs = list(zip(weights, coefficients, strict=True))
    missed = torch.cat([(x @ (w - c @ basis).T) for w, c in pairs], 1)
    best = torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt()
    assert float(missed.norm()) == pytest.approx(float(best), rel=1e-4)
    plain = torch.linalg.svd(torch.cat(weights), full_matrices=False)
    unwhitened = (plain[0][:, :rank] * plain[1][:rank]) @ plain[2][:rank]
    assert float((wanted - x @ unwhitened.T).norm()) > 1.02 * float(best)
    rows, columns = basis.norm(dim=1), torch.cat(coefficients).norm(dim=0)
    torch.testing.assert_close(rows, columns)


def test_nothing_on_the_text_is_refused() -> None:
    weights = [torch.randn(3, 4)]
    for gram in (torch.zeros(4, 4), torch.full((4, 4), float("nan"))):
        with pytest.raises(PostshareError, match="zero or not finite"):
            factorize(weights, gram.double(), 1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_full_rank_is_the_model(kv_heads: int, tied: bool, size: int) -> None:
    model = tiny(kv_heads, layers=5, tie_word_embeddings=tied)
    plan = full(HeadLayout.from_config(model.config), size)
    plan.validate(model.config)
    made = factorized(model, plan, text()).eval()
    ids = tokens()
    torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=0, atol=2e-4)
    attention = made.model.layers[3].self_attn
    assert attention.q_proj.owner is made.model.layers[3 - 3 % size].self_attn.q_proj
    assert attention.o_proj.weight.equal(model.model.layers[3].self_attn.o_proj.weight)
    stored = sum(p.numel() for p in made.parameters())
    assert stored == plan.savings(model.config).stored_parameters


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.613, 0.7, 0.83])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_take_all_that_they_may(kv_heads: int, share: float, size: int) -> None:
    model = tiny(kv_heads, layers=5)
    layout = HeadLayout.from_config(model.config)
    attention = model.model.layers[0].self_attn
    dense = 5 * sum(getattr(attention, f"{p}_proj").weight.numel() for p in "qkv")
    assert parameter_range(layout, size)[1] == dense
    allowed = int(share * dense)
    if allowed < parameter_range(layout, size)[0]:
        assert basis_of(layout, size, allowed) is None
        return
    plan = SharingPlan(basis=basis_of(layout, size, allowed))
    plan.validate(model.config)
    made = factorized(model, plan, text())
    stored = sum(
        p.numel() for name, p in made.named_parameters() if "basis" in name or "coeffic" in name
    )
    assert plan.basis is not None
    assert stored == plan.basis.parameters(layout)
    assert sum(p.numel() for p in made.parameters()) == (
        sum(p.numel() for p in model.parameters()) - dense + stored
    )
    assert plan.savings(model.config).basis_parameters == dense - stored
    # No rank more fits anywhere.
    cheapest = min(
        layout.hidden_size + n * layout.shape(p)[0] for p in "qkv" for n in {size, 5 % size or size}
    )
    assert allowed - cheapest < stored <= allowed


def test_no_factors_where_nothing_is_saved_or_no_rank_is_left() -> None:
    layout = HeadLayout.from_config(tiny(2).config)
    least, whole = parameter_range(layout, 2)
    assert basis_of(layout, 2, whole) is None
    assert basis_of(layout, 2, least - 1) is None
    ones = basis_of(layout, 2, least)
    assert ones is not None
    assert {*ones.q, *ones.k, *ones.v} == {1}


# --- the plan -------------------------------------------------------------------------------------


def test_a_plan_without_a_basis_is_written_as_before() -> None:
    assert "basis" not in SharingPlan().to_dict()
    plan = some(HeadLayout.from_config(tiny(2, layers=5).config))
    assert SharingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.hash() != SharingPlan().hash()
    assert plan.has_stock_form
    assert plan.structure() == SharingPlan()


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        ({"layers": 0, "ranks": {}}, r"basis\.layers is 0; give an integer of at least 1"),
        ({"layers": 2, "ranks": {"q": [1]}}, "give the lists q, k and v"),
        ({"layers": 2, "ranks": {p: [0, 1] for p in "qkv"}}, "give a positive integer"),
        ({"layers": 2, "ranks": {p: [1] for p in "qkv"}}, "has 1 entries; 4 layers in groups of 2"),
        ({"layers": 2, "ranks": {p: [1, 99] for p in "qkv"}}, "q.1. is 99; .* rank 20 at most"),
        ({"layers": 2, "rank": 3}, r"plan\.basis.*rank"),
        ([2], "give layers and ranks"),
    ],
)
def test_a_basis_that_cannot_be(basis: Any, message: str) -> None:
    with pytest.raises(PostshareError, match=message):
        SharingPlan.from_dict({"version": 1, "basis": basis}).validate(tiny(4, layers=4).config)


def test_a_basis_goes_with_nothing_else_yet() -> None:
    config = tiny(4, layers=4).config
    plan = some(HeadLayout.from_config(config))
    for more in (
        {"removed": ((1, 0),)},
        {"kv_heads": 2},
        {"ties": (HeadTie((1, 0), (0, 0), ("q",)),)},
    ):
        with pytest.raises(PostshareError, match="do not go together yet"):
            replace(plan, **more).validate(config)
    with pytest.raises(PostshareError, match="whose factors calibration text decides"):
        SharedLlamaForCausalLM.from_materialized(tiny(4, layers=4), plan)


# --- files ----------------------------------------------------------------------------------------


def exported(
    tmp_path: Path, model: LlamaForCausalLM, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[SharedLlamaForCausalLM, ExportResult]:
    """The factorized model, and its export."""
    plan = some(HeadLayout.from_config(model.config))
    made = factorized(model, plan, text()).eval()
    made.set_attn_implementation("eager")
    source = ExpandedFolder(write(made, tmp_path / "factors", 10**4))
    arguments = {"dtype": dtype, "shard_bytes": 10**9} | more
    return made, export_model(source, plan, tmp_path / "export", **arguments)


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, False), (1, True)])
def test_compact_holds_the_factors_and_dense_their_product(
    tmp_path: Path, kv_heads: int, tied: bool
) -> None:
    model = tiny(kv_heads, layers=5, tie_word_embeddings=tied)
    made, result = exported(tmp_path, model)
    state = dict(made.named_parameters())
    stored = load_file(result.paths["compact"] / "model.safetensors")
    assert stored.keys() == state.keys()
    for name, value in stored.items():
        assert torch.equal(value, state[name]), name
    assert result.bytes["compact"] == 4 * sum(p.numel() for p in state.values())
    assert result.bytes["dense"] == 4 * sum(p.numel() for p in model.parameters())
    ids = tokens()
    compact = AutoModelForCausalLM.from_pretrained(
        result.paths["compact"], dtype=torch.float32, attn_implementation="eager"
    )
    assert isinstance(compact, SharedLlamaForCausalLM)
    # In fp32 the last digit depends on where a tensor lies in memory.
    compact.double().eval()
    torch.testing.assert_close(compact(ids).logits, exact(made, ids), rtol=0, atol=1e-12)
    dense, info = LlamaForCausalLM.from_pretrained(
        result.paths["dense"], dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # Logits are about 10; a product, rounded to fp32, is not the two products that it replaces.
    torch.testing.assert_close(dense.eval()(ids).logits, made(ids).logits, rtol=0, atol=5e-5)
    k = made.model.layers[3].self_attn.k_proj
    product = k.coefficients.weight @ made.model.layers[2].self_attn.k_proj.basis.weight
    torch.testing.assert_close(dense.model.layers[3].self_attn.k_proj.weight, product)
    assert (dense(ids).logits - model(ids).logits).abs().max() > 0.1


def test_a_basis_is_held_in_memory_once_and_generates(tmp_path: Path) -> None:
    made, result = exported(tmp_path, tiny(2, layers=5))
    compact = AutoModelForCausalLM.from_pretrained(result.paths["compact"], dtype=torch.float32)
    held = {p.data_ptr(): p.nbytes for p in compact.parameters()}
    assert sum(held.values()) == result.bytes["compact"]
    again = compact.generate(tokens()[:1, :5], max_new_tokens=8, do_sample=False)
    whole = made.generate(tokens()[:1, :5], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_factors_are_what_both_forms_are_made_of(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    made, result = exported(tmp_path, tiny(2, layers=4), dtype)
    state = dict(made.named_parameters())
    compact = load_file(result.paths["compact"] / "model.safetensors")
    dense = WeightsFolder(result.paths["dense"])
    prefix = "model.layers.{}.self_attn.v_proj."
    for layer in range(4):
        c = state[prefix.format(layer) + "coefficients.weight"].to(dtype)
        b = state[prefix.format(layer - layer % 2) + "basis.weight"].to(dtype)
        assert torch.equal(compact[prefix.format(layer) + "coefficients.weight"], c)
        product = (c.double() @ b.double()).to(dtype)
        assert torch.equal(dense.read(prefix.format(layer) + "weight"), product)


def test_a_finished_export_is_left_and_another_is_refused(tmp_path: Path) -> None:
    _, result = exported(tmp_path, tiny(2, layers=4))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "export").rglob("*") if f.is_file()}
    source = ExpandedFolder(tmp_path / "factors")
    arguments: dict[str, Any] = {"dtype": torch.float32, "shard_bytes": 10**9}
    export_model(source, source.plan, tmp_path / "export", **arguments)
    assert before == {f: f.stat().st_mtime_ns for f in before}
    manifest = read_manifest(result.paths["compact"])
    assert manifest["plan"] == source.plan.to_dict()
    assert manifest["tensors"]["bytes"] == result.bytes["compact"]
    other = factorized(tiny(2, layers=4, seed=1), source.plan, text())
    shutil.rmtree(tmp_path / "factors")
    write(other, tmp_path / "factors")
    source = ExpandedFolder(tmp_path / "factors")
    with pytest.raises(PostshareError, match="holds an export of other weights"):
        export_model(source, source.plan, tmp_path / "export", **arguments)


@pytest.mark.parametrize("kind", ["basis", "coefficients"])
def test_a_factor_that_was_not_written_as_it_is_fails_the_verification(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit in the last place of one number."""
    add = ShardWriter.add

    def damaged(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        inside = "compact" in str(self.folder)
        if inside and name == f"model.layers.2.self_attn.k_proj.{kind}.weight":
            tensor = tensor.clone()
            tensor[1, 1] = torch.nextafter(tensor[1, 1], torch.tensor(1e9))
        add(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", damaged)
    with pytest.raises(PostshareError, match=rf"k_proj\.{kind}\.weight differs"):
        exported(tmp_path, tiny(2, layers=4))
    assert not list((tmp_path / "export").iterdir())


def test_a_layer_that_computes_something_else_fails_the_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The basis of another group."""
    from sa_models.export import verify

    real = ExpandedFolder.factor_names

    def wrong(self: ExpandedFolder, name: str) -> tuple[str, str] | None:
        found = real(self, name)
        is_k = "layers.3.self_attn.k" in name and sys._getframe(1).f_code.co_name == "_take_bases"
        return (found[0], found[1].replace("layers.2", "layers.0")) if is_k and found else found

    monkeypatch.setattr(verify.ExpandedFolder, "factor_names", wrong)
    with pytest.raises(PostshareError, match="layer 3 computes other outputs"):
        exported(tmp_path, tiny(2, layers=4))


def test_it_loads_without_the_package(tmp_path: Path) -> None:
    """By its own modeling files, in a process that cannot import this package."""
    made, result = exported(tmp_path, tiny(2, layers=4))
    folder = result.paths["compact"]
    code = (
        "import sys, torch\n"
        "sys.modules['sa_models'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True,\n"
        "    dtype=torch.float32, attn_implementation='eager').eval().double()\n"
        f"torch.save(m(torch.load({str(tmp_path / 'ids')!r})).logits, {str(tmp_path / 'out')!r})\n"
    )
    torch.save(tokens(), tmp_path / "ids")
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=300,
        env={"HF_HOME": str(tmp_path / "hf"), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = torch.load(tmp_path / "out")
    torch.testing.assert_close(found, exact(made, tokens()), rtol=0, atol=1e-12)


def test_a_source_without_the_factors_is_refused(tmp_path: Path) -> None:
    model = tiny(2, layers=4)
    model.save_pretrained(tmp_path / "dense")
    plan = some(HeadLayout.from_config(model.config))
    with pytest.raises(PostshareError, match="has not the plan's factors"):
        export_model(
            WeightsFolder(tmp_path / "dense"), plan, tmp_path / "export",
            dtype=torch.float32, shard_bytes=10**9,
        )  # fmt: skip
    assert not (tmp_path / "export").exists()


def test_a_file_that_lacks_a_factor_is_refused(tmp_path: Path) -> None:
    model = tiny(2, layers=4)
    made = factorized(model, some(HeadLayout.from_config(model.config)), text())
    folder = write(made, tmp_path / "factors")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.2.self_attn.v_proj.basis.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PostshareError, match=r"has no weight model\.layers\.2\.self_attn\.v_proj"):
        CompactFolder(folder)


def test_sizes_are_those_of_the_shape() -> None:
    layout = HeadLayout.from_config(tiny(2, layers=5).config)
    rows = {p: layout.shape(p)[0] for p in "qkv"}
    for (p, at), (one, dense) in factor_sizes(layout, 2).items():
        layers = 1 if at == 2 else 2
        assert one == layout.hidden_size + layers * rows[p]
        assert dense == layers * rows[p] * layout.hidden_size
