"""Card of a local dataset repository: the subsets and splits that its README.md lists.

What the card says is all that is read: patterns as on the hub, relative to the folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fsspec.utils import glob_translate

from sa_models.errors import PostshareError
from train.data.local.splits import TRAIN

_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_OURS = {"config_name", "data_files", "data_dir", "default", "description", "version"}


@dataclass(frozen=True)
class Subset:
    """One configuration of a card.

    `patterns` are those of each split, none where the card leaves them to names in `folder`.
    `plain` is false where the card has options for the library's own reader.
    """

    folder: Path
    patterns: dict[str, list[str]]
    plain: bool

    def files(self, split: str, listed: Sequence[Path]) -> list[Path]:
        """Those of `listed` that the card has for a split, in the card's order.

        Raises:
            PostshareError: the card has no such split, or no file is there.
        """
        if split not in self.patterns:
            raise PostshareError(
                f"{self.folder} has no split '{split}'; set split to one of "
                f"{', '.join(self.patterns)}"
            )
        found: dict[Path, None] = {}
        for pattern in self.patterns[split]:
            exact = self.folder / pattern
            matches = re.compile(glob_translate(pattern.removeprefix("./"))).match
            named = [
                path
                for path in listed
                if path == exact or matches(path.relative_to(self.folder).as_posix())
            ]
            if not named:
                raise PostshareError(
                    f"{self.folder} has no file '{pattern}', which its README.md names for split "
                    f"{split}; download or copy the data set again, whole"
                )
            found |= dict.fromkeys(named)
        return list(found)


def read_card(folder: Path, subset: str | None) -> Subset | None:
    """What the card of a folder says of a subset; None where it lists none.

    Raises:
        PostshareError: the card cannot be read, has no such subset, or has several and none is
            asked for.
    """
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
        front = _FRONT_MATTER.match(text)
        if front is None or not re.search("^configs:", front[1], re.MULTILINE):
            return None
        configs = yaml.safe_load(front[1])["configs"]
        by_name = {str(entry.get("config_name", "default")): entry for entry in configs}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PostshareError(
            f"the configs of {card} cannot be read ({reason}); correct or remove them"
        ) from error
    return _parse(folder, by_name[_choose(folder, by_name, subset)])


def _choose(folder: Path, by_name: dict[str, Any], subset: str | None) -> str:
    names = ", ".join(by_name)
    if subset is not None:
        if subset not in by_name:
            raise PostshareError(f"{folder} has no subset '{subset}'; set subset to one of {names}")
        return subset
    standard = [name for name, entry in by_name.items() if entry.get("default") is True]
    standard += [name for name in by_name if name == "default" or len(by_name) == 1]
    if not standard:
        raise PostshareError(f"{folder} has several subsets; set subset to one of {names}")
    return standard[0]


def _parse(folder: Path, entry: dict[str, Any]) -> Subset:
    given = entry.get("data_files")
    within = str(entry.get("data_dir") or "")
    if given is None:
        return Subset(folder / within, {}, set(entry) <= _OURS)
    if isinstance(given, str) or (
        isinstance(given, list) and all(isinstance(one, str) for one in given)
    ):
        given = {TRAIN: given}
    elif isinstance(given, list):
        given = {str(one.get("split", TRAIN)): one.get("path", []) for one in given}
    patterns = {
        str(split): [str(one) for one in ([paths] if isinstance(paths, str) else paths)]
        for split, paths in given.items()
    }
    remote = any("://" in one for found in patterns.values() for one in found)
    return Subset(folder / within, patterns, set(entry) <= _OURS and not remote)
