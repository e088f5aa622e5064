"""Runs on every rank: several trainings one after the other in one process, and their weights.

gradient_worker.py OUTPUT   (a folder; rank 0 writes NAME.safetensors and rows.json)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sa_models.errors import PostshareError
from tests.distributed.training import Setting, build, train
from train.checkpoint import Checkpoints, Position
from train.engine import Engine, start

SETTINGS = {
    "clipped": Setting(clip_norm=0.5),
    "unclipped": Setting(kind="js", clip_norm=None, trainable="model.layers", learning_rate=1e-3),
    # Only the penalty: computed in fp32 from fp32 masters, whatever the model computes in.
    "bf16-penalty": Setting(kind="mse", precision="bf16", lm_weight=0.0, clip_norm=1e-3),
}


def run(name: str, setting: Setting, folder: Path) -> list[dict]:
    engine = start(setting.recipe())
    assert '"auto"' not in json.dumps(engine.resolved)
    model, optimizer = build(setting)
    engine.prepare(model, optimizer)
    check_shards(engine)
    rows = train(engine, setting)
    engine.check_replicas()
    weights = dict(engine.full_weights())
    if engine.is_main:
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / name)
    if engine.backend == "deepspeed" and name == "clipped":
        resume(setting, engine, folder / "state", weights)
    engine.close()
    return rows


def check_shards(engine: Engine) -> None:
    """Every element of every trainable parameter lies in exactly one rank's range (or in all)."""
    for name, shard in engine.shards().items():
        covered = torch.zeros(shard.shape.numel())
        covered[shard.start : shard.stop] = 1
        expected = 1 if engine.sharded else engine.world
        assert bool((engine.reduce_sum(covered) == expected).all()), name
        assert shard.values.shape == (shard.stop - shard.start,), name


def resume(setting: Setting, engine: Engine, folder: Path, final: dict[str, torch.Tensor]) -> None:
    """Stop after half the steps, continue in another engine: the weights are the same bits."""
    engine.close()
    half = setting.steps // 2
    first = start(setting.recipe())
    first.prepare(*build(setting))
    train(first, setting, last=half)
    checkpoints = Checkpoints(folder, first, {}, keep=1)
    checkpoints.save(Position(half))
    checkpoints.wait()
    checkpoints.close()
    first.close()
    second = start(setting.recipe())
    second.prepare(*build(setting))
    assert Checkpoints(folder, second, {}, keep=1).resume() == Position(half)
    train(second, setting, first=half)
    for name, weight in second.full_weights():
        assert torch.equal(weight, final[name]), name
    second.close()


def check_divergence() -> None:
    """Ranks with different weights are found out (not on ZeRO-3, which has one copy)."""
    setting = Setting(steps=1)
    engine = start(setting.recipe())
    engine.prepare(*build(setting))
    if engine.world > 1 and engine.stage != 3:
        with torch.no_grad():
            next(iter(engine.model.parameters())).view(-1)[0] += 1e-3 * engine.rank
        try:
            engine.check_replicas()
        except PostshareError:
            print("divergence found")
        else:
            raise AssertionError("different weights were not noticed")
    engine.close()


def main() -> None:
    folder = Path(sys.argv[1])
    rows = {name: run(name, setting, folder) for name, setting in SETTINGS.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    check_divergence()


if __name__ == "__main__":
    main()
