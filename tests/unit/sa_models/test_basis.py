"""Basis Sharing: the optimum against singular values of outputs, and the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.basis import (
    BasisFolder,
    basis_ranks,
    factored_parameters,
    factorize,
    factorized,
    load_basis,
    parameter_range,
    stored_parameters,
)
from sa_models.errors import PostshareError
from sa_models.export import export_model
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.weights import ShardWriter
from tests.unit.sa_models.gauge import tiny, tokens


def text(blocks: int = 9) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(blocks=blocks)}]


def full(layout: HeadLayout, size: int) -> dict[str, list[int]]:
    """The rank of the stacked weights themselves."""
    groups = [min(size, layout.layers - at) for at in range(0, layout.layers, size)]
    return {p: [min(layout.hidden_size, n * layout.shape(p)[0]) for n in groups] for p in "qkv"}


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
@pytest.mark.parametrize("size", [2, 3])
def test_full_rank_is_the_model(kv_heads: int, tied: bool, size: int) -> None:
    model = tiny(kv_heads, layers=5, tie_word_embeddings=tied)
    layout = HeadLayout.from_config(model.config)
    made = factorized(model, size, full(layout, size), text()).eval()
    ids = tokens()
    torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=0, atol=2e-4)
    attention = made.model.layers[3].self_attn
    assert attention.q_proj.basis is made.model.layers[3 - 3 % size].self_attn.q_proj.basis
    assert attention.o_proj.weight.equal(model.model.layers[3].self_attn.o_proj.weight)
    stored = sum(p.numel() for p in made.parameters())
    assert stored == stored_parameters(made.config)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.613, 0.7, 0.83])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_take_all_that_they_may(kv_heads: int, share: float, size: int) -> None:
    model = tiny(kv_heads, layers=5)
    layout = HeadLayout.from_config(model.config)
    attention = model.model.layers[0].self_attn
    dense = 5 * sum(getattr(attention, f"{p}_proj").weight.numel() for p in "qkv")
    assert parameter_range(layout, size)[1] == dense
    allowed = int(share * dense)
    if allowed < parameter_range(layout, size)[0]:
        with pytest.raises(PostshareError, match="do not lie between"):
            basis_ranks(layout, size, allowed)
        return
    ranks = basis_ranks(layout, size, allowed)
    made = factorized(model, size, ranks, text())
    taken = {
        id(p): p.numel()
        for name, p in made.named_parameters()
        if name.endswith((".basis", ".coefficients"))
    }
    stored = sum(taken.values())
    assert stored == factored_parameters(layout, size, ranks)
    assert sum(p.numel() for p in made.parameters()) == (
        sum(p.numel() for p in model.parameters()) - dense + stored
    )
    # No rank more fits anywhere.
    cheapest = min(
        layout.hidden_size + n * layout.shape(p)[0] for p in "qkv" for n in {size, 5 % size or size}
    )
    assert allowed - cheapest < stored <= allowed


def test_a_plan_that_saves_nothing_leaves_no_factors() -> None:
    layout = HeadLayout.from_config(tiny(2).config)
    with pytest.raises(PostshareError, match=r"of the dense weights; change basis\.parameters"):
        basis_ranks(layout, 2, parameter_range(layout, 2)[1])


def test_written_is_read_is_exported(tmp_path: Path) -> None:
    model = tiny(2, layers=5, tie_word_embeddings=True)
    layout = HeadLayout.from_config(model.config)
    ranks = basis_ranks(layout, 2, parameter_range(layout, 2)[1] * 2 // 3)
    made = factorized(model, 2, ranks, text()).eval()
    (tmp_path / "factors").mkdir()
    made.config.save_pretrained(tmp_path / "factors")
    writer = ShardWriter(tmp_path / "factors", 10**4)
    for name, parameter in made.named_parameters():
        writer.add(name, parameter.detach())
    writer.close()
    assert len(list((tmp_path / "factors").glob("*.safetensors"))) > 1
    loaded = load_basis(tmp_path / "factors", "sdpa").eval()
    ids = tokens()
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in made.named_parameters()]
    folder = BasisFolder(tmp_path / "factors")
    result = export_model(
        folder, SharingPlan(), tmp_path / "export", formats=("dense",), dtype=torch.float32,
        shard_bytes=10**9,
    )  # fmt: skip
    dense, info = LlamaForCausalLM.from_pretrained(
        result.paths["dense"], dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # Logits are about 10; a product, rounded to fp32, is not the two products that it replaces.
    torch.testing.assert_close(dense.eval()(ids).logits, made(ids).logits, rtol=0, atol=5e-5)
    k = made.model.layers[3].self_attn.k_proj
    product = k.coefficients @ made.model.layers[2].self_attn.k_proj.basis
    torch.testing.assert_close(dense.model.layers[3].self_attn.k_proj.weight, product)
    assert (dense(ids).logits - model(ids).logits).abs().max() > 0.1


def test_a_file_that_lacks_a_factor_is_refused(tmp_path: Path) -> None:
    model = tiny(2, layers=4)
    layout = HeadLayout.from_config(model.config)
    made = factorized(model, 2, basis_ranks(layout, 2, 3000), text())
    made.config.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    state = {n: p.detach().contiguous() for n, p in made.named_parameters()}
    del state["model.layers.2.self_attn.v_proj.basis"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PostshareError, match=r"has no weight model\.layers\.2\.self_attn\.v_proj"):
        load_basis(tmp_path, "sdpa")
