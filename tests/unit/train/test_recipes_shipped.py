from __future__ import annotations

import re
from math import floor
from pathlib import Path

import pytest

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from train import strict_yaml
from train.estimate import plan_savings
from train.known_models import KNOWN, LlamaShape, find_shape
from train.recipe import load_recipe
from train.recipe_source import description, locate, shipped_recipes

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = sorted((REPOSITORY / "recipes").rglob("*.y*ml"))
# {recipe: (tied units, units, parameters saved)}, worked out by hand: units x width x hidden.
EXPECTED = {
    "llama2-7b-postshare-30": (307, 1024, 307 * 3 * 128 * 4096),
    "llama2-13b-postshare-30": (480, 1600, 480 * 3 * 128 * 5120),
    "llama2-7b-directshare-10": (102, 1024, 102 * 4 * 128 * 4096),
    "llama2-7b-directshare-30": (307, 1024, 307 * 4 * 128 * 4096),
    "llama3-8b-postshare-30": (76, 256, 76 * (4 + 1 + 1) * 128 * 4096),
    "llama3.2-1b-postshare-30": (38, 128, 38 * (4 + 1 + 1) * 64 * 2048),
}


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
    assert found >= {*EXPECTED, "demo", "demo_base"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
class TestEveryRecipe:
    def test_is_valid_and_has_nothing_to_warn_about(self, file: Path) -> None:
        recipe = load_recipe(file)
        assert recipe.name.replace("-", "_") == file.stem.replace("-", "_")
        assert recipe.warnings() == []

    def test_is_short_and_says_what_it_is(self, file: Path) -> None:
        data = strict_yaml.parse(file.read_text(encoding="utf-8"), str(file))
        assert keys(data) <= 25
        assert len(description(file)) > 20

    def test_plan_arithmetic(self, file: Path) -> None:
        recipe = load_recipe(file)
        shape = shape_of(str(file))
        savings = plan_savings(recipe.plan, shape)
        if recipe.plan.budget is None:
            assert savings.tied_parameters == 0
            return
        layout = HeadLayout.from_config(shape)
        assert recipe.plan.budget.ratio is not None
        assert savings.tied_units == floor(recipe.plan.budget.ratio * savings.units)
        per_unit = sum(layout.unit_parameters(p) for p in recipe.plan.share)
        assert savings.tied_parameters == savings.tied_units * per_unit
        base, stored = savings.bytes(shape.dtype_bytes)
        assert base - stored == savings.tied_units * per_unit * shape.dtype_bytes


@pytest.mark.parametrize("name", EXPECTED)
def test_published_settings_save_what_was_worked_out_by_hand(name: str) -> None:
    savings = plan_savings(load_recipe(name).plan, shape_of(name))
    assert (savings.tied_units, savings.units, savings.tied_parameters) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "gpus", "accumulation"), [("llama2-7b", 4, 4), ("llama2-13b", 8, 1)]
)
def test_published_batches(name: str, gpus: int, accumulation: int) -> None:
    recipe = load_recipe(f"{name}-postshare-30")
    assert recipe.train.accumulation(gpus) == accumulation
    assert recipe.data.sequence_length == 4096
    assert (recipe.train.learning_rate, recipe.train.schedule) == (5e-5, "cosine")
    assert (recipe.train.epochs, recipe.train.precision) == (1, "bf16")


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
