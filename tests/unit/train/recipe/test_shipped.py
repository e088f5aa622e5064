from __future__ import annotations

import math
import random
import re
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.search.spans import best_spans
from tests.support import REPOSITORY
from train.data.record_blocks import first_records
from train.estimate.llama_shapes import KNOWN, LlamaShape, find_shape
from train.estimate.parameters import expected_structure, plan_savings
from train.planning.problem import PlanProblem
from train.recipe import yaml12
from train.recipe.load import description, locate
from train.recipe.recipe import load_recipe
from train.recipe.shipped import shipped_recipes
from train.recipe.warnings import recipe_warnings
from train.training.optimizer import learning_rate_factor

FILES = sorted((REPOSITORY / "recipes").rglob("*.y*ml"))
# {recipe: (tied units, units, parameters saved)}, worked out by hand: units x width x hidden.
EXPECTED = {
    "llama2-7b-postshare-30": (307, 1024, 307 * 3 * 128 * 4096),
    "llama2-13b-postshare-30": (480, 1600, 480 * 3 * 128 * 5120),
    "llama2-7b-directshare-10": (102, 1024, 102 * 4 * 128 * 4096),
    "llama2-7b-directshare-30": (307, 1024, 307 * 4 * 128 * 4096),
    "llama3-8b-postshare-30": (76, 256, 76 * (4 + 1 + 1) * 128 * 4096),
    "llama3.2-1b-postshare-30": (38, 128, 38 * (4 + 1 + 1) * 64 * 2048),
    "smollm2-135m-postshare-30": (27, 90, 27 * (3 + 1 + 1) * 64 * 576),
}
# {recipe: ({follower: leader}, parameters gone, share of the KV cache gone)}, worked out by hand.
# A follower of attention weights loses q, k and cached keys; one of keys and values k, v and both.
STRUCTURED = {
    "llama2-7b-sa-23-26": (dict.fromkeys(range(23, 27), 22), 4 * 2 * 4096 * 4096, 4 / 64),
    "llama2-7b-sa-27-30": (dict.fromkeys(range(27, 31), 26), 4 * 2 * 4096 * 4096, 4 / 64),
    "llama3-8b-sa-23-26-alpaca": (
        dict.fromkeys(range(23, 27), 22),
        4 * (4096 + 1024) * 4096,
        4 / 64,
    ),
    "llama2-7b-postshare-30-sa-27-30": (
        dict.fromkeys(range(27, 31), 26),
        (4 * 2 * 4096 + 307 * 3 * 128) * 4096,
        4 / 64,
    ),
    "llama2-7b-cla2": ({2 * i + 1: 2 * i for i in range(16)}, 16 * 2 * 4096 * 4096, 16 / 32),
    "llama2-7b-gqa8": ({}, 32 * 2 * (32 - 8) * 128 * 4096, 24 / 32),
    "llama3.2-1b-sa-isotropy": (None, 4 * (2048 + 512) * 2048, 4 / 32),
    "smollm2-135m-sa": (None, 3 * (576 + 192) * 576, 1 - 57 / 60),
    "demo_sa": (None, 2 * 2 * 128 * 128, 2 / 16),
}

REAL = ("smollm2-135m", "smollm2-135m-postshare-30", "smollm2-135m-sa", "smollm2-135m-auto")


def keys(value: object) -> int:
    """Leaf keys of a recipe: what a reader has to understand."""
    if isinstance(value, dict):
        return sum(keys(child) if isinstance(child, dict | list) else 1 for child in value.values())
    if isinstance(value, list):
        return sum(map(keys, value)) if value and isinstance(value[0], dict) else 1
    return 1


def shape_of(name: str) -> LlamaShape:
    section = load_recipe(name).model
    return KNOWN[section.path] if section.path in KNOWN else find_shape(section)[0]


def test_all_recipes_are_found_and_all_that_were_promised_are_there() -> None:
    found = {f.relative_to(REPOSITORY / "recipes").with_suffix("").as_posix() for f in FILES}
    assert found == set(shipped_recipes())
    demos = {"demo", "demo_auto", "demo_postshare", "demo_base"}
    assert found >= {*EXPECTED, *STRUCTURED, *REAL, *demos}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
class TestEveryRecipe:
    def test_is_valid_and_has_nothing_to_warn_about(self, file: Path) -> None:
        recipe = load_recipe(file)
        assert recipe.name.replace("-", "_") == file.stem.replace("-", "_")
        assert recipe_warnings(recipe) == []

    def test_is_short_and_says_what_it_is(self, file: Path) -> None:
        data = yaml12.parse(file.read_text(encoding="utf-8"), str(file))
        assert keys(data) <= 25
        assert len(description(file)) > 20

    def test_plan_arithmetic(self, file: Path) -> None:
        recipe = load_recipe(file)
        shape = shape_of(str(file))
        savings = plan_savings(PlanProblem(recipe.plan, shape, expected_structure(recipe, shape)))
        if recipe.plan.budget is None:
            assert savings.tied_parameters == 0
            return
        if recipe.plan.strategy == "auto":  # nobody knows yet what will save it
            share = -float(str(recipe.plan.budget.bytes).rstrip("%")) / 100
            base, stored = savings.bytes(shape.dtype_bytes)
            assert base - stored == ceil(share * base / shape.dtype_bytes) * shape.dtype_bytes
            return
        layout = HeadLayout.from_config(shape)
        assert recipe.plan.budget.ratio is not None
        if recipe.plan.action == "remove":
            assert savings.removed_units == floor(recipe.plan.budget.ratio * savings.units)
            per_unit = sum(layout.unit_parameters(p) for p in PROJECTIONS)
            assert savings.removed_parameters == savings.removed_units * per_unit
            return
        assert savings.tied_units == floor(recipe.plan.budget.ratio * savings.units)
        per_unit = sum(layout.unit_parameters(p) for p in recipe.plan.share)
        assert savings.tied_parameters == savings.tied_units * per_unit
        base, stored = savings.bytes(shape.dtype_bytes)
        gone = savings.tied_units * per_unit + savings.span_parameters + savings.pooled_parameters
        assert base - stored == gone * shape.dtype_bytes


@pytest.mark.parametrize("name", EXPECTED)
def test_published_settings_save_what_was_worked_out_by_hand(name: str) -> None:
    savings = plan_savings(PlanProblem(load_recipe(name).plan, shape_of(name)))
    assert (savings.tied_units, savings.units, savings.tied_parameters) == EXPECTED[name]


@pytest.mark.parametrize("name", STRUCTURED)
def test_spans_and_kv_heads_save_what_was_worked_out_by_hand(name: str) -> None:
    leader_of, parameters, cache = STRUCTURED[name]
    recipe, shape = load_recipe(name), shape_of(name)
    plan = expected_structure(recipe, shape)
    followers = {f: span.leader for f, span in plan.leader_of().items()}
    if leader_of is not None:
        assert followers == leader_of
    savings = plan_savings(PlanProblem(recipe.plan, shape, plan))
    assert savings.removed_parameters == parameters
    assert savings.cache_ratio == cache


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama2-7b-auto", 32 * 4 * 4096**2), ("llama3.2-1b-auto", 16 * (2 * 2048 + 2 * 512) * 2048)],
)
def test_auto_asks_for_as_much_as_30_percent_of_attention(name: str, attention: int) -> None:
    recipe, size = load_recipe(name), 2
    base, stored = plan_savings(PlanProblem(recipe.plan, shape_of(name))).bytes(size)
    assert (base - stored) / size / attention == pytest.approx(0.3, abs=0.006)
    assert recipe.materialize.reconstruct
    assert recipe.materialize.heal_steps == 2000
    assert recipe.distill is not None


def test_shared_attention_saves_the_published_share() -> None:
    """6.25 % of the KV cache and 2 % of the parameters of Llama-2-7B (2407.12866)."""
    for name in ("llama2-7b-sa-23-26", "llama2-7b-sa-27-30"):
        recipe, shape = load_recipe(name), shape_of(name)
        savings = plan_savings(PlanProblem(recipe.plan, shape, expected_structure(recipe, shape)))
        assert savings.cache_ratio == 0.0625
        assert savings.removed_parameters / 6_738_415_616 == pytest.approx(0.02, abs=2e-4)
        assert recipe.train.steps == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_pairs_of_cla2_are_the_only_spans_that_fit(seed: int) -> None:
    section = load_recipe("llama2-7b-cla2").spans
    assert section is not None
    assert section.layers is not None
    assert (section.share, section.leaders) == ("kv", "mean")
    draw = random.Random(seed)
    found = best_spans(
        lambda leader, followers: draw.random(), 32, section.layers, section.max_followers
    )
    assert [tuple(span) for span in found] == [(2 * i, (2 * i + 1,)) for i in range(16)]


def test_published_instruction_tuning() -> None:
    recipe = load_recipe("llama3-8b-sa-23-26-alpaca")
    train, data = recipe.train, recipe.data
    assert (data.format, [s.path for s in data.train]) == ("alpaca", ["yahma/alpaca-cleaned"])
    assert (train.epochs, train.learning_rate, train.schedule) == (2, 2e-5, "cosine")
    assert (train.warmup_steps, train.precision, train.clip_norm) == (1000, "bf16", 1.0)
    assert [train.accumulation(gpus) for gpus in (2, 4, 8)] == [4, 2, 1]


def test_instruction_tuning_has_the_published_length_and_rates() -> None:
    """The release: 51,760 records, 32 a step; its cosine is laid out for 15,000 steps."""
    train = load_recipe("llama3-8b-sa-23-26-alpaca").train
    assert train.epochs is not None
    records, steps = 51_760, 2 * 51_760 / 32
    assert steps == 3235
    # Records of 200 tokens on average, in their order: how many find room in a block of 512.
    draw = random.Random(0)
    lengths = np.array([min(512, 40 + int(draw.expovariate(1 / 165))) for _ in range(records)])
    blocks = len(first_records(lengths, 512)) - 1
    assert float(lengths.mean()) == pytest.approx(200, abs=10)
    assert 0.98 * blocks * train.epochs / train.batch_size == pytest.approx(steps, rel=0.1)
    assert train.batch_size * records / blocks == pytest.approx(32, rel=0.1)
    for step in range(1000, 3235):
        theirs = (1 + math.cos(math.pi * (step - 1000) / 14_000)) / 2
        assert learning_rate_factor(step, 3235, train) == pytest.approx(theirs, rel=0.02)


def test_gqa_is_exported_as_a_stock_llama_and_spans_are_not() -> None:
    for name in STRUCTURED:
        recipe = load_recipe(name)
        if name == "demo_sa":
            continue  # shows the note that there is no dense form
        assert recipe.export.formats == (("dense",) if recipe.spans is None else ("compact",))


@pytest.mark.parametrize(
    ("name", "gpus", "accumulation", "epochs"),
    [("llama2-7b", 4, 4, 1.0), ("llama2-13b", 8, 1, 0.01)],
)
def test_published_batches_and_lengths(
    name: str, gpus: int, accumulation: int, epochs: float
) -> None:
    recipe = load_recipe(f"{name}-postshare-30")
    assert recipe.train.accumulation(gpus) == accumulation
    assert recipe.data.sequence_length == 4096
    assert (recipe.train.learning_rate, recipe.train.schedule) == (5e-5, "cosine")
    assert recipe.train.precision == "bf16"
    if recipe.train.epochs is None:
        assert recipe.train.steps is not None
        sequences = 20.2e9 / 4 / 4096  # of 20231101.en: bytes, tokens, sequences
        found = recipe.train.steps * recipe.train.batch_size / sequences
        assert found == pytest.approx(epochs, rel=0.05)
    else:
        assert recipe.train.epochs == epochs


def test_the_real_base_is_trained_in_what_the_hardware_has() -> None:
    for name in REAL:
        recipe = load_recipe(name)
        assert (recipe.model.path, recipe.train.precision) == ("smollm2-135m", "auto")
    recipe = load_recipe("smollm2-135m")  # `make real`: half an hour of two cores
    shape = shape_of("smollm2-135m")
    savings = plan_savings(PlanProblem(recipe.plan, shape, expected_structure(recipe, shape)))
    assert (savings.removed_units, savings.units) == (9, 90)
    assert savings.base_parameters - savings.stored_parameters == 9 * 2 * (3 + 1) * 64 * 576
    assert (recipe.train.steps, recipe.materialize.heal_steps) == (0, 16)
    assert recipe.materialize.reconstruct
    assert recipe.distill is not None


def test_directshare_does_not_train() -> None:
    for percent in (10, 30):
        recipe = load_recipe(f"llama2-7b-directshare-{percent}")
        assert recipe.train.steps == 0
        assert recipe.plan.share == ("q", "k", "v", "o")


def test_names_and_paths_find_the_same_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # outside a checkout
    assert locate("demo") == locate("recipes/demo.yaml") == REPOSITORY / "recipes" / "demo.yaml"
    Path("recipes").mkdir()
    Path("recipes/demo.yaml").write_text("mine: 1\n")
    assert locate("recipes/demo.yaml") == Path("recipes/demo.yaml")  # a file of one's own wins


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("demoo", "did you mean demo?"),
        ("recipes/llama2-7b-postshare.yaml", "did you mean llama2-7b-postshare-30?"),
        ("/nowhere/x.yaml", "`postshare recipes` lists"),
        ("zzzzzz", "`postshare recipes` lists"),
    ],
)
def test_missing_recipe_names_the_nearest(name: str, cure: str) -> None:
    with pytest.raises(PostshareError, match=re.escape(cure)):
        locate(name)


def test_editors_find_the_schema() -> None:
    for file in FILES:
        first = file.read_text(encoding="utf-8").splitlines()[0]
        if file.stem == "demo_base":
            continue  # not part of what people copy
        assert first == "# yaml-language-server: $schema=../docs/recipe.schema.json"
    assert (REPOSITORY / "docs" / "recipe.schema.json").is_file()
