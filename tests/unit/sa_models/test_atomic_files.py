"""A file or a folder is whole or as it was."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sa_models import atomic_files
from sa_models.atomic_files import beside, new_file, new_folder, write_json, write_text


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


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    write_text(tmp_path / "note", "old")
    with new_file(tmp_path / "note") as path:
        path.write_text("half")
        assert (tmp_path / "note").read_text() == "old"
        path.write_text("new")
    assert files(tmp_path) == {"note": "new"}
    write_json(tmp_path / "value", {"a": [1, "\u00e9"]})
    assert (tmp_path / "value").read_bytes() == b'{\n "a": [\n  1,\n  "\\u00e9"\n ]\n}\n'


def test_an_error_leaves_the_file_that_was_there_and_nothing_beside(tmp_path, monkeypatch):
    write_text(tmp_path / "note", "old")

    def full(path: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(atomic_files, "flush", full)
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "note", "new")
    assert files(tmp_path) == {"note": "old"}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "note", "1")
        with new_folder(tmp_path / "model") as folder:
            (folder / "a").write_text("1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "note").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "model" / "a").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~mask


def write_file(final: Path) -> None:
    write_text(final, "1")


def write_folder(final: Path) -> None:
    with new_folder(final) as folder:
        (folder / "a").write_text("1")


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    write: Callable[[Path], None], tmp_path, monkeypatch
):
    """Else a machine that loses its power has the name of a file that is empty."""
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def named(give: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def naming(source: Path, target: Path) -> None:
            done.append(f"name {Path(target).name}")
            give(source, target)

        return naming

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named(replace))
    monkeypatch.setattr(os, "rename", named(rename))
    write(tmp_path / "x")
    content = ["flush a", "flush x.tmp"] if write is write_folder else ["flush x.tmp"]
    assert done == [*content, "name x", f"flush {tmp_path.name}"]


KILLED = """
import os, sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("atomic_files", sys.argv[1])
made = module_from_spec(spec)
spec.loader.exec_module(made)
final = Path(sys.argv[2])
with made.new_file(final / "note") as path:
    path.write_text("half")
    with made.new_folder(final / "model") as folder:
        (folder / "half").write_text("0")
        os._exit(9)
"""


def test_what_a_killed_process_left_goes_with_the_next(tmp_path):
    """It lies where start-up checks expect it, and is not taken over."""
    write_text(tmp_path / "note", "old")
    command = [sys.executable, "-c", KILLED, atomic_files.__file__, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 9
    left = {"note": "old", "note.tmp": "half", "model.tmp/half": "0"}
    assert files(tmp_path) == left
    assert {beside(tmp_path / name).name for name in ("note", "model")} == {"note.tmp", "model.tmp"}
    write_text(tmp_path / "note", "new")
    write_folder(tmp_path / "model")
    assert files(tmp_path) == {"note": "new", "model/a": "1"}
