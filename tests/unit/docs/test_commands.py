"""Command lines of README.md and docs/: commands, options, recipes, overrides and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from typer.exceptions import TyperException

from sa_models.errors import PostshareError
from tests.support.pages import DOCS, PAGES, REPOSITORY, Command, blocks, commands, mentioned
from train.cli import app
from train.recipe import yaml12
from train.recipe.recipe import load_recipe, validate

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# What a reader puts a recipe or overrides of his own for.
STANDS_FOR_A_RECIPE = re.compile(r"RECIPE|R|\[RECIPE\]|(recipes/)?(X|mine|prune|residual)\.yaml")
PLACEHOLDERS = {"...", "a.b=c", "KEY=VALUE"}


def arguments_of_train(command: Command) -> list[str] | None:
    """What a command line passes to postshare; None: it does not start it."""
    words = list(command.words)
    if words[0] == "postshare":
        return words[1:]
    if "--no_python" in words and words[words.index("--no_python") + 1 :][:1] == ["postshare"]:
        return words[words.index("--no_python") + 2 :]
    if "-m" in words and words[words.index("-m") + 1 :][:1] == ["train"]:
        rest = words[words.index("-m") + 2 :]
        return rest if rest and rest[0] in COMMANDS else ["run", *rest]
    if words[0] == "sbatch":
        file = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        return ["run", *words[file + 1 :]]
    return None


def problem(command: Command, whole: bool) -> str | None:
    """What postshare would say against it, after parsing it and loading its recipe."""
    found = arguments_of_train(command)
    rest = [word for word in found or () if word not in PLACEHOLDERS]
    if found is None or rest[-1:] == ["--help"]:
        return None
    if rest[0] not in COMMANDS:
        return f"no command {rest[0]}"
    try:
        parsed = COMMANDS[rest[0]].make_context(rest[0], rest[1:], resilient_parsing=not whole)
        recipe = parsed.params.get("recipe")
        if recipe is not None:
            if STANDS_FOR_A_RECIPE.fullmatch(recipe):
                recipe = "demo_postshare"
            load_recipe(recipe, parsed.params.get("overrides") or ())
    except (TyperException, PostshareError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_typed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = [(c, problem(c, whole=True)) for c in commands(page)]
    found += [(c, problem(c, whole=False)) for c in mentioned(page)]
    assert [f"{command}: {said}" for command, said in found if said] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("postshare run demo --dry", "No such option"),
        ("postshare run dmo", "did you mean demo?"),
        ("postshare runs demo", "no command runs"),
        ("postshare evaluate", "Missing parameter"),
        ("postshare run demo plan.buget.bytes=-4%", "did you mean plan.budget?"),
        ("accelerate launch -m train demo train.steps=some", "a whole number"),
        ("accelerate launch --no_python postshare run demo train.steps=some", "a whole number"),
        (
            "sbatch --nodes=4 launch/slurm/train.sbatch recipes/none.yaml",
            "no recipe 'recipes/none.yaml'",
        ),
    ],
)
def test_a_command_that_cannot_be_typed_is_found(line: str, said: str) -> None:
    assert said in str(problem(Command(DOCS / "index.md", tuple(line.split())), whole=True))


def test_whole_recipes_in_the_pages_are_valid() -> None:
    found = [block for page in PAGES for block in blocks(page, "yaml") if "name: " in block.code]
    assert {"README.md", "recipe.md"} <= {block.page.name for block in found}
    for block in found:
        validate(yaml12.parse(block.code, block.page.name))


def test_make_targets_are_there() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    typed = {c.words[1] for page in PAGES for c in commands(page) if c.words[0] == "make"}
    assert {"demo"} <= typed <= targets
