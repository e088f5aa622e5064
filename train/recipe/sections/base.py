"""The common ground of a recipe's sections: strictness, and types of their fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
)

Projection = Literal["q", "k", "v", "o"]
_ORDER: tuple[Projection, ...] = ("q", "k", "v", "o")


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values. Raises ValueError when one of them is there twice."""
    if len(set(values)) != len(values):
        raise ValueError("names the same entry twice; list each once")
    return values


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
Rate = Annotated[float, Field(gt=0, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """What all parts of a recipe share: no unknown key, no coercion, no change after loading."""

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
