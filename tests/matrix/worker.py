"""Runs on every rank: several trainings one after the other in one process, and their weights.

worker.py OUTPUT CELL [CELL ...]   (a folder; rank 0 writes CELL.safetensors and rows.json)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from sa_models.calibration import logit_chunks
from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS
from sa_models.materialize.ties import unit
from tests.matrix.cells import CELLS, PROGRESSIVE, RESUMED
from tests.support.garbage import keep_what_is_imported
from tests.support.training import MODELS, VOCABULARY, Setting, build, train
from train.distributed.engines.base import Engine
from train.distributed.engines.start import start
from train.models.compiled_layers import compile_layers

State = dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]


def prepared(setting: Setting) -> Engine:
    engine = start(setting.recipe())
    assert '"auto"' not in json.dumps(engine.resolved)
    model, optimizer = build(setting)
    if setting.compiled and not is_reference(engine):
        compile_layers(model)
    engine.prepare(model, optimizer)
    return engine


def is_reference(engine: Engine) -> bool:
    """Whether this is what the others are compared with: one process without a library's engine."""
    return engine.backend == "plain" and engine.world == 1


def run(name: str, folder: Path) -> list[dict]:
    setting = CELLS[name]
    engine = prepared(setting)
    check_shards(engine)
    with chunked(engine, setting):
        rows = train(engine, setting)
    engine.check_replicas()
    weights = {key: value.contiguous() for key, value in engine.full_weights()}
    if engine.is_main:
        save_file(weights, folder / f"{name}.safetensors")
    engine.close()
    torch.compiler.reset()
    if setting.pull is not None:
        check_merged(setting, weights, rows[-1]["distance"])
    if name in RESUMED:
        check_resume(setting, weights, engine.backend == "plain" and engine.world > 2)
    return rows


@contextmanager
def chunked(engine: Engine, setting: Setting) -> Iterator[None]:
    """Losses by chunks as the setting asks; one plain process, the reference, has whole logits."""
    if not setting.chunk or is_reference(engine):
        yield
        return
    with patch.object(logit_chunks, "CHUNK_ELEMENTS", setting.chunk * VOCABULARY):
        yield


def check_shards(engine: Engine) -> None:
    """Every element of every trainable parameter lies in exactly one rank's range (or in all)."""
    for name, shard in engine.shards().items():
        covered = torch.zeros(shard.shape.numel(), device=engine.device)
        covered[shard.start : shard.stop] = 1
        expected = 1 if engine.sharded else engine.world
        assert bool((engine.reduce_sum(covered) == expected).all()), name
        assert shard.values.shape == (shard.stop - shard.start,), name
        assert shard.values.dtype == torch.float32, name


def check_resume(setting: Setting, final: dict[str, torch.Tensor], reordered: bool) -> None:
    """Stop after a step, continue in another engine: the weights are the same bits.

    DDP puts gradients into other buckets after the first step of a start, and a ring adds the ranks
    up in an order that depends on the place in a bucket. Of two ranks there is one order; of more,
    two starts differ by rounding, which bf16 makes larger: all is trained again with one order.

    Args:
        reordered: DDP with more than two ranks.
    """
    if not reordered:
        resume(setting, final)
        return
    with first_buckets():
        whole = prepared(setting)
        train(whole, setting)
        final = {name: weight.clone() for name, weight in whole.full_weights()}
        whole.close()
        resume(setting, final)


@contextmanager
def first_buckets() -> Iterator[None]:
    """DDP keeps its buckets, as it does where it looks for unused parameters."""
    real = DistributedDataParallel.__init__

    def init(self: DistributedDataParallel, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options | {"find_unused_parameters": True})

    with patch.object(DistributedDataParallel, "__init__", init):
        yield


def resume(setting: Setting, final: dict[str, torch.Tensor]) -> None:
    first = prepared(setting)
    train(first, setting, last=1)
    state: State = {
        name: (shard.values.clone(), {k: v.clone() for k, v in shard.read_state().items()})
        for name, shard in first.shards().items()
    }
    first.close()
    second = prepared(setting)
    for name, shard in second.shards().items():
        shard.restore(*state[name])
    second.restored()
    train(second, setting, first=1)
    for name, weight in second.full_weights():
        difference = float((weight - final[name]).norm())
        assert torch.equal(weight, final[name]), (
            f"{name} differs by {difference:.1e} after resuming"
        )
    second.close()


def check_merged(
    setting: Setting, weights: dict[str, torch.Tensor], distance: list[list[float]]
) -> None:
    """Pairs at distance 0, and no others, have the same bits; and there are such."""
    layout = setting.plan.layout(MODELS[setting.model][0])
    projections = [p for p in PROJECTIONS if any(p in tie.projections for tie in setting.plan.ties)]
    merged = []
    for tie, row in zip(setting.plan.ties, distance, strict=True):
        for p, apart in zip(projections, row, strict=True):
            if p in tie.projections:
                x, y = (unit(weights, layout, p, *place) for place in (tie.target, tie.source))
                assert torch.equal(x.view(torch.int32), y.view(torch.int32)) == (apart == 0)
                merged.append(apart == 0)
    assert any(merged)
    assert all(merged) == (setting.pull is PROGRESSIVE)


def check_divergence() -> None:
    """Ranks with different weights are found out, where each holds a copy of its own."""
    engine = prepared(Setting(steps=1))
    if engine.world > 1 and engine.stage != 3 and engine.backend != "fsdp":
        with torch.no_grad():
            next(iter(engine.model.parameters())).view(-1)[0] += 1e-3 * engine.rank
        try:
            engine.check_replicas()
        except PostshareError:
            print("divergence found")
        else:
            raise AssertionError("different weights were not noticed")
    engine.close()


def run_all(names: list[str], folder: Path) -> None:
    rows: dict[str, list[dict] | str] = {}
    for name in names:
        try:
            rows[name] = run(name, folder)
        except PostshareError as error:  # a refusal is a result; the comparison judges it
            rows[name] = str(error)
        if os.environ.get("RANK", "0") == "0":
            (folder / "rows.json").write_text(json.dumps(rows))


def main() -> None:
    folder, *names = sys.argv[1:]
    keep_what_is_imported()
    run_all(names, Path(folder))
    check_divergence()


if __name__ == "__main__":
    main()
