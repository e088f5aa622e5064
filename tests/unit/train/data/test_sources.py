"""Sources become tables of the cache: the right ones, and whose fault it is when not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub.utils import httpx

from sa_models.errors import PostshareError
from train.data import cache, sources
from train.data.sources import load_documents, load_records, stream_documents, without_text
from train.recipe.sections.inputs import DataSource

pytestmark = pytest.mark.usefixtures("own_cache")


def write(path: Path, *texts: str | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(path: Path, **source: Any) -> list[str | None]:
    """Both ways of reading give the same, or the same error."""
    asked = DataSource(path=str(path), **source)
    found: list[Any] = []
    for way in (lambda: load_documents(asked)["text"], lambda: stream_documents(asked)):
        try:
            found.append(list(way()))
        except PostshareError as error:
            found.append(str(error))
    assert found[0] == found[1]
    if isinstance(found[0], str):
        raise PostshareError(found[0])
    return found[0]


# --- the cache holds what the files do ------------------------------------------------------------


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """Also where its size, and by `touch -r` or rsync its date, are those of before."""
    path = write(tmp_path / "a.jsonl", "aa")
    before = path.stat()
    assert read(path) == ["aa"]
    with path.open("r+") as file:
        file.write(json.dumps({"text": "bb"}))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert read(path) == ["bb"]
    other = write(tmp_path / "b.jsonl", "cc")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert read(path) == ["cc"]


def test_a_changed_folder_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "b.jsonl", "b")
    assert read(folder) == ["b"]
    write(folder / "deep" / "c.jsonl", "c")
    assert read(folder) == ["b", "c"]
    (folder / "deep").rename(folder / "a")
    assert read(folder) == ["c", "b"]
    (folder / "b.jsonl").unlink()
    assert read(folder) == ["c"]


def test_a_second_start_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = DataSource(path=str(write(tmp_path / "a.jsonl", "a")))
    first = load_documents(asked)
    monkeypatch.setattr(sources.rows, "texts", None)
    again = load_documents(asked)
    assert again["text"][:] == ["a"]
    assert again._fingerprint == first._fingerprint  # what is made of it is found again as well


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", "a")
    reading = sources.rows.texts

    def meddle(*arguments: Any) -> Any:
        yield from reading(*arguments)
        write(path, "a", "b")

    monkeypatch.setattr(sources.rows, "texts", meddle)
    asked = DataSource(path=str(path))
    with pytest.raises(
        PostshareError, match=r"a\.jsonl has changed while it was read; start again"
    ):
        load_documents(asked)
    monkeypatch.undo()


# --- parts ----------------------------------------------------------------------------------------


def test_splits_and_parts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "train.jsonl", *map(str, range(10)))
    write(folder / "test.jsonl", "x", "y")
    assert read(folder) == [str(n) for n in range(10)]
    assert read(folder, split="test+train") == ["x", "y", *map(str, range(10))]

    def part(split: str, path: Path = folder) -> list[str]:
        return load_documents(DataSource(path=str(path), split=split))["text"][:]

    assert part("train[:20%]") == ["0", "1"]
    assert part("train[-1:]+test[:1]") == ["9", "x"]
    assert part("train[3:5]", folder / "train.jsonl") == ["3", "4"]
    with pytest.raises(PostshareError, match=r"split train\[ cannot be read .* write it as train"):
        part("train[")
    with pytest.raises(PostshareError, match=r"split train\[:1\] is a part, and a stream is read"):
        next(stream_documents(DataSource(path=str(folder), split="train[:1]")))


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    asked = DataSource(path=str(write(tmp_path / "a.jsonl", "a", None, "", "b")))
    assert without_text(asked, load_documents(asked)) == (
        "2 of 4 rows have no 'text' and are left out"
    )
    some = asked.model_copy(update={"split": "train[2:]"})
    assert without_text(some, load_documents(some)).startswith("1 of 2 rows")
    none = DataSource(path=str(write(tmp_path / "b.jsonl", "a")))
    assert without_text(none, load_documents(none)) == ""


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(PostshareError, match=rf"{name} \(train\) is empty; choose another source"):
        read(tmp_path / name)
    with pytest.raises(PostshareError, match="is empty"):
        load_records(DataSource(path=str(tmp_path / name)), ["messages"])


# --- cards ----------------------------------------------------------------------------------------


def test_a_card_may_ask_for_the_library(tmp_path: Path) -> None:
    """Kinds and options that are not read here."""
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "a.csv").write_text("text;n\nab;1\ncd;2\n")
    config = '[{"config_name": "default", "data_files": "a.csv", "sep": ";"}]'
    (folder / "README.md").write_text(f"---\nconfigs: {config}\n---\n")
    assert read(folder) == ["ab", "cd"]
    with pytest.raises(PostshareError, match=r"card has no column 'n\.'; set text to one of: text"):
        load_documents(DataSource(path=str(folder), text="n."))
    with pytest.raises(PostshareError, match=r"'n' does not hold text but int64; set text to one"):
        load_documents(DataSource(path=str(folder), text="n"))
    (folder / "a.csv").write_text("text;n\na;1\nb;1;2;3\n")
    with pytest.raises(
        PostshareError, match=r"as its README\.md asks \(.*2 fields in line 3, saw 4"
    ):
        load_documents(DataSource(path=str(folder)))


# --- whose fault it is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EROFS, "Read-only file system"),
        (errno.ENOSPC, "No space left on device"),
        (errno.EDQUOT, "Disk quota exceeded"),
        (errno.EACCES, "Permission denied"),
    ],
)
@pytest.mark.parametrize("step", ["reading", "tokens", "hub"])
def test_trouble_of_the_cache_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str, step: str
) -> None:
    path = str(write(tmp_path / "a.jsonl", "a"))

    def fail(*_: Any, **__: Any) -> None:
        try:
            raise OSError(number, os.strerror(number), "somewhere")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    with pytest.raises(PostshareError) as raised:  # noqa: PT012
        if step == "hub":
            monkeypatch.setattr(datasets, "load_dataset", fail)
            load_documents(DataSource(path="a/b"))
        elif step == "tokens":
            with cache.writing(path):
                fail()
        else:
            monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write", fail)
            load_documents(DataSource(path=path))
    assert str(raised.value) == (
        f"the cache of data, {datasets.config.HF_DATASETS_CACHE}, cannot be written ({reason}); "
        "make room there and allow writing, or set HF_HOME (or HF_DATASETS_CACHE) to another folder"
    )


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(
        PostshareError, match=r"the cache of data, .*/file/cache, cannot be used for"
    ):
        load_documents(DataSource(path=str(write(tmp_path / "a.jsonl", "a"))))


def test_a_damaged_table_is_the_caches(tmp_path: Path) -> None:
    asked = DataSource(path=str(write(tmp_path / "a.jsonl", "a" * 999)))
    (file,) = load_documents(asked).cache_files
    Path(file["filename"]).write_bytes(Path(file["filename"]).read_bytes()[:100])
    with pytest.raises(PostshareError, match=r"cannot be used for .*a\.jsonl \(.*; remove what it"):
        load_documents(asked)


def test_a_process_that_is_killed() -> None:
    with (
        pytest.raises(PostshareError, match=r"tokens of x was killed.*set data\.processes below 4"),
        cache.writing("x", processes=4),
    ):
        raise RuntimeError("One of the subprocesses has abruptly died during map operation.")
    with pytest.raises(RuntimeError, match="a fault of ours"), cache.writing("x"):
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize(
    ("error", "subset", "message"),
    [
        (
            ValueError(
                "Config name is missing.\nPlease pick one among the available configs: "
                "['en', 'fr']\nExample of usage:\n\t`load_dataset('a/b', 'en')`"
            ),
            None,
            "dataset a/b has several subsets; set subset to one of en, fr",
        ),
        (
            ValueError("BuilderConfig 'de' not found. Available: ['en', 'fr']"),
            "de",
            "dataset a/b has no subset de; set subset to one of en, fr",
        ),
        (
            ValueError(
                "Couldn't find cache for a/b for config 'de'\nAvailable configs in the cache: "
                "['en', 'fr']"
            ),
            "de",
            "of dataset a/b the cache has other subsets; set subset to one of en, fr, or run "
            "`postshare prepare RECIPE` on a machine with network, with the same HF_HOME",
        ),
        (
            httpx.ConnectError("All connection attempts failed"),
            None,
            "dataset a/b is not in the cache and the hub cannot be reached; run `postshare "
            "prepare RECIPE` on a machine with network, with the same HF_HOME",
        ),
        (
            NotImplementedError("Loading a dataset with an unknown\nfeature"),
            None,
            "dataset a/b cannot be loaded (Loading a dataset with an unknown feature); correct "
            "this data source",
        ),
    ],
)
def test_what_the_library_says_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, subset: str | None, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(PostshareError) as raised:
        load_documents(DataSource(path="a/b", subset=subset))
    assert str(raised.value) == message
