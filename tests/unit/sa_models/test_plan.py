"""The plan: arithmetic, chains, JSON, and every error that a wrong one gets."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan, resolve_roots
from sa_models.savings import llama_parameters


def config(kv_heads: int = 4, **fields) -> LlamaConfig:
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return LlamaConfig(**(shape | {"num_key_value_heads": kv_heads} | fields))


def tie(target, source, projections="qkv", **kwargs) -> HeadTie:
    return HeadTie(target, source, tuple(projections), **kwargs)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied_embeddings", [True, False])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_parameter_count_is_that_of_the_model(kv_heads, tied_embeddings, head_dim) -> None:
    c = config(kv_heads, tie_word_embeddings=tied_embeddings, head_dim=head_dim, mlp_bias=True)
    model = LlamaForCausalLM(c)
    assert llama_parameters(c) == sum(p.numel() for p in model.parameters())
    layout = HeadLayout.from_config(c)
    attention = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n)
    assert layout.attention_parameters == attention


@pytest.mark.parametrize(
    ("hidden", "middle", "layers", "heads", "kv", "vocab", "tied", "published"),
    [
        (4096, 11008, 32, 32, 32, 32000, False, 6_738_415_616),  # Llama-2-7B
        (5120, 13824, 40, 40, 40, 32000, False, 13_015_864_320),  # Llama-2-13B
        (8192, 28672, 80, 64, 8, 32000, False, 68_976_648_192),  # Llama-2-70B
        (4096, 14336, 32, 32, 8, 128256, False, 8_030_261_248),  # Llama-3-8B
        (2048, 8192, 16, 32, 8, 128256, True, 1_235_814_400),  # Llama-3.2-1B
    ],
)
def test_published_parameter_counts(
    hidden, middle, layers, heads, kv, vocab, tied, published
) -> None:
    c = config(
        kv,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    assert llama_parameters(c) == published


def test_savings_of_a_gqa_plan_by_hand() -> None:
    # 4 heads of 8 in 2 KV groups, hidden 32: a unit holds 16 rows of q, 8 of k, 8 of v.
    c = config(2)
    plan = SharingPlan((tie((1, 0), (0, 1), "qkv"), tie((3, 1), (0, 0), "kv")))
    plan.validate(c)
    savings = plan.savings(c)
    assert savings.tied_parameters == (16 + 8 + 8) * 32 + (8 + 8) * 32
    assert (savings.tied_units, savings.units) == (2, 8)
    assert (savings.tied_heads, savings.heads) == (4, 16)
    assert savings.effective_ratio == 2 / 8
    per_layer = 32 * 32 + 16 * 32 + 16 * 32 + 32 * 32
    assert savings.stored_ratio == savings.tied_parameters / (4 * per_layer)
    base, stored = savings.bytes(2)
    assert base - stored == 2 * savings.tied_parameters


def test_chains_resolve_to_roots_per_projection() -> None:
    ties = [
        tie((1, 0), (0, 3), "qk"),
        tie((2, 0), (1, 0), "qkv"),
        tie((3, 0), (2, 0), "qkvo"),
    ]
    resolved = resolve_roots(ties)
    sources = {(t.target, p): t.source for t in resolved for p in t.projections}
    assert sources[(2, 0), "q"] == (0, 3)
    assert sources[(2, 0), "v"] == (1, 0)
    assert sources[(3, 0), "k"] == (0, 3)
    assert sources[(3, 0), "v"] == (1, 0)
    assert sources[(3, 0), "o"] == (2, 0)
    SharingPlan(resolved).validate(config())


def test_random_chains_resolve_and_change_every_target() -> None:
    generator = random.Random(0)
    for _ in range(50):
        layers, units = 6, 3
        c = config(3, num_hidden_layers=layers, num_attention_heads=6, hidden_size=48)
        ties = [
            tie((layer, u), (generator.randrange(layer), generator.randrange(units)))
            for layer in range(1, layers)
            for u in range(units)
            if generator.random() < 0.7
        ]
        plan = SharingPlan(resolve_roots(ties))
        plan.validate(c)
        assert {t.target for t in plan.ties} == {t.target for t in ties}


def test_released_keeps_chains_and_changes_fewer_heads() -> None:
    ties = (tie((1, 0), (0, 0)), tie((2, 0), (1, 0)), tie((3, 0), (2, 0)), tie((3, 1), (0, 1)))
    plan = SharingPlan(ties, released=True)
    plan.validate(config())
    effective = plan.effective()
    effective.validate(config())
    # Targets 1.0 and 2.0 are sources too: the released forward leaves them their own weights.
    assert {t.target for t in effective.ties} == {(3, 0), (3, 1)}
    assert plan.savings(config()).effective_ratio == 2 / 16


def test_json_round_trip(tmp_path: Path) -> None:
    plan = SharingPlan((tie((2, 1), (0, 3), "qo", score=0.25), tie((3, 1), (1, 0), "v")))
    plan.save(tmp_path / "plan.json")
    assert SharingPlan.load(tmp_path / "plan.json") == plan
    assert SharingPlan.load(tmp_path / "plan.json").hash() == plan.hash()
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    value = plan.to_dict()
    assert value["version"] == 1
    assert value["ties"][0] == {
        "target": [2, 1],
        "source": [0, 3],
        "projections": ["q", "o"],
        "score": 0.25,
    }


@pytest.mark.parametrize(
    ("ties", "says"),
    [
        ([tie((4, 0), (0, 0))], "target layer 4 is out of range"),
        ([tie((1, 0), (-1, 0))], "source layer -1 is out of range"),
        ([tie((1, 4), (0, 0))], "target unit 4 is out of range"),
        ([tie((1, 0), (1, 0))], "cannot be its own source"),
        ([tie((1, 0), (0, 0), "qx")], "unknown projection 'x'"),
        ([tie((1, 0), (0, 0), "")], "no projection"),
        ([tie((1, 0), (0, 0), "qq")], "named twice"),
        ([tie((1, 0), (0, 0)), tie((1, 0), (0, 1), "k")], "already tied"),
        ([tie((1, 0), (2, 0)), tie((2, 0), (1, 0))], "cycle"),
        ([tie((1, 0), (0, 2)), tie((2, 0), (1, 0))], "root source [0, 2]"),
    ],
)
def test_a_wrong_tie_is_named(ties, says) -> None:
    with pytest.raises(PostshareError) as error:
        SharingPlan(tuple(ties)).validate(config())
    message = str(error.value)
    assert says in message
    assert "tie [" in message
    assert "\n" not in message


def test_a_head_index_is_no_kv_group() -> None:
    with pytest.raises(PostshareError, match=r"2 units \(KV groups of 2\)"):
        SharingPlan((tie((1, 3), (0, 0)),)).validate(config(2))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "not a JSON object"),
        ({"version": 2}, "version 2"),
        ({"version": 1, "tie": []}, "unknown key 'tie'"),
        ({"version": 1, "ties": {}}, "plan.ties is dict"),
        ({"version": 1, "ties": [{"target": [1, 0]}]}, r"plan.ties\[0\] has no 'source'"),
        (
            {"version": 1, "ties": [{"target": [1], "source": [0, 0], "projections": ["q"]}]},
            r"plan.ties\[0\].target is \[1\]",
        ),
        (
            {"version": 1, "ties": [{"target": [1, True], "source": [0, 0], "projections": []}]},
            "target",
        ),
        (
            {"version": 1, "ties": [{"target": [1, 0], "source": [0, 0], "projections": "qk"}]},
            "projections",
        ),
    ],
)
def test_a_malformed_plan_is_named(value, says) -> None:
    with pytest.raises(PostshareError, match=says):
        SharingPlan.from_dict(value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(PostshareError, match="does not exist"):
        SharingPlan.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"version": 1,')
    (tmp_path / "nan.json").write_text('{"version": 1, "ties": [], "scores": [NaN]}')
    (tmp_path / "deep.json").write_text(100_000 * "[")
    for name in ("broken", "nan", "deep"):
        with pytest.raises(PostshareError, match=r"cannot be read .*; delete it, and"):
            SharingPlan.load(tmp_path / f"{name}.json")
