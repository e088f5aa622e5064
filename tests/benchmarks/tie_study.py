"""The study of ties chosen by the loss: successive halving over ways to bring quality back.

    python tests/benchmarks/tie_study.py FOLDER [--sizes 10 30]

tie_study.yaml says what is tried. A round takes what the one before has kept, with every value of
the axes that it adds, trains each for its tokens and keeps those of the lowest held-out perplexity.
Ties of one set of projections are searched once: every plan is the beginning of that path, as long
as it takes to save what is asked for, residuals counted. Every training is one line of
docs/ties-smollm2.jsonl, from which tie_tables.py makes the tables of docs/ties.md, and every path
one of docs/ties-smollm2-paths.jsonl; a second start goes on with what is missing, also in another
FOLDER, which keeps small files alone. One thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import tie_tables
import yaml
from method_tables import Line, add_lines, read_lines
from transformers import AutoConfig

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.residual_shapes import residual_parameters
from sa_models.plan import SharingPlan
from sa_models.search.actions import Action, as_plan
from train.common.run_files import BLOCKS_FILE, SEARCH_FILE, SUMMARY_FILE
from train.models.base_model import base_folder
from train.recipe.recovery import STEPS
from train.recipe.sections.inputs import ModelSection

HERE = Path(__file__).parent
SETTINGS = HERE / "tie_study.yaml"
KNOWN = "known-losses.json"
"""Losses of base and *direct* that several trainings share, by what they are of."""


@dataclass(frozen=True)
class Arm:
    """A value of every axis, or a control.

    Attributes:
        values: by axis; those of `share` may be the name of a control.
    """

    values: tuple[tuple[str, str], ...]

    def __getitem__(self, axis: str) -> str:
        return dict(self.values)[axis]

    def with_values(self, axes: tuple[str, ...], chosen: tuple[str, ...]) -> Arm:
        return Arm(tuple((dict(self.values) | dict(zip(axes, chosen, strict=True))).items()))

    @property
    def name(self) -> str:
        """`qkvo heal rank16`: without the axes at `none`, and the merge that changes nothing."""
        return " ".join(value for _, value in self.values if value not in ("none", "copy"))


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: Arm
    size: str
    tokens: int
    seed: int

    @property
    def name(self) -> str:
        """Also of its folder."""
        return f"{self.arm.name.replace(' ', '-')}-{self.size}-{self.tokens}-{self.seed}"


@dataclass(frozen=True)
class Study:
    """What is tried, and where what is known lies.

    Attributes:
        settings: tie_study.yaml as read.
        lines: file of the finished trainings; that of the searches' paths lies beside it.
        folder: of the searches and runs.
    """

    settings: dict[str, Any]
    lines: Path
    folder: Path

    def read(self) -> list[Line]:
        """The trainings that have finished."""
        return read_lines(self.lines)

    @property
    def paths(self) -> Path:
        return self.lines.with_stem(f"{self.lines.stem}-paths")

    # --- what is tried ----------------------------------------------------------------------------

    @property
    def first(self) -> Arm:
        """The first value of every axis."""
        axes = self.settings["axes"]
        return Arm(tuple((axis, next(iter(values))) for axis, values in axes.items()))

    def controls(self, arms: list[Arm]) -> list[Arm]:
        """With and without a teacher, as some of the arms are."""
        return [
            self.first.with_values(("share", "teacher"), (name, teacher))
            for name in self.settings["controls"]
            for teacher in self.settings["axes"]["teacher"]
            if any(arm["teacher"] == teacher for arm in arms)
        ]

    def next_jobs(self, size: str) -> list[Job]:
        """What is missing of the first round that has not finished."""
        kept = [self.first]
        for number, round_ in enumerate(self.settings["rounds"]):
            arms = self._varied(kept, tuple(round_.get("vary", ())), size)
            jobs = [
                self.job(arm, size, round_["tokens"], seed)
                for seed in range(round_.get("seeds", 1))
                for arm in [*arms, *self.controls(arms)]
            ]
            done = {line["name"]: line for line in self.read()}
            if missing := [job for job in dict.fromkeys(jobs) if job.name not in done]:
                print(f"{size} %, round {number + 1}: {len(missing)} of {len(jobs)} to come")
                return missing
            perplexity = {
                arm: sum(
                    done[job.name]["perplexity"]["trained"] for job in jobs if job.arm == arm
                )
                for arm in arms
            }  # fmt: skip
            kept = sorted(arms, key=lambda arm: (perplexity[arm], arm.name))[: round_["keep"]]
        return []

    def _varied(self, arms: list[Arm], vary: tuple[str, ...], size: str) -> list[Arm]:
        """The arms with all values of some axes, fewest changes first; without what cannot be.

        A residual goes with copies: a merge in another gauge leaves nothing that it could mean.
        """
        axes = self.settings["axes"]
        found = [
            arm.with_values(vary, values)
            for arm in arms
            for values in itertools.product(*(axes[axis] for axis in vary))
        ]
        found = [
            arm if arm["residual"] == "none" else arm.with_values(("merge",), ("copy",))
            for arm in found
        ]
        found.sort(key=lambda arm: sum(arm[axis] != self.first[axis] for axis in vary))
        return [arm for arm in dict.fromkeys(found) if self._can_be(arm, size)]

    def _can_be(self, arm: Arm, size: str) -> bool:
        if size not in self.settings["axes"]["share"][arm["share"]]["heads"]:
            return False
        only = self.settings.get("only", {}).get(size, {})
        if any(arm[axis] not in values for axis, values in only.items()):
            return False
        if arm["reconstruct"] != "none" and (arm["merge"], arm["residual"]) != ("copy", "none"):
            return False  # a recipe refuses both
        return _trains(arm) or arm["teacher"] == "none"

    def job(self, arm: Arm, size: str, tokens: int, seed: int) -> Job:
        """Nothing is drawn where nothing trains."""
        return Job(arm, size, tokens, seed) if _trains(arm) else Job(arm, size, 0, 0)

    def continued(self, job: Job) -> Job | None:
        """*Continued* of a control's objective, tokens and seed, where it has no line yet."""
        if job.arm["share"] not in self.settings["controls"]:
            return None
        control = Job(job.arm.with_values(("share",), ("continued",)), "0", job.tokens, job.seed)
        known = {line["name"] for line in self.read()}
        return None if control.name in known else control

    # --- recipes ----------------------------------------------------------------------------------

    def recipe(self, job: Job) -> dict[str, Any]:
        """The recipe of a training; its plan file is written, its search has finished."""
        base, arm = self.settings["base"], job.arm
        recipe: dict[str, Any] = {**base, "name": "tie-study", "seed": job.seed}
        recipe["output_dir"] = str(self.folder / job.name)
        recipe["train"] = base["train"] | {"steps": self._steps(job.tokens)}
        recovery: set[str] = set()
        for axis in ("merge", "heal", "pull", "residual", "teacher", "reconstruct"):
            value = self.settings["axes"][axis][arm[axis]]
            recovery |= {*value.get("recovery", ())}
            for section, keys in value.get("recipe", {}).items():
                recipe[section] = recipe.get(section, {}) | keys
        recipe["plan"] = {"strategy": "file", "path": str(self.plan_file(job))}
        if recovery:
            recipe["recovery"] = [step for step in STEPS if step in recovery]
        return recipe

    def _steps(self, tokens: int) -> int:
        base = self.settings["base"]
        return tokens // (base["data"]["sequence_length"] * base["train"]["batch_size"])

    def plan_file(self, job: Job) -> Path:
        return self.folder / f"plan-{job.arm['share']}-{job.size}-{job.arm['residual']}.json"

    def search_recipe(self, share: str, size: str) -> dict[str, Any]:
        """Of the search whose path begins with the plans of one set of projections."""
        settings = self.settings
        found = (settings["axes"]["share"] | settings["controls"])[share]
        plan = {**settings["search"], **found["plan"], "budget": {"heads": found["heads"][size]}}
        output = str(self.folder / f"search-{share}-{size}")
        train = settings["base"]["train"] | {"steps": 0}
        return {**settings["base"], "train": train, "name": "tie-study", "output_dir": output,
                "plan": plan}  # fmt: skip

    @cached_property
    def config(self) -> Any:
        """Of the base model."""
        return AutoConfig.from_pretrained(
            base_folder(ModelSection(**self.settings["base"]["model"]))
        )


def _trains(arm: Arm) -> bool:
    return (arm["heal"], arm["pull"]) != ("none", "none")


# --- plans ----------------------------------------------------------------------------------------


def first_of_path(path: list[dict[str, Any]], config: Any, needed: int, rank: int) -> SharingPlan:
    """The shortest beginning of a search's path that saves enough, residuals of a rank counted.

    Args:
        path: of plan-search.json.
        needed: parameters.

    Raises:
        PostshareError: the whole path saves less.
    """
    layout = HeadLayout.from_config(config)
    taken: list[Action] = []
    for step in path:
        for found in step["actions"]:
            source = found["source"]
            taken.append(
                Action(
                    tuple(found["target"]),
                    None if source is None else tuple(source),
                    tuple(found["projections"]),
                )
            )
            plan = as_plan(taken, layout)
            residuals = residual_parameters(plan, config, rank) if rank and plan.ties else 0
            if plan.savings(config).removed_parameters - residuals >= needed:
                return plan
    raise PostshareError(f"the path of {len(taken)} actions saves less than {needed:,} parameters")


def found_path(study: Study, name: str, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The path of a search, kept as a line for all folders; searches, where nobody has."""
    known = {line["name"]: line["path"] for line in read_lines(study.paths)}
    if name in known:
        return known[name]
    start("plan", recipe, study.folder / f"search-{name}.yaml")
    searched = Path(recipe["output_dir"], SEARCH_FILE)
    path = json.loads(searched.read_text(encoding="utf-8"))["path"]
    add_lines(study.paths, {"name": name, "path": path})
    return path


def write_plan(study: Study, job: Job) -> None:
    """The plan file of a training; searches first, where nobody has."""
    file = study.plan_file(job)
    if file.is_file():
        return
    recipe = study.search_recipe(job.arm["share"], job.size)
    path = found_path(study, f"{job.arm['share']}-{job.size}", recipe)
    residual = study.settings["axes"]["residual"][job.arm["residual"]]
    rank = residual.get("recipe", {}).get("residual", {}).get("rank", 0)
    needed = study.settings["sizes"][job.size]
    first_of_path(path, study.config, needed, rank).save(file)


# --- trainings ------------------------------------------------------------------------------------


def start(command: str, recipe: dict[str, Any], file: Path) -> None:
    """A postshare command. Raises CalledProcessError; the log beside the recipe has the reason."""
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    with file.with_suffix(".log").open("a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-m", "train", command, str(file)]
        subprocess.run(arguments, env=environment, stdout=log, stderr=log, check=True)


def run(study: Study, job: Job) -> None:
    """Train, and add the line; that of *continued* too, where it is trained beside."""
    write_plan(study, job)
    recipe, folder = study.recipe(job), study.folder / job.name
    if (continued := study.continued(job)) is not None:
        recipe["evaluate"] = recipe["evaluate"] | {"continued": True}
    began = time.monotonic()
    folder.mkdir(exist_ok=True)
    share_losses(study, job, folder)
    start("run", recipe, study.folder / f"{job.name}.yaml")
    seconds = round(time.monotonic() - began)
    lines = [line_of(one, folder) | {"seconds": seconds} for one in (job, continued) if one]
    add_lines(study.lines, *lines)
    keep_losses(study, job, folder)
    for child in folder.iterdir():
        if child.is_dir():  # weights of half a gigabyte
            shutil.rmtree(child)


def line_of(job: Job, folder: Path) -> Line:
    """What a finished run tells of its model, or of *continued*."""
    summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    losses = json.loads((folder / BLOCKS_FILE).read_text(encoding="utf-8"))
    measured, size = summary["perplexity"], summary["bytes"]
    continued = job.arm["share"] == "continued"
    wanted = ("continued",) if continued else ("post", "direct")
    last = next(name for name in wanted if name in losses)
    return {
        "name": job.name,
        "arm": dict(job.arm.values),
        "size": job.size,
        "tokens": job.tokens,
        "seed": job.seed,
        "perplexity": {
            "base": measured["base"],
            "untrained": None if continued else measured["direct"],
            "trained": measured[last],
        },
        "nats": [round(value, 3) for value in losses[last]["nats"]],
        "predicted": losses[last]["tokens"],
        "units": None if continued else summary["heads"]["tied"] + summary["heads"]["removed"],
        "bytes": size["base"] if continued else size["compact"] + (size["adapter"] or 0),
        "date": date.today().isoformat(),
    }


def _shared_losses(study: Study, job: Job) -> dict[str, str]:
    """The models of a run that other runs have too, and the names under which they are known."""
    return {"base": "base", "direct": f"{study.plan_file(job).stem} {job.arm['merge']}"}


def _known(study: Study) -> dict[str, Any]:
    file = study.folder / KNOWN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def share_losses(study: Study, job: Job, folder: Path) -> None:
    """Give a run the losses that others have measured; every entry says what it is of."""
    known = _known(study)
    given = {model: known[n] for model, n in _shared_losses(study, job).items() if n in known}
    if given and not (folder / BLOCKS_FILE).is_file():
        (folder / BLOCKS_FILE).write_text(json.dumps(given), encoding="utf-8")


def keep_losses(study: Study, job: Job, folder: Path) -> None:
    losses = json.loads((folder / BLOCKS_FILE).read_text(encoding="utf-8"))
    found = {n: losses[model] for model, n in _shared_losses(study, job).items() if model in losses}
    (study.folder / KNOWN).write_text(json.dumps(_known(study) | found), encoding="utf-8")


def go_on(study: Study, sizes: list[str]) -> Iterator[Job]:
    """Every training that is missing, one after another, as it finishes.

    Exits with the names of those that failed, once the others of their round have finished.
    """
    for size in sizes:
        while jobs := study.next_jobs(size):
            failed = []
            for job in jobs:
                try:
                    run(study, job)
                except subprocess.CalledProcessError:
                    failed.append(job.name)
                else:
                    yield job
            if failed:
                sys.exit(f"error: see the logs in {study.folder} of {', '.join(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    study = Study(settings, tie_tables.LINES, arguments.folder.resolve())
    for job in go_on(study, arguments.sizes or [*settings["sizes"]]):
        print(job.name, flush=True)
        tie_tables.write()


if __name__ == "__main__":
    main()
