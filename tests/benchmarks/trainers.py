"""The trainings that bench_trainers.py compares, each in a process of its own, step by step.

All train the same random Llama on the same blocks in the same order: fp32, fused AdamW, the
gradient clipped to a norm of 1, a constant learning rate, every step logged. Data are drawn from a
skewed distribution, so that the loss falls and shows whether two trainings do the same.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TRL = REPOSITORY / ".site" / "trl"
LENGTH = 256
ROWS = 4
LEARNING_RATE = 2e-4
BLOCKS = 256


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights, its embeddings tied, and what it reads."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int

    def model(self) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config)

    def blocks(self) -> Any:
        """int64 [BLOCKS, LENGTH], in the order in which they are read."""
        import numpy as np

        drawn = np.random.default_rng(0).zipf(1.3, size=(BLOCKS, LENGTH))
        return 3 + drawn % (self.vocabulary - 3)


SHAPES = {
    "7M": Shape(4096, 256, 1024, 8, 8),
    "52M": Shape(4096, 512, 2048, 12, 8),
    "1024x8": Shape(32_000, 1024, 2816, 8, 16),
}
"""The two bases of docs/methods.md, and a wider one with Llama 2's vocabulary."""


class StopError(Exception):
    """The comparison has seen enough."""


class Gate:
    """Where a training waits before each step until it is its turn.

    Attributes:
        held: resident bytes before the first step: imports, weights, data.
    """

    def __init__(self, turns: Connection) -> None:
        self.turns = turns
        self.held = 0
        self.began: tuple[float, float] | None = None

    def __call__(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self.began is None:
            self.held = resident_bytes()
            self.turns.send(None)
        else:
            self.turns.send((now[0] - self.began[0], now[1] - self.began[1]))
        if self.turns.recv() == "stop":
            raise StopError
        self.began = time.perf_counter(), time.process_time()


def resident_bytes() -> int:
    rows = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("VmRSS:"))


def run(name: str, shape: str, folder: Path, turns: Connection) -> None:
    """One training until it is stopped; then its losses in nats a token and peak bytes are sent.

    Args:
        folder: for what it writes, of its own; what it prints is in `printed` there.
    """
    folder.mkdir()
    printed = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(printed, stream.fileno())
    os.environ["HF_HUB_OFFLINE"] = "1"
    losses: list[float] = []
    more: dict[str, float] = {}
    training = {"trainer": trainer, "trl": trl}.get(name)
    gate = Gate(turns)
    try:
        if training is None:
            ours(name, SHAPES[shape], folder, gate, losses, more)
        else:
            training(SHAPES[shape], folder, gate, losses)
    except StopError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    turns.send({"losses": losses, "peak_bytes": peak, "held_bytes": gate.held, **more})


# --- Hugging Face's trainers ----------------------------------------------------------------------


def options(folder: Path) -> dict[str, Any]:
    """What both take, and our recipe says."""
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 1000,
        "per_device_train_batch_size": ROWS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
    }


def at_the_gate(gate: Gate, losses: list[float]) -> Any:
    from transformers import TrainerCallback

    class AtTheGate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.append(logs["loss"])

    return AtTheGate()


def trainer(shape: Shape, folder: Path, gate: Gate, losses: list[float]) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    ids = shape.blocks().tolist()
    Trainer(
        shape.model(),
        TrainingArguments(**options(folder)),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=default_data_collator,
        callbacks=[at_the_gate(gate, losses)],
    ).train()


def trl(shape: Shape, folder: Path, gate: Gate, losses: list[float]) -> None:
    sys.path.insert(0, str(TRL))
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    SFTTrainer(
        shape.model(),
        SFTConfig(**options(folder), max_length=LENGTH),
        train_dataset=Dataset.from_dict({"input_ids": shape.blocks().tolist()}),
        processing_class=words(),
        callbacks=[at_the_gate(gate, losses)],
    ).train()


def words() -> Any:
    """A tokenizer, which TRL asks for where nothing is tokenized."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **named)


# --- ours -----------------------------------------------------------------------------------------


def ours(
    name: str,
    shape: Shape,
    folder: Path,
    gate: Gate,
    losses: list[float],
    more: dict[str, float],
) -> None:
    """`ours`: without a plan; `penalty`: 30 % of the heads tied (q, k, v); `span`: every other
    layer follows the one before it."""
    from unittest.mock import patch

    import torch

    from sa_models.heads import HeadLayout
    from sa_models.plan import SharingPlan
    from sa_models.scores.weight_cosine import random_matches
    from sa_models.search.budget import units_of_ratio
    from sa_models.search.pairs import make_plan
    from sa_models.spans import AttentionSpan
    from sa_models.weights.structure import convert
    from train.data.blocks import Blocks, permutation
    from train.data.packed import Packed, TextBlocks
    from train.penalty.coupled import Penalty
    from train.recipe.recipe import validate
    from train.tracking.metrics_log import read_rows
    from train.training import loop

    model = shape.model()
    plan = None
    if name == "penalty":
        layout = HeadLayout.from_config(model.config)
        units = units_of_ratio(0.3, layout)
        plan = make_plan(random_matches(layout, 0), layout, units, ("q", "k", "v"))
    elif name == "span":
        leaders = range(0, shape.layers, 2)
        plan = SharingPlan(spans=tuple(AttentionSpan(at, (at + 1,)) for at in leaders))
    recipe = validate(
        {
            "name": name,
            "output_dir": str(folder / "run"),
            "model": {"path": "none"},
            "data": {"train": "none", "validation": "none", "sequence_length": LENGTH},
            "plan": {"budget": {"ratio": 0.3}},
            "train": {
                "steps": 1000,
                "batch_size": ROWS,
                "micro_batch_size": ROWS,
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "weight_decay_exclude": ["*norm*", "*bias"],
            },
        }
    )
    read = shape.blocks()
    tokens = read.copy()
    tokens[permutation(BLOCKS, recipe.seed, 0)] = read
    packed = Packed([tokens.reshape(-1)], torch.full((BLOCKS,), LENGTH).numpy())
    job = loop.TrainJob(
        name="post",
        load=lambda: convert(model, plan or SharingPlan()),
        plan=plan,
        train_blocks=Blocks([TextBlocks(packed, LENGTH)]),
        validation_blocks=None,
        folder=recipe.folder,
        steps=recipe.train.steps,
        learning_rate=LEARNING_RATE,
    )
    spent: list[float] = []
    with patch.object(loop, "seed_step", gated(gate, loop.seed_step)), timed(Penalty, spent):
        try:
            loop.train(job, recipe)
        finally:
            losses += [row["lm_loss"] for row in read_rows(recipe.folder / "metrics.jsonl")]
            if spent:
                more["penalty_seconds"] = statistics.median(spent[1:])


def gated(gate: Gate, function: Callable[..., None]) -> Callable[..., None]:
    """The function that begins a step, behind the gate."""

    def begin(*arguments: Any) -> None:
        gate()
        function(*arguments)

    return begin


@contextlib.contextmanager
def timed(owner: Any, spent: list[float]) -> Iterator[None]:
    """Seconds of each call of its `apply`."""
    apply = owner.apply

    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return apply(*arguments)
        finally:
            spent.append(time.perf_counter() - began)

    owner.apply = call
    try:
        yield
    finally:
        owner.apply = apply
