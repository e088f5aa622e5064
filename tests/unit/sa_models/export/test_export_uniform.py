"""Exports of plans that take as many units from every layer: a stock model with fewer heads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, MistralForCausalLM

from sa_models import HeadTie, SharingPlan
from sa_models.errors import PostshareError
from sa_models.export.export import export_model
from sa_models.export.verify import verify_equal
from sa_models.heads import HeadLayout
from sa_models.materialize.low_rank_residual import lost, low_rank
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.residual_shapes import residual_shapes
from sa_models.weights.compact_folder import ExpandedFolder
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.whole_model import load_whole
from tests.support.exports import export, load, sha256
from tests.support.reference import LAYERS, SHAPES, Reference, dense, tokens

KV = {shape: SHAPES[shape]["num_key_value_heads"] for shape in SHAPES}
CASES = [(s, k) for s in ("mha", "gqa", "odd") for k in range(1, KV[s])]


def uniform_plan(units: int, gone: int, layers: int = LAYERS, **fields: Any) -> SharingPlan:
    """As many units of every layer, others in each."""
    draw = random.Random(units * 10 + gone)
    removed = [(at, u) for at in range(layers) for u in sorted(draw.sample(range(units), gone))]
    return SharingPlan(removed=tuple(removed), **fields)


def source(folder: Path, shape: str, **fields: Any) -> WeightsFolder:
    dense(shape, **fields).save_pretrained(folder)
    return WeightsFolder(folder)


def without_units(weights: WeightsFolder, plan: SharingPlan) -> dict[str, torch.Tensor]:
    """The tensors that are left, cut out head by head from the definition of a KV group."""
    config = weights.config
    heads, groups, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    found = {}
    for name in weights.names():
        tensor = weights.read(name)
        if ".self_attn." in name:
            layer = int(name.split(".")[2])
            gone = {unit for at, unit in plan.removed if at == layer}
            of_q = [h for h in range(heads) if h // (heads // groups) not in gone]
            kept = of_q if "q_proj" in name or "o_proj" in name else sorted({*range(groups)} - gone)
            at = [h * size + i for h in kept for i in range(size)]
            tensor = tensor[:, at] if "o_proj" in name else tensor[at]
        found[name] = tensor
    return found


@pytest.mark.parametrize(("shape", "gone"), CASES)
@torch.no_grad()
def test_the_dense_form_is_a_stock_model_with_fewer_heads(
    tmp_path: Path, shape: str, gone: int
) -> None:
    base = source(tmp_path / "base", shape)
    plan = uniform_plan(KV[shape], gone)
    result = export(base, plan, tmp_path / "export")
    folder = result.paths["dense"]

    stock = load(folder).eval()  # no missing, no unexpected key
    heads = (KV[shape] - gone) * (base.config.num_attention_heads // KV[shape])
    even = base.config.hidden_size % heads == 0
    assert type(stock) is (LlamaForCausalLM if even else MistralForCausalLM)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_attention_heads"] == heads
    assert config["num_key_value_heads"] == KV[shape] - gone
    assert config["head_dim"] == base.config.head_dim
    assert config["architectures"] == [type(stock).__name__]

    expected = without_units(base, plan)
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    for name, tensor in stored.items():
        if ".self_attn." in name:
            assert (tensor != 0).all(), name

    ids = tokens(2, 12)
    defined = Reference.of(dense(shape), plan)(ids).logits
    compact = load(result.paths["compact"]).eval()
    ours = load_whole(WeightsFolder(folder))
    for model in (stock, compact, ours):
        assert (model(ids).logits - defined).abs().max() <= 1e-5
    told = [m.generate(ids[:1], max_new_tokens=6, do_sample=False) for m in (stock, compact)]
    assert torch.equal(*told)

    predicted = plan.savings(base.config).bytes(4)[1]
    assert result.bytes == {"compact": predicted, "dense": predicted}
    assert predicted == sum(tensor.nbytes for tensor in expected.values())


def test_each_format_alone_is_the_one_beside_the_other(tmp_path: Path) -> None:
    base, plan = source(tmp_path / "base", "gqa"), uniform_plan(4, 1)
    seen: dict[str, list[tuple[int, int]]] = {}
    both = export(
        base,
        plan,
        tmp_path / "both",
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )
    assert all(steps[-1][0] == steps[-1][1] for steps in seen.values()), seen
    for kind in ("compact", "dense"):
        alone = export(base, plan, tmp_path / kind, formats=[kind])
        for name in ("model.safetensors", "config.json"):
            assert sha256(alone.paths[kind] / name) == sha256(both.paths[kind] / name)
    # A compact folder is a source too: what healing leaves.
    again = export(ExpandedFolder(both.paths["compact"]), plan, tmp_path / "again")
    for kind in ("compact", "dense"):
        name = "model.safetensors"
        assert sha256(again.paths[kind] / name) == sha256(both.paths[kind] / name)
    assert export(base, plan, tmp_path / "both").bytes == both.bytes, "it is left as it is"


def test_fewer_kv_heads_and_fewer_units_together(tmp_path: Path) -> None:
    """8 heads on 4 KV heads: on 2, of which every layer then loses one."""
    base = source(tmp_path / "base", "gqa")
    plan = uniform_plan(2, 1, kv_heads=2)
    result = export(base, plan, tmp_path / "export")
    stock = load(result.paths["dense"]).eval()
    config = stock.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 1, 4)
    ids = tokens(2, 12)
    with torch.no_grad():
        defined = Reference.of(dense("gqa"), plan)(ids).logits
        assert (stock(ids).logits - defined).abs().max() <= 1e-5
    assert result.bytes["dense"] == result.bytes["compact"]


def test_ties_and_residuals_are_written_out_among_the_units_that_are_left(tmp_path: Path) -> None:
    base = source(tmp_path / "base", "mha")
    removed = tuple((layer, (layer + 1) % 4) for layer in range(LAYERS))
    tie = HeadTie((3, 1), (1, 1), ("q", "k", "v", "o"))
    plan = SharingPlan((tie,), removed=removed)
    result = export(base, plan, tmp_path / "ties")
    model = dense("mha")
    ids = tokens(2, 12)
    with torch.no_grad():
        defined = Reference.of(model, plan)(ids).logits
        for path in result.paths.values():
            assert (load(path).eval()(ids).logits - defined).abs().max() <= 1e-5
    assert result.bytes["dense"] > result.bytes["compact"]
    after, draw = MaterializedReader(base, plan), torch.Generator().manual_seed(0)
    pairs = {
        where: low_rank(lost(base, after, plan, *where), 2, None, draw)
        for where in residual_shapes(plan, base.config)
    }
    adapted = export(base, plan, tmp_path / "residual", residual=pairs)
    small = WeightsFolder(adapted.paths["dense"])
    assert small.config.num_attention_heads == 3
    plain = WeightsFolder(result.paths["dense"])
    changed = [n for n in small.names() if not torch.equal(small.read(n), plain.read(n))]
    assert {int(name.split(".")[2]) for name in changed} == {3}


def test_layers_that_differ_keep_the_full_size(tmp_path: Path) -> None:
    base = source(tmp_path / "base", "mha")
    plan = SharingPlan(removed=uniform_plan(4, 1).removed[:-1])
    assert plan.stock_units(base.config) is None
    result = export(base, plan, tmp_path / "export")
    assert result.bytes["dense"] == plan.savings(base.config).bytes(4)[0]
    name = HeadLayout.parameter_name(0, "q")
    assert int((load_file(result.paths["dense"] / "model.safetensors")[name] == 0).sum()) == 6 * 24


def test_biases_that_mistral_has_not_keep_the_full_size(tmp_path: Path) -> None:
    base = source(tmp_path / "base", "gqa", mlp_bias=True)
    uneven, even = uniform_plan(4, 1), uniform_plan(4, 2)
    assert (uneven.stock_units(base.config), even.stock_units(base.config)) == (None, 2)
    ids = tokens(2, 12)
    for plan, heads in ((uneven, 8), (even, 4)):
        result = export(base, plan, tmp_path / str(heads))
        stock = load(result.paths["dense"]).eval()
        assert type(stock) is LlamaForCausalLM
        assert stock.config.num_attention_heads == heads
        with torch.no_grad():
            compact = load(result.paths["compact"]).eval()(ids).logits
            assert (stock(ids).logits - compact).abs().max() <= 1e-5


@pytest.mark.parametrize("what", ["weight", "heads"])
def test_the_verification_sees_another_weight_and_another_shape(tmp_path: Path, what: str) -> None:
    """One head of 18 has the weights' shapes of 3 heads of 6, and other outputs."""
    base, plan = source(tmp_path / "base", "mha"), uniform_plan(4, 1)
    result = export(base, plan, tmp_path / "export")
    compact, folder = ExpandedFolder(result.paths["compact"]), result.paths["dense"]
    verify_equal(compact, WeightsFolder(folder))
    if what == "weight":
        tensors = load_file(folder / "model.safetensors")
        tensors[HeadLayout.parameter_name(2, "v")][0, 0] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        message = "self_attn.v_proj.weight differs"
    else:
        file = folder / "config.json"
        sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 18}
        file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
        message = "layer 0 computes other outputs than the stock layer"
    with pytest.raises(PostshareError, match=message):
        verify_equal(compact, WeightsFolder(folder))


def test_a_dense_form_with_zeros_of_an_earlier_version_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, plan = source(tmp_path / "base", "mha"), uniform_plan(4, 1)
    with monkeypatch.context() as earlier:
        earlier.setattr(SharingPlan, "stock_units", lambda self, config: None)
        old = export(base, plan, tmp_path / "export")
    assert old.bytes["dense"] > old.bytes["compact"]
    verify_equal(ExpandedFolder(old.paths["compact"]), WeightsFolder(old.paths["dense"]))
    assert export(base, plan, tmp_path / "export").bytes == old.bytes


def test_the_card_says_what_it_is_and_on_how_many_devices(tmp_path: Path) -> None:
    base = source(tmp_path / "base", "gqa")
    for gone, named, sizes in ((1, "MistralForCausalLM", "1, 3"), (2, "LlamaForCausalLM", "1, 2")):
        result = export(base, uniform_plan(4, gone), tmp_path / named)
        cards = {kind: (path / "README.md").read_text() for kind, path in result.paths.items()}
        card = " ".join(cards["dense"].split())
        heads = 2 * (4 - gone)
        assert f"A stock `{named}` with {heads} attention heads and {4 - gone} KV heads" in card
        assert f"Tensor parallel sizes that divide its heads: {sizes}." in card
        assert ("transformers 5 refuses a Llama whose number of heads" in card) == (gone == 1)
        assert "as zeros" not in card
        assert "The dense export holds the same tensors" in cards["compact"]
        assert all(len(text.splitlines()) <= 60 for text in cards.values())
        manifest = json.loads((result.paths["dense"] / "manifest.json").read_text())
        assert manifest["stock"]["tensor_parallel"] == [*map(int, sizes.split(", "))]
    free = export(base, SharingPlan(removed=((1, 1),)), tmp_path / "free").paths["dense"]
    assert json.loads((free / "manifest.json").read_text())["stock"] is None
    assert "removed ones as zeros" in " ".join((free / "README.md").read_text().split())


@pytest.mark.parametrize(("model", "gone"), [("stories260K", 1), ("mixed7M", 3)])
def test_real_checkpoints(shared: Path, tmp_path: Path, model: str, gone: int) -> None:
    """GQA with 6 of 8 heads on hidden 64; MHA with 5 of 8 on hidden 256; tied embeddings both."""
    base = WeightsFolder(shared / "models" / model)
    layout = HeadLayout.from_config(base.config)
    plan = uniform_plan(layout.units, gone, layout.layers)
    result = export_model(
        base, plan, tmp_path, dtype=torch.bfloat16, shard_bytes=10**9, tokenizer=base.path
    )
    stock, compact = (load(result.paths[kind]).float().eval() for kind in ("dense", "compact"))
    assert type(stock) is MistralForCausalLM
    ids = torch.randint(100, 400, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = compact(ids).logits, stock(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert result.bytes["dense"] == plan.savings(base.config).bytes(2)[1]
