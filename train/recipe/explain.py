"""A line for each key or value of a recipe that is wrong: its path, and what is allowed there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

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


@dataclass(frozen=True)
class Fault:
    """One key or value that is wrong.

    Attributes:
        path: of the key, list indices included.
        text: the path, the cause, the cure.
        unknown, missing: the key is there in vain, or is not there.
        meant: of an unknown key, the path of the one that was most likely meant, if any is near.
    """

    path: tuple[str, ...]
    text: str
    unknown: bool = False
    missing: bool = False
    meant: tuple[str, ...] = ()


def explain(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """What `error` is about: a value once, however many forms it could have had, and a list or a
    mapping for itself only where nothing in it is wrong."""
    schema = _schema(model)
    found: dict[tuple[str, ...], Fault] = {}
    for one in error.errors(include_url=False):
        fault = _fault(schema, one)
        found.setdefault(fault.path, fault)
    around = {path[:size] for path in found for size in range(len(path))}
    return [fault for path, fault in found.items() if path not in around]


REPLACED: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {
    ("plan", "basis"): (
        ("plan", "objective"),
        "set plan.objective=bytes where strategy auto may share bases, or leave it out",
    )
}
"""Keys of earlier versions: the path of the key that took their place, and what to do."""


def _fault(schema: Schema, error: ErrorDetails) -> Fault:
    loc, kind = error["loc"], error["type"]
    if kind in ("extra_forbidden", "invalid_key"):
        path = tuple(map(str, loc))
        meant, near = REPLACED[path] if path in REPLACED else _nearest(schema, loc)
        return Fault(path, f"unknown key {'.'.join(path)}; {near}", unknown=True, meant=meant)
    while loc and _find(schema, loc) is None:
        loc = loc[:-1]  # the rest names the form of the value that was tried
    path = tuple(map(str, loc))
    name, allowed = ".".join(path), allowed_values(schema, _find(schema, loc))
    if kind == "missing":
        return Fault(path, f"{name} is missing; set it to {allowed}", missing=True)
    if kind == "value_error":
        return Fault(path, f"{name}: {error['ctx']['error']}")
    return Fault(path, f"{name} is {_short(error['input'])}; allowed: {allowed}")


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
    if "const" in node:
        return str(node["const"])
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


def _nearest(schema: Schema, loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], str]:
    """The valid key that was most likely meant: a sibling, or a key of another section.

    Returns:
        its path, () where none is near; and what to say.
    """
    *parents, wrong = map(str, loc)
    parent = _find(schema, loc[:-1]) or schema
    siblings = [key for b in branches(schema, parent) for key in b.get("properties", {})]
    prefix = "".join(f"{part}." for part in parents)
    if close := difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.6):
        return (*parents, close[0]), f"did you mean {prefix}{close[0]}?"
    by_leaf: dict[str, str] = {}
    for path in _paths(schema, schema):
        by_leaf.setdefault(path.rsplit(".", 1)[-1], path)
    if close := difflib.get_close_matches(wrong, by_leaf, n=1, cutoff=0.8):
        path = by_leaf[close[0]]
        return tuple(path.split(".")), f"did you mean {path}?"
    where = f"valid in {prefix[:-1]}" if parents else "valid at the top"
    nearest = max(siblings, key=lambda key: difflib.SequenceMatcher(None, wrong, key).ratio())
    return (), f"did you mean {prefix}{nearest}? {where}: {', '.join(siblings)}"
