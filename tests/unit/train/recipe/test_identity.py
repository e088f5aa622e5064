"""What a refusal names: the key that was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sa_models.errors import PostshareError
from train.common.identity import refuse_other_run
from train.recipe.identity import compared
from train.recipe.recipe import Recipe, load_recipe, validate


def recipe(recovery: Any, steps: int, **sections: Any) -> Recipe:
    return validate(
        {
            "name": "test",
            "model": {"path": "demo-base"},
            "data": {"train": "stdlib", "validation": "stdlib", "sequence_length": 64},
            "plan": {"budget": {"ratio": 0.3}},
            "recovery": recovery,
            "train": {
                "steps": steps,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
            },
            **sections,
        }
    )


def begun(of: Recipe, folder: Path) -> Recipe:
    """As it is read back from a run folder."""
    of.save(folder / "recipe.yaml")
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("recovery", ["default", ["penalty", "heal", "distill"]])
def test_other_steps_are_named_as_they_were_typed(recovery: Any, tmp_path: Path) -> None:
    theirs = begun(recipe(recovery, 40), tmp_path)
    assert theirs.materialize.heal_steps > 0
    refuse_other_run(tmp_path, *compared(theirs, recipe(recovery, 40)))
    with pytest.raises(PostshareError) as caught:
        refuse_other_run(tmp_path, *compared(theirs, recipe(recovery, 50)))
    assert "holds another run (train.steps was 40, now 50);" in str(caught.value)
    assert "heal_steps" not in str(caught.value)


def test_steps_that_lie_elsewhere_are_other_steps(tmp_path: Path) -> None:
    """The sum is the same; what is trained is not."""
    theirs = begun(recipe(["penalty", "heal"], 40), tmp_path)
    ours = recipe(["heal"], 40)
    with pytest.raises(PostshareError, match=r"materialize\.heal_steps was 20, now 40"):
        refuse_other_run(tmp_path, *compared(theirs, ours))


def test_without_recovery_heal_steps_are_typed(tmp_path: Path) -> None:
    theirs = begun(recipe(None, 4, materialize={"heal_steps": 20}), tmp_path)
    ours = recipe(None, 4, materialize={"heal_steps": 30})
    with pytest.raises(PostshareError, match=r"materialize\.heal_steps was 20, now 30"):
        refuse_other_run(tmp_path, *compared(theirs, ours))
