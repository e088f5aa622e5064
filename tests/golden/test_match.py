"""Matching, selection and DirectShare against the released implementation's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.heads import HeadLayout
from sa_models.materialize.ties import copy_ties_, materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import HeadTie, SharingPlan, resolve_roots
from sa_models.scores.weight_cosine import best_matches, unit_scores
from sa_models.search.budget import units_of_ratio
from sa_models.search.pairs import make_plan, select_pairs
from sa_models.weights.safetensors_folder import WeightsFolder


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="module")
def folder(shared: Path) -> WeightsFolder:
    return WeightsFolder(shared / "models" / "stories260K-mha")


@pytest.fixture(scope="module")
def layout(folder: WeightsFolder) -> HeadLayout:
    return HeadLayout.from_config(folder.config)


def matches_of(folder: WeightsFolder, score: str):
    layout = HeadLayout.from_config(folder.config)
    return best_matches(unit_scores(folder, layout, score), layout)


@pytest.mark.parametrize("score", ["q", "k", "v", "qk", "qkv"])
def test_match_values_and_indices(golden: Path, folder: WeightsFolder, score: str) -> None:
    expected = np.load(golden / f"match_{score}.npz")
    matches = matches_of(folder, score)
    # The golden rows run from the last layer down to layer 1; indices are (head, layer).
    values = matches.scores[1:].flip(0).numpy()
    indices = matches.sources[1:].flip(0).flip(-1).numpy()
    np.testing.assert_allclose(values, expected["match_values"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(indices, expected["match_indexs"])


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_selection_order(
    golden: Path, folder: WeightsFolder, layout: HeadLayout, rate: float
) -> None:
    expected = json.loads((golden / f"selection_qk_{rate}.json").read_text())
    matches = matches_of(folder, "qk")
    pairs = select_pairs(matches, layout, units_of_ratio(rate, layout), "qkv")
    assert [(tie.target, tie.source) for tie in pairs] == golden_pairs(expected)


def golden_pairs(selection: dict) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return [
        ((p["target_layer"], p["target_head"]), (p["source_layer"], p["source_head"]))
        for p in selection["pairs"]
    ]


def released_pairs(golden: Path, projections: str) -> tuple[HeadTie, ...]:
    selection = json.loads((golden / "selection_qk_0.3.json").read_text())
    return tuple(HeadTie(t, s, tuple(projections)) for t, s in golden_pairs(selection))


@torch.no_grad()
def loss_and_logits(model: LlamaForCausalLM, golden: Path) -> tuple[float, np.ndarray]:
    ids = torch.from_numpy(np.load(golden / "input_ids.npy"))
    out = model.eval()(ids, labels=ids)
    return out.loss.item(), out.logits[:, ::16].numpy()


@pytest.mark.parametrize("projections", ["qk", "qkv", "qkvo"])
@pytest.mark.parametrize("variant", ["a", "b"])
def test_directshare(
    golden: Path, shared: Path, layout: HeadLayout, projections: str, variant: str
) -> None:
    """a: the paired source's original weights; b: chains followed to their root."""
    model = LlamaForCausalLM.from_pretrained(shared / "models" / "stories260K-mha")
    ties = released_pairs(golden, projections)
    parameters = dict(model.named_parameters())
    if variant == "a":
        copy_ties_(parameters, layout, ties)
    else:
        plan = SharingPlan(resolve_roots(ties))
        plan.validate(model.config)
        assert len({tie.target for tie in plan.ties}) == len(ties) == 12
        materialize_(parameters, layout, plan)
    check_directshare(model, golden, f"{variant}_{projections}")


def test_the_released_forward(golden: Path, shared: Path, layout: HeadLayout) -> None:
    """The released code undoes chains: 9 of the 12 targets really change."""
    model = LlamaForCausalLM.from_pretrained(shared / "models" / "stories260K-mha")
    plan = SharingPlan(released_pairs(golden, "qkvo"), released=True)
    plan.validate(model.config)
    materialize_(dict(model.named_parameters()), layout, plan)
    check_directshare(model, golden, "reference")
    facts = json.loads((golden / "directshare_0.3.json").read_text())
    savings = plan.savings(model.config)
    assert savings.tied_units == facts["ref_n_changed"] == 9
    compact = SharedLlamaForCausalLM.from_materialized(model, plan)
    check_directshare(compact, golden, "reference")


def test_selected_and_resolved_plan_is_the_golden_one(
    golden: Path, folder: WeightsFolder, layout: HeadLayout
) -> None:
    facts = json.loads((golden / "directshare_0.3.json").read_text())
    plan = make_plan(matches_of(folder, "qk"), layout, units_of_ratio(0.3, layout), "qkvo")
    plan.validate(folder.config)
    roots = {f"{t.target[0]}.{t.target[1]}": list(t.source) for t in plan.ties}
    assert roots == {target: root[:2] for target, root in facts["roots"].items()}
    savings = plan.savings(folder.config)
    assert savings.attention_parameters == facts["attn_params_dense"]
    stored = savings.attention_parameters - savings.tied_parameters
    assert stored == facts["attn_params_ideal"]


def check_directshare(model: LlamaForCausalLM, golden: Path, name: str) -> None:
    arrays = np.load(golden / "directshare_0.3.npz")
    loss, logits = loss_and_logits(model, golden)
    assert loss == pytest.approx(float(arrays[f"{name}__lm_loss"]), abs=5e-6)
    np.testing.assert_allclose(logits, arrays[f"{name}__logits_s16"], rtol=0, atol=2e-4)
