"""Disks that are full or read-only, checkpoints that are damaged: never a silent fresh start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sa_models.errors import PostshareError
from tests.support import tiny
from tests.support.interruption import KilledError, at_step
from train.recipe.recipe import Recipe
from train.training.checkpoint import steps_in
from train.training.loop import train

STEPS = 14


def recipe(folder: Path) -> Recipe:
    return tiny.recipe(folder, steps=STEPS, checkpoint_every=2, keep_checkpoints=3)


def run(folder: Path) -> Path:
    """Train to the end; the weights file."""
    asked = recipe(folder)
    return train(tiny.job(asked), asked).weights / "model.safetensors"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was broken off before its 12th step."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with at_step(12), pytest.raises(KilledError):
        run(folder)
    return folder


def copied(interrupted: Path, folder: Path) -> list[int]:
    """The steps of its checkpoints, of which there are several."""
    shutil.copytree(interrupted, folder)
    steps = steps_in(folder / "checkpoints")
    assert len(steps) >= 2
    assert steps[-1] >= 8
    return steps


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("undisturbed") / "run")


def assert_bitwise(mine: Path, theirs: Path) -> None:
    ours, wanted = load_file(mine), load_file(theirs)
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert ours[name].equal(value), name


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path) -> None:
    file = largest(folder)
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def delete_shard(folder: Path) -> None:
    largest(folder).unlink()


def keep_only_the_manifest(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"version": 2, "fil')


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [
    truncate, flip_a_bit, delete_shard, keep_only_the_manifest, lose_the_manifest,
    garble_the_manifest, empty,
]  # fmt: skip
Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_the_damaged_one_is_used(
    damage: Damage,
    tmp_path: Path,
    interrupted: Path,
    expected: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    *_, before, newest = copied(interrupted, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / f"step-{newest:06d}")
    weights = run(tmp_path / "run")
    said = capsys.readouterr().err
    assert f"step-{newest:06d}: " in said
    assert "ignored" in said
    assert f"resuming from {tmp_path / 'run' / 'checkpoints'}/step-{before:06d}" in said
    assert_bitwise(weights, expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_good_one_it_does_not_start_over(
    damage: Damage, tmp_path: Path, interrupted: Path
) -> None:
    steps = copied(interrupted, tmp_path / "run")
    for step in steps:
        damage(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(PostshareError, match=r"none can be used .*delete the folder to start over"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Leave so many bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * (shutil.disk_usage(disk).free - leave))
    return ballast


@pytest.mark.parametrize("leave", [0, 20_000, 150_000])
def test_a_full_disk_is_an_error_that_says_so_and_costs_nothing(
    leave: int, disk: Path, interrupted: Path, expected: Path
) -> None:
    steps = copied(interrupted, disk / "run")
    for unfinished in (disk / "run" / "checkpoints").glob("*.tmp"):
        shutil.rmtree(unfinished)  # else the start does, and there is room again
    ballast = fill(disk, leave)
    with pytest.raises(PostshareError, match=r"(?i)no space left.*(disk space|with room)"):
        run(disk / "run")
    kept = steps_in(disk / "run" / "checkpoints")
    assert kept[-1] >= steps[-1], "what was there is there"
    ballast.unlink()
    assert_bitwise(run(disk / "run"), expected)


def test_a_read_only_folder(disk: Path, interrupted: Path, expected: Path) -> None:
    copied(interrupted, disk / "run")
    remount = ["mount", "-o"]
    subprocess.run([*remount, "remount,ro", disk], check=True)
    try:
        with pytest.raises(PostshareError, match=r"cannot be written.*Read-only file system"):
            run(disk / "run")
    finally:
        subprocess.run([*remount, "remount,rw", disk], check=True)
    assert_bitwise(run(disk / "run"), expected)
    assert json.loads((disk / "run" / "result.json").read_text())["steps"] == STEPS
