"""A teacher that is whole on no rank, and its answers, each rank's share of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.in_memory import text_blocks
from tests.support.training import LENGTH, VOCABULARY
from train.data.blocks import Blocks
from train.distributed.engines.base import Engine
from train.distributed.engines.start import start
from train.recipe.recipe import Recipe, validate
from train.training.objective import Lessons
from train.training.teacher import Teacher

BLOCKS = 70  # two chunks of 32 and one of 6: of two ranks one has nothing to ask in the end


def recipe(folder: Path, teacher: Path, **distill: Any) -> Recipe:
    section = {"top_k": 7, "temperature": 1.5, "cache": True, "teacher": str(teacher), **distill}
    return validate(
        {
            "name": "teacher",
            "output_dir": str(folder),
            "model": {"path": "unused"},
            "data": {"train": "unused", "validation": "unused", "sequence_length": LENGTH},
            "plan": {"strategy": "none"},
            "train": {"steps": 9, "batch_size": 12, "micro_batch_size": 2, "learning_rate": 1e-3},
            "distill": section,
        }
    )


def blocks() -> Blocks:
    """Documents of 5 to 24 tokens, which do not see each other."""
    generator = torch.Generator().manual_seed(4)
    documents: list[list[int]] = []
    while sum(map(len, documents)) < BLOCKS * LENGTH:
        size = int(torch.randint(5, 25, (), generator=generator))
        documents.append(torch.randint(VOCABULARY, (size,), generator=generator).tolist())
    masked = text_blocks(documents, LENGTH, document_mask=True)
    assert BLOCKS <= len(masked) < 96
    return masked


def check_spread(asked: Recipe, engine: Engine) -> None:
    """Every parameter's rows lie on one rank each, before and after a forward."""
    teacher = Teacher(asked, engine)
    total = sum(p.numel() for p in teacher.model.parameters())
    for _ in range(2):
        parameters: list[Any] = list(teacher.model.parameters())
        own = sum(p.to_local().numel() for p in parameters)
        assert engine.reduce_sum(own) == total
        assert own < 0.6 * total
        ids = torch.zeros(1, LENGTH, dtype=torch.int64, device=engine.device)
        with teacher({"input_ids": ids}):
            pass


def ask(folder: Path, teacher: Path) -> None:
    """On every rank: the teacher is spread over all, and all see its answers to all blocks."""
    asked = recipe(folder, teacher)
    engine = start(asked)
    check_spread(asked, engine)
    taught = Lessons(asked, engine, blocks(), 9).blocks
    rows = [taught[index]["teacher_rest"] for index in range(len(taught))]  # every rank sees all
    same = torch.cat(rows).double().sum()
    assert engine.reduce_max(float(same)) == -engine.reduce_max(float(-same))
    print("all answered")
    engine.close()
