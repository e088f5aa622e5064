"""A tiny training with the real engine and penalty, shared by the workers of this folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from train.engine import Engine
from train.recipe import Recipe, validate
from train.regularizer import Penalty

# Sizes that divide by no world size: norms of 35, embeddings of 101 x 35, attention weights of
# 20 x 35 = 700 elements, which three ranks cannot share out evenly and whose units they cut.
CONFIG = LlamaConfig(
    hidden_size=35,
    intermediate_size=61,
    num_hidden_layers=3,
    num_attention_heads=5,
    num_key_value_heads=5,
    head_dim=4,
    vocab_size=101,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
LENGTH = 16
# A chain, a source with two targets, two targets in one layer.
PLAN = SharingPlan(
    (
        HeadTie((2, 0), (1, 3), ("q", "k", "v", "o")),
        HeadTie((1, 3), (0, 2), ("q", "k", "v", "o")),
        HeadTie((2, 4), (0, 2), ("q", "o")),
    ),
    released=True,
)


@dataclass(frozen=True)
class Setting:
    """What one training does; everything else is fixed."""

    kind: str = "l2"
    clip_norm: float | None = 0.5
    precision: str = "fp32"
    lm_weight: float = 0.5
    trainable: str = "model"  # a prefix of parameter names
    steps: int = 4
    learning_rate: float = 1e-2
    batch: int = 12
    sections: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        return validate(
            {
                "name": "distributed-test",
                "model": {"path": "unused"},
                "data": {"train": "unused", "validation": "unused", "sequence_length": LENGTH},
                "plan": {"strategy": "none"},
                "train": {
                    "steps": self.steps,
                    "batch_size": self.batch,
                    "micro_batch_size": 2,
                    "learning_rate": self.learning_rate,
                    "clip_norm": self.clip_norm,
                    "precision": self.precision,
                },
            }
        )


def build(setting: Setting) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(setting.trainable))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=setting.learning_rate,
        weight_decay=0.0,
        eps=1e-4,  # near-zero gradients must not decide a sign: fp32 sums differ in their order
    )
    return model, optimizer


def train(engine: Engine, setting: Setting, first: int = 0, last: int | None = None) -> list[dict]:
    """Steps [first, last) on data that depends on the step alone; one row of numbers a step."""
    penalty = Penalty(PLAN, HeadLayout.from_config(CONFIG), setting.kind)
    micro, world = 2, engine.world
    rows = []
    for step in range(first, setting.steps if last is None else last):
        generator = torch.Generator().manual_seed(1000 + step)
        ids = torch.randint(0, 101, (setting.batch, LENGTH), generator=generator)
        # Labels of uneven number per row: averaging over ranks or micro-batches would be wrong.
        labels = ids.clone()
        for row in range(setting.batch):
            labels[row, : 1 + row] = -100
        tokens = int((labels[:, 1:] != -100).sum())
        accumulation = setting.batch // (micro * world)
        total = 0.0
        for m in range(accumulation):
            at = slice((m * world + engine.rank) * micro, (m * world + engine.rank + 1) * micro)
            with engine.micro_step(boundary=m == accumulation - 1):
                logits = engine.model(input_ids=ids[at].to(engine.device)).logits.float()
                loss = F.cross_entropy(
                    logits[:, :-1].flatten(0, 1),
                    labels[at][:, 1:].flatten().to(engine.device),
                    ignore_index=-100,
                    reduction="sum",
                )
                engine.backward(setting.lm_weight * loss / tokens)
            total += loss.item() / tokens
        pulled = penalty.apply(engine, 0.5)
        norm = engine.step()
        rows.append(
            {
                "lm": engine.reduce_sum(total),
                "penalty": pulled.value,
                "norm": norm,
                "distance": pulled.distance.tolist(),
            }
        )
    return rows
