"""What the shell is offered: every recipe, and no key that a recipe does not have."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa_models.errors import PostshareError
from train.commands.completion import complete_override, complete_recipe
from train.recipe.recipe import load_recipe
from train.recipe.shipped import shipped_recipes


def test_recipes_are_offered_by_name_and_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(complete_recipe("")) == sorted(shipped_recipes())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("")
    (tmp_path / "mine" / "own.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert complete_recipe("mi") == ["mine/"]
    assert complete_recipe("mine/o") == ["mine/own.yaml"]
    assert complete_recipe(f"{tmp_path}/mine/o") == [f"{tmp_path}/mine/own.yaml"]


def test_every_key_that_is_offered_is_one() -> None:
    """Set to null: where that is no value, the complaint is about it and not about the key."""
    keys = complete_override("")
    assert {"train.steps=", "plan.budget.ratio=", "data.train.0.path=", "seed="} <= set(keys)
    assert len(keys) > 100
    complaints = ""
    for key in keys:
        with contextlib.suppress(PostshareError):
            load_recipe("demo_postshare", [f"{key}null"])
            continue
        with pytest.raises(PostshareError) as caught:
            load_recipe("demo_postshare", [f"{key}null"])
        complaints += f"{caught.value}\n"
    assert complaints.count("\n") > 20
    assert "unknown key" not in complaints
    assert "check the path" not in complaints


def test_choices_are_those_of_the_key() -> None:
    assert complete_override("plan.action=") == [
        f"plan.action={w}" for w in ("tie", "remove", "any", "drop")
    ]
    assert complete_override("plan.strategy=ra") == ["plan.strategy=random"]
    assert complete_override("data.bos=") == ["data.bos=true", "data.bos=false"]
    assert complete_override("train.steps=") == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("postshare ana", ["analyze"]),
        ("postshare run demo_s", ["demo_sa"]),
        ("postshare run demo train.ste", ["train.steps="]),
    ],
)
def test_bash_gets_its_answer_without_torch(typed: str, offered: list[str]) -> None:
    code = (
        "import sys; sys.argv[0] = 'postshare'; from train import cli\n"
        "try: cli.main()\n"
        "finally: sys.stderr.write(str([m for m in ('torch', 'transformers') if m in sys.modules]))"
    )
    asked = {
        "_POSTSHARE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr.strip()) == (offered, "[]")
