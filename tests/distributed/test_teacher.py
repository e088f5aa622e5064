"""A sharded teacher says what a whole one says, and its cached answers are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.teacher_worker import blocks, recipe
from tests.support.launcher import run
from tests.support.training import teacher_folder
from train.distributed.engines.start import start
from train.training.objective import Lessons

WORKER = Path(__file__).with_name("teacher_worker.py")

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("config", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_answers_of_a_sharded_teacher(config: str, tmp_path: Path) -> None:
    teacher = teacher_folder("both")
    output = run(config, WORKER, tmp_path / "sharded", teacher, processes=2)
    assert output.count("all answered") == 2
    whole = recipe(tmp_path / "whole", teacher)
    engine = start(whole)
    expected = Lessons(whole, engine, blocks(), 9).blocks
    there = recipe(tmp_path / "sharded", teacher)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sharded/teacher").iterdir()}
    assert len(before) == 2 * 3 + 1
    found = Lessons(there, engine, blocks(), 9).blocks  # another launch takes them as they are
    for index in range(len(expected)):
        one, other = found[index], expected[index]
        assert one.keys() == other.keys()
        for key in ("teacher_log_probabilities", "teacher_rest"):
            assert float((one[key] - other[key]).abs().max()) <= 5e-6
    chunks = [path for path in before if path.name != "teacher.json"]
    assert all(path.stat().st_mtime_ns == before[path] for path in chunks)
