"""The timetable of a run: its stages by number, and how long those to come will take.

The seconds of a step are measured once a training of the run has begun, and an evaluation is
foretold from them. What is not known is not said: exports and reports take what the disk takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.common.progress import clock, note
from train.stages.run import Run
from train.tracking.metrics_log import read_rows
from train.training.training_folder import read_result

TOLD = 5.0
"""Seconds: less is not worth a word."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        steps: optimizer steps; 0 where it trains nothing.
        folder: of its training.
        reads: the work of the forward passes of an evaluation, in optimizer steps: what one process
            reads alone counts as often as there are processes.
    """

    name: str
    work: Callable[[Run], None]
    steps: int = 0
    folder: Path | None = None
    reads: float = 0.0

    @property
    def is_trained(self) -> bool:
        """Whether it is a training that has finished before."""
        return self.folder is not None and read_result(self.folder) is not None

    @property
    def done(self) -> tuple[int, float] | None:
        """Steps and seconds so far, of this start and earlier ones; None: it has not begun."""
        rows = [] if self.folder is None else read_rows(self.folder / "metrics.jsonl")
        return (rows[-1]["step"], rows[-1]["seconds"]) if rows else None


def announce(current: Run, stages: Sequence[Stage], number: int) -> None:
    """Say on stderr which stage begins, and how long the run still takes where it is known.

    Args:
        number: of the stage, from 1.
    """
    if not current.ranks.is_main:
        return
    stage = stages[number - 1]
    line = f"stage {number} of {len(stages)}: {stage.name}"
    if stage.is_trained:
        line += ", done before"
    elif stage.steps:
        line += f", {stage.steps:,} steps"
    seconds = time_left(stages, number)
    note(line if seconds is None or seconds < TOLD else f"{line}; about {clock(seconds)} left")


def time_left(stages: Sequence[Stage], number: int) -> float | None:
    """Seconds from a stage on, at the pace of the run's last training.

    A forward pass is taken for a third of a step: a backward pass computes twice as much. None
    where nothing has been trained yet, or nothing is left to train or to evaluate.
    """
    paces = [done[1] / done[0] for stage in stages if (done := stage.done) is not None]
    left = sum(
        stage.reads / 3 + stage.steps - (stage.done or (0, 0.0))[0]
        for stage in stages[number - 1 :]
        if not stage.is_trained
    )
    return left * paces[-1] if paces and left > 0 else None
