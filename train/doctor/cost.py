"""Check: what the job takes, in hours and GPU-hours."""

from __future__ import annotations

from collections.abc import Iterator

from sa_models.errors import PostshareError
from train.doctor.findings import Finding, Situation, from_error, ok
from train.estimate.duration import Job, cost_rows, earlier_pace
from train.estimate.parameters import expected_structure
from train.estimate.throughput import speed_of
from train.planning.problem import PlanProblem


def check_cost(s: Situation) -> Iterator[Finding]:
    """Tokens per second and time, as `--dry-run` has them, of the GPUs that are here.

    Steps of epochs are not counted: that would read the text.
    """
    recipe, shape = s.recipe, s.shape
    if recipe is None or shape is None or recipe.steps == 0:
        return
    devices = [f.gpu.name for f in s.facts if f.gpu is not None]
    device, gpus = (devices[0], s.world) if devices else ("", 0)
    try:
        speed = speed_of(recipe, shape, gpus, s.assumed, earlier_pace(recipe), device)
        problem = PlanProblem(recipe.plan, shape, expected_structure(recipe, shape))
        rows = list(cost_rows(Job(recipe, problem, recipe.steps, gpus), speed))
    except PostshareError as error:
        yield from_error("cost", error)
        return
    lines = [f"{name}: {value}" if name else value for name, value in rows]
    yield ok("cost", "\n".join(lines))
