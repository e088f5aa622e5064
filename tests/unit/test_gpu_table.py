"""`make test-gpu`: rows that fail, hang or die, a start that goes on, and all rows on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import run
from tests.gpu.rows import Absent, Machine, Row, within
from tests.support import REPOSITORY

CHILD = """
import json, sys, time
folder, answers = sys.argv[1:]
pending = json.load(open(folder + "/pending.json"))
out = open(answers, "a")

def tell(**line):
    print(json.dumps(line), file=out, flush=True)

for name in pending:
    tell(begin=name)
    if name == "dies":
        sys.exit("the driver is gone")
    if name == "hangs":
        time.sleep(60)
    if name == "fails":
        tell(state="failed", seconds=0.0, reason="AssertionError: 2 is above 1")
        sys.exit(0)
    tell(state="ok", seconds=0.5, values={"difference": 1e-7, "tolerance": 1e-5})
"""


def table(folder: Path, *names: str, seconds: float = 60.0, limit: float = 20.0) -> dict[str, Any]:
    """What a parent makes of rows of these names, and leaves in its file."""
    report = run.Report(folder / "gpu.json", "cpu")
    limits = {name: 1.0 if name == "hangs" else limit for name in names if not report.has(name)}
    run.Parent(report, limits, limit, seconds, [sys.executable, "-c", CHILD]).go()
    return json.loads((folder / "gpu.json").read_text())["rows"]


def test_a_row_that_fails_dies_or_hangs_is_a_row_and_not_an_end(tmp_path: Path) -> None:
    rows = table(tmp_path, "first", "dies", "second", "hangs", "fails", "last")
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "first": "ok", "dies": "failed", "second": "ok", "hangs": "failed", "fails": "failed",
        "last": "ok",
    }  # fmt: skip
    assert rows["dies"]["reason"] == "the process ended with code 1; the driver is gone"
    assert rows["hangs"]["reason"] == "took more than 1 s"
    assert rows["fails"]["reason"] == "AssertionError: 2 is above 1"
    assert rows["first"]["values"] == {"difference": 1e-7, "tolerance": 1e-5}


def test_a_second_start_goes_on_with_what_was_not_run(tmp_path: Path) -> None:
    rows = table(tmp_path, "first", "last", seconds=-1)
    assert {row["state"] for row in rows.values()} == {"not run"}
    assert rows["first"]["reason"] == "out of time"
    rows = table(tmp_path, "first")
    assert [row["state"] for row in rows.values()] == ["ok", "not run"]
    rows["first"]["reason"] = "kept"
    held = json.loads((tmp_path / "gpu.json").read_text())
    (tmp_path / "gpu.json").write_text(json.dumps({**held, "rows": rows}))
    rows = table(tmp_path, "first", "last")
    assert [row["state"] for row in rows.values()] == ["ok", "ok"]
    assert rows["first"]["reason"] == "kept"


def test_results_of_another_machine_are_not_taken_over(tmp_path: Path) -> None:
    table(tmp_path, "first")
    held = json.loads((tmp_path / "gpu.json").read_text())
    held["machine"]["torch"] = "2.0"
    (tmp_path / "gpu.json").write_text(json.dumps(held))
    assert (tmp_path / "gpu").is_dir()
    assert run.Report(tmp_path / "gpu.json", "cpu").rows == {}
    assert not (tmp_path / "gpu").exists()  # nor what rows have written there


def test_what_a_row_needs_and_asserts(tmp_path: Path) -> None:
    machine = Machine("cpu", 0, tmp_path)
    for need, reason in (
        ("gpu", "needs a GPU"),
        ("2 gpus", "needs two GPUs"),
        ("no_such_module", "not installed: no_such_module"),
    ):
        with pytest.raises(Absent, match=reason):
            Row("row", lambda _: {}, 1.0, (need,)).run(machine)
    assert within(1e-6, 1e-5) == {"difference": 1e-6, "tolerance": 1e-5}
    with pytest.raises(AssertionError, match=r"difference 0\.002 is above 0\.001"):
        within(0.002, 1e-3)


def test_names_are_distinct_and_the_important_rows_come_first() -> None:
    names = list(run.ROWS)
    rows = (*run.equality.ROWS, *run.trainings.ROWS, *run.stepping.ROWS, *run.decoding.ROWS)
    assert len(names) == len(rows) + len(run.trainings.SERVED)
    assert names.index("logits stock") < names.index("train plain") < names.index("steps penalty")


@pytest.mark.more
@pytest.mark.timeout(3600)
def test_all_rows_are_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.gpu.run", "--device", "cpu", "--output", str(file)]
    done = subprocess.run(
        [*command, "--minutes", "60"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == list(run.ROWS)
    absent = {name for name, row in rows.items() if row["state"] == "absent"}
    needy = {name for name, row in run.ROWS.items() if {"gpu", "2 gpus"} & {*row.needs}}
    assert needy <= absent
    # The others run, or are refused by a recipe that does not know the key.
    assert {rows[name]["state"] for name in set(rows) - absent - {"vLLM"}} <= {"ok", "refused"}
    for name in ("logits ties", "loss top-k", "train plain", "resume", "steps penalty"):
        assert rows[name]["state"] == "ok", rows[name]
