"""Runs on every rank of a backend that splits models up: memory, what is loaded, a teacher.

sharded_worker.py LARGE SMALL RUN TEACHER   (folders: two models, a run and its teacher)

Memory comes first: the peak is that of a process that has done nothing else.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from sa_models.weights.structure import convert
from tests.distributed import teacher
from tests.support.training import LENGTH
from train.distributed.engines.base import Engine
from train.distributed.engines.start import shutdown, start
from train.models.base_model import load_dense
from train.models.sharded_source import base_source
from train.recipe.recipe import Recipe, validate
from train.training.job import TrainJob
from train.training.loop import prepare
from train.training.objective import token_losses

PLANS = {
    "none": SharingPlan(),
    "structure": SharingPlan(
        kv_heads=3, spans=(AttentionSpan(0, (1,), "kv"), AttentionSpan(2, (3,), "attention"))
    ),
}


def recipe(folder: Path, **train: Any) -> Recipe:
    section = {"steps": 1, "batch_size": 12, "micro_batch_size": 2, "learning_rate": 1e-2, **train}
    return validate(
        {
            "name": "loading",
            "model": {"path": str(folder), "attention": "eager"},
            "data": {"train": "unused", "validation": "unused", "sequence_length": LENGTH},
            "plan": {"strategy": "none"},
            "train": section,
        }
    )


def job(made: Recipe, folder: Path, plan: SharingPlan) -> TrainJob:
    return TrainJob(
        name="post",
        load=lambda: convert(load_dense(folder, "eager"), plan),
        source=lambda: base_source(made.model, plan),
        plan=None,
        train_blocks=None,  # type: ignore[arg-type]  # nothing is read here
        validation_blocks=None,
        folder=folder,
        steps=1,
        learning_rate=1e-2,
    )


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in engine.full_weights()}


def loaded_and_trained(
    folder: Path, plan: SharingPlan, streamed: bool, **train: Any
) -> list[dict[str, torch.Tensor]]:
    """All weights after loading and after a step."""
    made = recipe(folder, **train)
    engine = start(made)
    assert engine.streams
    here = job(made, folder, plan)
    if streamed:
        source = here.source()
        assert source is not None
        here = replace(here, load=lambda: engine.build(source))
    prepare(engine, here, made)
    before = weights(engine)
    generator = torch.Generator().manual_seed(engine.rank)
    ids = torch.randint(48, (2, LENGTH), generator=generator)
    for micro in range(accumulation := made.train.accumulation(engine.world)):
        with engine.micro_step(boundary=micro == accumulation - 1):
            batch = {"input_ids": ids, "labels": ids}
            engine.backward(token_losses(engine, here.model, batch) / 100)
    engine.step()
    after = weights(engine)
    engine.close()
    return [before, after]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("structure", {"precision": "bf16"}),
    ("structure", {"precision": "bf16", "trainable": ["model.layers.*"]}),
]


def equal(folder: Path) -> None:
    """Loaded tensor by tensor and loaded whole, one step each: the same bits."""
    for name, train in CASES:
        whole = loaded_and_trained(folder, PLANS[name], streamed=False, **train)
        ours = loaded_and_trained(folder, PLANS[name], streamed=True, **train)
        for when, a, b in zip(("loaded", "trained"), whole, ours, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert torch.equal(a[key], b[key]), f"{name} {train} {when}: {key}"
        moved = [key for key in ours[0] if not torch.equal(ours[0][key], ours[1][key])]
        assert len(moved) > 10, moved
    print(f"{len(CASES)} cases equal")


def peak() -> int:
    """Most bytes that this process has had resident."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory(folder: Path) -> None:
    """Print the peak before and after a model of 400 MB is loaded tensor by tensor."""
    made = recipe(folder)
    engine = start(made)
    import deepspeed  # noqa: F401 - what it takes is not the model's

    here = job(made, folder, PLANS["none"])
    base = peak()
    source = here.source()
    assert source is not None
    here = replace(here, load=lambda: engine.build(source))
    # Files are mapped: what `load` returns may lie in no memory yet, so touch it.
    assert all(bool((p.detach() == p.detach()).all()) for p in here.model.parameters())
    row = {"rank": engine.rank, "base": base, "loaded": peak()}
    prepare(engine, here, made)
    print("memory " + json.dumps({**row, "prepared": peak()}))
    engine.close()


if __name__ == "__main__":
    large, small, run, instructor = map(Path, sys.argv[1:])
    memory(large)
    equal(small)
    teacher.ask(run, instructor)
    shutdown()
