"""Basis Sharing on two processes: factors of several layers, whole (DDP) or split up."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.launcher import run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

RECIPE = (
    "recipes/demo_postshare.yaml",
    "plan={strategy: basis, budget: {parameters: -10%}}",
    "penalty={}",
    "materialize={heal_steps: 3, calibration_blocks: 2}",
    "train.steps=0",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.warmup_steps=0",
    "train.checkpoint_every=0",
    "data.sequence_length=64",
    "evaluate.blocks=2",
    "evaluate.continued=false",
)


def test_factors_train_alike_on_every_backend(tmp_path: Path) -> None:
    found = {}
    for config in ("cpu", "ddp", "zero3", "fsdp2"):
        folder = tmp_path / config
        run(config, "-m", "train", *RECIPE, f"output_dir={folder}", timeout=600)
        found[config] = load_file(folder / "heal" / "weights" / "model.safetensors")
    first = load_file(tmp_path / "cpu" / "merged" / "model.safetensors")
    shared = "model.layers.2.self_attn.k_proj.basis.weight"
    assert shared in first
    for config in ("ddp", "zero3", "fsdp2"):
        assert found[config].keys() == found["cpu"].keys()
        for name, weight in found["cpu"].items():
            difference = float((found[config][name] - weight).norm())
            assert difference <= 1e-4 * float(weight.norm()), (config, name)
            moved = float((weight - first[name]).norm())
            assert difference <= 1e-2 * moved + 1e-7, (config, name)
    assert not found["cpu"][shared].equal(first[shared])
