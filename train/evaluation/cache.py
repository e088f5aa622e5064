"""Results of evaluations, kept by the content of all that decides them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sa_models.atomic_files import write_json
from sa_models.errors import PostshareError
from train.common.identity import identity_hash
from train.evaluation.score import Score

VERSION = 1
"""Of what is computed: raise it when a score is computed otherwise."""


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/postshare/evaluations`, or the same below ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "postshare" / "evaluations"


class ResultCache:
    """One JSON file for each (model, task): all that decides the result, and the result.

    Args:
        folder: made when something is written first; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, key: dict[str, Any]) -> list[Score] | None:
        """The scores of this very key; None where there are none, or the file is damaged."""
        if self.folder is None or not (file := self._file(self.folder, key)).is_file():
            return None
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            return [Score.from_dict(score) for score in value["scores"]]
        except (ValueError, KeyError, TypeError):
            return None  # computed and written again

    def write(self, key: dict[str, Any], scores: Sequence[Score]) -> None:
        """Raises PostshareError when the folder cannot be written to."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(
                self._file(self.folder, key), {"key": key, "scores": [asdict(s) for s in scores]}
            )
        except OSError as error:
            raise PostshareError(
                f"{self.folder} cannot be written to ({error.strerror}); pass --cache FOLDER"
            ) from None

    def _file(self, folder: Path, key: dict[str, Any]) -> Path:
        return folder / f"{identity_hash({'version': VERSION, **key})}.json"
