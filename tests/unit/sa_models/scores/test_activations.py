"""Scores on calibration text against plain loops, and their nulls."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout, unit_view
from sa_models.scores import weight_cosine
from sa_models.scores.activations import HeadOutputs, output_map_scores, output_scores, output_terms
from sa_models.scores.attention_maps import unit_map_similarity
from sa_models.scores.significance import Chance, chance
from sa_models.scores.significance_text import linear_map_terms, map_terms, shuffles
from tests.support.gauge import HEAD_DIM, HEADS, HIDDEN, change_gauge_, slices, tiny, tokens


def batches(blocks: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(blocks, length)}]


def loop_heads(model: LlamaForCausalLM) -> torch.Tensor:
    """Head outputs from the maps of the model and its values: (layers, heads, tokens, head_dim)."""
    model.set_attn_implementation("eager")
    group = HEADS // model.config.num_key_value_heads
    found = []
    with torch.no_grad():
        run = model(batches()[0]["input_ids"], output_attentions=True, output_hidden_states=True)
        for layer, maps, x in zip(
            model.model.layers, run.attentions, run.hidden_states[:-1], strict=True
        ):
            v = layer.self_attn.v_proj(layer.input_layernorm(x)).unflatten(-1, (-1, HEAD_DIM))
            heads = [maps[:, h] @ v[:, :, h // group] for h in range(HEADS)]
            found.append(torch.stack(heads).flatten(1, 2))
    return torch.stack(found).double()


def group_of(layout: HeadLayout, unit: int) -> range:
    return range(unit * layout.heads_per_unit, (unit + 1) * layout.heads_per_unit)


def pairs(layout: HeadLayout):
    every = list(itertools.product(range(layout.layers), range(layout.units)))
    return itertools.product(enumerate(every), repeat=2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_scores_equal_a_loop(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kv_heads)
    layout, heads = HeadLayout.from_config(model.config), loop_heads(model)
    # Five tokens at a time of 24, blocks of 5 units.
    monkeypatch.setattr(weight_cosine, "CHUNK_BYTES", 5 * 4 * layout.layers * layout.units * HIDDEN)
    monkeypatch.setattr(weight_cosine, "BLOCK_UNITS", 5)
    outputs = HeadOutputs.measure(model, batches())
    found = output_scores(outputs), output_map_scores(outputs)
    terms = output_terms(outputs)
    for (i, a), (j, b) in pairs(layout):
        h_a, h_b = (heads[u[0], list(group_of(layout, u[1]))] for u in (a, b))
        o_a, o_b = (torch.stack(slices(model, *u)["o"]) for u in (a, b))
        y_a, y_b = (h_a @ o_a).sum(0), (h_b @ o_b).sum(0)
        cosine = float((y_a * y_b).sum() / y_a.norm() / y_b.norm())
        assert float(found[0][i, j]) == pytest.approx(cosine, abs=1e-5)
        assert terms(a, b).score == pytest.approx(cosine, abs=1e-5)
        h_a, h_b = h_a.flatten(0, 1), h_b.flatten(0, 1)
        m = torch.linalg.lstsq(h_b, h_a).solution
        missed = ((h_a - h_b @ m) @ o_a).square().sum() / (h_a @ o_a).square().sum()
        assert float(found[1][i, j]) == pytest.approx(1 - float(missed), abs=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_change_of_gauge_changes_nothing(kv_heads: int) -> None:
    model = tiny(kv_heads)

    def measure() -> list[torch.Tensor]:
        outputs = HeadOutputs.measure(model, batches())
        return [
            output_scores(outputs),
            output_map_scores(outputs),
            unit_map_similarity(model, batches()),
        ]

    before = measure()
    change_gauge_(model)
    for one, other in zip(before, measure(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_maps_of_units_are_compared_head_by_head(kv_heads: int) -> None:
    model = tiny(kv_heads)
    layout = HeadLayout.from_config(model.config)
    found = unit_map_similarity(model, batches())
    assert model.config._attn_implementation != "eager"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(batches()[0]["input_ids"], output_attentions=True).attentions
    for (i, a), (j, b) in pairs(layout):
        cosines = [
            torch.cosine_similarity(
                maps[a[0]][block, x, row].double(), maps[b[0]][block, y, row].double(), dim=0
            )
            for x, y in zip(group_of(layout, a[1]), group_of(layout, b[1]), strict=True)
            for block in range(2)
            for row in range(1, 12)
        ]
        assert float(found[i, j]) == pytest.approx(float(sum(cosines)) / len(cosines), abs=1e-6)


def test_no_block_stays_in_its_place() -> None:
    drawn = shuffles(6, 3)
    assert (drawn.sort(1).values == torch.arange(6)).all()
    assert not (drawn == torch.arange(6)).any()
    assert len(set(map(tuple, drawn.tolist()))) > 200  # of 265
    assert not torch.equal(drawn, shuffles(6, 4))


def test_the_scores_of_pairs_are_those_of_the_matrix() -> None:
    model, text = tiny(2), batches(7, 10)
    outputs = HeadOutputs.measure(model, text)
    scores, terms = output_map_scores(outputs), linear_map_terms(outputs, 7)
    for target, source in [((2, 1), (0, 0)), ((1, 0), (0, 1))]:
        i, j = (u[0] * 2 + u[1] for u in (target, source))
        assert terms(target, source).score == pytest.approx(float(scores[i, j]), abs=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_map_scores_of_pairs_are_those_of_the_matrix(masked: bool) -> None:
    """All rows with two keys or more are kept; every block has one border of documents."""
    model, text = tiny(2), batches(7, 10)
    if masked:
        text[0]["position_ids"] = torch.cat([torch.arange(4), torch.arange(6)]).expand(7, 10)
    maps, terms = unit_map_similarity(model, text), map_terms(model, text)
    for target, source in [((2, 1), (0, 0)), ((1, 0), (0, 1))]:
        i, j = (u[0] * 2 + u[1] for u in (target, source))
        assert terms(target, source).score == pytest.approx(float(maps[i, j]), abs=1e-6)


def test_a_copy_of_a_layer_is_no_chance() -> None:
    """Layer 1 is layer 0 again, on nearly the same states: o and the MLP add next to nothing."""
    model = tiny(2, seed=8)
    with torch.no_grad():
        model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 1e-3
            layer.mlp.down_proj.weight *= 1e-3
    text = batches(8, 16)
    outputs = HeadOutputs.measure(model, text)
    for terms in (output_terms(outputs), linear_map_terms(outputs, 8), map_terms(model, text)):
        copy = chance(terms((1, 0), (0, 0)), 2)
        assert copy.score > 0.99
        assert copy.corrected < 1e-3


def test_bad_input() -> None:
    model = tiny(2)
    with pytest.raises(PostshareError, match=r"5 calibration blocks are too few .*at least 6"):
        map_terms(model, batches(5))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(torch.inf)
    with pytest.raises(PostshareError, match="not finite"):
        HeadOutputs.measure(model, batches())


@pytest.mark.parametrize("silent", ["o", "v", "vo"])
def test_a_unit_that_writes_nothing_scores_zero(silent: str) -> None:
    """As a target; as a source, unless it returns what its o then loses."""
    model = tiny(2)
    layout = HeadLayout.from_config(model.config)
    before = HeadOutputs.measure(model, batches(8))
    with torch.no_grad():
        for p in silent:
            unit_view(model.get_parameter(layout.parameter_name(2, p)), layout, p)[1] = 0
    outputs, at = HeadOutputs.measure(model, batches(8)), 2 * layout.units + 1
    others = [unit for unit in range(layout.layers * layout.units) if unit != at]
    for measure in (output_scores, output_map_scores):
        scores, whole = measure(outputs), measure(before)
        assert (scores[at] == 0).all()
        assert (scores[:, at] == 0).all() or (measure, silent) == (output_map_scores, "o")
        assert torch.equal(scores[others][:, others], whole[others][:, others])
    for terms in (output_terms(outputs), linear_map_terms(outputs, 8)):
        assert chance(terms((2, 1), (0, 0)), 4) == Chance(0.0, 0.0, 1.0, 1.0)
