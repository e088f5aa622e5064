"""One word, or a few in a row, for how quality comes back: what they stand for in the sections.

`recovery` is an abbreviation. It is written out before the recipe is checked, so that the resolved
recipe has the sections alone, and says what was meant; so is what a recipe without any training
leaves out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from train.recipe.sections.base import FaultsError
from train.recipe.sections.training import untrained

Step = Literal["penalty", "decoupled", "progressive", "residual", "reconstruct", "heal", "distill"]
Recovery = (
    Literal["default", "paper"] | Annotated[tuple[Step, ...], Field(strict=False, min_length=1)]
)

STEPS: tuple[str, ...] = get_args(Step)
PULLS = STEPS[:3]
"""Ways to bring tied units together before they are made one."""
NAMED: dict[str, tuple[str, ...]] = {
    "default": ("reconstruct", "heal", "distill"),
    "paper": ("penalty",),
}
RESIDUAL_RANK = 8
OF_SECTION = {"penalty": PULLS, "distill": ("distill",), "residual": ("residual",)}
WRITTEN: set[tuple[str, ...]] = {
    ("train", "steps"), ("materialize",), ("penalty",), ("residual",), ("distill",),
}  # fmt: skip
"""What it is written out to."""


def resolved(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe with its recovery written out, and with what training needs where nothing trains.

    Args:
        data: as YAML gives it; not changed.

    Raises:
        FaultsError: see :func:`written_out`.
    """
    data = written_out(data)
    train, materialize = data.get("train"), data.get("materialize")
    heals = isinstance(materialize, dict) and materialize.get("heal_steps", 0) != 0
    if not isinstance(train, dict) or train.get("steps") != 0 or heals:
        return data
    return {**data, "train": untrained(train)}


def written_out(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe without its `recovery`, which its sections now say.

    `train.steps` are all steps: a pull alone takes them before sharing, `heal` alone after it, both
    together half of them each. Sections may refine what a step does, not contradict it.

    Args:
        data: as YAML gives it; returned as it is where there is no `recovery`.

    Raises:
        FaultsError: unknown steps, in no order in which they can happen, without effect, or beside
            a section that says otherwise.
    """
    if data.get("recovery") is None or not isinstance(data.get("train"), dict):
        return data
    if not isinstance(data["train"].get("steps"), int | None):
        return data  # the recipe's own check says so
    names = _names(data["recovery"])
    data = copy.deepcopy({key: value for key, value in data.items() if key != "recovery"})
    pulls, heals = any(name in PULLS for name in names), "heal" in names
    if lines := [*_misused(names, data), *_idle(data["train"].get("steps"), pulls, heals)]:
        raise FaultsError(lines)
    steps = data["train"].get("steps")
    before = 0 if steps is None or not pulls else steps // 2 if heals else steps
    contradictions: list[str] = []
    if heals and steps is not None:
        data["train"]["steps"] = before
        contradictions += _set(data, "materialize", "heal_steps", steps - before)
    if "reconstruct" in names:
        contradictions += _set(data, "materialize", "reconstruct", True)
    if "residual" in names:
        _refine(data, "residual", rank=RESIDUAL_RANK)
    if "distill" in names:
        _refine(data, "distill")
    if pulls:
        contradictions += _pull(data, names[0], before)
    if contradictions:
        raise FaultsError(contradictions)
    return data


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]
    if isinstance(value, list | tuple) and value and all(name in STEPS for name in value):
        return tuple(value)
    allowed = f"allowed: {', '.join(NAMED)}, or a list of {', '.join(STEPS)}"
    raise FaultsError([f"recovery is {value!r}; {allowed}"])


def _misused(names: tuple[str, ...], data: dict[str, Any]) -> Iterator[str]:
    in_order = tuple(name for name in STEPS if name in names)
    if names != in_order:
        yield (
            f"recovery: steps are named once, in the order {', '.join(STEPS)}; write "
            f"[{', '.join(in_order)}]"
        )
    if len(pulls := [name for name in in_order if name in PULLS]) > 1:
        yield f"recovery: {' and '.join(pulls)} are ways of one pull; keep one"
    for section, wanted in OF_SECTION.items():
        if data.get(section) is not None and not set(wanted) & set(names):
            yield (
                f"recovery does not name {wanted[0]}, so the section {section} has no effect; "
                f"add it to recovery, or remove {section}"
            )


def _idle(steps: int | None, pulls: bool, heals: bool) -> Iterator[str]:
    if heals and not steps:
        yield (
            "recovery: heal takes its share of train.steps, the optimizer steps of the whole run; "
            "set train.steps to a number above 0"
        )
    if not heals and not pulls and steps != 0:
        yield (
            "recovery: nothing in it trains, so train.steps has no effect; add heal, or set "
            "train.steps=0"
        )


def _pull(data: dict[str, Any], name: str, steps: int) -> Iterator[str]:
    if name == "penalty":
        name = "coupled"
    yield from _set(data, "penalty", "mode", name)
    if name == "progressive" and steps:
        _refine(data, "penalty", schedule="linear", ramp_steps=max(1, steps // 2))


def _refine(data: dict[str, Any], section: str, **defaults: Any) -> dict[str, Any]:
    """The section, with defaults for what it does not say itself."""
    if data.get(section) is None:
        data[section] = {}
    if isinstance(data[section], dict):  # else the recipe's own check says so
        data[section] = {**defaults, **data[section]}
        return dict(data[section])
    return {}


def _set(data: dict[str, Any], section: str, key: str, value: Any) -> Iterator[str]:
    if _refine(data, section, **{key: value}).get(key, value) != value:
        yield (
            f"{section}.{key} is {data[section][key]}, and {value} by recovery; remove "
            f"{section}.{key}, or recovery"
        )
