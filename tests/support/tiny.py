"""A training that takes milliseconds: a random Llama, a few blocks, a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.plan import HeadTie, SharingPlan
from tests.support.in_memory import text_blocks
from train.data.blocks import Blocks
from train.recipe.recipe import Recipe, validate
from train.tracking.metrics_log import TIMING_KEYS, read_rows
from train.training.job import TrainJob

# Threads that wait for each other between tiny operations take longer than the operations.
torch.set_num_threads(1)

VOCABULARY, LENGTH = 48, 16
PLAN = SharingPlan(
    ties=(
        HeadTie((1, 0), (0, 1), ("q", "k", "v")),
        HeadTie((1, 2), (0, 1), ("q", "k", "v")),
    )
)


def model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **config}))


def blocks(count: int = 24, document_mask: bool = False, seed: int = 1) -> Blocks:
    """Documents of 3 to 40 tokens: blocks predict unequal numbers of tokens under the mask."""
    generator = torch.Generator().manual_seed(seed)
    documents: list[list[int]] = []
    while sum(map(len, documents)) < count * LENGTH:
        size = int(torch.randint(3, 41, (), generator=generator))
        documents.append(torch.randint(VOCABULARY, (size,), generator=generator).tolist())
    return text_blocks(documents, LENGTH, document_mask=document_mask)


def recipe(folder: Path, penalty: dict[str, Any] | None = None, **train: Any) -> Recipe:
    section = {
        "steps": 6,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        **train,
    }
    return validate(
        {
            "name": "tiny",
            "output_dir": str(folder),
            "model": {"path": "tiny"},
            "data": {"train": "tiny", "validation": "tiny", "sequence_length": LENGTH},
            "plan": {"strategy": "random", "budget": {"heads": 2}},
            "penalty": penalty or {},
            "train": section,
        }
    )


def job(recipe: Recipe, plan: SharingPlan | None = PLAN, **fields: Any) -> TrainJob:
    made = fields.pop("model", None) or model()
    values: dict[str, Any] = {
        "name": "post" if plan else "continued",
        "load": lambda: made,
        "plan": plan,
        "train_blocks": blocks(),
        "validation_blocks": blocks(5, seed=2),
        "folder": recipe.folder,
        "steps": recipe.train.steps,
        "learning_rate": recipe.train.learning_rate,
    }
    return TrainJob(**{**values, **fields})


def curve(folder: Path) -> list[dict[str, Any]]:
    """The rows of a training without what the clock decides."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a training has left."""
    return load_file(folder / "weights" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    """Of two trainings, bitwise."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise equal weights, equal metrics."""
    assert curve(one) == curve(other)
    assert_same_weights(one, other)


def row(step: int, **fields: Any) -> dict[str, Any]:
    """What a training logs of a step."""
    values = {
        "step": step,
        "tokens": 100 * step,
        "lm_loss": 2.0,
        "penalty": 0.5,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.1,
        "tokens_per_second": 1234.0,
        "memory_bytes": 2**30,
    }
    return {**values, **fields}
