"""Runs on every rank: a training that fails and goes on, and its evaluation, with wandb offline.

wandb_worker.py FOLDER   (writes FOLDER/run and FOLDER/teacher)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import train.training.loop as loop
from sa_models.errors import PostshareError
from tests.support import tiny
from train.distributed.engines.start import shutdown
from train.evaluation.perplexity import Perplexity
from train.evaluation.summary import TrainingCost, summarize
from train.recipe.recipe import DistillSection, Recipe, WandbSection
from train.tracking.wandb_evaluation import log_outcome
from train.tracking.wandb_run import plan_group
from train.training.loop import train

GROUP = plan_group("tiny", tiny.PLAN, tiny.model().config)


def recipe(folder: Path) -> Recipe:
    made = tiny.recipe(
        folder / "run", steps=5, checkpoint_every=2, evaluate_every=1, health_every=1
    )
    sections = {
        "distill": DistillSection(
            teacher=str(folder / "teacher"), hidden_weight=0.1, attention_weight=0.1
        ),
        "wandb": WandbSection(mode="offline", upload=True),
    }
    return made.model_copy(update=sections)


def stop_before(step: int) -> Any:
    """The loop's `seed_step`, and one with which a training fails when so many steps are done."""
    seed = loop.seed_step

    def stopping(base: int, done: int, rank: int) -> None:
        if done == step:
            raise PostshareError("stopped here")
        seed(base, done, rank)

    return seed, stopping


def evaluate(asked: Recipe) -> None:
    """The outcome of a run that was evaluated, told twice."""
    tiny.PLAN.save(asked.folder / "plan.json")
    exports = {}
    for kind in ("compact", "dense"):
        exports[kind] = asked.folder / "export" / kind
        exports[kind].mkdir(parents=True)
        (exports[kind] / "weights").write_text(kind)
    models = ("base", "continued", "direct", "post")
    summary = summarize(
        {name: Perplexity(1.0, 10.0 + i, 100) for i, name in enumerate(models)},
        tiny.PLAN,
        tiny.PLAN.savings(tiny.model().config),
        0.3,
        {"base": 1000, "compact": 900, "dense": 1000},
        TrainingCost(tokens=600, seconds=1.0),
        element_bytes=4,
        positions=tiny.model().config.max_position_embeddings,
    )
    for _ in range(2):
        log_outcome(asked, GROUP, tiny.PLAN, summary, exports)


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["GROUP_WORLD_SIZE"] = "2"  # as on two nodes, which agree on the run
    asked = recipe(folder)
    original, loop.seed_step = stop_before(3)
    try:
        train(tiny.job(asked, group=GROUP), asked)
    except PostshareError as error:
        print(f"first: {error}")
    loop.seed_step = original
    train(tiny.job(asked, group=GROUP), asked)
    if os.environ["RANK"] == "0":
        evaluate(asked)
    shutdown()


if __name__ == "__main__":
    main()
