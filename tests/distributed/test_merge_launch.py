"""A merge on calibration text on two processes: once, on one of them, and read by all."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.launcher import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

RECIPE = (
    "recipes/demo_postshare.yaml",
    "materialize={merge: least_squares, calibration_blocks: 3, heal_steps: 2}",
    "train.steps=1",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.warmup_steps=0",
    "train.checkpoint_every=0",
    "data.sequence_length=64",
    "evaluate.blocks=2",
    "evaluate.continued=false",
)


def test_all_ranks_heal_what_was_merged(tmp_path: Path) -> None:
    found = {}
    for config in ("cpu", "zero3"):
        folder = tmp_path / config
        run(config, "-m", "train", *RECIPE, f"output_dir={folder}", timeout=600)
        found[config] = [
            load_file(folder / name / "model.safetensors") for name in ("merged", "heal/weights")
        ]
    for one, other in zip(found["cpu"], found["zero3"], strict=True):
        assert one.keys() == other.keys()
        for name, weight in one.items():
            difference = float((other[name] - weight).norm())
            assert difference <= 1e-4 * float(weight.norm()), name
    merged, healed = found["zero3"]
    assert healed["model.norm.weight"].shape == merged["model.norm.weight"].shape
    assert not healed["model.norm.weight"].equal(merged["model.norm.weight"])
