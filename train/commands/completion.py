"""Completion in the shell while a command is typed: recipes, override keys, their choices.

Read from file names and from the shipped schema: a key press must not wait for torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.recipe.shipped import SUFFIXES, shipped_folder, shipped_recipes


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes by name, and the .yaml files and folders that begin so."""
    found = [name for name in shipped_recipes() if name.startswith(incomplete)]
    return found + complete_file(incomplete, SUFFIXES)


def complete_file(incomplete: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Folders that begin so, and files with one of the suffixes."""
    if not incomplete:
        return []
    head, _, tail = incomplete.rpartition("/")
    folder = Path(head or ("/" if incomplete.startswith("/") else ".")).expanduser()
    if not folder.is_dir():
        return []
    prefix = incomplete[: len(incomplete) - len(tail)]
    return sorted(
        f"{prefix}{path.name}{'/' if path.is_dir() else ''}"
        for path in folder.iterdir()
        if path.name.startswith(tail) and (path.is_dir() or path.suffix in suffixes)
    )


def complete_override(incomplete: str) -> list[str]:
    """`train.st` is offered `train.steps=`; `plan.strategy=` its choices."""
    file = shipped_folder("docs") / "recipe.schema.json"
    schema = json.loads(file.read_text(encoding="utf-8"))
    keys = dict(_leaves(schema, schema, ""))
    key, equals, begun = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in keys if name.startswith(incomplete)]
    return [f"{key}={choice}" for choice in keys.get(key, ()) if choice.startswith(begun)]


def _leaves(
    node: dict[str, Any], schema: dict[str, Any], prefix: str
) -> Iterator[tuple[str, list[str]]]:
    """(key, choices) of every value that can be set."""
    for name, below in node.get("properties", {}).items():
        options = _options(below, schema)
        sections = [option for option in options if "properties" in option]
        items = [_options(o["items"], schema) for o in options if "items" in o]
        for section in sections:
            # One section or a list of them is read as a list.
            index = "0." if any(section in item for item in items) else ""
            yield from _leaves(section, schema, f"{prefix}{name}.{index}")
        if len(sections) < len(options) and not _only_null(options, sections):
            yield f"{prefix}{name}", _choices(options)


def _options(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A node without references, as the list of what it may be."""
    if "$ref" in node:
        return _options(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in node or "oneOf" in node:
        every = node.get("anyOf") or node["oneOf"]
        return [option for one in every for option in _options(one, schema)]
    return [node]


def _only_null(options: list[dict[str, Any]], sections: list[dict[str, Any]]) -> bool:
    """A section that may be left out is no value to be written."""
    return bool(sections) and all(o in sections or o.get("type") == "null" for o in options)


def _choices(options: list[dict[str, Any]]) -> list[str]:
    words: list[str] = []
    for option in options:
        words += [str(value) for value in option.get("enum", ())]
        words += [str(option["const"])] if "const" in option else []
        if option.get("type") == "boolean":
            words += ["true", "false"]
    return words
