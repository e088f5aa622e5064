"""Which files of a folder are read: against lists that a person would write down."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from sa_models.errors import PostshareError
from train.data.local.files import data_files, find_files, kind, suffix
from train.recipe.sections.inputs import DataSource


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"text": "a"}\n')
    return folder


def read(folder: Path, split: str = "train", **source: Any) -> list[str]:
    files = data_files(DataSource(path=str(folder), split=split, **source))
    return [file.relative_to(folder).as_posix() for file in files]


def said(folder: Path, split: str = "train") -> str:
    files = find_files(DataSource(path=str(folder)), split)
    assert files is not None
    return files.said


@pytest.mark.parametrize(
    "names",
    [
        ["alice.txt", "moby-dick.txt", "the-train-journey.txt", "zebra.txt"],
        ["alice.txt", "moby-dick.txt", "taking-a-test.txt", "zebra.txt"],
        ["alice.txt", "the-train-journey.txt", "taking-a-test.txt"],
        ["alice.txt", "train.txt"],
        ["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"],
        ["a.jsonl", "deep/er/b.jsonl", "deep/train/c.jsonl"],
        ["latest.txt", "evaluate.txt", "contest.txt", "devil.txt", "valley.txt", "trains.txt"],
        ["A.TXT", "b.txt"],
        ["a.jsonl", "b.json", "c.jsonl.gz", "d.JSONL.GZ", "e.json.zst"],
    ],
)
def test_names_mean_nothing(tmp_path: Path, names: list[str]) -> None:
    assert read(fill(tmp_path, *names)) == sorted(names)
    assert said(tmp_path).startswith(f"{len(names)} ")
    with pytest.raises(PostshareError, match=r"has no split 'test'"):
        read(tmp_path, "test")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train.jsonl"], ["test.jsonl"]),
        (
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            ["test-00000-of-00001.jsonl"],
        ),
        (["data/train-00000-of-00001.jsonl"], ["data/test-00000-of-00001.jsonl"]),
        (["train/a.jsonl", "train/deep/b.jsonl"], ["test/a.jsonl"]),
        (["wiki-train.jsonl"], ["wiki-test.jsonl"]),
        (["wiki.train.tokens.txt", "wiki.train.2.txt"], ["wiki.test.tokens.txt"]),
        (["en/train.jsonl", "fr/train.jsonl"], ["en/test.jsonl", "fr/test.jsonl"]),
        (["c4-train.00000-of-00002.json.gz"], ["c4-test.00000-of-00001.json.gz"]),
        (["Train.jsonl"], ["Test.jsonl"]),
        (["my_train_set.jsonl"], ["small_test.jsonl"]),  # every file has such a word
    ],
)
def test_names_that_leave_no_doubt_are_splits(
    tmp_path: Path, train: list[str], test: list[str]
) -> None:
    fill(tmp_path, *train, *test)
    assert read(tmp_path) == sorted(train)
    assert read(tmp_path, "test") == read(tmp_path, "evaluation") == sorted(test)
    assert read(tmp_path, "train[:50%]+test") == sorted([*train, *test])
    assert f"left out, split test: {sorted(test)[0]}" in said(tmp_path)
    with pytest.raises(PostshareError, match=r"no split 'dev'; set split to one of test, train"):
        read(tmp_path, "dev")


def test_splits_are_called_by_all_their_names(tmp_path: Path) -> None:
    fill(tmp_path, "train_sft.jsonl", "test_sft.jsonl", "train_gen.jsonl", "val.jsonl")
    assert read(tmp_path, "train") == ["train_gen.jsonl", "train_sft.jsonl"]
    assert read(tmp_path, "train_sft") == ["train_sft.jsonl"]
    for name in ("validation", "val", "dev"):
        assert read(tmp_path, name) == ["val.jsonl"]


def test_files_of_no_split_are_left_out_and_said(tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "test.jsonl", "extra.jsonl", "cover.png")
    assert read(tmp_path) == ["train.jsonl"]
    assert said(tmp_path) == (
        "1 .jsonl file read; left out, no data: cover.png; left out, split test: test.jsonl; "
        "left out, of no split: extra.jsonl"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test.jsonl"], r"no split 'train'; set split to one of test"),
        (["test.jsonl", "a.jsonl"], r"no split 'train', beside files of none \(a\.jsonl\); set"),
        (["train.jsonl", "a.jsonl", "my-val.jsonl"], r"held-out text \(my-val\.jsonl\); put each"),
        (["a.jsonl", "b.txt"], r"kinds, 1 \.jsonl \(a\.jsonl\) and 1 \.txt \(b\.txt\); keep"),
        (["a.parquet", "b.txt"], r"several kinds"),
        ([], r"holds no \.jsonl.*correct the path"),
        (["a.csv", "b.parquet.gz"], r"holds no \.jsonl.*\(but a\.csv, b\.parquet\.gz\)"),
    ],
)
def test_what_is_in_doubt_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(PostshareError, match=message) as raised:
        read(fill(tmp_path, *names))
    assert "\n" not in str(raised.value)


def test_a_name_for_held_out_text_is_said(tmp_path: Path) -> None:
    fill(tmp_path, "alice.txt", "taking-a-test.txt")
    assert said(tmp_path) == (
        "2 .txt files read; names mean nothing, taking-a-test.txt is read like the others"
    )


def test_empty_files_and_others_are_said(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{n}.csv" for n in range(5)), "a.jsonl", "b.jsonl")
    (tmp_path / "c.jsonl").touch()
    assert read(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert said(tmp_path) == (
        "2 .jsonl files read; left out, no data: 0.csv, 1.csv, 2.csv and 2 more; left out, empty: "
        "c.jsonl"
    )
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(PostshareError, match=r"is empty: so are all its files \(a\.jsonl, b\.jso"):
        read(tmp_path)


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", ".b.jsonl", ".cache/c.jsonl", ".git/d.jsonl", "e/.f/g.jsonl")
    assert read(tmp_path) == ["a.jsonl"]
    assert said(tmp_path) == "1 .jsonl file read"
    assert read(tmp_path / ".cache") == ["c.jsonl"]  # asked for by name


def test_links_are_followed_once(tmp_path: Path) -> None:
    """As in a snapshot of the hub's cache, whose files are links to blobs."""
    fill(tmp_path, "blobs/0", "other/b.jsonl")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to("../blobs/0")
    (folder / "more").symlink_to("../other")
    (folder / "circle").symlink_to(".")
    assert read(folder) == ["a.jsonl", "more/b.jsonl"]
    (folder / "gone.jsonl").symlink_to("../blobs/1")
    with pytest.raises(
        PostshareError, match=r"gone\.jsonl is a link to \.\./blobs/1 that does not"
    ):
        read(folder)
    with pytest.raises(PostshareError, match=r"gone\.jsonl is a link to"):
        data_files(DataSource(path=str(folder / "gone.jsonl")))


@pytest.mark.parametrize("name", ["[a-z]", "what?", "*", "[bold]x[/bold]", "a{b,c}", "x::y", "~x"])
def test_characters_are_characters(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / name, f"{name}.jsonl", "b.jsonl")
    assert read(folder) == sorted([f"{name}.jsonl", "b.jsonl"])
    source = DataSource(path=str(folder / f"{name}.jsonl"))
    assert data_files(source) == [folder / f"{name}.jsonl"]


# --- what `datasets` writes -----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    table.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": table, "dev": table}).save_to_disk(str(tmp_path / "both"))
    return tmp_path


def test_a_saved_data_set_says_which_files_are_its_own(saved: Path) -> None:
    shards = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert read(saved / "one") == shards
    fill(saved / "one", "cache-0123456789abcdef.arrow", "data-00002-of-00003.arrow", "notes.txt")
    assert read(saved / "one") == shards
    assert "no part of the data set: cache-0123456789abcdef.arrow, data-00002" in said(
        saved / "one"
    )
    (saved / "one" / shards[1]).unlink()
    with pytest.raises(PostshareError, match=r"data-00001-of-00002\.arrow is missing, which state"):
        read(saved / "one")


def test_splits_of_a_saved_data_set(saved: Path) -> None:
    assert read(saved / "both") == ["train/data-00000-of-00001.arrow"]
    assert read(saved / "both", "dev") == ["dev/data-00000-of-00001.arrow"]
    with pytest.raises(PostshareError, match=r"no split 'test'; set split to one of train, dev"):
        read(saved / "both", "test")
    with pytest.raises(PostshareError, match=r"one has no split 'test'.*remove split"):
        read(saved / "one", "test")


def test_caches_in_a_folder_of_tables_are_no_data(saved: Path) -> None:
    """A folder above several saved data sets, and one of the library's own cache."""
    fill(saved / "one", "cache-0123456789abcdef.arrow")
    folder = saved / "above"
    folder.mkdir()
    (saved / "one").rename(folder / "one")
    (saved / "both" / "dev").rename(folder / "two")
    fill(folder, "cache-fedcba9876543210_00000_of_00002.arrow", "dataset_info.json")
    assert read(folder) == [
        "one/data-00000-of-00002.arrow",
        "one/data-00001-of-00002.arrow",
        "two/data-00000-of-00001.arrow",
    ]


# --- cards ----------------------------------------------------------------------------------------


def card(folder: Path, *configs: dict[str, Any]) -> Path:
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\nx: 1\n---\n# A card\n")
    return folder


def test_a_card_says_what_is_read(tmp_path: Path) -> None:
    names = ["en/a.jsonl", "en/b.jsonl", "fr/x.jsonl", "fr/held/y.jsonl", "z.jsonl", "[q].jsonl"]
    fill(tmp_path, *names)
    english = {"config_name": "en", "data_files": "en/*.jsonl"}
    french = {
        "config_name": "fr",
        "data_files": [
            {"split": "train", "path": ["fr/*.jsonl", "[q].jsonl"]},
            {"split": "dev", "path": "fr/**/y.jsonl"},
        ],
    }
    card(tmp_path, english, french)
    assert read(tmp_path, subset="en") == names[:2]
    assert read(tmp_path, subset="fr") == ["[q].jsonl", "fr/x.jsonl"]
    assert read(tmp_path, "dev", subset="fr") == ["fr/held/y.jsonl"]
    for faulty, message in (
        ({}, r"has several subsets; set subset to one of en, fr"),
        ({"subset": "de"}, r"has no subset 'de'; set subset to one of en, fr"),
        ({"subset": "fr", "split": "test"}, r"no split 'test'; set split to one of train, dev"),
    ):
        with pytest.raises(PostshareError, match=message):
            read(tmp_path, **faulty)
    card(tmp_path, english | {"default": True}, french)
    assert read(tmp_path) == names[:2]
    card(tmp_path, {"config_name": "default", "data_files": "gone*.jsonl"})
    with pytest.raises(
        PostshareError, match=r"no file 'gone\*\.jsonl', which its README\.md names"
    ):
        read(tmp_path)


def test_a_card_that_names_no_files_leaves_them_to_their_names(tmp_path: Path) -> None:
    fill(tmp_path, "en/train.jsonl", "en/test.jsonl", "fr/train.jsonl")
    card(tmp_path, {"config_name": "en", "data_dir": "en"})
    assert read(tmp_path) == ["en/train.jsonl"]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nconfigs: none\n")
    assert read(tmp_path) == ["en/train.jsonl", "fr/train.jsonl"]
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(PostshareError, match=r"configs of .*README\.md cannot be read"):
        read(tmp_path)


def test_the_library_agrees_on_cards_and_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = fill(
        tmp_path / "x", "data/a-1.jsonl", "data/deep/a-2.jsonl", "data/b.jsonl", "c.jsonl"
    )
    entry = {
        "config_name": "default",
        "data_files": [
            {"split": "train", "path": "data/**/a-*"},
            {"split": "dev", "path": ["*.jsonl"]},
        ],
    }
    card(folder, entry)
    theirs = datasets.load_dataset_builder(str(folder)).config.data_files
    for split in ("train", "dev"):
        assert read(folder, split) == sorted(os.path.relpath(f, folder) for f in theirs[split])


# --- requests that a source cannot meet -----------------------------------------------------------


def test_what_is_asked_of_a_file_in_vain_is_said(tmp_path: Path) -> None:
    file = fill(tmp_path, "a.jsonl") / "a.jsonl"
    files = find_files(DataSource(path=str(file), split="test", subset="en"), "test")
    assert files is not None
    assert files.paths == (file,)
    assert files.said == (
        "1 .jsonl file read; split test and subset en ignored, as a file is read whole"
    )
    plain = find_files(DataSource(path=str(file)), "train")
    assert plain is not None
    assert not plain.notable
    with pytest.raises(PostshareError, match=r"no subsets \(no README\.md that lists them\)"):
        read(tmp_path, subset="en")


def test_hub_names_and_missing_files() -> None:
    assert data_files(DataSource(path="owner/name")) == []
    assert data_files(DataSource(path="stdlib")) == []
    for name in ("absent.jsonl", "absent.JSONL", "a/absent.jsonl.gz", "a/b.zst", "a/b/c"):
        with pytest.raises(PostshareError, match="does not exist"):
            data_files(DataSource(path=name))


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(PostshareError, match="neither a file nor a folder"):
        data_files(DataSource(path=str(tmp_path / "pipe.jsonl")))
    fill(tmp_path, "a.jsonl")
    assert read(tmp_path) == ["a.jsonl"]
    assert said(tmp_path) == "1 .jsonl file read; left out, no file: pipe.jsonl"


@pytest.mark.parametrize(
    ("name", "end", "how"),
    [
        ("a.jsonl", ".jsonl", "json"),
        ("a.b.TXT", ".txt", "text"),
        ("a.Json.GZ", ".json.gz", "json"),
        ("a.parquet.zst", ".parquet.zst", None),
        ("gz", "", None),
        (".jsonl", "", None),
    ],
)
def test_suffixes(name: str, end: str, how: str | None) -> None:
    assert suffix(Path(name)) == end
    assert kind(Path(name)) == how
