"""All that is wrong with a recipe, at once.

Rules are checked on what is valid: a key that is missing, misspelt or wrong stands as *unknown*,
and a rule that reads it says nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from pydantic import ValidationError

from sa_models.errors import PostshareError
from train.recipe.explain import Fault, explain
from train.recipe.fields import RecipeFields
from train.recipe.recovery import WRITTEN, resolved
from train.recipe.rules import RULES, something_is_shared
from train.recipe.sections.base import UNRULED, FaultsError, Rule, Section

Path = tuple[str, ...]
"""Of a section, or of one of its keys."""

STAND_INS: dict[str, Any] = {
    "name": "x",
    "model": {"path": "x"},
    "data": {"train": "x", "sequence_length": 2},
    "train": {"batch_size": 1, "micro_batch_size": 1, "learning_rate": 1.0},
    "lora": {"rank": 1},
    "residual": {"rank": 1},
}
"""Values for required keys that have none: of the right type, and never read."""


class FaultyRecipeError(PostshareError):
    """A recipe with faults: one in one line, several below a line with their number.

    Attributes:
        lines: one for each fault: where, the cause, the cure.
    """

    def __init__(self, origin: str, faults: list[str]) -> None:
        self.lines = [f"{origin}: {fault}" for fault in faults]
        several = [f"{origin}: {len(faults)} faults", *(f"  {fault}" for fault in faults)]
        super().__init__("\n".join(several) if len(faults) > 1 else self.lines[0])


class _Unread(Exception):  # noqa: N818 - nothing went wrong
    """A rule has read what is not known."""


class _Unknown:
    """Stands where a value is not known. It is there, and cannot be used."""

    def _read(self, *_: Any) -> NoReturn:
        raise _Unread

    __getattr__ = __getitem__ = __contains__ = __iter__ = __len__ = __bool__ = _read
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _read
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _read
    __format__ = __str__ = __repr__ = _read


UNKNOWN = _Unknown()


def faults(data: dict[str, Any], unknown: Iterable[Path] = ()) -> list[str]:
    """What is wrong with a recipe, one line each; unknown keys first, rules last.

    Args:
        data: as YAML gives it; not changed.
        unknown: what it may lack for another reason, which has been said.
    """
    hidden = {path[:2] for path in unknown}
    lines: list[str] = []
    try:
        data = resolved(copy.deepcopy(data))
    except FaultsError as error:
        lines += error.lines
        data = {key: value for key, value in copy.deepcopy(data).items() if key != "recovery"}
        hidden |= WRITTEN
    fields, found = _typed(data, hidden)
    lines = found + lines
    if fields is None:
        return lines
    for path in sorted(hidden):
        _hide(fields, path)
    if unshared := _kept(something_is_shared, fields):
        lines += unshared
        _hide(fields, ("plan",))  # what the sections would have to agree with
    for path, section in _sections(fields):
        where = "".join(f"{part}." for part in path)[:-1]
        for rule in section.rules if path else RULES:
            lines += [f"{where}: {line}" if where else line for line in _kept(rule, section)]
    return list(dict.fromkeys(lines))


def _typed(data: dict[str, Any], hidden: set[Path]) -> tuple[RecipeFields | None, list[str]]:
    """The recipe with stand-ins for what is wrong, which is added to `hidden`; and what is wrong.

    `data` is changed.
    """
    found: list[Fault] = []
    excused = {*hidden}
    fields = None
    while fields is None:
        try:
            fields = RecipeFields.model_validate(data, context=UNRULED)
        except ValidationError as error:
            more = [fault for fault in explain(error, RecipeFields) if fault not in found]
            if not more:
                break  # never seen, and no reason to say nothing
            found += more
            hidden |= {f.meant[:2] for f in more if f.meant and not _is_there(data, f.meant[:2])}
            hidden |= {f.path[:2] for f in more if not f.unknown or len(f.path) > 2}
            for fault in more:
                _replace(data, fault.path)
    meant = {fault.meant for fault in found}  # a required key that is misspelt is missing as well
    said = [
        fault
        for fault in found
        if not fault.missing
        or (fault.path not in meant and not excused & {fault.path[:1], fault.path[:2]})
    ]
    return fields, [fault.text for fault in sorted(said, key=lambda fault: not fault.unknown)]


def _is_there(data: Any, path: Path) -> bool:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data is not None


def _replace(data: dict[str, Any], path: Path) -> None:
    """Remove what is there, in the section or below the key; a required key has its stand-in."""
    section, stand_ins, key = data, STAND_INS, path[0]
    if len(path) > 1 and isinstance(data.get(key), dict):
        section, stand_ins, key = data[key], STAND_INS.get(key, {}), path[1]
    for there in [there for there in section if str(there) == key]:  # YAML's keys may be numbers
        del section[there]
    if key in stand_ins:
        section[key] = copy.deepcopy(stand_ins[key])


def _hide(fields: RecipeFields, path: Path) -> None:
    """Put UNKNOWN in the place of a section, or of one of its keys."""
    values = fields.__dict__  # the recipe itself lets nobody change it
    section = values.get(path[0])
    if len(path) == 1 or not isinstance(section, Section):
        if path[0] in values:
            values[path[0]] = UNKNOWN
    elif path[1] in section.__dict__:
        values[path[0]] = section.model_copy()  # a default is every recipe's
        values[path[0]].__dict__[path[1]] = UNKNOWN


def _sections(section: Section, path: Path = ()) -> Iterator[tuple[Path, Section]]:
    """The sections within a section, and, last, itself."""
    for name, value in section.__dict__.items():
        if isinstance(value, Section):
            yield from _sections(value, (*path, name))
    yield path, section


def _kept(rule: Rule, section: Section) -> list[str]:
    """What a rule says until it reads what is not known."""
    lines: list[str] = []
    with contextlib.suppress(_Unread):
        for line in rule(section):
            lines.append(line)
    return lines
