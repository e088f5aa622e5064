"""Rows of data files, read one after the other; what is wrong is named with its file and place.

A .txt file is one row; of a .json or .jsonl file each object, be it a line, an element of one list
or written over several lines; of a table each row. Nothing is guessed: a value is what the file
says, whatever the others look like.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sa_models.errors import PostshareError
from train.data.local.files import kind, some

Row = dict[str, Any]
Place = tuple[str, int]
"""What a row is called and its number: a line counts from 1, a record and a row from 0."""
_LONGEST = 2**31 - 1  # bytes of a text in a table
BATCH = 1000  # rows of a table that are Python objects at a time
_PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda path: io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")),
}
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,  # names of columns that are no UTF-8, among others
    KeyError,  # two columns of one name
    zlib.error,
    lzma.LZMAError,
    pa.ArrowException,
)
_TABLES = ("parquet", "arrow")
_SPACE = re.compile(r"\s*")
_POINTER = b"version https://git-lfs"
_BEGINNINGS = {
    codecs.BOM_UTF32_LE: "UTF-32; save it as UTF-8 (iconv -f UTF-32 -t UTF-8)",
    codecs.BOM_UTF32_BE: "UTF-32; save it as UTF-8 (iconv -f UTF-32 -t UTF-8)",
    codecs.BOM_UTF16_LE: "UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "compressed by gzip; rename it to end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; rename it to end in .zst",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a parquet file; rename it to end in .parquet",
    b"ARROW1": "an Arrow file; rename it to end in .arrow",
}


def texts(paths: Sequence[Path], column: str) -> Iterator[str | None]:
    """The text of every row; None where a row has none.

    Raises:
        PostshareError: a file cannot be read, has no such column, or something else than text in
            it.
    """
    for path in paths:
        present, last = False, {}
        for place, row in rows(path, [column]):
            last = row
            value = row.get(column)
            if value is not None and not isinstance(value, str):
                raise _no_text(path, place, column, row, present)
            present = present or column in row
            if not present and kind(path) in _TABLES:
                break
            yield value
        if last and not present:
            raise no_column(str(path), column, list(last), [*_of_text(last)])


def records(paths: Sequence[Path], fields: Sequence[str]) -> Iterator[str]:
    """Every row as JSON; of a table with all `fields` only these.

    Raises:
        PostshareError: a file cannot be read.
    """
    for path in paths:
        for _, row in rows(path, fields):
            yield json.dumps(row, ensure_ascii=False, default=lambda value: [type(value).__name__])


def place_of(paths: Sequence[Path], fields: Sequence[str], index: int) -> str:
    """Where the row of this index is, counted through all files."""
    every = ((path, place) for path in paths for place, _ in rows(path, fields))
    path, place = next(itertools.islice(every, index, None))
    return where(path, place)


def where(path: Path, place: Place) -> str:
    return f"{path}, {place[0]} {place[1]}"


def no_column(name: str, column: str, columns: list[str], of_text: list[str]) -> PostshareError:
    """`of_text` are the columns that could be meant."""
    if "messages" in columns:
        return PostshareError(
            f"{name} has no column '{column}' but chats in 'messages'; set data.format=chat"
        )
    if {"instruction", "output"} <= {*columns}:
        return PostshareError(
            f"{name} has no column '{column}' but records of 'instruction' and 'output'; set "
            "data.format=alpaca"
        )
    if of_text:
        return PostshareError(
            f"{name} has no column '{column}'; set text to one of: {', '.join(of_text)}"
        )
    return PostshareError(
        f"{name} has no column '{column}', nor another of text ({some(columns)}); choose another "
        "source"
    )


def other_than_text(name: str, column: str, what: str, of_text: list[str]) -> PostshareError:
    """`of_text` are the columns that could be meant instead."""
    cure = f"set text to one of: {', '.join(of_text)}" if of_text else "choose another source"
    return PostshareError(f"{name}: column '{column}' does not hold text but {what}; {cure}")


def rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[Place, Row]]:
    """The rows of a file, and where they are; of a table with all `fields` these columns alone,
    without any `fields` all columns.

    Raises:
        PostshareError: the file cannot be read, or not to its end.
    """
    reader = {"text": _text, "json": _json, "parquet": _parquet, "arrow": _arrow}[kind(path) or ""]
    try:
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
        if head == _POINTER:
            raise PostshareError(f"{path} is a Git LFS pointer and no data; run git lfs pull")
        if head:
            yield from reader(path, fields)
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        cure = "download or write it again"
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
            cure = "give the job's user read access"
        raise PostshareError(f"{path} cannot be read ({reason}); {cure}") from error


def _no_text(path: Path, place: Place, column: str, row: Row, present: bool) -> PostshareError:
    what = _named(row[column])
    if not present:
        row = next(rows(path, []))[1] if kind(path) in _TABLES else row  # with all columns
        return other_than_text(where(path, place), column, what, [*_of_text(row)])
    return PostshareError(
        f"{where(path, place)}: the '{column}' is {what}, no text; correct or remove it"
    )


def _named(value: Any) -> str:
    """What a value of JSON is called."""
    names: dict[type, str] = {bool: "true or false", dict: "an object", str: "text"}
    names |= {int: "a number", float: "a number", list: "a list", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _of_text(row: Row) -> Iterator[str]:
    return (name for name, value in row.items() if isinstance(value, str))


# --- text and JSON --------------------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    packed = _PACKED.get(path.suffix.lower())
    return packed(path) if packed else path.open("rb")


def _check_beginning(path: Path, head: bytes) -> None:
    for beginning, what in _BEGINNINGS.items():
        if head.startswith(beginning):
            raise PostshareError(f"{path} is {what}")
    if b"\0" in head[:4]:
        order = "BE" if head.startswith(b"\0") else "LE"
        raise PostshareError(
            f"{path} is no UTF-8 text but UTF-16 or binary; save it as UTF-8 (iconv -f "
            f"UTF-16{order} -t UTF-8)"
        )


def _decode(path: Path, data: bytes, line: int) -> str:
    """The text of bytes that begin at a line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise PostshareError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is no UTF-8; save the file as "
            "UTF-8 (iconv -f LATIN1 -t UTF-8)"
        ) from None


def _text(path: Path, fields: Sequence[str]) -> Iterator[tuple[Place, Row]]:
    with _open(path) as file:
        data = file.read()
    _check_beginning(path, data)
    if len(data) > _LONGEST:
        raise PostshareError(
            f"{path} is one document of {len(data):,} bytes; split it, or write it as .jsonl"
        )
    text = _decode(path, data.removeprefix(codecs.BOM_UTF8), 1)
    yield ("line", 1), {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _json(path: Path, fields: Sequence[str]) -> Iterator[tuple[Place, Row]]:
    values = _json_values(path)
    first = next(values, None)
    if first is None:
        return
    second = next(values, None)
    if second is None and isinstance(first[1], dict) and not _has(first[1], fields):
        for name, value in first[1].items():
            if isinstance(value, list) and value and _has(value[0], fields):
                raise PostshareError(
                    f"{path} is one object, whose '{name}' is a list of {len(value):,}; write that "
                    f"list alone into the file (jq .{name})"
                )
    for place, value in itertools.chain([first], [second] if second else [], values):
        if not isinstance(value, dict):
            raise PostshareError(
                f"{where(path, place)} is {_named(value)}, no object with fields; correct or "
                "remove it"
            )
        yield place, value


def _has(value: Any, fields: Sequence[str]) -> bool:
    return isinstance(value, dict) and any(field in value for field in fields)


def _json_values(path: Path) -> Iterator[tuple[Place, Any]]:
    with _open(path) as file:
        begun = False
        for number, line in enumerate(file, 1):
            if not begun:
                _check_beginning(path, line)
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if not line:
                continue
            if not begun and line.startswith(b"["):
                rest = _decode(path, file.read(), number + 1)
                yield from _elements(path, f"{_decode(path, line, number)}\n{rest}", number)
                return
            text = _decode(path, line, number)
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                if not begun and getattr(error, "pos", 0) >= len(text):
                    text = _with_further_lines(path, text, file.read(), number)
                yield from _several(path, text, number)
            else:
                if "\\u" in text:
                    _check_characters(path, ("line", number), value)
                yield ("line", number), value
            begun = True


def _with_further_lines(path: Path, text: str, rest: bytes, line: int) -> str:
    """A first line that is no whole object, and the others if it goes on in them."""
    try:
        json.loads(rest.partition(b"\n")[0])
    except ValueError:
        return f"{text}\n{_decode(path, rest, line + 1)}"
    return text


def _elements(path: Path, text: str, line: int) -> Iterator[tuple[Place, Any]]:
    """The elements of one list; a text as the field `text`."""
    (place, values), *more = _several(path, text, line)
    if more:
        raise PostshareError(
            f"{where(path, place)} is a list, and more follows; write one object per line"
        )
    escapes = "\\u" in text
    for number, value in enumerate(values):
        if escapes:
            _check_characters(path, ("record", number), value)
        yield ("record", number), {"text": value} if isinstance(value, str) else value


def _several(path: Path, text: str, line: int) -> Iterator[tuple[Place, Any]]:
    """The values of a text that begins at a line."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            number = line + text.count("\n", at, error.pos)
            begin = text.rfind("\n", 0, error.pos) + 1
            reason = re.sub("( starting)? at$", "", error.msg)
            raise PostshareError(
                f"{path}, line {number}: no whole JSON ({reason} at column "
                f"{error.pos - begin + 1}); correct or remove the line"
            ) from None
        except (ValueError, RecursionError) as error:  # too long a number, nested too deep
            raise PostshareError(
                f"{path}, line {line}: cannot be read ({error}); correct or remove the line"
            ) from None
        if "\\u" in text and isinstance(value, dict):
            _check_characters(path, ("line", line), value)
        yield ("line", line), value
        begin, at = at, _SPACE.match(text, end).end()  # type: ignore[union-attr]
        line += text.count("\n", begin, at)


def _check_characters(path: Path, place: Place, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise PostshareError(
            f"{where(path, place)} has \\u{half:04x}, half of a character; correct or remove it"
        ) from None


# --- tables ---------------------------------------------------------------------------------------


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[tuple[Place, Row]]:
    with pq.ParquetFile(path) as file:
        columns = _columns(file.schema_arrow, fields)
        yield from _of_batches(path, file.iter_batches(BATCH, columns=columns))


def _arrow(path: Path, fields: Sequence[str]) -> Iterator[tuple[Place, Row]]:
    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            table = pa.ipc.open_file(path)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            file.seek(0)
            table = batches = pa.ipc.open_stream(file)
        columns = _columns(table.schema, fields)
        yield from _of_batches(path, (batch.select(columns) for batch in batches))


def _columns(schema: pa.Schema, fields: Sequence[str]) -> list[str]:
    found = [name for name in fields if name in schema.names]
    return found if found and len(found) == len(fields) else schema.names


def _of_batches(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[Place, Row]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, len(batch), BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                yield ("row", number), row
                number += 1
