"""Folders of data of legal and illegal parts: every document, or one line that names the file.

Each folder is read whole and as a stream. What is right is the list of documents that went in.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sa_models.errors import PostshareError
from tests.support.fuzz import contents, fuzz
from train.data.sources import load_documents
from train.data.token_table import Encoder, streamed_token_table, token_table
from train.demo import demo_base_path
from train.recipe.recipe import DataSource

# None of them is a split: `alice` is in every folder, and belongs to none.
NAMES = [
    "moby-dick",
    "the-train-journey",
    "taking-a-test",
    "zebra",
    "a[b]*c?",
    "100%",
    "two words",
    "ünï",
    "part/one",
    "part/two",
    "-",
]
DOCUMENTS = [
    "Once upon a time there was a cat.",
    "two\nlines",
    'tabs\tand "quotes" and \\ backslashes',
    "日本語 and 😀",
    "\u2028 is a line of its own to some readers",
    " spaces around ",
    "null",
    "1.0",
]


def to_text(rows: list[str]) -> bytes:
    return rows[0].encode()


def to_lines(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def to_list(rows: list[str]) -> bytes:
    return json.dumps([{"id": i, "text": row} for i, row in enumerate(rows)], indent=1).encode()


def to_parquet(rows: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(rows))), "text": rows}), sink)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    ".txt": to_text,
    ".jsonl": to_lines,
    ".json": to_list,
    ".parquet": to_parquet,
}
Part = Callable[[Path, str], None]


def beside(name: str, content: bytes) -> Part:
    def part(folder: Path, suffix: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return part


def mark(folder: Path, suffix: str) -> None:
    """A byte order mark, which editors on Windows write, before what is text."""
    if suffix != ".parquet":
        file = folder / f"alice{suffix}"
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def links(folder: Path, suffix: str) -> None:
    (folder / ".blobs").mkdir()
    (folder / f"alice{suffix}").rename(folder / ".blobs" / "0")
    (folder / f"alice{suffix}").symlink_to(Path(".blobs") / "0")


LEGAL: dict[str, Part] = {
    "a README": beside("README.md", b"# Some text\n"),
    "a script": beside("make.py", b"raise SystemExit(1)\n"),
    "a hidden file": lambda folder, suffix: beside(f".hidden{suffix}", b"\xff")(folder, suffix),
    "a cache": beside(".cache/huggingface/download/x.json", b"{}"),
    "a table of others": beside("notes.csv", b"a,b\n1,2\n"),
    "an empty file": lambda folder, suffix: beside(f"void{suffix}", b"")(folder, suffix),
    "a byte order mark": mark,
    "links": links,
}


def broken(content: bytes) -> Part:
    def part(folder: Path, suffix: str) -> None:
        file = folder / f"alice{suffix}"
        file.unlink()
        # Of text anything is text that is UTF-8.
        file.write_bytes(content if suffix != ".txt" or not_text(content) else b"\x80")

    return part


def not_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return True
    return False


def cut(folder: Path, suffix: str) -> None:
    file = folder / f"alice{suffix}"
    # Of text every part is text: half a character is not.
    whole = file.read_bytes() if suffix != ".txt" else "é".encode()
    file.unlink()
    file.write_bytes(whole[: len(whole) - 6] if suffix != ".txt" else whole[:1])


def another_kind(folder: Path, suffix: str) -> None:
    other = ".jsonl" if suffix == ".txt" else ".txt"
    (folder / f"other{other}").write_bytes(WRITERS[other](["text"]))


def columns(rows: list[dict[str, Any]]) -> Part:
    def part(folder: Path, suffix: str) -> None:
        if suffix == ".txt":  # which has no columns
            return cut(folder, suffix)
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        if suffix == ".json":
            content = json.dumps(rows).encode()
        if suffix == ".parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            content = sink.getvalue().to_pybytes()
        for file in folder.rglob(f"*{suffix}"):
            if file.is_file() and not any(
                p.startswith(".") for p in file.relative_to(folder).parts
            ):
                file.write_bytes(content)
        return None

    return part


def no_target(folder: Path, suffix: str) -> None:
    (folder / f"lost{suffix}").symlink_to("nowhere")


ILLEGAL: dict[str, Part] = {
    "a cut file": cut,
    "UTF-16": broken("one document".encode("utf-16")),
    "Latin-1": broken(b'{"text": "caf\xe9"}\n'),
    "zeros": broken(b"\0" * 64),
    "another kind": another_kind,
    "no column of that name": columns([{"content": "a"}, {"content": "b"}]),
    "a column of numbers": columns([{"text": 1}, {"text": 2}]),
    "a link to nothing": no_target,
}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    suffix = draw(st.sampled_from(sorted(WRITERS)))
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
    return {
        "suffix": suffix,
        "upper": draw(st.booleans()),
        "files": {
            name: draw(st.lists(st.sampled_from(DOCUMENTS), min_size=1, max_size=4))
            for name in ["alice", *names]
        },
        "legal": sorted(draw(st.sets(st.sampled_from(sorted(LEGAL)), max_size=2))),
        "illegal": draw(st.none() | st.sampled_from(sorted(ILLEGAL))),
    }


def make(folder: Path, case: dict[str, Any]) -> list[str]:
    """Write the folder; returns its documents, in the order of the files' names."""
    suffix, expected = case["suffix"], {}
    for name, rows in case["files"].items():
        # The one that parts change is written as usual.
        end = suffix.upper() if case["upper"] and name != "alice" else suffix
        file = folder / f"{name}{end}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(WRITERS[suffix](rows))
        expected[f"{name}{end}"] = rows[:1] if suffix == ".txt" else rows
    for part in (*(LEGAL[name] for name in case["legal"]),):
        part(folder, suffix)
    if case["illegal"] is not None:
        ILLEGAL[case["illegal"]](folder, suffix)
    return [row for name in sorted(expected) for row in expected[name]]


TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_file=str(demo_base_path() / "tokenizer.json"), eos_token="</s>"
)
REFERENCE = Tokenizer.from_file(str(demo_base_path() / "tokenizer.json"))
ENCODER = Encoder.build(TOKENIZER, bos=False, eos=True)


def whole(source: DataSource) -> Any:
    return token_table(source, load_documents(source), ENCODER)


def stream(source: DataSource) -> Any:
    return streamed_token_table(source, ENCODER, 10**6)


def ids(document: str) -> list[int]:
    encoded = REFERENCE.encode(document, add_special_tokens=False).ids
    return [*encoded, TOKENIZER.eos_token_id]


def check(case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="data-") as made:
        folder = Path(made) / "texts [of] people"
        folder.mkdir()
        expected = make(folder, case)
        before = contents(folder)
        for read in (whole, stream):
            try:
                found = read(DataSource(path=str(folder)))["input_ids"]
            except PostshareError as error:
                said = str(error)
                assert case["illegal"] is not None, f"{read.__name__} refuses: {said}"
                assert "\n" not in said
                assert "; " in said, f"no cure: {said}"
                assert str(folder) in said
                continue
            assert case["illegal"] is None, f"{read.__name__} takes {case['illegal']}"
            assert [*found] == [ids(document) for document in expected]
        assert contents(folder) == before


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables of these folders are of no use to anybody else."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@fuzz(150)
@given(cases())
def test_folders_are_read_whole_or_refused_in_one_line(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.more
@pytest.mark.timeout(1800)
@fuzz(1000)
@given(cases())
def test_further_folders(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.parametrize("suffix", sorted(WRITERS))
@pytest.mark.parametrize("illegal", sorted(ILLEGAL))
def test_each_illegal_part_alone_is_refused(illegal: str, suffix: str) -> None:
    check({**plain(suffix), "illegal": illegal})


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_every_legal_part_together_is_read(suffix: str) -> None:
    check({**plain(suffix), "upper": True, "legal": sorted(LEGAL)})


def plain(suffix: str) -> dict[str, Any]:
    files = {name: DOCUMENTS[i % 3 :] for i, name in enumerate(["alice", *NAMES])}
    return {"suffix": suffix, "upper": False, "files": files, "legal": [], "illegal": None}
