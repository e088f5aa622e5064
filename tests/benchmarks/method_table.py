"""The rows of docs/methods.md: one training each, two at a time, kept as they finish.

    python tests/benchmarks/method_table.py FOLDER [--base mixed7M] [--only ROW ...] [--workers 2]

methods_smollm2.yaml lists the rows of a really pretrained Llama, methods.yaml those of a toy, and
methods_52m.yaml those of a larger one, which is trained first by base_52m.yaml. Every training is a
run folder below FOLDER and one line of docs/methods*.jsonl, from which the tables and pictures of
docs/methods.md are made (method_tables.py, method_picture.py). A second start goes on with what is
missing, and the rows are read again before every training, so that one may be added meanwhile. The
plan of a training is a line of docs/methods*-plans.jsonl: no search is made twice, also in another
FOLDER.
Every worker has one thread. A row of `rounds` scores the export of another row, rounded
(score_export.py); one with `hellaswag` answers the first questions of ../shared/eval/hellaswag too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import method_picture
import method_tables
import yaml
from method_tables import BASES, Base, add_lines, read_lines

from train.common.run_files import BLOCKS_FILE, PLAN_FILE, RECIPE_FILE, SEARCH_CACHE

SEEDED = ("0", "30")
"""The sizes at which a row has all its seeds; elsewhere one."""
HELLASWAG = Path(__file__).parents[2].with_name("shared") / "eval" / "hellaswag"
QUESTIONS = 400
SEARCHED = ("auto", "loss")
"""Strategies that may choose the plan of another row."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        size: how much is shared, in percent of the units; for spans the number of followers; 0:
            nothing.
        overrides: of the row's recipe.
        to: of a row that rounds the export of another: to what.
        hellaswag: whether questions are answered.
    """

    row: str
    size: str
    seed: int
    recipe: dict[str, Any]
    overrides: tuple[str, ...]
    rounds: Job | None = None
    to: str | None = None
    hellaswag: bool = False

    @property
    def name(self) -> str:
        return f"{self.row}-{self.size}-{self.seed}"

    @property
    def plan_name(self) -> str:
        """Of the training that searches the plan: only what is drawn differs from seed to seed."""
        drawn = any(one.startswith("plan.seed=") for one in self.overrides)
        return self.name if drawn else f"{self.row}-{self.size}-0"


def jobs(base: Base, only: list[str] | None = None) -> list[Job]:
    """All trainings, the most telling ones first: 30 %, then other sizes, then other seeds."""
    config = base.settings()
    found = [
        job
        for name, row in config["rows"].items()
        if only is None or name in only
        for job in _jobs_of(name, row, config)
    ]
    return sorted(found, key=lambda job: (job.seed, job.size not in SEEDED))


def _jobs_of(name: str, row: dict[str, Any], config: dict[str, Any]) -> Iterator[Job]:
    hellaswag = row.get("hellaswag", False)
    if "rounds" in row:
        for of in _jobs_of(row["rounds"], config["rows"][row["rounds"]], config):
            if of.seed == 0:
                yield replace(of, row=name, rounds=of, to=row["to"], hellaswag=hellaswag)
        return
    recipe = {**config["base"], **row["recipe"]}
    recipe["train"] = config["base"]["train"] | row["recipe"].get("train", {})
    sizes = row.get("at") or {size: [how[row["counts"]]] for size, how in config["sizes"].items()}
    for size, overrides in sizes.items():
        for seed in range(row.get("seeds", 1) if size in SEEDED else 1):
            more = [f"seed={seed}"] + ([f"plan.seed={seed}"] if row.get("draws") else [])
            if size not in SEEDED:  # that of 30 % is the same training
                more.append("evaluate.continued=false")
            asked = hellaswag and seed == 0  # its table has one seed
            yield Job(name, size, seed, recipe, (*overrides, *more), hellaswag=asked)


def to_do(every: list[Job], begun: set[str], busy: set[str]) -> list[Job]:
    """Those that have not begun; an export is rounded when the training that makes it has ended."""
    return [
        job
        for job in every
        if job.name not in begun and (job.rounds is None or job.rounds.name not in busy)
    ]


def finished(base: Base) -> set[str]:
    """Names of the trainings that have a line."""
    return {_name_of(line) for line in base.read()}


def _name_of(line: method_tables.Line) -> str:
    return f"{line['row']}-{line['size']}-{line['seed']}"


def run(base: Base, job: Job, folder: Path) -> None:
    """Train, and add the line. Raises CalledProcessError; FOLDER/<name>.log has the reason."""
    trained = job.rounds or job
    export = folder / trained.name / "export"
    if trained is job and (line := as_another(base, job, plan_of(base, job, folder))) is not None:
        add_line(base, line)
        return
    if trained is job or not export.is_dir():
        _start_training(base, trained, folder, "run")
    line = {"row": job.row, "size": job.size, "seed": job.seed, "perplexity": {}}
    line |= _summary(folder / trained.name)
    summarized = "bytes" in line and job.to is None
    if not summarized or (job.hellaswag and HELLASWAG.is_dir()):
        scores = _score(job, folder)
        if not summarized:
            line["perplexity"] |= {"post": scores["perplexity"]}
            line |= {"bytes": scores["bytes"], "cache": scores["cache"]}
        line |= {"margins": scores["margins"]} if "margins" in scores else {}
    add_line(base, line)


def add_line(base: Base, line: method_tables.Line) -> None:
    """Of today, and what is made of the lines."""
    add_lines(base.results, line | {"date": date.today().isoformat()})
    method_tables.write()
    method_picture.draw(base)


def as_another(base: Base, job: Job, plan: dict[str, Any] | None) -> method_tables.Line | None:
    """The line of a training with the same plan, seed and recipe but for what chose the plan."""
    if plan is None:
        return None
    others = {
        other.name: other
        for other in jobs(base)
        if other.rounds is None
        and known_plan(base, other) == plan
        and _but_for_the_plan(other) == _but_for_the_plan(job)
    }
    for line in base.read():
        other = others.get(_name_of(line))
        if other is None or "same_as" in line or (job.hellaswag and "margins" not in line):
            continue
        kept = {key: value for key, value in line.items() if job.hellaswag or key != "margins"}
        return kept | {"row": job.row, "size": job.size, "same_as": other.row}
    return None


def _but_for_the_plan(job: Job) -> tuple[dict[str, Any], list[str]]:
    recipe = {key: value for key, value in job.recipe.items() if key != "plan"}
    return recipe, [one for one in job.overrides if not one.startswith("plan.")]


def plan_of(base: Base, job: Job, folder: Path) -> dict[str, Any] | None:
    """The plan of a training that searches one, which is searched where nobody has; or None."""
    if job.recipe.get("plan", {}).get("strategy") not in SEARCHED or "spans" in job.recipe:
        return None
    if (known := known_plan(base, job)) is None:
        _start_training(base, job, folder, "plan")
        known = json.loads((folder / job.name / PLAN_FILE).read_text(encoding="utf-8"))
    return known


def known_plan(base: Base, job: Job) -> dict[str, Any] | None:
    """The plan that a training of this row has found before, here or on another machine."""
    lines = read_lines(base.plans)
    return next((line["plan"] for line in lines if line["name"] == job.plan_name), None)


def _start_training(base: Base, job: Job, folder: Path, command: str) -> None:
    """`postshare plan` or `run` of a row; a plan that was found is kept as a line.

    A run that has not begun where its plan is found already takes it from a file.
    """
    output, given = folder / job.name, folder / f"{job.name}-plan.json"
    recipe, overrides, known = job.recipe, job.overrides, known_plan(base, job)
    if known is not None and (given.is_file() or not (output / RECIPE_FILE).is_file()):
        given.write_text(json.dumps(known), encoding="utf-8")
        recipe = recipe | {"plan": {"strategy": "file", "path": str(given.absolute())}}
        overrides = tuple(one for one in overrides if not one.startswith("plan."))
    file = folder / f"{job.name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    _share_measurements(folder, output)
    arguments = ["-m", "train", command, str(file), f"output_dir={output}", *overrides]
    plan = output / PLAN_FILE
    try:
        _start(arguments, folder / f"{job.name}.log")
    finally:  # what was stopped in its training has been searched
        if known is None and plan.is_file():
            line = {"name": job.plan_name, "plan": json.loads(plan.read_text(encoding="utf-8"))}
            add_lines(base.plans, line)


def _score(job: Job, folder: Path) -> dict[str, Any]:
    """What score_export.py says."""
    command = [str(Path(__file__).with_name("score_export.py"))]
    command.append(str(folder / (job.rounds or job).name))
    command += ["--to", job.to] if job.to is not None else []
    if job.hellaswag and HELLASWAG.is_dir():
        command += ["--hellaswag", str(HELLASWAG), "--limit", str(QUESTIONS)]
    log = folder / f"{job.name}.scores.log"
    _start(command, log)
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])


def _start(command: list[str], log: Path) -> None:
    """Run Python in a process with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(
            [sys.executable, *command], env=environment, stdout=file, stderr=file, check=True
        )


def _summary(run: Path) -> dict[str, Any]:
    """What a line takes from the summary of a run; nothing where nothing was shared."""
    file = run / "summary.json"
    if not file.is_file():
        return {}
    summary = json.loads(file.read_text(encoding="utf-8"))
    cache = {
        kind: 2 * summary["cache"][f"{kind}_elements_per_token"] for kind in ("base", "stored")
    }
    kept = ("structure", "heads", "parameters", "bytes", "tokens")
    return {
        "perplexity": {name: value for name, value in summary["perplexity"].items() if value},
        **{key: summary[key] for key in kept},
        "cache": cache,  # in bf16
    }


def _share_measurements(folder: Path, output: Path) -> None:
    """Give a run what others have measured, in searches and of the base: all says what it is of.

    One search of mixed7M takes longer than the training, and rows differ in little.
    """
    cache = output / SEARCH_CACHE
    if cache.exists():
        return
    lines = {
        line
        for path in sorted(folder.glob(f"*/{SEARCH_CACHE}"))
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")  # not one that is just being written
    }
    output.mkdir(exist_ok=True)
    cache.write_text("".join(sorted(lines)), encoding="utf-8")
    for path in sorted(folder.glob(f"*/{BLOCKS_FILE}")):
        if base := json.loads(path.read_text(encoding="utf-8")).get("base"):
            (output / BLOCKS_FILE).write_text(json.dumps({"base": base}), encoding="utf-8")
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", choices=BASES, default="mixed7M")
    parser.add_argument("--only", nargs="*", metavar="ROW")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    base = BASES[arguments.base]
    running: dict[Future[None], Job] = {}
    failed: set[str] = set()
    took: list[float] = []
    began: dict[str, float] = {}
    with ThreadPoolExecutor(arguments.workers) as pool:
        while True:
            busy = {job.name for job in running.values()}
            left = to_do(jobs(base, arguments.only), finished(base) | failed | busy, busy)
            while left and len(running) < arguments.workers:
                job = left.pop(0)
                began[job.name] = time.monotonic()
                running[pool.submit(run, base, job, arguments.folder)] = job
                eta = len(left) * sum(took) / len(took) / arguments.workers / 60 if took else None
                about = "" if eta is None else f", about {eta:.0f} min"
                print(f"{job.name} ({len(left)} to come{about})", flush=True)
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(done)
                took.append(time.monotonic() - began[job.name])
                if isinstance(error := done.exception(), subprocess.CalledProcessError):
                    failed.add(job.name)
                    print(f"{job.name} failed: see {arguments.folder / job.name}.log", flush=True)
                elif error:
                    raise error
    if failed:
        sys.exit(f"error: these failed: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
