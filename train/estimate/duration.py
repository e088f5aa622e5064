"""The duration of a run: its steps, of epochs too where the text is local, hours, GPU-hours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_models.search.algorithms import Passes, evolution_passes, greedy_passes
from train.data.local.files import STDLIB
from train.demo import DEMO_BASE
from train.estimate.throughput import Speed, Unknown, forward_flops, step_flops
from train.planning.problem import PlanProblem
from train.planning.search.auto_space import auto_passes

if TYPE_CHECKING:
    from train.estimate.llama_shapes import LlamaShape
    from train.recipe.recipe import Recipe

MOST_BYTES = 64 * 10**6
"""Of local text that a dry run reads and tokenizes, seconds of work; the run finds it cached."""


def steps_of(recipe: Recipe, shape: LlamaShape) -> int | None:
    """Optimizer steps, healing included; of epochs the local text is counted.

    None where only the run can tell: the text or the tokenizer is not here, or the text is large.

    Raises:
        PostshareError: the text cannot be read.
    """
    if recipe.steps is not None:
        return recipe.steps
    name = recipe.model.tokenizer or recipe.model.path
    if not (_is_here(name) and _is_small(recipe)):
        return None
    from train.data.blocks import prepare_data
    from train.models.tokenizer import load_tokenizer

    training, _ = prepare_data(
        recipe, load_tokenizer(name), needed_blocks=None, vocab_size=shape.vocab_size
    )
    assert recipe.train.epochs is not None
    steps = math.ceil(recipe.train.epochs * len(training) / recipe.train.batch_size)
    return steps + recipe.materialize.heal_steps


def _is_here(name: str) -> bool:
    return name in (STDLIB, DEMO_BASE) or Path(name).expanduser().exists()


def _is_small(recipe: Recipe) -> bool:
    """Whether all text is local, and little."""
    held = 0
    for source in (*recipe.data.train, *(recipe.data.validation or ())):
        path = Path(source.path).expanduser()
        if source.path != STDLIB and not path.exists():
            return False
        files = path.rglob("*") if path.is_dir() else [path] if path.exists() else []
        held += sum(file.stat().st_size for file in files if file.is_file())
    return held <= MOST_BYTES


def earlier_pace(recipe: Recipe) -> tuple[float, str] | None:
    """Seconds of a step as an earlier run in this run folder has measured, and the file."""
    for name in ("heal", ".", "continued"):
        file = recipe.folder / name / "metrics.jsonl"
        if (row := _last_row(file)) is not None:
            return row["seconds"] / row["step"], str(file)
    return None


def _last_row(file: Path) -> dict[str, Any] | None:
    """The last row that is whole."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except ValueError:  # half written by a run that was killed
            continue
    return None


@dataclass(frozen=True)
class Job:
    """What the time of a run depends on.

    Attributes:
        problem: of its plan.
        steps: of the training, healing included, and of the control; None: only the data tells.
        gpus: that train together; 0: there is none, and GPU-hours mean nothing.
    """

    recipe: Recipe
    problem: PlanProblem
    steps: int | None
    gpus: int


def cost_rows(job: Job, speed: Speed | Unknown) -> Iterator[tuple[str, str]]:
    """Tokens per second; hours and GPU-hours of the training, the control and the search, a line
    each, and of all; what is not counted. Or what is missing to tell it."""
    if isinstance(speed, Unknown):
        yield "speed", f"not known: {speed.why}"
        return
    on = f" on {job.gpus} GPU(s)" if job.gpus else ""
    yield "speed", f"{speed.tokens_per_second:,.0f} tokens/s{on}: {speed.origin[0]}"
    yield from (("", line) for line in speed.origin[1:])
    recipe, gpus = job.recipe, job.gpus
    steps = 1000 if job.steps is None else job.steps
    tokens = steps * recipe.train.batch_size * recipe.data.sequence_length
    training = tokens / speed.tokens_per_second
    what = "for each 1,000 steps" if job.steps is None else f"{tokens:,} tokens"
    yield "time", f"training  {_cost(training, gpus)}, {what}"
    has_control = recipe.plans and recipe.evaluate.continued
    yield "", f"control   {_cost(training, gpus)}, as many" if has_control else "control   none"
    passes, searching = search_passes(job.problem), search_seconds(job, speed)
    if passes is None:
        yield "", "search    none by measured loss"
    else:
        known = "not known: fp32 at this speed; give --chip"
        if searching is not None:
            known = f"{_cost(searching, gpus)}, at most, by one in fp32"
        yield "", f"search    {known}"
        both = f"{passes.forward:,} forward passes, {passes.backward:,} with backward"
        yield "", f"          {both}, {recipe.plan.calibration_blocks} blocks"
    if job.steps is not None and searching is not None:
        yield "", f"in all    {_cost((1 + has_control) * training + searching, gpus)}"
    yield "", f"without   {', '.join(_left_out(recipe))}"


def _left_out(recipe: Recipe) -> Iterator[str]:
    """What takes time and is not foretold."""
    yield "evaluation"
    yield "export"
    if recipe.penalized:
        yield "penalty"
    if recipe.materialize.reconstruct:
        yield "reconstruction"
    if recipe.plan.alternatives:
        yield "alternatives"
    if recipe.spans is not None and recipe.spans.measures:
        yield "spans"


def search_passes(problem: PlanProblem) -> Passes | None:
    """Passes of a search over the calibration text, at most; None where nothing is searched."""
    section = problem.section
    if section.strategy == "auto":
        return auto_passes(problem)
    if section.strategy != "loss":
        return None
    bound = greedy_passes if section.search == "greedy" else evolution_passes
    return bound(problem.space.largest)


def search_seconds(job: Job, speed: Speed) -> float | None:
    """Of the search, at most: on one GPU, in fp32, at the training's share of the peak.

    A pass that estimates computes as much as three forward ones. None: how much slower fp32 is on
    this chip is not known.
    """
    passes = search_passes(job.problem)
    if passes is None:
        return 0.0
    if speed.slower is None:
        return None
    recipe, shape = job.recipe, job.problem.config
    length = recipe.data.sequence_length
    tokens = (passes.forward + 3 * passes.backward) * recipe.plan.calibration_blocks * length
    of_a_step = forward_flops(shape, length) / step_flops(recipe, shape)
    alone = speed.tokens_per_second / max(job.gpus, 1)
    return tokens * of_a_step * speed.slower / alone


def _cost(seconds: float, gpus: int) -> str:
    """A time in words; with GPUs, all of which wait for the one at work, also GPU-hours."""
    hours = f", {seconds * gpus / 3600:,.3g} GPU-hours" if gpus else ""
    return f"about {in_words(seconds)}{hours}"


def in_words(seconds: float) -> str:
    """A time as `90 s`, `12 minutes` or `1,234.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"
