"""The penalty against a loop over pairs, and against the training step that it is part of.

Model: 8 layers x 16 heads, hidden 1024, 30 % of the heads tied (q, k, v), 4,096 tokens a step.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from timing import interleaved
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.heads import HeadLayout, unit_view
from sa_models.plan import SharingPlan
from sa_models.scores.weight_cosine import random_matches
from sa_models.search.budget import units_of_ratio
from sa_models.search.pairs import make_plan
from tests.support.operations import Operations
from tests.support.pulled import Weights
from train.distributed.engines.start import start
from train.penalty.coupled import CHUNK_ELEMENTS, Penalty
from train.recipe.recipe import Recipe, validate

TOKENS = (4, 1024)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=8,
            num_attention_heads=16,
            tie_word_embeddings=True,
        )
    )


def recipe() -> Recipe:
    return validate(
        {
            "name": "bench",
            "model": {"path": "none"},
            "data": {"train": "none", "validation": "none", "sequence_length": TOKENS[1]},
            "plan": {"budget": {"ratio": 0.3}},
            "train": {
                "steps": 1,
                "batch_size": TOKENS[0],
                "micro_batch_size": TOKENS[0],
                "learning_rate": 1e-4,
            },
        }
    )


def loop_over_pairs(dense: LlamaForCausalLM, layout: HeadLayout, plan: SharingPlan) -> float:
    """Forward and backward as the published code has it: a few small operations for every pair."""
    total: Any = 0.0
    for tie in plan.ties:
        for p in tie.projections:
            x, y = (
                unit_view(dense.get_parameter(layout.parameter_name(layer, p)), layout, p)[unit]
                for layer, unit in (tie.target, tie.source)
            )
            total = total + torch.norm(x - y)
    (0.5 * total / len(plan.ties)).backward()
    return float(total.detach()) / len(plan.ties)


def operations(pairs: int) -> float:
    """Operations of a projection, forward and backward, in chunks as on a GPU; views left out."""
    layout = HeadLayout(layers=33, hidden_size=64, heads=32, kv_heads=32, head_dim=2)
    weights: Any = Weights(layout)
    plan = make_plan(random_matches(layout, 0), layout, pairs, "qkvo")
    penalty = Penalty(plan, layout, "l2", chunk_elements=CHUNK_ELEMENTS)
    penalty.apply(weights, 0.5)
    with Operations() as counted:
        penalty.apply(weights, 0.5)
    return counted.computing.total() / 4


def measure(step_rounds: int = 3) -> dict[str, dict[str, float]]:
    dense = model()
    layout = HeadLayout.from_config(dense.config)
    plan = make_plan(random_matches(layout, 0), layout, units_of_ratio(0.3, layout), "qkv")
    penalty = Penalty(plan, layout, "l2")
    engine = start(recipe())
    engine.prepare(dense, torch.optim.AdamW(dense.parameters(), lr=1e-6))
    ids = torch.randint(0, 4096, TOKENS)

    def training_step() -> None:
        with engine.micro_step(boundary=True):
            engine.backward(engine.model(ids, labels=ids, use_cache=False).loss)
        engine.step()

    # Gradients exist, as at the end of a backward; both variants add to them.
    for parameter in dense.parameters():
        parameter.grad = torch.zeros_like(parameter)
    difference = abs(penalty.apply(engine, 0.5).value - loop_over_pairs(dense, layout, plan))
    assert difference < 1e-3, difference
    small = interleaved(
        7,
        loop=lambda: loop_over_pairs(dense, layout, plan),
        ours=lambda: penalty.apply(engine, 0.5),
    )
    engine.zero_grad()
    step = interleaved(step_rounds, step=training_step)["step"]
    return {
        "penalty_8x16x1024": {
            "seconds_loop": small["loop"],
            "seconds": small["ours"],
            "speedup": small["loop"] / small["ours"],
            "target_speedup": 10,
            "seconds_training_step": step,
            "share_of_training_step": small["ours"] / step,
            "target_share_of_training_step": 0.03,
            "operations_of_38_pairs": operations(38),
            "operations_of_1000_pairs": operations(1000),
            "target_operations": 60,
        }
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
