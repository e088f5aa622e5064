"""Rows of files: against what was written into them, and where something is wrong with it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sa_models.errors import PostshareError
from train.data.local.rows import place_of, records, texts

Write = Callable[[Path, list[dict[str, Any]]], None]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def write_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


FORMS: dict[str, Write] = {
    "lines.jsonl": lambda path, rows: path.write_text(lines(*rows)),
    "unescaped.JSONL": lambda path, rows: path.write_text(
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig"
    ),
    "list.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "wide.json": lambda path, rows: path.write_text("\n " + json.dumps(rows, indent=2)),
    "objects.json": lambda path, rows: path.write_text(
        "\n".join(json.dumps(row, indent=2) for row in rows)
    ),
    "joined.jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) for row in rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(*rows).encode())),
    "a.jsonl.bz2": lambda path, rows: path.write_bytes(bz2.compress(lines(*rows).encode())),
    "a.json.xz": lambda path, rows: path.write_bytes(lzma.compress(json.dumps(rows).encode())),
    "a.jsonl.zst": lambda path, rows: path.write_bytes(zstd(lines(*rows).encode())),
    "a.parquet": lambda path, rows: pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=3
    ),
    "stream.arrow": write_stream,
    "file.arrow": write_file,
}


@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_is_read(tmp_path: Path, form: str) -> None:
    draw = random.Random(form)
    letters = 'ab \t\n\r"\\{}[],:\u00e4\u2028\u0085\ufeff\U0001f600'
    rows = [
        {"text": "".join(draw.choices(letters, k=draw.randrange(9))), "id": draw.randrange(99)}
        for _ in range(20)
    ]
    rows[7]["text"] = None
    path = tmp_path / form
    FORMS[form](path, rows)
    assert list(texts([path, path], "text")) == [row["text"] for row in rows] * 2
    assert [json.loads(row) for row in records([path], ["text", "id"])] == rows
    assert len([*records([path], ["text", "absent"])]) == 20


def test_values_are_not_guessed_from_others(tmp_path: Path) -> None:
    """Dates stay text, a column of several types stands beside, a text may be missing."""
    path = tmp_path / "a.jsonl"
    rows = [{"text": "2020-01-01", "x": 1}, {"text": "2021-01-01T00:00:00Z", "x": "y"}]
    rows += [{"x": [{}]}, {"text": None}, {"text": "1", "message": {}, "type": "user"}]
    path.write_text(lines(*rows))
    assert list(texts([path], "text")) == ["2020-01-01", "2021-01-01T00:00:00Z", None, None, "1"]
    assert [json.loads(row) for row in records([path], ["text"])] == rows


def test_text_files(tmp_path: Path) -> None:
    """No byte order mark, and newlines as Python reads them."""
    paths = [tmp_path / name for name in ("bom.txt", "crlf.txt", "none.txt", "a.TXT.gz")]
    paths[0].write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbfb")
    paths[1].write_bytes(b"a\r\nb\rc\n")
    paths[2].write_bytes(b"")
    paths[3].write_bytes(gzip.compress("\u00e4".encode()))
    assert list(texts(paths, "text")) == ["a\ufeffb", "a\nb\nc\n", "\u00e4"]


def test_a_mark_may_begin_every_line(tmp_path: Path) -> None:
    """As `cat` leaves it of several files."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"\xef\xbb\xbf" + lines({"text": t}).encode() for t in "ab"))
    assert list(texts([path], "text")) == ["a", "b"]


def test_texts_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["a", "b"]))
    assert list(texts([path], "text")) == ["a", "b"]


GOOD = lines({"text": "a"})
SAVE = r"save the file as UTF-8 \(iconv -f LATIN1 -t UTF-8\)"


WRONG: list[tuple[str, str | bytes, str]] = [
    (
        "a.jsonl",
        GOOD * 119 + '{"text": "b',
        r", line 120: no whole JSON \(Unterminated string a",
    ),
    (
        "a.jsonl",
        GOOD + '{"text": "b",}\n' + GOOD,
        r", line 2: .*at column 14\); correct or rem",
    ),
    ("a.jsonl", '{"text": "b"\n' + GOOD, r", line 1: no whole JSON \(Expecting ',' delimiter"),
    ("a.jsonl", "\n\n{}x", r", line 3: no whole JSON \(Expecting value at column 3\)"),
    ("a.json", '[{"text": "a"},\n{"text": }]', r", line 2: no whole JSON .* at column 10\)"),
    ("a.json", '{\n"text":\n"a"\n}\n{\n"text" "a"}', r", line 6: no whole JSON .* column 8\)"),
    ("a.jsonl", GOOD + "[" * 10**5, r", line 2: (cannot be read \(max|no whole JSON)"),
    ("a.jsonl", GOOD + f'{{"n": {"1" * 5000}}}', r", line 2: cannot be read \(Exceeds the lim"),
    ("a.jsonl", GOOD * 9999 + '{"text": 5}', r", line 10000: the 'text' is a number, no text"),
    (
        "a.jsonl",
        '{"text": [], "t": "a"}',
        r", line 1: column 'text' does not hold text but a l",
    ),
    ("a.jsonl", '{"text": {}}', r"does not hold text but an object; choose another source"),
    ("a.json", '[{"text": "a"}, null]', r", record 1 is null, no object with fields"),
    ("a.jsonl", '"a"\n', r", line 1 is text, no object with fields"),
    (
        "a.jsonl",
        "[1]\n[2]\n",
        r", line 1 is a list, and more follows; write one object per line",
    ),
    (
        "a.json",
        '{"data": [{"text": "a"}]}',
        r"one object, whose 'data' is a list of 1; .*jq \.d",
    ),
    ("a.jsonl", '{"body": "a", "id": 1}', r"has no column 'text'; set text to one of: body$"),
    ("a.jsonl", '{"id": 1}', r"no column 'text', nor another of text \(id\); choose another s"),
    ("a.jsonl", '{"messages": []}', r"but chats in 'messages'; set data\.format=chat"),
    (
        "a.jsonl",
        lines({"instruction": "", "output": ""}),
        r"but records of 'instruction' and 'output'; set data\.format=alpaca",
    ),
    ("a.jsonl", GOOD + '{"text": "\\ud83d"}', r", line 2 has \\ud83d, half of a character"),
    ("a.json", '[{"text": "\\udc00"}]', r", record 0 has \\udc00, half of a character"),
    ("a.txt", "a\nb\n\u00e4".encode("latin-1"), r", line 3: byte 0xe4 is no UTF-8; " + SAVE),
    ("a.jsonl", GOOD.encode() + b'"\xff"', r", line 2: byte 0xff is no UTF-8; " + SAVE),
    ("a.json", b'[{"text":\n\n"\xfc"}]', r", line 3: byte 0xfc is no UTF-8; " + SAVE),
    ("a.txt", "ab".encode("utf-16"), r" is UTF-16; save it as UTF-8 \(iconv -f UTF-16 -t UTF"),
    ("a.jsonl", GOOD.encode("utf-16-be"), r"UTF-16 or binary; .*iconv -f UTF-16BE -t UTF-8"),
    ("a.txt", "ab".encode("utf-32"), r" is UTF-32; save it as UTF-8"),
    ("a.jsonl", gzip.compress(b"a"), r" is compressed by gzip; rename it to end in \.gz"),
    (
        "a.jsonl.gz",
        gzip.compress(GOOD.encode())[:-4],
        r"cannot be read \(Compressed file ended",
    ),
    ("a.jsonl.gz", b"abc", r"cannot be read \(Not a gzipped file"),
    ("a.json.xz", lzma.compress(b"[]")[:-9], r"cannot be read \(Compressed file ended"),
    ("a.jsonl.zst", zstd(GOOD.encode() * 99)[:-4], r"cannot be read \(Truncated compressed"),
    (
        "a.txt",
        b"version https://git-lfs.github.com/spec/v1\n",
        r"a Git LFS pointer and no data",
    ),
    ("a.parquet", b"version https://git-lfs.github.com/spec", r"a Git LFS pointer and no data"),
    ("a.parquet", b"PAR1", r"cannot be read \(.*; download or write it again"),
    ("a.arrow", b"no arrow at all", r"cannot be read \(.*; download or write it again"),
]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    WRONG,
    ids=[f"{number}-{name}" for number, (name, *_) in enumerate(WRONG)],  # the same in each worker
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, name: str, data: str | bytes, message: str
) -> None:
    (tmp_path / "fine.jsonl").write_text(GOOD)
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(PostshareError, match=message) as raised:
        list(texts([tmp_path / "fine.jsonl", path], "text"))
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_table_that_is_cut_off(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    FORMS[form](path, [{"text": str(n) * 50} for n in range(20)])
    whole = path.read_bytes()
    for size in (5, 20, len(whole) // 3, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(PostshareError, match=r"cannot be read \(") as raised:
            list(texts([path], "text"))
        assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("form", ["stream.arrow", "file.arrow"])
def test_names_of_columns_that_cannot_be_read(tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    FORMS[form](path, [{"text": "a"}])
    path.write_bytes(path.read_bytes().replace(b"text", b"te\xcat"))
    with pytest.raises(PostshareError, match=r"cannot be read \(.*can't decode byte 0xca"):
        list(texts([path], "text"))
    table = pa.table([pa.array(["a"])] * 2, names=["text", "text"])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(PostshareError, match=r"cannot be read \(.*exists 2 times in schema"):
        list(texts([path], "text"))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            pa.array([1, 2]),
            r", row 0: column 'text' does not hold text but a number; set text to o",
        ),
        (
            pa.array([b"a", b"b"]),
            r", row 0: column 'text' does not hold text but bytes; set text to",
        ),
        (pa.array([["a"], ["b"]]), r"does not hold text but a list; set text to one of: other"),
    ],
)
def test_columns_of_tables_that_are_no_text(tmp_path: Path, column: Any, message: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column, "other": ["a", "b"]}), path)
    with pytest.raises(PostshareError, match=message):
        list(texts([path], "text"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_every_type_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["a", None], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(texts([tmp_path / "a.parquet"], "text")) == ["a", None]
    coded = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})
    pq.write_table(coded, tmp_path / "b.parquet")
    assert list(texts([tmp_path / "b.parquet"], "text")) == ["a", "b", "a"]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        PostshareError, match=r"a\.jsonl cannot be read \(Permission denied\); give"
    ):
        list(texts([path], "text"))


def test_places_are_counted_through_all_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.json"
    first.write_text(f"\n{GOOD}\n{GOOD}")
    second.write_text('[{"text": "a"}, {"text": "b"}]')
    found = [place_of([first, second], ["text"], index) for index in range(4)]
    assert found == [
        f"{first}, line 2",
        f"{first}, line 4",
        f"{second}, record 0",
        f"{second}, record 1",
    ]
