"""The lock of a run folder, held and taken by real processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sa_models.errors import PostshareError
from tests.support import REPOSITORY
from train.stages import lock as module
from train.stages.lock import LOCK_FILE, announce, lock, require_free, unlock

HOLDING = """
import sys, time
from pathlib import Path
from train.stages.lock import announce, lock
sys.argv = ["/bin/postshare", "run", "a recipe"]
lock(Path({folder!r}))
announce(Path({folder!r}))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING.format(folder=str(tmp_path))],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_by_whom(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    for ask in (lock, require_free, lock):
        with pytest.raises(PostshareError) as caught:
            ask(tmp_path)
        said = str(caught.value)
        assert said.startswith(f"{tmp_path} is in use by process {holder.pid} on {os.uname()[1]}")
        assert "(postshare run 'a recipe')" in said
        assert "\n" not in said


def test_the_lock_of_a_dead_process_is_taken_over(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    require_free(tmp_path)
    lock(tmp_path)
    announce(tmp_path)
    assert f'"process": {os.getpid()}' in (tmp_path / LOCK_FILE).read_bytes().decode()
    unlock(tmp_path)


def refused_to_another(folder: Path) -> bool:
    code = (
        f"from pathlib import Path; from train.stages.lock import lock; lock(Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert (b"is in use by another process; " in done.stderr) == bool(done.returncode)
    return bool(done.returncode)


def test_a_process_may_take_it_several_times(tmp_path: Path) -> None:
    lock(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    lock(tmp_path / "link")
    require_free(tmp_path)
    unlock(tmp_path)
    assert refused_to_another(tmp_path)
    unlock(tmp_path)
    assert not refused_to_another(tmp_path)
    assert (tmp_path / LOCK_FILE).is_file()


def test_a_worker_that_is_forked_does_not_keep_it(tmp_path: Path) -> None:
    lock(tmp_path)
    worker = os.fork()
    if worker == 0:
        signal.pause()
        os._exit(0)
    try:
        unlock(tmp_path)
        assert not refused_to_another(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "lockf", refuse)
    lock(tmp_path)
    require_free(tmp_path)
    unlock(tmp_path)
    said = capsys.readouterr().err
    assert said.startswith(f"note: the file system of {tmp_path} has no locks (No locks available)")
    assert said.count("\n") == 1


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """As another user's is; root may write that, so it is a folder here."""
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(PostshareError, match=r"\.lock cannot be written \(Is a directory\); set"):
        lock(tmp_path)
