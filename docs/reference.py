"""The parts of the site that are never written by hand: keys of a recipe, commands, recipes.

A page has a line `<!-- generated: NAME -->`; `docs/conf.py` puts the text of `GENERATED[NAME]` in
its place when the site is built.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from train.recipe.explain import allowed_values, branches
from train.recipe.load import description
from train.recipe.recipe import Recipe
from train.recipe.shipped import shipped_recipes

Schema = dict[str, Any]
MARKER = re.compile(r"^<!-- generated: ([a-z]+) -->$", re.MULTILINE)


def fill(text: str) -> str:
    """The page with every marker replaced. Raises KeyError for a name that nothing generates."""
    return MARKER.sub(lambda found: GENERATED[found[1]](), text)


def generated(page: Path) -> bool:
    """Whether the page has a marker."""
    return MARKER.search(page.read_text(encoding="utf-8")) is not None


# --- keys -----------------------------------------------------------------------------------------


def keys() -> str:
    """Every key of a recipe, in MyST: a heading for each mapping, a confval for each key."""
    schema = Recipe.model_json_schema()
    return "\n\n".join(["## The top", *_mapping(schema, schema, "", seen=set())])


def _mapping(schema: Schema, node: Schema, prefix: str, seen: set[str]) -> Iterator[str]:
    """The keys of one mapping, then those of the mappings inside, each of which comes once."""
    inside = []
    for name, value in node["properties"].items():
        found = list(_mappings(schema, value))
        yield _key(schema, prefix + name, value, name in node.get("required", ()), found)
        # One mapping abbreviates a list of one, and is kept as such a list.
        inside += [(prefix + name, child, (child, True) in found) for child, _ in found]
    for path, child, listed in inside:
        if child["title"] in seen:
            continue
        seen.add(child["title"])
        yield f"({_target(child)})=\n## `{path}`{', an entry' if listed else ''}"
        yield _escaped(child["description"])
        yield from _mapping(schema, child, f"{path}.0." if listed else f"{path}.", seen)


def _mappings(schema: Schema, node: Schema, listed: bool = False) -> Iterator[tuple[Schema, bool]]:
    """The mappings that a value is or lists, and whether it lists them."""
    for branch in branches(schema, node):
        if "properties" in branch:
            yield branch, listed
        elif isinstance(branch.get("items"), dict):
            yield from _mappings(schema, branch["items"], listed=True)


def _key(
    schema: Schema, path: str, node: Schema, required: bool, inside: list[tuple[Schema, bool]]
) -> str:
    lines = [f":type: {_escaped(allowed_values(schema, node))}"]
    if required:
        lines.append(":default: none, it must be set")
    elif not isinstance(node.get("default"), dict):
        lines.append(f":default: `{_yaml(node.get('default'))}`")
    text = _escaped(node.get("description") or inside[0][0]["description"])
    if inside:
        text += f" Its keys: [below](#{_target(inside[0][0])})."
    return "\n".join(["```{confval} " + path, *lines, "", text, "```"])


def _target(mapping: Schema) -> str:
    return f"recipe-{mapping['title'].lower()}"


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def _escaped(text: str) -> str:
    """Schema text is plain: what MyST would read as markup in it is meant as it stands."""
    return re.sub(r"([*_|<\[\]`$])", r"\\\1", text)


# --- commands and recipes -------------------------------------------------------------------------


def commands() -> str:
    """Every command, by Typer's own writer of Markdown, without the list of them at its head."""
    made = subprocess.run(
        [sys.executable, "-m", "typer", "train.cli", "utils", "docs", "--name", "postshare"],
        capture_output=True,
        text=True,
        check=True,
    )
    text = made.stdout[made.stdout.index("\n## ") :]
    # An epilog is one paragraph: its example is a line to copy, perhaps with another in brackets.
    return re.sub(r"^Example: (.*?)(?: +\(or: (.*)\))?$", _example, text, flags=re.MULTILINE)


def _example(found: re.Match[str]) -> str:
    lines = [line for line in found.groups() if line]
    return "\n".join(["Example:", "", "```bash", *lines, "```"])


def recipes() -> str:
    """The shipped recipes, as `postshare recipes` lists them."""
    rows = [f"| `{name}` | {description(file)} |" for name, file in shipped_recipes().items()]
    return "\n".join(["| recipe | what it is |", "| --- | --- |", *rows])


GENERATED: dict[str, Callable[[], str]] = {
    "keys": keys,
    "commands": commands,
    "recipes": recipes,
}
