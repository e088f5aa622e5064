"""One line for what is wrong with a recipe: the path, the value, and what is allowed there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

Schema = dict[str, Any]
_BOUNDS = (
    ("minimum", ">="),
    ("exclusiveMinimum", ">"),
    ("maximum", "<="),
    ("exclusiveMaximum", "<"),
)
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first error of `error`, unknown keys before all others.

    A misspelt required key is both unknown and missing; the unknown key is the one to correct.
    """
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = ".".join(str(part) for part in first["loc"])
    schema = _schema(model)
    if first["type"] == "extra_forbidden":
        return f"unknown key {path}; {_nearest(schema, first['loc'])}"
    if first["type"] == "missing":
        return f"{path} is missing; set it to {allowed_values(schema, _find(schema, first['loc']))}"
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return f"{path}: {reason}" if path else reason
    allowed = allowed_values(schema, _find(schema, first["loc"]))
    return f"{path} is {_short(first['input'])}; allowed: {allowed}"


@cache
def _schema(model: type[BaseModel]) -> Schema:
    return model.model_json_schema(mode="serialization")


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def branches(schema: Schema, node: Schema) -> Iterator[Schema]:
    """`node` with its reference followed, or the alternatives that it stands for."""
    if "$ref" in node:
        yield from branches(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
    elif "anyOf" in node:
        for branch in node["anyOf"]:
            yield from branches(schema, branch)
    else:
        yield node


def _find(schema: Schema, loc: tuple[int | str, ...]) -> Schema | None:
    """The schema of the value at `loc`, or None where there is none."""
    node = schema
    for part in loc:
        child = next((c for b in branches(schema, node) if (c := _child(b, part))), None)
        if child is None:
            return None
        node = child
    return node


def _child(node: Schema, part: int | str) -> Schema | None:
    if isinstance(part, str):
        return node.get("properties", {}).get(part)
    fixed = node.get("prefixItems", [])
    return fixed[part] if part < len(fixed) else node.get("items")


def allowed_values(schema: Schema, node: Schema | None) -> str:
    """What a value may be, in words."""
    if node is None:
        return "nothing else"
    return " or ".join(dict.fromkeys(_words(schema, b) for b in branches(schema, node)))


def _words(schema: Schema, node: Schema) -> str:
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    if "pattern" in node:
        return f"text that matches {node['pattern']}"
    if "properties" in node:
        return "a mapping with " + ", ".join(node.get("required") or node["properties"])
    words = _TYPES.get(node.get("type", ""), "another value")
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])} values"
    if "items" in node:
        least = "one or more of: " if node.get("minItems") else ""
        return f"a list of {least}{allowed_values(schema, node['items'])}"
    if node.get("minLength"):
        words = "non-empty text"
    bounds = [f"{sign} {node[key]}" for key, sign in _BOUNDS if key in node]
    return f"{words} {' and '.join(bounds)}" if bounds else words


def _paths(schema: Schema, node: Schema, prefix: str = "") -> Iterator[str]:
    """The full path of every key that a recipe may hold."""
    for branch in branches(schema, node):
        for key, child in branch.get("properties", {}).items():
            yield prefix + key
            yield from _paths(schema, child, f"{prefix}{key}.")


def _nearest(schema: Schema, loc: tuple[int | str, ...]) -> str:
    """The valid key that was most likely meant: a sibling, or a key of another section."""
    *parents, wrong = map(str, loc)
    parent = _find(schema, loc[:-1]) or schema
    siblings = [key for b in branches(schema, parent) for key in b.get("properties", {})]
    prefix = "".join(f"{part}." for part in parents)
    if close := difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6):
        return f"did you mean {prefix}{close[0]}?"
    by_leaf: dict[str, str] = {}
    for path in _paths(schema, schema):
        by_leaf.setdefault(path.rsplit(".", 1)[-1], path)
    if close := difflib.get_close_matches(wrong, by_leaf, n=1, cutoff=0.6):
        return f"did you mean {by_leaf[close[0]]}?"
    where = f"valid in {prefix[:-1]}" if parents else "valid at the top"
    nearest = max(siblings, key=lambda key: difflib.SequenceMatcher(None, wrong, key).ratio())
    return f"did you mean {prefix}{nearest}? {where}: {', '.join(siblings)}"
