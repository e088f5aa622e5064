"""Files and modules that pages, comments and docstrings name are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.pages import PAGES, REPOSITORY
from train.recipe.recipe import TrainSection

TOP = "train|sa_models|tests|docs|launch|recipes"
FILE = re.compile(rf"(?<![\w/.-])(?:{TOP})/[\w./-]+\.\w+")
MADE_BY_READERS = {"recipes/X.yaml", "recipes/mine.yaml"}
MODULE = re.compile(r"(?<![\w/.-])(?:train|sa_models)(?:\.\w+)+(?![\w/-])")
# Keys of a recipe, one of them half typed, and files of these names.
NO_MODULES = {*TrainSection.model_fields, "st", "py", "sbatch", "jsonl"}


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of all that people read: pages, comments of launch files, docstrings."""
    files = [*PAGES, REPOSITORY / "Makefile", REPOSITORY / ".ci" / "run"]
    for folder in ("recipes", "launch"):
        files += [file for file in (REPOSITORY / folder).rglob("*") if file.is_file()]
    for file in files:
        yield file.relative_to(REPOSITORY).as_posix(), file.read_text(encoding="utf-8")
    for package in ("train", "sa_models"):
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            yield file.relative_to(REPOSITORY).as_posix(), prose(file)


def prose(file: Path) -> str:
    """The docstrings and other texts of a module, and its comments."""
    source = file.read_text(encoding="utf-8")
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join([*strings, *re.findall(r"#.*$", source, re.MULTILINE)])


@cache
def names(module: Path) -> frozenset[str]:
    """What a module defines, its classes' attributes included."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return frozenset(found)


def resolves(dotted: str) -> bool:
    """Whether it is a module, or something that a module or a package defines."""
    at, rest = REPOSITORY, dotted.split(".")
    while rest and (at / rest[0]).is_dir():
        at, rest = at / rest[0], rest[1:]
    if rest and (at / f"{rest[0]}.py").is_file():
        at, rest = at / f"{rest[0]}.py", rest[1:]
    else:
        at = at / "__init__.py"
    return all(name in names(at) for name in rest)


def test_files_are_there() -> None:
    found = [(where, path) for where, text in texts() for path in FILE.findall(text)]
    assert len(found) > 200
    missing = {one for one in found if not (REPOSITORY / one[1]).is_file()}
    missing = {one for one in missing if one[1] not in MADE_BY_READERS}
    assert missing == set(), missing


def test_modules_are_there() -> None:
    found = [
        (where, dotted)
        for where, text in texts()
        for dotted in MODULE.findall(text)
        if not (dotted.startswith("train.") and dotted.split(".")[1] in NO_MODULES)
    ]
    assert len(found) > 50
    missing = {one for one in found if not resolves(one[1])}
    assert missing == set(), missing
