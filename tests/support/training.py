"""Tiny trainings with the real engine, penalty and models, shared by the workers."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.basis import SharedBasis
from sa_models.export.peft_adapter import insert_
from sa_models.materialize.low_rank_residual import Pair
from sa_models.materialize.residual_shapes import residual_shapes
from sa_models.materialize.shared_basis import factorized
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import HeadTie, SharingPlan
from sa_models.spans import AttentionSpan
from sa_models.weights.parameter_shapes import llama_shapes
from sa_models.weights.structure import convert
from train.distributed.engines.base import Engine
from train.models.checkpointing import enable_checkpointing
from train.models.lora import adapt
from train.penalty.coupled import Penalty
from train.penalty.decoupled import Pull
from train.penalty.lora import LoraPenalty
from train.recipe.recipe import PenaltySection, Recipe, validate
from train.recipe.sections.training import Checkpointing
from train.training.objective import Lessons, Objective

LENGTH = 16
VOCABULARY = 101

# Sizes that divide by no world size: norms of 35, embeddings of 101 x 35, attention weights of
# 20 x 35 = 700 elements, which three ranks cannot share out evenly and whose units they cut.
MHA = LlamaConfig(
    hidden_size=35,
    intermediate_size=61,
    num_hidden_layers=4,
    num_attention_heads=5,
    num_key_value_heads=5,
    head_dim=4,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
GQA = LlamaConfig(
    hidden_size=45,
    intermediate_size=53,
    num_hidden_layers=5,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=6,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
UNTIED = LlamaConfig(**{**MHA.to_dict(), "tie_word_embeddings": False})
ALL = ("q", "k", "v", "o")
SPANS = (AttentionSpan(0, (1,), "attention"), AttentionSpan(2, (3,), "kv"))
BOTH = SharingPlan(
    (
        HeadTie((1, 0), (0, 1), ALL),
        HeadTie((2, 2), (0, 1), ("v", "o")),  # a follower has no q and k of its own,
        HeadTie((4, 1), (0, 0), ("q", "o")),  # this one no k and v
    ),
    spans=(AttentionSpan(1, (2,), "attention"), AttentionSpan(3, (4,), "kv")),
)
MODELS: dict[str, tuple[LlamaConfig, SharingPlan]] = {
    # A chain, a source with two targets, two targets in one layer.
    "ties": (
        MHA,
        SharingPlan(
            (
                HeadTie((2, 0), (1, 3), ALL),
                HeadTie((1, 3), (0, 2), ALL),
                HeadTie((2, 4), (0, 2), ("q", "o")),
            ),
            released=True,
        ),
    ),
    # A source with three targets, two of them in one layer.
    "stars": (
        MHA,
        SharingPlan(
            (
                *(HeadTie(target, (0, 2), ALL) for target in ((1, 3), (2, 0), (2, 4))),
                HeadTie((3, 1), (1, 0), ("q", "o")),
            )
        ),
    ),
    "spans": (UNTIED, SharingPlan(spans=SPANS)),
    "both": (GQA, BOTH),
    # Ties between layers that have lost different units.
    "removed": (
        MHA,
        SharingPlan(
            (HeadTie((2, 0), (1, 3), ALL), HeadTie((3, 4), (1, 1), ("v", "o"))),
            removed=((1, 0), (1, 2), (2, 1), (2, 4), (3, 3)),
        ),
    ),
    # The first layer and another have no attention.
    "dropped": (
        MHA,
        SharingPlan(
            (HeadTie((3, 4), (1, 1), ("v", "o")),),
            removed=((1, 2), *((layer, unit) for layer in (0, 2) for unit in range(5))),
        ),
    ),
    # A layer that owns none of its queries, and one that reads another layer's for all but one.
    "owned": (
        MHA,
        SharingPlan(
            (
                *(HeadTie((2, unit), (0, unit), ("q", "o")) for unit in range(5)),
                *(HeadTie((3, unit), (1, 2), ALL) for unit in range(4)),
            )
        ),
    ),
    # Factors that two layers share, and one layer of its own; sizes that divide by no world size.
    "basis": (GQA, SharingPlan(basis=SharedBasis(2, (19, 17, 11), (7, 11, 5), (13, 7, 9)))),
}


@dataclass(frozen=True)
class Setting:
    """What one training does; everything else is fixed.

    Attributes:
        model: a key of `MODELS`.
        heal: train the compact model, in which a tied unit is one parameter, without a penalty.
        residual: with residuals of rank 3 on tied units, trained too, or alone.
        accumulation: micro-batches per step and rank.
        trainable: a prefix of parameter names.
        lora: ranks of adapters that train alone; 0: none.
        distill: the recipe's section, with :func:`teacher_folder` as the teacher.
        pull: the penalty's section, where it moves the weights after the step.
        chunk: rows of logits at a time, but where one process without an engine of a library sees
            whole ones; 0: as by default.
        compiled: the layers, the teacher's too, but the student's own in the same reference.
    """

    model: str = "ties"
    heal: bool = False
    residual: Literal["", "both", "alone"] = ""
    lora: int = 0
    kind: str = "l2"
    clip_norm: float | None = 0.5
    accumulation: int = 1
    precision: str = "fp32"
    lm_weight: float = 0.5
    trainable: str = "model"
    checkpointing: Checkpointing = False
    steps: int = 3
    learning_rate: float = 1e-2
    batch: int = 48
    distill: tuple[tuple[str, Any], ...] = ()
    pull: PenaltySection | None = None
    chunk: int = 0
    compiled: bool = False

    @cached_property
    def plan(self) -> SharingPlan:
        return MODELS[self.model][1]

    def recipe(self) -> Recipe:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return validate(
            {
                "name": "distributed-test",
                "model": {"path": "unused"},
                "data": {"train": "unused", "validation": "unused", "sequence_length": LENGTH},
                "plan": {"strategy": "none"},
                "train": {
                    "steps": self.steps,
                    "batch_size": self.batch,
                    "micro_batch_size": self.batch // (self.accumulation * world),
                    "learning_rate": self.learning_rate,
                    "clip_norm": self.clip_norm,
                    "precision": self.precision,
                    "compile": self.compiled,
                },
                **({"distill": self._distill()} if self.distill else {}),
                **({"lora": self._lora()} if self.lora else {}),
            }
        )

    def _lora(self) -> dict[str, Any]:
        return {"rank": self.lora, "base": "bf16" if self.precision == "bf16" else "fp32"}

    def _distill(self) -> dict[str, Any]:
        return {**dict(self.distill), "teacher": str(teacher_folder(self.model))}


def teacher_folder(model: str) -> Path:
    """A model of the same shape with other weights.

    Call it before a launch: ranks must find the folder, as saving a model is a collective there.
    """
    config = copy.deepcopy(MODELS[model][0])  # making a model changes its config
    shape = hashlib.sha256(repr(sorted(llama_shapes(config).items())).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"postshare-teachers-{os.getuid()}" / f"{model}-{shape}"
    if not folder.is_dir():
        torch.manual_seed(2)
        folder.parent.mkdir(exist_ok=True)
        beside = tempfile.mkdtemp(dir=folder.parent)
        LlamaForCausalLM(config).save_pretrained(beside)
        try:
            os.rename(beside, folder)
        except OSError:
            shutil.rmtree(beside)
    return folder


def build(setting: Setting) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(1)
    config, plan = MODELS[setting.model]
    model = convert(LlamaForCausalLM(config), plan)
    if plan.basis is not None:
        text = torch.randint(0, VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(3))
        model = factorized(model, plan, [{"input_ids": text}])
    elif setting.heal:
        materialize_(dict(model.named_parameters()), plan.layout(config), plan)
        model = SharedLlamaForCausalLM.from_materialized(model, plan)
    if setting.residual:
        shapes = residual_shapes(plan, config)
        insert_(
            model,
            {w: Pair(torch.randn(3, i) / 9, torch.randn(o, 3) / 9) for w, (o, i) in shapes.items()},
        )
    if setting.lora:
        adapt(model, setting.recipe())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.contiguous()
        if setting.lora and ".lora_B." in name:
            parameter.data.uniform_(-0.1, 0.1)
        trained = ".lora_" in name or (setting.residual != "alone" and not setting.lora)
        parameter.requires_grad_(trained and name.startswith((setting.trainable, "lm_head")))
    enable_checkpointing(model, setting.checkpointing)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=setting.learning_rate,
        weight_decay=0.0,
        eps=1e-4,  # near-zero gradients must not decide a sign: fp32 sums differ in their order
        fused=True,
    )
    return model.train(), optimizer


def train(engine: Engine, setting: Setting, first: int = 0, last: int | None = None) -> list[dict]:
    """Steps [first, last) on data that depends on the step alone; one row of numbers a step."""
    penalty, pull = None, None
    layout = setting.plan.layout(MODELS[setting.model][0])
    if setting.pull is not None:
        pull = Pull(setting.plan, layout, setting.pull)
    elif setting.plan.ties and not setting.heal:
        options = (setting.plan, layout, setting.kind)
        inner = engine.accelerator.unwrap_model(engine.model)
        penalty = LoraPenalty(inner, *options) if setting.lora else Penalty(*options)
    recipe = setting.recipe()
    lessons = Lessons(recipe, engine, None, 0) if recipe.distill else None  # type: ignore[arg-type]
    model = engine.accelerator.unwrap_model(engine.model)
    objective = Objective(engine, model, recipe, setting.lm_weight, lessons)
    micro = setting.batch // (setting.accumulation * engine.world)
    rows = []
    for step in range(first, setting.steps if last is None else last):
        generator = torch.Generator().manual_seed(1000 + step)
        ids = torch.randint(0, VOCABULARY, (setting.batch, LENGTH), generator=generator)
        # Labels of uneven number per row: averaging over ranks or micro-batches would be wrong.
        labels = ids.clone()
        for row in range(setting.batch):
            labels[row, : 1 + row % LENGTH] = -100
        tokens = int((labels[:, 1:] != -100).sum())
        total = 0.0
        for m in range(setting.accumulation):
            begin = (m * engine.world + engine.rank) * micro
            at = slice(begin, begin + micro)
            with engine.micro_step(boundary=m == setting.accumulation - 1):
                batch = {"input_ids": ids[at], "labels": labels[at]}
                minimised, losses = objective(batch)
                engine.backward(minimised / tokens)
            # With a teacher what is minimised, else the language-model loss, whatever its weight.
            total += (minimised if lessons else losses["lm_loss"]).item() / tokens
        pulled = None if penalty is None else penalty.apply(engine, 0.5)
        norm = engine.step()
        if pull is not None:
            pulled = pull.apply(engine, step, setting.learning_rate)
        rows.append(
            {
                "lm": engine.reduce_sum(total),
                "penalty": 0.0 if pulled is None else pulled.value,
                "norm": norm,
                "distance": [] if pulled is None else pulled.distance.tolist(),
            }
        )
    return rows
