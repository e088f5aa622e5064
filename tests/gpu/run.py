"""`make test-gpu`: everything that wants a GPU, row by row, as one table and as JSON.

Rows run in a child process, one after the other, each with a time limit; a child that fails, dies
or is late ends, and the next row begins in a new one. The file is written after every row: a second
start on the same machine goes on from there. Nothing is installed, nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from sa_models.atomic_files import write_text
from tests.gpu import decoding, equality, stepping, trainings
from tests.gpu.rows import Absent, Machine, Refused, Row
from tests.support import REPOSITORY
from train.common.versions import versions
from train.estimate.throughput import find_chip

ROWS: dict[str, Row] = {
    row.name: row
    for row in (*equality.ROWS, *trainings.ROWS, *stepping.ROWS, *decoding.ROWS, *trainings.SERVED)
}
"""In order of importance."""
STARTING = 180.0
"""Seconds that a child may take for its imports."""
SLOWER = 10
"""Times the limits on a CPU, which others may be using."""
PATIENCE = 10.0
"""Seconds between asking a child to end and ending it: a launcher ends its workers first."""
FAILED, LATE = "failed", "not run"
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make test-gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all rows together")
    parser.add_argument("--output", type=Path, default=REPOSITORY / ".bench" / "gpu.json")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name begins so")
    parser.add_argument("--again", action="store_true", help="also rows that have a result")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = [n for n in ROWS if any(n.startswith(o) for o in arguments.only or [""])]
    if not wanted:
        parser.error(f"no row begins so; there are {', '.join(ROWS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu rehearses the rows at toy size")
    if arguments.child is not None:
        work(arguments.device, *arguments.child)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends its child too
    report = Report(arguments.output.resolve(), arguments.device)
    slower = 1 if arguments.device == "cuda" else SLOWER
    pending = [n for n in wanted if arguments.again or not report.has(n)]
    limits = {n: slower * ROWS[n].seconds for n in pending}
    command = [sys.executable, "-m", "tests.gpu.run", "--device", arguments.device, "--child"]
    try:
        Parent(report, limits, slower * STARTING, 60 * arguments.minutes, command).go()
    finally:
        report.show()
    sys.exit(any(r["state"] == FAILED for r in report.rows.values()))


@dataclass
class Report:
    """The results in a file. One of another machine, or of other versions, is begun anew."""

    file: Path
    device: str
    rows: dict[str, Result] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = machine_facts(self.device)
        try:
            held = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if held["machine"] == self.machine:
            self.rows = held["rows"]
        else:
            print(f"note: {self.file} is of another machine or version and is begun anew")
            shutil.rmtree(self.file.with_suffix(""), ignore_errors=True)  # the CPU's run too

    def has(self, name: str) -> bool:
        return name in self.rows and self.rows[name]["state"] != LATE

    def add(self, name: str, result: Result) -> None:
        self.rows[name] = {**result, "date": date.today().isoformat()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.rows = {n: self.rows[n] for n in [*ROWS, *self.rows] if n in self.rows}
        report = {"machine": self.machine, "rows": self.rows}
        write_text(self.file, json.dumps(report, indent=2) + "\n")
        print(f"{name}: {result['state']}, {result['seconds']:.0f} s", flush=True)

    def show(self) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("row", "state", "s", "measured, or why not"):
            table.add_column(column, no_wrap=column in ("row", "state"))
        for name, row in self.rows.items():
            said = row.get("reason") or ", ".join(told(row["values"]))
            table.add_row(name, row["state"], f"{row['seconds']:.0f}", said)
        console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
        console.print(", ".join(f"{k} {v}" for k, v in self.machine.items()))
        console.print(table)
        console.print(f"written to {self.file}")


def told(values: dict[str, float | str]) -> Iterator[str]:
    """Numbers to four digits."""
    for name, value in values.items():
        if isinstance(value, str):
            yield f"{name}: {value}"
        else:
            yield f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}"


def machine_facts(device: str) -> dict[str, str]:
    """What results depend on."""
    facts = {"device": "CPU"}
    if device == "cuda":
        name = torch.cuda.get_device_name()
        chip = find_chip(name)
        peak = f"{chip.bf16 / 1e12:.4g} TFLOP/s dense bf16" if chip else "not known"
        facts = {"device": f"{torch.cuda.device_count()} x {name}", "peak": peak}
    return facts | versions()


# --- the parent -----------------------------------------------------------------------------------


class Parent:
    """Starts children, reads what they write, ends those that are late.

    Args:
        limits: seconds of each row that is to run, in their order.
        starting: seconds until a child begins a row.
        seconds: for all of them.
        command: of a child; the files that it reads and writes follow.
    """

    def __init__(
        self,
        report: Report,
        limits: dict[str, float],
        starting: float,
        seconds: float,
        command: Sequence[str],
    ) -> None:
        self.report, self.limits, self.starting = report, limits, starting
        self.pending, self.command = list(limits), command
        self.end = time.monotonic() + seconds
        self.folder = report.file.with_suffix("")
        self.folder.mkdir(parents=True, exist_ok=True)

    def go(self) -> None:
        while self.pending and time.monotonic() < self.end:
            self._child()
        for name in self.pending:
            self.report.add(name, {"state": LATE, "seconds": 0.0, "reason": "out of time"})

    def _child(self) -> None:
        """One child, until it has ended or was ended."""
        answers, log = self.folder / "answers.jsonl", self.folder / "log.txt"
        answers.unlink(missing_ok=True)
        (self.folder / "pending.json").write_text(json.dumps(self.pending), encoding="utf-8")
        with log.open("ab") as output:
            child = subprocess.Popen(
                [*self.command, str(self.folder), str(answers)],
                cwd=REPOSITORY,
                env=child_environment(self.report.device),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            if (problem := self._follow(child, answers, log)) is not None:
                self._done({"state": FAILED, **problem})
        finally:
            stop(child)

    def _follow(self, child: subprocess.Popen, answers: Path, log: Path) -> Result | None:
        """Take the answers of a child; why its row failed that has none."""
        read, began, limit = 0, time.monotonic(), self.starting
        while True:
            has_ended = child.poll() is not None  # before its last answers are read
            for line in lines(answers)[read:]:
                read, began = read + 1, time.monotonic()
                if "begin" in line:
                    limit = self.limits[line["begin"]]
                else:
                    limit = self.starting
                    self._done(line)
            seconds = time.monotonic() - began
            if not self.pending:
                return None
            if has_ended and (read % 2 or not read):
                said = f"the process ended with code {child.returncode}; {last_line(log)}"
                return {"seconds": seconds, "reason": said}
            if has_ended or time.monotonic() > self.end:
                return None
            if seconds > limit:
                return {"seconds": seconds, "reason": f"took more than {limit:.0f} s"}
            time.sleep(0.1)

    def _done(self, result: Result) -> None:
        """Of the row that is on turn: a child takes them in their order."""
        self.report.add(self.pending.pop(0), result)


def child_environment(device: str) -> dict[str, str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def lines(file: Path) -> list[dict[str, Any]]:
    """Those that are whole."""
    if not file.is_file():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def last_line(file: Path) -> str:
    said = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1].strip()[:200] if said else "no output"


def stop(child: subprocess.Popen) -> None:
    """End a child and what it has started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sent)
        except ProcessLookupError:
            break
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


# --- the child ------------------------------------------------------------------------------------


def work(device: str, folder: Path, told_to: Path) -> None:
    """Run the pending rows, until one fails: a broken device would break those after it."""
    pending = json.loads((folder / "pending.json").read_text(encoding="utf-8"))
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    machine = Machine(device, gpus, folder)
    with told_to.open("a", encoding="utf-8") as out:
        for name in pending:
            print(json.dumps({"begin": name}), file=out, flush=True)
            print(f"--- {name}", flush=True)
            began = time.monotonic()
            try:
                result: Result = {"state": "ok", "values": ROWS[name].run(machine)}
            except Absent as error:
                result = {"state": "absent", "reason": str(error)}
            except Refused as error:
                result = {"state": "refused", "reason": str(error)[:200]}
            except Exception as error:
                traceback.print_exc()
                first = str(error).strip().partition("\n")[0][:200]
                result = {"state": FAILED, "reason": f"{type(error).__name__}: {first}"}
            result["seconds"] = time.monotonic() - began
            print(json.dumps(result), file=out, flush=True)
            if result["state"] == FAILED:
                return


if __name__ == "__main__":
    main()
