"""`recovery` stands for sections: which, with how many steps, and what it may not stand beside."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sa_models.errors import PostshareError
from train.recipe.load import read
from train.recipe.recipe import load_recipe, validate


def value(recovery: Any, **sections: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "short",
        "recovery": recovery,
        "model": {"path": "demo-base"},
        "data": {"train": "stdlib", "validation_fraction": 0.1, "sequence_length": 64},
        "plan": {"strategy": "cosine", "budget": {"ratio": 0.3}},
        "train": {"steps": 9, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
    }
    return made | sections


LONG: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (
        "default",
        {
            "steps": 0,
            "materialize": {"reconstruct": True, "heal_steps": 9},
            "distill": {"weight": 0.5},
        },
    ),
    "paper": ("paper", {"steps": 9, "penalty": {"mode": "coupled"}}),
    "one step": (["heal"], {"steps": 0, "materialize": {"heal_steps": 9}}),
    "half and half": (["decoupled", "heal"], {
        "steps": 4, "materialize": {"heal_steps": 5}, "penalty": {"mode": "decoupled"},
    }),
    "progressive": (["progressive", "heal", "distill"], {
        "steps": 4,
        "materialize": {"heal_steps": 5},
        "penalty": {"mode": "progressive", "schedule": "linear", "ramp_steps": 2},
        "distill": {},
    }),
    "residual": (["residual", "heal"], {
        "steps": 0, "materialize": {"heal_steps": 9}, "residual": {"rank": 8},
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_recovery_is_the_recipe_it_stands_for(name: str) -> None:
    short, long = LONG[name]
    sections = {key: section for key, section in long.items() if key != "steps"}
    train = value(None)["train"] | {"steps": long["steps"]}
    written = validate(value(None, train=train, **sections))
    found = validate(value(short))
    assert found == written
    assert found.steps == 9
    # what a run folder keeps is read again as the same recipe
    assert validate(yaml.safe_load(found.to_yaml())) == found


def test_sections_refine_a_step_without_contradicting_it() -> None:
    given = value("default", distill={"weight": 0.25}, materialize={"calibration_blocks": 7})
    recipe = validate(given)
    assert recipe.distill is not None
    assert recipe.distill.weight == 0.25
    assert recipe.materialize.calibration_blocks == 7
    assert given["train"]["steps"] == 9  # the caller's own is not touched


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (value("defualt"), "recovery is 'defualt'; allowed: default, paper"),
    "unknown step": (
        value(["heel"]),
        "recovery is ['heel']; allowed: default, paper, or a list of penalty, ",
    ),
    "order": (value(["distill", "heal"]), "write [heal, distill]"),
    "twice": (value(["heal", "heal"]), "write [heal]"),
    "two pulls": (value(["penalty", "progressive"]), "penalty and progressive are ways of one"),
    "contradiction": (
        value("default", materialize={"heal_steps": 5}),
        "materialize.heal_steps is 5, and 9 by recovery; remove materialize.heal_steps",
    ),
    "another mode": (
        value("paper", penalty={"mode": "decoupled"}),
        "penalty.mode is decoupled, and coupled by recovery",
    ),
    "idle section": (value(["heal"], distill={}), "does not name distill"),
    "idle penalty": (value("default", penalty={"coefficient": 2.0}), "does not name penalty"),
    "epochs": (
        value(["heal"], train=value(None)["train"] | {"steps": None, "epochs": 1.0}),
        "set train.steps to a number above 0",
    ),
    "nothing trains": (value(["reconstruct"]), "add heal, or set train.steps=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_cannot_stand_for_is_said_in_one_line(name: str) -> None:
    given, message = BAD[name]
    with pytest.raises(PostshareError) as error:
        validate(given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "before"),
    [("demo", (), 0), ("demo", ("recovery=[penalty,heal,distill]",), 25), ("demo_auto", (), 0)],
)
def test_fewer_steps_of_a_demo_are_fewer_before_and_after_sharing(
    name: str, overrides: tuple[str, ...], before: int
) -> None:
    assert "recovery" in read(name)
    recipe = load_recipe(name, [*overrides, "train.steps=50"])
    steps = recipe.train.steps, recipe.materialize.heal_steps, recipe.steps
    assert steps == (before, 50 - before, 50)
