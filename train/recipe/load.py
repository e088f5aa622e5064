"""Recipes by where they come from: shipped by name, files by path, overrides typed with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sa_models.errors import PostshareError
from train.common.run_files import RECIPE_FILE
from train.recipe import yaml12
from train.recipe.sections.inputs import as_sources
from train.recipe.sections.structure import as_spans
from train.recipe.shipped import SUFFIXES, shipped_recipes


def description(file: Path) -> str:
    """What a recipe says it is: the first sentence of its opening comment."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if not line.startswith("#") or (words and not text):
            break
        if not text.startswith("yaml-language-server"):
            words += text.split()
    return " ".join(words).split(". ")[0].removesuffix(".")


def locate(path_or_name: str | Path) -> Path:
    """The recipe file: an existing path, else a shipped recipe.

    `recipes/demo.yaml` also names the shipped demo where there is no such file, so that the
    commands of the README work outside a checkout.
    """
    text = str(path_or_name)
    path = Path(text)
    is_path = path.suffix in SUFFIXES
    if is_path and path.is_file():
        return path
    shipped = shipped_recipes()
    name = text
    if is_path and path.parts[0] == "recipes":
        name = Path(*path.parts[1:]).with_suffix("").as_posix()
    if name in shipped:
        return shipped[name]
    if is_path and name == text:
        raise PostshareError(f"{text}: no such recipe file; `postshare recipes` lists the shipped")
    if path.is_file():
        raise PostshareError(f"{text}: the name of a recipe file ends in .yaml; rename it")
    nearest = [str(file) for file in _beside(path) if file.is_file()]
    nearest += difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "`postshare recipes` lists them"
    raise PostshareError(f"no recipe {text!r}, neither a .yaml file nor a shipped name; {hint}")


def _beside(path: Path) -> Iterator[Path]:
    """Recipes that may be meant by a path that is none: without its ending, or of a run folder."""
    if path.name:
        yield from (path.with_name(path.name + suffix) for suffix in SUFFIXES)
    yield path / RECIPE_FILE


def text_of(path_or_name: str | Path) -> str:
    """A recipe as it is written, without the line that leads an editor to our schema.

    Raises:
        PostshareError: not found, or unreadable.
    """
    lines = _text(locate(path_or_name)).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("# yaml-language-server:"))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PostshareError(f"{file}: cannot be read ({error}); give a YAML text file") from None


def copy_recipe(path_or_name: str | Path, file: Path) -> None:
    """Write a recipe to a new file.

    Raises:
        PostshareError: not found, the file is there already, or it cannot be written.
    """
    text = text_of(path_or_name)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise PostshareError(f"{file} exists; choose another name") from None
    except OSError as error:
        reason = error.strerror or error
        raise PostshareError(f"{file} cannot be written ({reason}); choose another place") from None


def read(path_or_name: str | Path) -> dict[str, Any]:
    """The raw mapping of a recipe, its data sources spelt out as lists.

    Raises:
        PostshareError: not found, unreadable, not YAML, or not a mapping.
    """
    file = locate(path_or_name)
    text = _text(file)
    data = yaml12.parse(text, str(file))
    if not isinstance(data, dict):
        raise PostshareError(f"{file}: a recipe is a mapping of keys to values; see recipes/demo")
    if file.name == RECIPE_FILE:
        _bring_up_to_date(data)
    if isinstance(data.get("data"), dict):
        # So that an override can point into them: data.train.0.path=x
        for key in ("train", "validation"):
            if key in data["data"]:
                data["data"][key] = as_sources(data["data"][key])
    if "spans" in data:
        data["spans"] = as_spans(data["spans"])  # likewise: spans.spans.0.leader=x
    return data


def _bring_up_to_date(data: dict[str, Any]) -> None:
    """The resolved recipe of a run that an earlier version began: it holds keys that are gone."""
    plan = data.get("plan")
    if isinstance(plan, dict) and "basis" in plan:
        bases = plan.pop("basis")  # of strategy auto alone; the others had the default
        if plan.get("strategy") == "auto":
            plan["objective"] = "bytes" if bases else "all"


def override(data: dict[str, Any], text: str) -> None:
    """Set one value in place: `a.b=c`, `a.0.b=c`; missing mappings are created on the way.

    The value is YAML: `1e-4`, `[q, k]`, `null`, `{ratio: 0.3}`. An index may be the next one.

    Raises:
        PostshareError: not of the form key=value, or the path leads through a plain value.
    """
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise PostshareError(f"{text!r} is no override; write key=value, such as train.steps=10")
    node: Any = data
    for depth, key in enumerate(keys[:-1]):
        child = _get(node, key, path)
        if child is None:
            child = [] if keys[depth + 1].isdigit() else {}
            _set(node, key, child, path)
        node = child
    _set(node, keys[-1], yaml12.parse(value, f"override {path}"), path)


def _get(node: Any, key: str, path: str) -> Any:
    if isinstance(node, dict):
        return node.get(key)
    index = _index(node, key, path)
    return node[index] if index < len(node) else None


def _set(node: Any, key: str, value: Any, path: str) -> None:
    if isinstance(node, dict):
        node[key] = value
        return
    index = _index(node, key, path)
    node[index : index + 1] = [value]


def _index(node: Any, key: str, path: str) -> int:
    if not isinstance(node, list):
        raise PostshareError(f"override {path}: {key!r} lies below a plain value; check the path")
    if not (key.isascii() and key.isdigit()) or int(key) > len(node):
        raise PostshareError(
            f"override {path}: {key!r} is no index into {len(node)} entries; "
            f"use 0 to {len(node)} ({len(node)} adds one)"
        )
    return int(key)
