"""The common ground of a recipe's sections: strictness, rules, and types of their fields."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

Projection = Literal["q", "k", "v", "o"]
_ORDER: tuple[Projection, ...] = ("q", "k", "v", "o")


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values. Raises ValueError when one of them is there twice."""
    if len(set(values)) != len(values):
        raise ValueError("names the same entry twice; list each once")
    return values


LONGEST = 255
"""Bytes of the name of a file or folder, on Linux."""


def expanded(path: str) -> str:
    """A path with `~` and variables such as $SCRATCH in the place of which a shell puts folders.

    What exists under the name as it is written stays: its `$` and `~` are characters.

    Raises:
        ValueError: a variable is not set, a user is not known, or no file can have the name.
    """
    if "\0" in path or any(len(os.fsencode(part)) > LONGEST for part in path.split("/")):
        raise ValueError(
            f"{path[:40]!r}...: a name of more than {LONGEST} bytes, or with a zero byte, is no "
            "file's; shorten it"
        )
    if os.path.lexists(path):
        return path
    for name in re.findall(r"\$(?:\{([^}]*)\}|(\w+))", path):
        if "".join(name) not in os.environ:
            raise ValueError(
                f"{path!r}: the variable {''.join(name)} is not set; set it, or write the folder"
            )
    found = os.path.expanduser(os.path.expandvars(path))
    if found.startswith("~"):
        user = found.split("/")[0]
        raise ValueError(
            f"{path!r}: {user} is no user's folder here; write the folder, or ./{user}"
        )
    return found


def _in_order(values: tuple[Projection, ...]) -> tuple[Projection, ...]:
    return tuple(p for p in _ORDER if p in distinct(values))


# Strict everywhere, except that a YAML sequence may fill a tuple.
SEQUENCE = Field(strict=False)
Projections = Annotated[
    tuple[Projection, ...], Field(strict=False, min_length=1), AfterValidator(_in_order)
]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
PathName = Annotated[str, Field(min_length=1), AfterValidator(expanded)]
"""A path, or a name of the hub."""
Rate = Annotated[float, Field(gt=0, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


Rule = Callable[[Any], Iterator[str]]
"""Of a section: what its fields say against one another, or ask for in vain, one line each."""

UNRULED = "unruled"
"""The context of a validation that checks keys and types alone."""


class FaultsError(ValueError):
    """Several things that are wrong at once.

    Attributes:
        lines: one for each: the cause, then the cure.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = list(dict.fromkeys(lines))
        super().__init__("\n".join(self.lines))


class Section(BaseModel):
    """What all parts of a recipe share: no unknown key, no coercion, no change after loading."""

    rules: ClassVar[tuple[Rule, ...]] = ()
    """All are checked, whatever the others say."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def is_set(self, name: str) -> bool:
        """Whether a field says something else than its default.

        A resolved recipe states the defaults too: they change nothing.
        """
        return bool(getattr(self, name) != type(self).model_fields[name].get_default())

    @model_validator(mode="after")
    def _keeps_rules(self, info: ValidationInfo) -> Self:
        if info.context != UNRULED and (lines := [s for rule in self.rules for s in rule(self)]):
            raise FaultsError(lines)
        return self
