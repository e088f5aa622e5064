"""Local data of lm-eval's tasks: every layout that docs/evaluation.md names."""

from __future__ import annotations

import bz2
import json
import re
import zipfile
from pathlib import Path

import pytest

from sa_models.errors import PostshareError
from train.commands.evaluate.lm_eval_data import LocalTask, data_hash, find_local
from train.commands.evaluate.lm_eval_tasks import _with_local_data


def test_splits_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "rte"
    folder.mkdir()
    header = "sentence1\tsentence2\tlabel\tidx\n"
    (folder / "dev.tsv").write_text(header + 'He said "no.\tHe spoke.\t0\t0\nA.\tB.\t1\t1\n')
    rows = [{"question": "1 + 1?", "answer": "#### 2"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_local(tmp_path, "rte")
    assert task is not None
    assert task.rows("validation") == [
        {"sentence1": 'He said "no.', "sentence2": "He spoke.", "label": 0, "idx": 0},
        {"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 1},
    ]
    assert task.rows("train") == rows
    assert task.rows("test") is None
    assert find_local(tmp_path, "sst2") is None
    assert find_local(None, "rte") is None


def test_mmlu_in_a_zip_and_unpacked(tmp_path: Path) -> None:
    csv = '"What is 1, or one?","a ""b""",b,c,d,C\nx?,1,2,3,4,A\n'
    expected = [
        {"question": "What is 1, or one?", "choices": ['a "b"', "b", "c", "d"], "answer": 2},
        {"question": "x?", "choices": ["1", "2", "3", "4"], "answer": 0},
    ]
    name = "data/test/anatomy_test.csv"
    packed, unpacked = tmp_path / "a" / "mmlu", tmp_path / "b" / "mmlu"
    packed.mkdir(parents=True)
    with zipfile.ZipFile(packed / "mmlu.zip", "w") as archive:
        archive.writestr(name, csv)
    (unpacked / name).parent.mkdir(parents=True)
    (unpacked / name).write_text(csv)
    for data in (packed.parent, unpacked.parent):
        task = find_local(data, "mmlu_anatomy", "mmlu", "anatomy")
        assert task == LocalTask(data / "mmlu", "anatomy")
        assert task.rows("test") == expected
    with pytest.raises(PostshareError, match=r"the dev data cannot be read .*anatomy_dev\.csv"):
        LocalTask(packed, "anatomy").rows("dev")


def test_hellaswag_as_llama_cpp_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "hellaswag"
    folder.mkdir()
    endings = ["is one.", "is two.", "is three.", "is four."]
    lines = ["Roof: A man sits on a roof. he", "3", *endings, "How to: Do it. Well.", "0", *endings]
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    first, second = LocalTask(folder).rows("validation") or []
    assert first == {
        "activity_label": "Roof",
        "ctx_a": "A man sits on a roof.",
        "ctx_b": "he",
        "endings": endings,
        "label": 3,
    }
    assert (second["ctx_a"], second["ctx_b"], second["label"]) == ("Do it. Well.", "", 0)
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(b"one line"))
    with pytest.raises(PostshareError, match="1 lines, six for each question"):
        LocalTask(folder).rows("validation")


def test_the_hash_is_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    file = tmp_path / "sst2" / "validation.jsonl"
    file.write_text("{}\n")
    first = data_hash(tmp_path, "sst2")
    assert list(first) == ["validation.jsonl"]
    file.write_text("{} \n")
    assert data_hash(tmp_path, "sst2") != first
    assert data_hash(tmp_path, "rte") == data_hash(None, "rte") == {}


def test_real_files(shared: Path) -> None:
    data = shared / "eval"
    mmlu = LocalTask(data / "mmlu", "abstract_algebra").rows("test") or []
    hellaswag = LocalTask(data / "hellaswag").rows("validation") or []
    rte = LocalTask(data / "rte").rows("validation") or []
    assert (len(mmlu), len(hellaswag), len(rte)) == (100, 10042, 277)
    assert {row["label"] for row in hellaswag} == {0, 1, 2, 3}
    assert all(len(row["endings"]) == 4 and row["ctx_a"] for row in hellaswag)
    assert [
        len(LocalTask(data / n).rows(s) or [])
        for n, s in (("sst2", "validation"), ("gsm8k", "test"))
    ] == [872, 1319]


def test_hellaswag_without_its_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "hellaswag").mkdir()
    found = find_local(tmp_path, "hellaswag")
    assert found is not None
    config = {"task": "hellaswag", "training_split": "train", "validation_split": "validation"}
    said = re.escape(
        f"{tmp_path / 'hellaswag'} has no validation data; put validation.jsonl there "
        "(docs/evaluation.md)"
    )
    with pytest.raises(PostshareError, match=f"^{said}$"):
        _with_local_data(config, found)
