"""The recipe's section for wandb."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from train.recipe.sections.base import Name, Section


class WandbSection(Section):
    """Dashboards; metrics.jsonl is written in any case."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    """online needs an account; offline writes files for `wandb sync`."""
    project: Name = "postshare"
    """Project."""
    group: Name | None = None
    """Group of runs (default: the recipe's name and the plan)."""
    tags: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Tags."""
    upload: bool = False
    """Log the exported folders as artifacts, with the base, data and plan they come from."""

    def _somewhere_to_upload(self) -> Iterator[str]:
        if self.upload and self.mode == "disabled":
            yield (
                "wandb.upload: wandb.mode is disabled, nothing is uploaded; set wandb.mode=online "
                "(or offline), or remove upload"
            )

    rules = (_somewhere_to_upload,)
