"""The log of a training: `metrics.jsonl`, wandb, and one progress line.

Only the main process tracks. The file is the record; wandb and the line are views of the same row.
On other nodes one process may send system metrics to the same wandb run.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sa_models.atomic_files import write_text
from sa_models.errors import PostshareError
from train.common.progress import bar, clock, note
from train.distributed.launch_env import launched_place
from train.tracking.wandb_run import WandbRun, agree_on_run, check_wandb

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe

Row = dict[str, Any]

PAIR_ROWS = 50
"""Rows of `pairs.jsonl` in a training."""

# Everything else in a row is a function of recipe and step: equal however often a run was stopped.
TIMING_KEYS = (
    "seconds",
    "step_seconds",
    "tokens_per_second",
    "data_wait_seconds",
    "memory_bytes",
    "slowest_rank",
    "rank_seconds_max",
    "rank_seconds_median",
    "data_wait_seconds_max",
    "memory_bytes_max",
)


class Tracker:
    """Writes one row a step. Use it as a context manager, which ends the wandb run.

    Made by all ranks together: the nodes of a launch agree on the wandb run.

    Args:
        folder: run folder; rows go to `folder/metrics.jsonl`.
        steps: optimizer steps of the whole training, for the ETA.
        resumed_step: rows beyond this step are dropped from an existing file, so that the curve
            holds every step once.
        wandb_run_id: id of an earlier segment, from the checkpoint.
        main: whether this is the main process; elsewhere nothing is recorded.
        group: of the wandb run (default: the recipe's name).
        later_steps: of the run's trainings after this one.

    Raises:
        PostshareError: wandb is online and no account is set up.
    """

    def __init__(
        self,
        job: str,
        recipe: Recipe,
        folder: Path,
        steps: int,
        resumed_step: int = 0,
        wandb_run_id: str | None = None,
        main: bool = True,
        group: str | None = None,
        later_steps: int = 0,
    ) -> None:
        check_wandb(recipe.wandb)
        self.path = folder / "metrics.jsonl"
        self.main = main
        place = launched_place()
        run_id, shared = agree_on_run(job, recipe, wandb_run_id, place)
        self._reports = main or (shared and place.first)
        if main:
            self._pairs_path = folder / "pairs.jsonl"
            self._pairs_every = max(1, steps // PAIR_ROWS)
            truncate_rows(self.path, resumed_step)
            if self._pairs_path.is_file():
                truncate_rows(self._pairs_path, resumed_step)
        if self._reports:
            node = place.node if shared else None
            self._wandb = WandbRun(job, recipe, folder, group or recipe.name, run_id, node, main)
        if main:
            self._line = ProgressLine(job, steps, resumed_step, later_steps)

    @property
    def wandb_run_id(self) -> str | None:
        """Goes into the checkpoint, so that a resumed run continues the same curve."""
        return self._wandb.run_id if self.main else None

    def log(self, row: Row, distances: torch.Tensor | None = None) -> None:
        """Record one step.

        Args:
            row: has `step` and `tokens`; the other keys are listed in docs and the loop.
            distances: float, the distance of every pair, for a histogram; nan where there is none.
        """
        if not self.main:
            return
        append_row(self.path, row)
        self._wandb.log(row, distances)
        self._line.show(row)

    def log_pairs(self, step: int, distance: torch.Tensor, cosine: torch.Tensor) -> None:
        """Record every pair, about 50 times in a training, in `pairs.jsonl`.

        Args:
            distance, cosine: [ties, projections] in the order of the plan's ties; nan (null in the
                file) where a tie does not pull a projection.
        """
        if not self.main or step % self._pairs_every:
            return
        append_row(
            self._pairs_path, {"step": step, "distance": _nulls(distance), "cosine": _nulls(cosine)}
        )

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        if self.main:
            note(text)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.main:
            self._line.close()
            if isinstance(exception[1], Exception):
                self._wandb.alert(exception[1])
        if self._reports:
            self._wandb.close(failed=exception[0] is not None)


def _nulls(values: torch.Tensor) -> list[list[float | None]]:
    return [[None if one != one else one for one in row] for row in values.tolist()]


# --- metrics.jsonl --------------------------------------------------------------------------------


def append_row(path: Path, row: Row) -> None:
    # JSON has no NaN: a row that could not be read back must fail here.
    line = json.dumps(row, allow_nan=False) + "\n"
    with _writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one line."""
    try:
        yield
    except OSError as error:
        raise PostshareError(
            f"{path} cannot be written ({error.strerror}); free disk space, then start the same "
            "command again"
        ) from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line left half written by a killed process is dropped."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise PostshareError(
                    f"{path}: line {number} is not JSON; delete the line, or move the file away"
                ) from None
    return rows


def truncate_rows(path: Path, step: int) -> None:
    """Drop the rows beyond `step`."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def memory_bytes() -> int:
    """Peak memory of this process so far: of its GPU where it uses one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- the progress line ----------------------------------------------------------------------------


class ProgressLine:
    """One line on stderr: redrawn on a terminal, else a new line about 20 times a training.

    Args:
        later: steps of the run's trainings after this one.
    """

    def __init__(self, job: str, steps: int, done: int, later: int = 0) -> None:
        self.steps, self.later = steps, later
        self.average: float | None = None
        self.slowest = ""
        self._stack = ExitStack()
        self._show = self._stack.enter_context(bar(job, lines=20, first=done, keep=True))

    def show(self, row: Row) -> None:
        step, loss = row["step"], row["lm_loss"]
        self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
        self._show(step, self.steps, f"{step}/{self.steps} {self._text(row)}")

    def _text(self, row: Row) -> str:
        parts = [f"loss {self.average:.4f}"]
        if row.get("penalty") is not None:
            parts.append(f"penalty {row['penalty']:.4g}")
        step_seconds = row["step_seconds"]
        wait = 100 * row["data_wait_seconds"] / max(step_seconds, 1e-9)
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"data {wait:.0f}%")
        parts.append(f"{row['memory_bytes'] / 2**30:.2f} GiB")
        if "slowest_rank" in row:
            behind = row["rank_seconds_max"] / max(row["rank_seconds_median"], 1e-9) - 1
            self.slowest = f"slowest rank {row['slowest_rank']} (+{100 * behind:.0f}%)"
        if self.slowest:
            parts.append(self.slowest)
        if self.later:
            left = (self.steps - row["step"] + self.later) * row["seconds"] / row["step"]
            parts.append(f"all training {clock(left)}")
        return "  ".join(parts)

    def close(self) -> None:
        self._stack.close()
