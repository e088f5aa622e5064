"""Paths of a recipe: `~` and variables become folders once, other characters stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sa_models.errors import PostshareError
from train.recipe.recipe import Recipe, load_recipe, validate


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def value(**changes: Any) -> dict[str, Any]:
    return {
        "name": "paths",
        "plan": {"strategy": "none"},
        "model": {"path": "demo-base"},
        "data": {"train": "stdlib", "validation_fraction": 0.1, "sequence_length": 64},
        "train": {"steps": 1, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3},
        **changes,
    }


def paths(recipe: Recipe) -> list[str | None]:
    data = recipe.data
    return [
        recipe.output_dir,
        recipe.model.path,
        recipe.model.tokenizer,
        *(source.path for source in (*data.train, *(data.validation or ()))),
        recipe.plan.path,
        recipe.distill and recipe.distill.teacher,
    ]


def test_every_path_is_expanded_when_it_is_read(home: Path, tmp_path: Path) -> None:
    made = validate(
        value(
            output_dir="~/runs/x",
            model={"path": "$SCRATCH/llama", "tokenizer": "~/tokenizer"},
            data={
                "train": ["~/a.jsonl", {"path": "${SCRATCH}/b.jsonl"}],
                "validation": "~/c.txt",
                "sequence_length": 64,
            },
            plan={"strategy": "file", "path": "~/plan.json"},
            distill={"teacher": "$SCRATCH/teacher"},
        )
    )
    scratch = tmp_path / "scratch"
    assert paths(made) == [
        str(home / "runs" / "x"),
        str(scratch / "llama"),
        str(home / "tokenizer"),
        str(home / "a.jsonl"),
        str(scratch / "b.jsonl"),
        str(home / "c.txt"),
        str(home / "plan.json"),
        str(scratch / "teacher"),
    ]
    assert made.folder == home / "runs" / "x"
    assert paths(validate(made.model_dump(mode="json"))) == paths(made)


def test_no_path_keeps_its_tilde(home: Path) -> None:
    """Every field of the recipe that holds a path is one of those above."""
    from train.recipe import sections

    folder = Path(sections.__file__).parent
    for file in [*folder.glob("*.py"), folder.parent / "fields.py"]:
        for line in file.read_text().splitlines():
            name, colon, kind = line.strip().partition(": ")
            if colon and name in ("path", "tokenizer", "teacher", "output_dir"):
                assert kind.startswith("PathName"), f"{file.name}: {line}"


def test_an_override_is_expanded(home: Path) -> None:
    made = load_recipe("demo_postshare", ["output_dir=~/out", "model.path=$SCRATCH/m"])
    assert made.folder == home / "out"
    assert made.model.path.endswith("/scratch/m")


@pytest.mark.parametrize("path", ["runs/[a]", "runs/a*b?", "runs/{a}", "runs/a b", "runs/100%"])
def test_other_characters_stay(path: str, home: Path) -> None:
    assert validate(value(output_dir=path)).output_dir == path


def test_what_is_named_with_a_dollar_or_a_tilde_is_found(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a$NOT_SET").mkdir()
    (tmp_path / "~").mkdir()
    assert validate(value(output_dir="a$NOT_SET")).output_dir == "a$NOT_SET"
    assert validate(value(output_dir="~")).output_dir == "~"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("$NOT_SET/runs", "the variable NOT_SET is not set"),
        ("${NOT_SET}/runs", "the variable NOT_SET is not set"),
        ("~nobody-of-this-name/runs", "~nobody-of-this-name is no user's folder here"),
        ("runs/" + 256 * "a", "a name of more than 255 bytes"),
        ("runs/a\0b", "with a zero byte"),
    ],
)
def test_what_cannot_be_expanded_is_refused(path: str, reason: str, home: Path) -> None:
    with pytest.raises(PostshareError) as caught:
        validate(value(output_dir=path))
    assert "output_dir" in str(caught.value)
    assert reason in str(caught.value)
