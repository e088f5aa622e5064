"""`postshare evaluate ARGUMENTS`: the stage of a run, or a comparison of models.

Decided by the first argument alone. This file imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sa_models.errors import PostshareError
from train.demo import DEMO_BASE
from train.demo.smollm2 import SMOLLM2
from train.recipe.load import locate
from train.recipe.shipped import shipped_recipes


def is_stage(arguments: Sequence[str], given: Mapping[str, object]) -> bool:
    """Whether the arguments are RECIPE [KEY=VALUE ...], and not models.

    Args:
        given: the options of a comparison by their name, None or False where not given.

    Raises:
        PostshareError: the first argument could be either, the others do not go with it, or an
            option has no effect on a stage.
    """
    first, *others = arguments
    if not _is_recipe(first):
        for other in arguments:
            key, equals, _ = other.partition("=")
            if equals and not Path(other).exists() and "/" not in key:
                raise PostshareError(
                    f"evaluate: {other} is an override, which goes with a recipe, and {first} is "
                    "none; name models only"
                )
        return False
    for other in others:
        if "=" not in other:
            raise PostshareError(
                f"evaluate: {first} is a recipe and {other} is no override (key=value); to compare "
                "models name run folders, model folders or hub names"
            )
    for name, value in given.items():
        if value is not None and value is not False:
            raise PostshareError(
                f"evaluate: {name} is for comparing models, and {first} is a recipe; name its run "
                "folder instead (output_dir; runs/<name>)"
            )
    return True


def _is_recipe(argument: str) -> bool:
    path = Path(argument)
    if path.is_dir():
        if argument in shipped_recipes():
            raise PostshareError(
                f"evaluate: {argument} is a folder here and a shipped recipe; write ./{argument} "
                f"or recipes/{argument}.yaml"
            )
        return False
    if path.suffix in (".yaml", ".yml"):
        return True
    if argument in (DEMO_BASE, SMOLLM2) or path.suffix == ".gguf":
        return False
    if argument.count("/") == 1 and argument not in shipped_recipes():
        return False  # a hub name
    if argument.startswith(("/", ".", "~")):
        return False
    locate(argument)  # raises, and names the nearest recipe
    return True
