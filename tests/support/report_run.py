"""A run folder that looks as a finished run leaves it, written in milliseconds: known numbers."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from sa_models.plan import AttentionSpan, HeadTie, SharingPlan
from train.evaluation.perplexity import BlockLosses
from train.evaluation.summary import TrainingCost, summarize
from train.planning.plan_maps import save_similarity
from train.recipe.recipe import Recipe, validate
from train.stages.provenance import record_start

TOKENS = (10, 30, 20, 40)
BASE = np.array([3.0, 3.2, 3.1, 2.9])
"""Nats per token of the base, by block."""
ABOVE = {"base": 0.0, "continued": -0.1, "direct": 0.6, "post": -0.04}
"""Of every block, so that the interval of a difference is that difference."""

GQA = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
TIES = SharingPlan(
    ties=(
        HeadTie((1, 0), (0, 1), ("q", "k", "v"), score=0.25),
        HeadTie((2, 1), (0, 1), ("q", "k", "v"), score=0.5),
    )
)
MIXED = SharingPlan(
    ties=(HeadTie((2, 1), (0, 1), ("v", "o")),),
    spans=(AttentionSpan(0, (1,)),),
)


def recipe(folder: Path, **sections: Any) -> Recipe:
    value: dict[str, Any] = {
        "name": "made",
        "output_dir": str(folder),
        "model": {"path": "some/llama"},
        "data": {"train": "text.txt", "validation": "text.txt", "sequence_length": 16},
        "plan": {"budget": {"ratio": 0.4}},
        "train": {"steps": 40, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
    }
    return validate({**value, **sections})


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def losses(above: float) -> BlockLosses:
    return BlockLosses(tuple((BASE + above) * TOKENS), TOKENS)


def make_run(
    folder: Path,
    shared: SharingPlan = TIES,
    config: LlamaConfig = GQA,
    steps: int = 40,
    above: dict[str, float] = ABOVE,
    **sections: Any,
) -> Path:
    """Write all files of a finished run but for its weights and exports; returns the folder."""
    folder.mkdir(parents=True)
    made = recipe(folder, **sections)
    made.save(folder / "recipe.yaml")
    record_start(folder, config, 1, torch.device("cpu"))
    shared.save(folder / "plan.json")
    (folder / "plan-similarity.svg").write_text(similarity_picture())
    for name, where in (("post", folder), ("continued", folder / "continued")):
        write_training(where, name, steps)
    pairs = [
        {"step": step, "distance": [[2 - step / steps, 1.0, None]] * len(shared.ties)}
        for step in range(1, steps + 1, max(1, steps // 50))
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    measured = {name: losses(value) for name, value in above.items()}
    write(folder / "evaluation-blocks.json", {n: asdict(b) for n, b in measured.items()})
    summary = summarize(
        {name: block.perplexity for name, block in measured.items()},
        shared,
        shared.savings(config),
        0.4,
        {"base": 4_000_000, "compact": 3_700_000},
        TrainingCost(tokens=steps * 64, seconds=90.0),
        element_bytes=4,
        positions=config.max_position_embeddings,
    )
    write(folder / "summary.json", summary)
    return folder


@functools.cache
def similarity_picture() -> str:
    scores = torch.linspace(-1, 1, 36).view(6, 6)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        save_similarity(scores, SharingPlan().layout(GQA), "qk", file)
        return file.with_suffix(".svg").read_text()


def write_training(folder: Path, name: str, steps: int) -> None:
    noise = np.random.default_rng(0).normal(size=steps)
    rows = [
        {
            "step": step,
            "tokens": step * 64,
            "lm_loss": 3.0 + noise[step - 1],
            "penalty": 1.0 / step if name == "post" else None,
            "pair_distance_mean": 1.0 / step,
            "pair_distance_worst": 2.0 / step,
            "seconds": 0.5 * step,
            "step_seconds": 0.5,
            "data_wait_seconds": 0.05,
            "tokens_per_second": 128.0,
            "memory_bytes": 5 * 10**8,
        }
        for step in range(1, steps + 1)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(folder / "result.json", {"steps": steps, "tokens": steps * 64, "seconds": 80.0})
    backend = {"backend": "plain", "processes": 1, "device": "cpu"}
    write(folder / "run.json", {"identity": {}, "backend": backend})
