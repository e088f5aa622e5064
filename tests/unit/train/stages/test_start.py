"""The start of a run: what is said, refused and locked before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sa_models.errors import PostshareError
from tests.support import REPOSITORY
from tests.support.demo_runs import recipe
from train.stages.lock import LOCK_FILE, lock, unlock
from train.stages.start import begin

LOCKING = """
from pathlib import Path
from train.stages.lock import announce, lock
lock(Path({folder!r}))
announce(Path({folder!r}))
print("held", flush=True)
input()
"""


def test_a_second_start_in_a_folder_is_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    made.folder.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCKING.format(folder=str(made.folder))],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(PostshareError, match=f"in use by process {holder.pid} on"):
        begin(made)
    assert [file.name for file in made.folder.iterdir()] == [LOCK_FILE]
    holder.communicate("\n")
    with begin(made):
        assert (made.folder / "recipe.yaml").is_file()


def test_the_folder_is_free_after_the_command(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    for _ in range(2):
        with begin(made):
            assert held_by_this_process(made.folder)
        assert not held_by_this_process(made.folder)
    with pytest.raises(PostshareError, match="no finished training"), begin(made, requires=refuse):
        pass
    assert not held_by_this_process(made.folder)


def refuse(_: object) -> None:
    raise PostshareError("no finished training")


def held_by_this_process(folder: Path) -> bool:
    code = LOCKING.format(folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, input=b"\n"
    )
    assert done.returncode == 0 or b"is in use by process" in done.stderr
    return done.returncode != 0


def test_a_lock_that_is_held_already_is_kept(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    made.folder.mkdir()
    lock(made.folder)
    with begin(made):
        pass
    assert held_by_this_process(made.folder)
    unlock(made.folder)


def test_a_sequence_longer_than_the_model_is_warned_about(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = str(tmp_path / "text.txt")
    data = {"train": text, "validation": text, "sequence_length": 513}
    with begin(recipe(tmp_path / "run", data=data)):
        pass
    assert "warning: data.sequence_length 513 exceeds the 512 positions" in capfd.readouterr().err
    data["sequence_length"] = 512
    with begin(recipe(tmp_path / "other", data=data)):
        pass
    assert "exceeds" not in capfd.readouterr().err
