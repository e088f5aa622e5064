"""Files of a data source on this machine: which are read, which are left out, and why.

A folder is listed here, as the `datasets` library goes by names: it may take a part of the files
for a split and say nothing of the rest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from sa_models.errors import PostshareError
from train.data.local.card import Subset, read_card
from train.data.local.splits import TRAIN, canonical, held_out_by_name, splits_of

if TYPE_CHECKING:
    from train.recipe.recipe import DataSource

STDLIB = "stdlib"
KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files, which are read if they are text or JSON."""
OTHERS = (".csv", ".tsv", ".zip", ".lz4", ".tar", ".bin", ".md", ".yaml", ".html", ".xml")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What `datasets` and huggingface_hub write beside data, and what `Dataset.map` keeps there.
_NO_DATA = re.compile(r"dataset_infos?\.json|dataset_dict\.json|config\.json|cache-\w+\.arrow")


@dataclass(frozen=True)
class Files:
    """The files of one split, in the order in which they are read.

    `left_out` has, for each reason, the files that are not read, relative to the folder; `remarks`
    what else is to be known. `by_library`: the card asks for a reader of the `datasets` library.
    """

    paths: tuple[Path, ...]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    by_library: bool = False

    @property
    def notable(self) -> bool:
        """Whether there is more to say than that the one file that was named is read."""
        return len(self.paths) > 1 or bool(self.left_out or self.remarks)

    @property
    def said(self) -> str:
        """How many are read, and what is left out."""
        kinds = sorted({suffix(path) for path in self.paths})
        count = len(self.paths)
        parts = [f"{count:,} {' and '.join(kinds)} file{'s' * (count != 1)} read"]
        for reason, names in self.left_out.items():
            parts.append(f"left out, {reason}: {some(names)}")
        return "; ".join([*parts, *self.remarks])


def data_files(source: DataSource) -> list[Path]:
    """The local files that a source reads, sorted; none of hub names and stdlib.

    Raises:
        PostshareError: there are none, or it is in doubt which.
    """
    found: set[Path] = set()
    for split in split_names(source.split):
        files = find_files(source, split)
        if files is not None:
            found.update(files.paths)
    return sorted(found)


def split_names(spec: str) -> list[str]:
    """The splits of `train`, `train[:10%]`, `train+validation`."""
    return [re.split(r"[\[(]", part)[0].strip() for part in spec.split("+")]


def find_files(source: DataSource, split: str) -> Files | None:
    """The files of one split of a source; None for what is no path here: hub names and stdlib.

    Raises:
        PostshareError: there are none, or it is in doubt which.
    """
    path = Path(source.path).expanduser()
    if source.path == STDLIB:
        return None
    if path.is_file():
        return _one_file(path, source)
    if not path.is_dir():
        if path.is_symlink():
            raise _dangling(path)
        if path.exists():
            raise PostshareError(f"{path} is neither a file nor a folder; write it into a file")
        if on_hub(source.path):
            return None
        raise PostshareError(
            f"{source.path} does not exist (looked in {Path.cwd()}); correct the path of this "
            "data source"
        )
    if (subset := read_card(path, source.subset)) is not None:
        return _by_card(subset, split)
    if source.subset is not None:
        raise PostshareError(
            f"{path} has no subsets (no README.md that lists them); remove subset: "
            f"{source.subset}, or set path to the folder that holds it"
        )
    if (path / "dataset_dict.json").is_file():
        path = path / _saved_split(path, split)
    if (path / "state.json").is_file() and (saved := _saved_files(path)) is not None:
        return _whole(path, saved, split)
    return _by_names(path, split)


def on_hub(path: str) -> bool:
    """Whether a path that does not exist here names a dataset of the hub, and no missing file."""
    if Path(path).suffix.lower() in (*KINDS, *PACKED, *OTHERS):
        return False
    return bool(_HUB_NAME.fullmatch(path))


def suffix(path: PurePath) -> str:
    """`.jsonl`, or `.jsonl.gz`, in lower case."""
    name = path.name.lower()
    packed = next((end for end in PACKED if name.endswith(end)), "")
    return PurePath(name[: len(name) - len(packed)]).suffix + packed


def kind(path: PurePath) -> str | None:
    """How a file is read: as text, json, parquet or arrow; None: not at all."""
    end = suffix(path)
    packed = next((one for one in PACKED if end.endswith(one)), "")
    found = KINDS.get(end.removesuffix(packed))
    return None if packed and found in ("parquet", "arrow") else found


def some(names: list[str]) -> str:
    """At most three names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more:,} more" if more > 0 else "")


def _one_file(path: Path, source: DataSource) -> Files:
    if kind(path) is None:
        raise PostshareError(
            f"{path}: files of kind '{suffix(path)}' are not read; convert it to one of "
            f"{', '.join(KINDS)}"
        )
    asked = [f"split {name}" for name in split_names(source.split) if name != TRAIN]
    asked += [f"subset {source.subset}"] if source.subset is not None else []
    remarks = [f"{' and '.join(asked)} ignored, as a file is read whole"] if asked else []
    return Files((path,), remarks=tuple(remarks))


def _by_card(subset: Subset, split: str) -> Files:
    folder = subset.folder
    if not subset.patterns and subset.plain:
        return _by_names(folder, split)
    if not subset.plain:
        return Files(tuple(_listed(folder)), by_library=True)
    paths = subset.files(split, [*_listed(folder)])
    if any(kind(path) is None for path in paths):
        return Files(tuple(paths), by_library=True)
    left_out = [path.relative_to(folder).as_posix() for path in paths if not path.stat().st_size]
    paths = [path for path in paths if path.stat().st_size]
    if not paths:
        raise _all_empty(folder, left_out)
    _same_kind(folder, paths)
    return Files(tuple(paths), {"empty": left_out} if left_out else {})


def _listed(folder: Path) -> Iterator[Path]:
    """All files below a folder, through links too; none that is hidden, or in a hidden folder."""

    def refuse(error: OSError) -> None:
        raise PostshareError(
            f"{error.filename} cannot be listed ({error.strerror}); give the job's user read access"
        )

    seen = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()  # a link to a folder above
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _by_names(folder: Path, split: str) -> Files:
    data: list[Path] = []
    left_out: dict[str, list[str]] = {}

    def leave(reason: str, paths: list[Path]) -> None:
        if paths:
            left_out.setdefault(reason, []).extend(map(name, paths))

    def name(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    saved: dict[Path, tuple[Path, ...] | None] = {}
    for path in sorted(_listed(folder), key=name):
        if path.parent not in saved:
            state = path.parent / "state.json"
            saved[path.parent] = _saved_files(path.parent) if state.is_file() else None
        listed = saved[path.parent]
        is_data = kind(path) is not None and not _NO_DATA.fullmatch(path.name)
        if not is_data or (listed is not None and path not in listed):
            leave("no data", [path])
        elif not path.exists():
            raise _dangling(path)
        elif not path.is_file():
            leave("no file", [path])
        elif path.stat().st_size == 0:
            leave("empty", [path])
        else:
            data.append(path)
    if not data:
        if left_out.get("empty"):
            raise _all_empty(folder, left_out["empty"])
        beside = f" (but {some([*chain.from_iterable(left_out.values())])})" if left_out else ""
        raise PostshareError(f"{folder} holds no {', '.join(KINDS)} file{beside}; correct the path")
    short = {path: _stem(path.relative_to(folder)) for path in data}
    splits = splits_of(list(short.values()))
    chosen = [path for path in data if _belongs(short[path], splits, split)]
    unnamed = [path for path in data if short[path] not in splits]
    doubtful = held_out_by_name([short[path] for path in unnamed])
    remarks: tuple[str, ...] = ()
    if set(splits.values()) <= {TRAIN} and split == TRAIN:
        names = [name(path) for path in data if short[path] in doubtful]
        if splits and doubtful:
            raise PostshareError(
                f"{folder} has files of the split train and others that may be held-out text "
                f"({some(names)}); put each split into a folder of its own and set path to it"
            )
        if doubtful:
            remarks = (f"names mean nothing, {some(names)} is read like the others",)
        chosen = data
    elif not chosen:
        raise _no_split(folder, split, sorted(set(splits.values())), unnamed)
    else:
        for other in sorted(set(data) - set(chosen) - set(unnamed)):
            leave(f"split {splits[short[other]]}", [other])
        leave("of no split", unnamed)
    _same_kind(folder, chosen)
    return Files(tuple(chosen), left_out, remarks)


def _belongs(path: PurePath, splits: dict[PurePath, str], split: str) -> bool:
    return path in splits and (splits[path] == canonical(split) or path.name == split)


def _no_split(folder: Path, split: str, splits: list[str], unnamed: list[Path]) -> PostshareError:
    if not splits:
        return PostshareError(
            f"{folder} has no split '{split}', nor any other: it is read whole; remove split, or "
            "set path to the files of that split"
        )
    rest = f", beside files of none ({some([path.name for path in unnamed])})" if unnamed else ""
    return PostshareError(
        f"{folder} has no split '{split}'{rest}; set split to one of {', '.join(splits)}"
        + (", or put each split into a folder of its own" if unnamed else "")
    )


def _same_kind(folder: Path, paths: list[Path]) -> None:
    by_kind: dict[str, list[Path]] = {}
    for path in paths:
        by_kind.setdefault(kind(path) or "", []).append(path)
    if len(by_kind) > 1:
        said = " and ".join(
            f"{len(found):,} {suffix(found[0])} ({found[0].relative_to(folder).as_posix()})"
            for found in by_kind.values()
        )
        raise PostshareError(
            f"{folder} holds files of several kinds, {said}; keep those of one kind, or list them "
            "as sources of their own"
        )


def _stem(path: PurePath) -> PurePath:
    return path.with_name(path.name[: len(path.name) - len(suffix(path))])


def _all_empty(folder: Path, names: list[str]) -> PostshareError:
    return PostshareError(
        f"{folder} is empty: so are all its files ({some(names)}); choose another source"
    )


def _dangling(path: Path) -> PostshareError:
    return PostshareError(
        f"{path} is a link to {os.readlink(path)} that does not exist; download or copy the data "
        "again"
    )


def _saved_split(folder: Path, split: str) -> str:
    """The folder of a split of what `DatasetDict.save_to_disk` has written."""
    splits = _json(folder / "dataset_dict.json").get("splits", [])
    if split not in splits:
        raise PostshareError(
            f"{folder} has no split '{split}'; set split to one of {', '.join(splits)}"
        )
    return split


def _saved_files(folder: Path) -> tuple[Path, ...] | None:
    """The files of what `Dataset.save_to_disk` has written; None if state.json is another's."""
    listed = _json(folder / "state.json").get("_data_files")
    if not isinstance(listed, list):
        return None
    return tuple(folder / entry["filename"] for entry in listed)


def _whole(folder: Path, paths: tuple[Path, ...], split: str) -> Files:
    """A saved data set: all its files, and none that lies beside them."""
    saved = _json(folder / "state.json").get("_split")
    if split not in (TRAIN, saved, folder.name):
        raise PostshareError(
            f"{folder} has no split '{split}': it was saved as {saved}; remove split, or correct "
            "the path"
        )
    for path in paths:
        if not path.is_file():
            raise PostshareError(
                f"{path} is missing, which state.json names; save or copy the data set again"
            )
    beside = sorted(
        path.name
        for path in folder.iterdir()
        if kind(path) == "arrow" and path not in paths and not path.name.startswith(".")
    )
    return Files(paths, {"no part of the data set": beside} if beside else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PostshareError(
            f"{path} cannot be read ({error}); save or copy the data set again"
        ) from error
    return found if isinstance(found, dict) else {}
