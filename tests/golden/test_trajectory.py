"""30 steps of the released training, reproduced by the very `train()` that users call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sa_models.plan import HeadTie, SharingPlan
from tests.support.in_memory import text_blocks
from train.recipe.recipe import validate
from train.tracking.metrics_log import read_rows
from train.training.checkpoint import PART
from train.training.job import TrainJob
from train.training.loop import train

STEPS = 30


def released_plan(path: Path) -> SharingPlan:
    """The published selection, chains and all."""
    pairs = json.loads(path.read_text())["pairs"]
    return SharingPlan(
        ties=tuple(
            HeadTie(
                (pair["target_layer"], pair["target_head"]),
                (pair["source_layer"], pair["source_head"]),
                ("q", "k", "v"),
            )
            for pair in pairs
        ),
        released=True,
    )


@pytest.mark.parametrize(
    ("mode", "loss_weights"), [("lm_plus_norm", [0.5, 0.5]), ("lm_only", [1.0, 0.0])]
)
def test_thirty_steps(shared: Path, tmp_path: Path, mode: str, loss_weights: list[float]) -> None:
    golden = json.loads((shared / "golden" / f"postshare_traj_{mode}.json").read_text())
    rows = np.load(shared / "golden" / "input_ids.npy").tolist()
    recipe = validate(
        {
            "name": mode,
            "output_dir": str(tmp_path),
            "model": {"path": str(shared / "models/stories260K-mha")},
            "data": {"train": "unused", "validation": "unused", "sequence_length": 128},
            "plan": {"strategy": "released", "budget": {"ratio": 0.3}},
            "penalty": {"kind": "l2", "loss_weights": loss_weights},
            "train": {
                # One more than the published 30, to see the loss after the last of them; its
                # weights are those of the checkpoint.
                "steps": STEPS + 1,
                "checkpoint_every": STEPS,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "weight_decay": 0.1,
                "weight_decay_exclude": [],
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "clip_norm": None,
            },
        }
    )
    train(
        TrainJob(
            name="post",
            load=lambda: LlamaForCausalLM.from_pretrained(shared / "models/stories260K-mha"),
            plan=released_plan(shared / "golden" / "selection_qk_0.3.json"),
            train_blocks=text_blocks(rows, 128),
            validation_blocks=None,
            folder=tmp_path,
            steps=STEPS + 1,
            learning_rate=1e-3,
        ),
        recipe,
    )

    curve = read_rows(tmp_path / "metrics.jsonl")
    for key, name in (("lm", "lm_loss"), ("penalty", "penalty"), ("total", "total_loss")):
        np.testing.assert_allclose([row[name] for row in curve], golden[key], rtol=1e-3)
    weights = load_file(tmp_path / f"checkpoints/step-{STEPS:06d}" / PART.format(0, 1))
    norms = {n: float(weight.norm()) for n, weight in weights.items() if n.endswith(".weight")}
    assert norms == pytest.approx(golden["final_weight_l2_norms"], rel=1e-3)
