"""Runs on every rank: some steps of a training, from its newest checkpoint on, and a checkpoint.

resume_worker.py FOLDER STEPS   (rank 0 adds to FOLDER/rows.json)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.support.training import Setting, build, train
from train.distributed.engines.start import start
from train.training.checkpoint import Checkpoints, Position

SETTING = Setting(clip_norm=0.5, steps=8)


def go_on(folder: Path, steps: int) -> None:
    engine = start(SETTING.recipe())
    engine.prepare(*build(SETTING))
    checkpoints = Checkpoints(folder / "checkpoints", engine, {"seed": 0}, keep=2)
    at = checkpoints.resume()
    rows = train(engine, SETTING, at.step, at.step + steps)
    checkpoints.save(Position(at.step + steps))
    checkpoints.wait()
    weights = dict(engine.full_weights())
    if engine.is_main:
        save_file({n: w.contiguous() for n, w in weights.items()}, folder / "weights.safetensors")
        file = folder / "rows.json"
        earlier = json.loads(file.read_text()) if file.is_file() else []
        file.write_text(json.dumps(earlier + rows))
    checkpoints.close()
    engine.close()


if __name__ == "__main__":
    go_on(Path(sys.argv[1]), int(sys.argv[2]))
