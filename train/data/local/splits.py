"""Splits in a folder without a card: only where the names of its files leave no doubt.

A name means nothing by itself: `alice.txt` and `taking-a-test.txt` are one data set. Names are
splits where a file or topmost folder is called `train` or `test` and no more than that; where names
differ in such a word alone (`wiki-train.jsonl`, `wiki-valid.jsonl`); and where every file has such
a word, and not all the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath

TRAIN = "train"
NAMES = {
    TRAIN: (TRAIN, "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The splits, and how files call them: as the `datasets` library has it."""
_CANONICAL = {name: split for split, names in NAMES.items() for name in names}
_ANY = "|".join(sorted(_CANONICAL, key=len, reverse=True))
_WORD = re.compile(rf"(?<![^\W\d_])({_ANY})(?![^\W\d_])", re.IGNORECASE)
_NUMBER = r"[-_. ]*\d+(?:-of-\d+)?"  # of a shard
_WHOLE = re.compile(rf"({_ANY})(?:{_NUMBER})*", re.IGNORECASE)
Words = list[tuple[tuple[str, ...], str]]


def canonical(split: str) -> str:
    """`validation` for `dev`; another name as it is."""
    return _CANONICAL.get(split.lower(), split)


def splits_of(paths: Sequence[PurePath]) -> dict[PurePath, str]:
    """The split of each file that has one; `paths` are relative to the folder, without suffix."""
    words = {path: _words(path) for path in paths}
    beside = defaultdict(set)
    for template, split in (word for found in words.values() for word in found):
        beside[template].add(split)
    first = {found[0][1] for found in words.values() if found}
    throughout = all(words.values()) and len(first) > 1
    splits = {}
    for path, found in words.items():
        told = [split for template, split in found if len(beside[template]) > 1]
        told += [found[0][1]] if throughout else []
        if mark := _whole(path) or next(iter(told), None):
            splits[path] = mark
    return splits


def held_out_by_name(paths: Sequence[PurePath]) -> list[PurePath]:
    """The files whose name has a word for another split than train, whatever it means there."""
    return [path for path in paths if any(split != TRAIN for _, split in _words(path))]


def _words(path: PurePath) -> Words:
    """Where a path has the one name of a split: the parts up to there, without it and numbers."""
    found = []
    for depth, part in enumerate(path.parts):
        bare = re.sub(_NUMBER, "", part)
        if len(hits := _WORD.findall(bare)) == 1:
            template = _WORD.sub("*", bare).strip("-_. ")
            found.append(((*path.parts[:depth], template), canonical(hits[0])))
    return found


def _whole(path: PurePath) -> str | None:
    parts = path.parts[1:] if len(path.parts) > 1 and path.parts[0] == "data" else path.parts
    match = _WHOLE.fullmatch(parts[0])
    return canonical(match[1]) if match else None
