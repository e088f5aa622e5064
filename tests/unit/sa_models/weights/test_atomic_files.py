"""A folder is whole or as it was."""

from pathlib import Path

import pytest

from sa_models.weights.atomic_files import new_folder


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
    final = tmp_path / "deeper" / "model"
    with new_folder(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
    assert files(tmp_path) == {"deeper/model/a": "1"}


def test_a_folder_that_is_there_is_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("0")
    with new_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("1")
    assert files(tmp_path) == {"model/new": "1"}


def test_an_error_leaves_what_was_there_and_nothing_beside(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("0")

    def write() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "new").write_text("1")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert files(tmp_path) == {"model/old": "0"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path):
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "half").write_text("0")
    with new_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("1")
    assert files(tmp_path) == {"model/new": "1"}
