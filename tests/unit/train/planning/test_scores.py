"""Scores in the recipe and through the plan stage: what is measured, and what is said of chance."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout, unit_view
from sa_models.plan import SharingPlan
from sa_models.scores.activations import HeadOutputs, output_scores
from sa_models.scores.gauge_invariant import FoldedNorm, aligned_scores
from sa_models.scores.registry import OF_TEXT, SCORES, weight_terms
from sa_models.scores.significance import chance
from sa_models.scores.weight_cosine import best_matches
from sa_models.search.budget import units_of_ratio
from sa_models.search.pairs import make_plan
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.spans_base import (
    LAYERS,
    base_model,
    calibration_ids,
    read,
    recipe,
)
from train.stages import pipeline

pytestmark = pytest.mark.usefixtures("sketched")


def planned(home: Path, folder: Path, **plan) -> tuple[SharingPlan, dict]:
    made = recipe(home, folder, plan={"budget": {"ratio": 0.3}, **plan})
    pipeline.plan(made)
    found = SharingPlan.load(folder / "plan.json")
    return found, read(folder, "chance.json") if (folder / "chance.json").is_file() else {}


def test_aligned_weights_with_the_norm_folded(home: Path, tmp_path: Path, capsys) -> None:
    plan, said = planned(home, tmp_path, score="qk_aligned", fold_norm=True, seed=4)
    folder = WeightsFolder(home / "base")
    layout = HeadLayout.from_config(folder.config)
    scores = aligned_scores(FoldedNorm(folder), layout, "qk_aligned")
    matches = best_matches(scores, layout)
    assert plan == make_plan(matches, layout, units_of_ratio(0.3, layout), "qkv")
    pairs = {(tie.target, tie.source) for tie in plan.ties}
    terms = weight_terms(FoldedNorm(folder), layout, "qk_aligned")
    for pair in said["pairs"]:
        target, source = tuple(pair["target"]), tuple(pair["source"])
        pairs.remove((target, source))
        expected = chance(terms(target, source), target[0] * layout.units, 4)
        assert pair["corrected"] == pytest.approx(expected.corrected, rel=1e-6)
        assert pair["score"] == pytest.approx(expected.score)
    assert not pairs
    count = sum(pair["corrected"] <= 0.05 for pair in said["pairs"])
    assert said["significant"] == count <= 2  # the base's weights are random
    line = f"chance: {count} of 7 pairs beat the best of as many scrambled sources (5%)"
    assert line in capsys.readouterr().out


def test_outputs_on_training_blocks(home: Path, tmp_path: Path) -> None:
    plan, said = planned(home, tmp_path, score="output", calibration_blocks=3)
    made = recipe(home, tmp_path, plan={"budget": {"ratio": 0.3}})
    outputs = HeadOutputs.measure(base_model(home), [{"input_ids": calibration_ids(made, 3)}])
    layout = outputs.layout
    expected = make_plan(
        best_matches(output_scores(outputs), layout), layout, units_of_ratio(0.3, layout), "qkv"
    )
    assert [(t.target, t.source) for t in plan.ties] == [
        (t.target, t.source) for t in expected.ties
    ]
    assert len(said["pairs"]) == 7


def test_too_few_blocks_to_shuffle_are_said(home: Path, tmp_path: Path, capsys) -> None:
    plan, said = planned(home, tmp_path, score="attention", calibration_blocks=2)
    assert len(plan.ties) == 7
    assert said == {}
    out = capsys.readouterr().out
    assert "chance: score attention needs 6 calibration blocks for p-values" in out


def test_pooled_heads_and_followers(home: Path, tmp_path: Path) -> None:
    """Two KV heads of four; layer 3 reuses maps of layer 2, so it has no units to choose."""
    made = recipe(
        home,
        tmp_path,
        plan={"budget": {"ratio": 0.3}, "score": "output_map", "calibration_blocks": 6},
        heads={"kv_heads": 2},
        spans=[{"leader": 2, "followers": [3]}],
        export={"formats": ["compact"]},
    )
    pipeline.plan(made)
    plan, said = SharingPlan.load(tmp_path / "plan.json"), read(tmp_path, "chance.json")
    assert len(plan.ties) == len(said["pairs"]) == int(0.3 * LAYERS * 2)
    assert all(3 not in (tie.target[0], tie.source[0]) for tie in plan.ties)
    for pair in said["pairs"]:
        layers = pair["target"][0] - (pair["target"][0] > 3)
        assert pair["corrected"] == pytest.approx(1 - (1 - pair["p"]) ** (2 * layers), abs=1e-9)


def test_random_plans_are_not_compared(home: Path, tmp_path: Path, capsys) -> None:
    _, said = planned(home, tmp_path, strategy="random")
    assert said == {}
    assert "chance" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"strategy": "random", "fold_norm": True}, "strategy random ignores fold_norm"),
        ({"score": "output", "fold_norm": True}, "score output is measured on text"),
        ({"score": "vo", "calibration_blocks": 4}, "remove plan.calibration_blocks"),
        ({"score": "qk_algned"}, "qk_aligned"),
    ],
)
def test_options_without_effect(home: Path, tmp_path: Path, plan: dict, message: str) -> None:
    with pytest.raises(PostshareError, match=re.escape(message)):
        recipe(home, tmp_path, plan={"budget": {"ratio": 0.3}, **plan})


def test_a_merge_without_effect_is_refused_before_training(home: Path, tmp_path: Path) -> None:
    made = recipe(
        home,
        tmp_path,
        plan={"budget": {"ratio": 0.3}, "share": ["q", "k", "v", "o"]},
        materialize={"merge": "absorb"},
    )
    with pytest.raises(PostshareError, match="changes o where v is shared and o kept"):
        pipeline.plan(made)
    assert not (tmp_path / "plan.json").exists()


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return [number for each in inside for number in numbers(each)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("score", SCORES)
def test_a_dense_export_with_removed_heads_is_a_base_like_any_other(
    home: Path, tmp_path: Path, score: str
) -> None:
    shutil.copytree(home, tmp_path / "home")
    path = tmp_path / "home" / "base" / "model.safetensors"
    tensors = load_file(path)
    layout, removed = HeadLayout.from_config(base_model(home).config), ((1, 0), (3, 1), (4, 2))
    for layer, unit in removed:
        for p in PROJECTIONS:
            unit_view(tensors[layout.parameter_name(layer, p)], layout, p)[unit] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    read_text = {"calibration_blocks": 6} if score in OF_TEXT else {}
    plan, _ = planned(tmp_path / "home", tmp_path / "run", score=score, **read_text)
    assert len({tie.target for tie in plan.ties}) == 7
    files = [json.loads(file.read_text()) for file in (tmp_path / "run").glob("*.json")]
    found = numbers(files)
    assert found
    assert all(map(math.isfinite, found))
    if score not in ("attention", "output_map"):  # the maps of such a head are like others
        assert not {tie.target for tie in plan.ties} & set(removed)
        assert not {tie.source for tie in plan.ties} & set(removed)


def test_scores_that_are_no_numbers_are_in_no_plan(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home")
    path = tmp_path / "home" / "base" / "model.safetensors"
    tensors = {n: t * 1e25 if "_proj" in n else t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PostshareError, match=r"score qk is no number for \d+ pairs of units"):
        planned(tmp_path / "home", tmp_path / "run", score="qk")
    assert not (tmp_path / "run" / "plan.json").exists()
