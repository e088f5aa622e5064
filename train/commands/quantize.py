"""`postshare quantize MODEL --to int8 --output FOLDER`."""

from __future__ import annotations

from pathlib import Path

from sa_models.errors import PostshareError
from sa_models.export.quantize import quantize_folder
from train.common.console import plain_console
from train.common.run_files import RECIPE_FILE
from train.evaluation.models import Judged
from train.models.base_model import base_folder
from train.recipe.sections.inputs import ModelSection


def quantize_model(model: str, output: Path, to: str, group_size: int | None) -> None:
    """Write the folder, and print its bytes beside those of the model.

    Raises:
        PostshareError: see :func:`~sa_models.export.quantize.quantize_folder`; or MODEL is a run.
    """
    if not model:
        raise PostshareError("MODEL is empty; give a folder or a hub name")
    source = base_folder(ModelSection(path=model), "model")
    if (source / RECIPE_FILE).is_file():
        raise PostshareError(
            f"{model} is a run folder; name one of its exports, such as {model.rstrip('/')}"
            "/export/compact"
        )
    quantize_folder(source, output, to, group_size)
    before, after = (Judged(model, path, path).size()[1] for path in (source, output))
    plain_console().print(
        f"quantized {output}: {after:,} bytes ({after / before:.1%} of {before:,})",
        soft_wrap=True,
    )
