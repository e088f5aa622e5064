"""Text of `--text FILE` goes through the one reader of files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sa_models.errors import PostshareError
from train.evaluation.text import find_text

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_text_file_without_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone two\r\n\r\nthree\n")
    found = find_text(tmp_path / "a.txt", [])
    assert found.texts == ("one two\n\nthree\n",)
    assert (found.name, found.words) == ("a.txt", 3)


def test_rows_of_a_packed_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "a"}\n{"text": ""}\n{"text": "b"}')
    )
    assert find_text(tmp_path / "a.jsonl.gz", []).texts == ("a", "b")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"a\n\xe4", r"a\.txt, line 2: byte 0xe4 is no UTF-8; save the file as UTF-8"),
        ("a.txt", b"", r"a\.txt \(train\) is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"te', r"a\.jsonl, line 2: no whole JSON"),
        (
            "a.csv",
            b"text\na\n",
            r"files of kind '\.csv' are not read; convert it to one of \.jsonl",
        ),
    ],
)
def test_a_text_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PostshareError, match=message):
        find_text(tmp_path / name, [])
