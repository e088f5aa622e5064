"""The compiling of a training's layers, before its first step."""

from __future__ import annotations

import time

from train.common.progress import clock, note, waiting
from train.distributed.watchdog import Watchdog
from train.training.objective import Batch, Objective


def compile_ahead(objective: Objective, batch: Batch, job: str, hang_timeout: float | None) -> None:
    """Let forward and backward be compiled before the first step, of which it is no part.

    A collective, between steps: it adds a gradient of 0.

    Args:
        batch: a micro-batch, on the CPU.
        job: the training's name.
        hang_timeout: as in the recipe.
    """
    engine, began = objective.engine, time.perf_counter()
    with Watchdog(engine.rank, engine.world, hang_timeout) as watch:
        watch.note("compiling the layers", 1)
        with waiting(f"{job}: compiling the layers"), engine.micro_step(boundary=False):
            total, _ = objective(batch)
            engine.backward(0 * total)
    if engine.is_main:
        note(f"{job}: layers compiled in {clock(time.perf_counter() - began)}")
