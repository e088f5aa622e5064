from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.demo_runs import recipe
from train.recipe.precision import is_auto, precisions, with_precision, with_precisions_of
from train.recipe.recipe import Recipe


def made(folder: Path, train: str, distill: str | None = None) -> Recipe:
    section = {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
    more = {} if distill is None else {"distill": {"precision": distill}}
    return recipe(folder, train={**section, "precision": train}, **more)


@pytest.mark.parametrize(
    ("train", "distill", "there"),
    [
        ("auto", None, {"train.precision": "bf16"}),
        ("auto", "auto", {"train.precision": "bf16", "distill.precision": "bf16"}),
        ("auto", "int8", {"train.precision": "bf16", "distill.precision": "int8"}),
        ("fp32", "auto", {"train.precision": "fp32", "distill.precision": "bf16"}),
    ],
)
def test_auto_alone_is_replaced(
    tmp_path: Path, train: str, distill: str | None, there: dict[str, str]
) -> None:
    asked = made(tmp_path / "run", train, distill)
    settled = with_precision(asked, "bf16")
    assert (is_auto(asked), is_auto(settled)) == (True, False)
    assert precisions(settled) == there
    assert settled.model_dump(exclude={"train", "distill"}) == asked.model_dump(
        exclude={"train", "distill"}
    )
    assert with_precisions_of(asked, settled) == settled


def test_one_key_alone(tmp_path: Path) -> None:
    asked = made(tmp_path / "run", "auto", "auto")
    settled = with_precision(asked, "fp32", "distill.precision")
    assert precisions(settled) == {"train.precision": "auto", "distill.precision": "fp32"}
