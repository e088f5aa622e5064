"""A `train` of the user's own, beside which ours is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.common.shadowing import hiding

REPOSITORY = Path(__file__).resolve().parents[4]


def make(folder: Path, name: str) -> Path:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("print('mine')\n")
    return file


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], None),
        (["train.py"], "train.py"),
        (["train/__init__.py", "train/__main__.py"], "train"),
        (["train/__init__.py", "train/__main__.py", "train.py"], "train"),
        (["train/data.jsonl"], None),
        (["train/__main__.py"], None),  # ours is installed, and comes before a bare folder
    ],
)
def test_it_is_what_python_runs(tmp_path: Path, files: list[str], found: str | None) -> None:
    for name in files:
        make(tmp_path, name)
    assert hiding(tmp_path) == (None if found is None else tmp_path / found)
    done = subprocess.run(
        [sys.executable, "-m", "train", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("mine" in done.stdout) == (found is not None)
    assert ("KEY=VALUE" in done.stdout) == (found is None)


def test_the_checkout_hides_nothing(tmp_path: Path) -> None:
    assert hiding(REPOSITORY) is None
    (tmp_path / "train").symlink_to(REPOSITORY / "train")
    assert hiding(tmp_path) is None
