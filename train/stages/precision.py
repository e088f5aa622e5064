"""The precision of a run, agreed by all ranks, and the warning where bf16 is emulated."""

from __future__ import annotations

from collections.abc import Callable

from train.common.progress import note
from train.distributed.bf16 import bf16_factor, has_bf16
from train.recipe.precision import is_auto, precisions, with_precision
from train.recipe.recipe import Recipe
from train.stages.run import Run

SLOWER = 1.2
"""From which factor on emulated bf16 is warned about."""


def settle_precision(current: Run, trains: bool, begun: Callable[[], Recipe | None]) -> None:
    """Put what the run computes in in the place of each `auto` of its recipe. A collective.

    What the run began with, it keeps; else it is what every rank has. A command that does not train
    leaves a run that has not begun as it is: another machine may train it.

    Args:
        begun: called on the main process: the resolved recipe of the run in the folder, if any.
    """
    ranks = current.ranks
    lacking = round(ranks.reduce_sum(0.0 if has_bf16(ranks.device) else 1.0))
    if is_auto(current.recipe):
        kept: list[Recipe | None] = []
        current.on_main(lambda: kept.append(begun()))
        _settle(current, trains, kept[0] if kept else None, lacking)
    if trains and lacking:
        current.on_main(lambda: _warn(current, lacking))


def _settle(current: Run, trains: bool, kept: Recipe | None, lacking: int) -> None:
    """As :func:`settle_precision`; `kept` is the main process's, None on the others."""
    recipe, ranks = current.recipe, current.ranks
    found = "fp32" if lacking else "bf16"
    if ranks.reduce_max(0.0 if kept is None else 1.0):
        for key in precisions(recipe):
            says_bf16 = kept is not None and precisions(kept)[key] == "bf16"
            value = "bf16" if ranks.reduce_max(float(says_bf16)) else "fp32"
            recipe = with_precision(recipe, value, key)
        said = f"as in the run that {current.folder} holds"
    elif trains:
        recipe = with_precision(recipe, found)
        said = f"{_share(lacking, ranks.world)} bf16 instructions"
    else:
        return
    asked, settled = precisions(current.recipe), precisions(recipe)
    values = " and ".join(f"{key} {settled[key]}" for key in asked if asked[key] == "auto")
    current.recipe = recipe
    current.on_main(lambda: note(f"note: precision auto: {values}, {said}"))


def _share(lacking: int, world: int) -> str:
    if world == 1:
        return "the hardware has no" if lacking else "the hardware has"
    return f"{lacking} of {world} processes have no" if lacking else "all processes have"


def _warn(current: Run, lacking: int) -> None:
    keys = [key for key, value in precisions(current.recipe).items() if value == "bf16"]
    if not keys:
        return
    device, slow = current.ranks.device, ""
    if not has_bf16(device):
        if (factor := bf16_factor(device)) < SLOWER:
            return
        slow = f": a linear layer takes {factor:.3g} times as long as in fp32"
    names, cures = " and ".join(keys), " ".join(f"{key}=fp32" for key in keys)
    note(
        f"warning: bf16 is emulated ({names}), {_share(lacking, current.ranks.world)} bf16 "
        f"instructions{slow}; set {cures}, or auto"
    )
