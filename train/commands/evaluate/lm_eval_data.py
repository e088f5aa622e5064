"""Data of lm-eval's tasks from a local folder, for machines without a network.

    <data>/<task>/<split>.jsonl            or .csv, .tsv, .parquet; columns as on the hub
    <data>/<group>/<subset>/<split>.jsonl   likewise, of one task of a group

`dev` is read where `validation` is wanted (GLUE's own name). Two well-known distributions are read
as they come: MMLU's csv files (`mmlu/mmlu.zip`, or unpacked as `mmlu/data/test/<subject>_test.csv`)
and HellaSwag as llama.cpp has it (`hellaswag/hellaswag_val*.txt`, also .bz2): context, number of
the right ending, four endings, one a line.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_models.errors import PostshareError
from train.common.files import file_hash

Rows = list[dict[str, Any]]
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
ALIASES = {"validation": ("validation", "dev", "val"), "dev": ("dev",), "test": ("test",)}
SPLITS = ("train", "validation", "dev", "test")
LAST_SENTENCE = re.compile(r"(.*[.!?]\s+)?([a-z][^.!?]*)", re.DOTALL)


@dataclass(frozen=True)
class LocalTask:
    """What a folder holds for one task.

    Attributes:
        folder: `<data>/<name>`.
        subset: of a group's folder: which of its tasks.
    """

    folder: Path
    subset: str | None = None

    def rows(self, split: str) -> Rows | None:
        """The rows of a split; None where there are none. Raises PostshareError: unreadable."""
        file = self._file(split)
        try:
            if file is not None:
                return _read(file)
            if self.folder.name == "mmlu" and self.subset is not None:
                return _mmlu(self.folder, self.subset, split)
            if self.folder.name == "hellaswag" and split == "validation":
                return _hellaswag(self.folder)
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PostshareError(
                f"{self.folder}: the {split} data cannot be read ({reason}); see "
                "docs/evaluation.md for the layout"
            ) from None
        return None

    def _file(self, split: str) -> Path | None:
        folder = self.folder if self.subset is None else self.folder / self.subset
        for name in ALIASES.get(split, (split,)):
            for suffix in SUFFIXES:
                if (file := folder / f"{name}{suffix}").is_file():
                    return file
        return None


def find_local(
    data: Path | None, task: str, asked: str | None = None, subset: str | None = None
) -> LocalTask | None:
    """Where the data of a task lies; None where `data` has no folder for it.

    Args:
        asked: what was asked for: the task (None), or a group that it belongs to.
        subset: the task's part of the group's hub dataset, where it has one.
    """
    folder = None if data is None else data / (asked or task)
    if folder is None or not folder.is_dir():
        return None
    return LocalTask(folder, None if asked in (None, task) else subset or task)


def data_hash(data: Path | None, name: str) -> dict[str, str]:
    """Hashes of all files of a task or group; empty where the hub's data is used."""
    folder = None if data is None else data / name
    if folder is None or not folder.is_dir():
        return {}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file_hash(file) for file in files}


def _read(file: Path) -> Rows:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(file).to_pylist()
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    # GLUE's tsv files quote nothing: a quotation mark is a character like any other.
    tsv = file.suffix == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tsv else {}
    rows = csv.DictReader(io.StringIO(text, newline=""), **options)
    return [{key: _number(value) for key, value in row.items()} for row in rows]


def _number(value: str) -> str | int:
    """Labels of a csv are numbers, as the hub has them."""
    return int(value) if value.isdecimal() else value


def _mmlu(folder: Path, subject: str, split: str) -> Rows | None:
    """The columns question, choices, answer; the files have no header: question, A to D, answer."""
    name = f"data/{split}/{subject}_{split}.csv"
    if (folder / "mmlu.zip").is_file():
        with zipfile.ZipFile(folder / "mmlu.zip") as archive:
            text = archive.read(name).decode("utf-8")
    elif (folder / name).is_file():
        text = (folder / name).read_text(encoding="utf-8")
    else:
        return None
    rows: Sequence[list[str]] = list(csv.reader(io.StringIO(text, newline="")))
    return [
        {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in rows
    ]


def _hellaswag(folder: Path) -> Rows | None:
    """As the hub's columns: the last, unfinished sentence of the context is ctx_b."""
    file = next(iter(sorted(folder.glob("hellaswag_val*.txt*"))), None)
    if file is None:
        return None
    content = file.read_bytes()
    text = (bz2.decompress(content) if file.suffix == ".bz2" else content).decode("utf-8")
    lines = text.splitlines()
    if not lines or len(lines) % 6:
        raise ValueError(f"{file.name} has {len(lines)} lines, six for each question are needed")
    rows = []
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        activity, _, rest = context.partition(": ")
        whole = LAST_SENTENCE.fullmatch(rest)
        begun = whole[2] if whole and whole[1] else ""
        rows.append(
            {
                "activity_label": activity,
                "ctx_a": rest.removesuffix(begun).rstrip() if begun else rest,
                "ctx_b": begun,
                "endings": endings,
                "label": int(label),
            }
        )
    return rows
