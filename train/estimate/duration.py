"""The duration of a run: its steps, of epochs too where the text is local, and its hours."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.local.files import STDLIB
from train.demo import DEMO_BASE

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


@dataclass(frozen=True)
class Pace:
    """Seconds of an optimizer step, and where that is from, for the reader."""

    seconds: float
    origin: str


def pace_of(recipe: Recipe, tokens_per_second: float | None) -> Pace | None:
    """From what is given, else from what an earlier run in this run folder has measured."""
    if tokens_per_second is not None:
        tokens = recipe.train.batch_size * recipe.data.sequence_length
        return Pace(tokens / tokens_per_second, f"{tokens_per_second:,.0f} tokens/s")
    for name in ("heal", ".", "continued"):
        file = recipe.folder / name / "metrics.jsonl"
        if (row := _last_row(file)) is not None:
            seconds = row["seconds"] / row["step"]
            return Pace(seconds, f"{seconds:.3g} s a step, as in {file}")
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


def training_time(recipe: Recipe, steps: int | None, pace: Pace | None) -> str:
    """The time of all trainings in words, or what is missing to tell it."""
    if pace is None:
        return "not known; give the tokens per second of all GPUs together: --speed"
    if steps is None:
        return f"not known: the steps are not ({pace.origin})"
    control = recipe.plans and recipe.evaluate.continued
    seconds = steps * pace.seconds * (2 if control else 1)
    what = "the control included" if control else "there is no control"
    return f"about {in_words(seconds)} of training, {what} ({pace.origin})"


def in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
