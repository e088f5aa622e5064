"""The modes of the penalty on a real model: perplexity before and after sharing, cost of a step.

    python tests/benchmarks/pull_modes.py FOLDER [MODE ...] [a.b=c ...]

30 % of mixed7M's units (cosine pairs, q, k and v), 100 steps of 2,048 tokens. FOLDER keeps the
trainings: a second start measures what is missing. Times are of the processor, not of the clock.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sa_models.heads import HeadLayout
from sa_models.materialize.ties import materialize_
from sa_models.weights.safetensors_folder import WeightsFolder
from train.data.blocks import prepare_data
from train.evaluation.perplexity import perplexity
from train.models.base_model import load_base, load_dense
from train.models.tokenizer import load_tokenizer
from train.penalty.coupled import Penalty
from train.penalty.decoupled import Pull
from train.planning.find import find_ties
from train.planning.problem import PlanProblem
from train.recipe.load import override
from train.recipe.recipe import validate
from train.tracking.metrics_log import read_rows
from train.training.job import TrainJob
from train.training.loop import train

SHARED = Path(__file__).resolve().parents[3] / "shared"
MODES: dict[str, dict[str, Any]] = {
    "continued": {},
    "coupled": {},
    "decoupled": {"mode": "decoupled", "coefficient": 12.0},
    "progressive": {"mode": "progressive", "schedule": "cosine", "ramp_steps": 60},
}


def recipe(mode: str, folder: Path, overrides: list[str]) -> Any:
    data: dict[str, Any] = {
        "name": mode,
        "output_dir": str(folder / mode),
        "model": {"path": str(SHARED / "models" / "mixed7M")},
        "data": {
            "train": str(SHARED / "text" / "mixed-train.jsonl"),
            "validation": str(SHARED / "text" / "mixed-validation.jsonl"),
            "sequence_length": 256,
        },
        "plan": {"budget": {"ratio": 0.3}},
        "penalty": MODES[mode],
        "train": {
            "steps": 100,
            "batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 5e-4,
            "warmup_steps": 5,
            "checkpoint_every": 25,
        },
        "evaluate": {"blocks": 96},
    }
    for one in overrides:
        override(data, one)
    return validate(data)


@contextmanager
def timed(owner: type, name: str, spent: list[float]) -> Any:
    """Add the processor seconds of each call to `spent`."""
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return original(*arguments, **options)
        finally:
            spent.append(time.process_time() - began)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def measure(mode: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    asked = recipe(mode, folder, overrides)
    base = Path(asked.model.path)
    tokenizer = load_tokenizer(str(base), None)
    dense = load_dense(base, "sdpa")
    training, validation = prepare_data(
        asked, tokenizer, needed_blocks=None, vocab_size=dense.config.vocab_size
    )
    weights = WeightsFolder(base)
    plan, _ = find_ties(PlanProblem(asked.plan, weights.config), weights)

    def judge(model: Any) -> float:
        return round(perplexity(model.eval(), validation, 8, 96, progress=False).perplexity, 2)

    def shared(load: Callable[[], Any]) -> float:
        model = load()
        materialize_(dict(model.named_parameters()), HeadLayout.from_config(model.config), plan)
        return judge(model)

    job = TrainJob(
        name="post",
        load=lambda: load_base(asked),
        plan=None if mode == "continued" else plan,
        train_blocks=training,
        validation_blocks=None,
        folder=asked.folder,
        steps=asked.train.steps,
        learning_rate=asked.train.learning_rate,
    )
    pulls: list[float] = []
    owner: type = Penalty if mode == "coupled" else Pull
    began = time.process_time()
    with timed(owner, "apply", pulls):
        weights = train(job, asked).weights
    spent = time.process_time() - began
    rows = read_rows(asked.folder / "metrics.jsonl")
    row = rows[-1]
    return {
        "mode": mode,
        "options": overrides,
        "units": len(plan.ties),
        "before_sharing": judge(load_dense(weights, "sdpa")),
        "after_sharing": shared(lambda: load_dense(weights, "sdpa")),
        "merged": row.get("pairs_merged"),
        "all_merged_at_step": next(
            (r["step"] for r in rows if r.get("pairs_merged") == len(plan.ties)), None
        ),
        "pair_distance_mean": row.get("pair_distance_mean"),
        "pull_seconds_a_step": sum(pulls) / max(len(pulls), 1),
        "share_of_step": sum(pulls) / spent,
        "processor_seconds": spent,
    }


def main() -> None:
    folder, *rest = sys.argv[1:]
    overrides = [one for one in rest if "=" in one]
    for mode in [one for one in rest if "=" not in one] or list(MODES):
        print(json.dumps(measure(mode, Path(folder), overrides)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
