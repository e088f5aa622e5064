"""Tokens per second, utilization and memory of training steps, by the loop itself.

At the shape of Llama-3.2-1B with random weights: 8 x 2,048 tokens a step in two micro-batches,
bf16. What a training leaves behind is not written. On a CPU the same at toy size.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.calibration import logit_chunks
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.scores.weight_cosine import random_matches
from sa_models.search.budget import units_of_ratio
from sa_models.search.pairs import make_plan
from tests.gpu.rows import Absent, Machine, Refused, Row, Values
from tests.support.in_memory import text_blocks
from train.estimate.gpu_memory import memory_per_gpu
from train.estimate.llama_shapes import KNOWN, LlamaShape
from train.estimate.throughput import find_chip, training_flops
from train.recipe.recipe import Recipe, validate
from train.tracking.metrics_log import read_rows
from train.training import loop
from train.training.job import TrainJob

WARM, TIMED = 3, 8
"""Steps: the first ones choose kernels and grow the memory pool."""


def shape_of(machine: Machine) -> LlamaShape:
    if machine.is_toy:
        return LlamaShape(512, 64, 176, 2, 4, 2, 16, 128, True)
    return KNOWN["meta-llama/Llama-3.2-1B"]


def config_of(machine: Machine) -> dict[str, Any]:
    """The same as the JSON of a config, without a dtype: that is the row's."""
    return {name: value for name, value in asdict(shape_of(machine)).items() if name != "dtype"}


def recipe(machine: Machine, **train: Any) -> Recipe:
    """Raises Refused: the recipe does not take one of the keys."""
    batch, micro, length = (4, 2, 64) if machine.is_toy else (8, 4, 2048)
    try:
        return validate(
            {
                "name": "steps",
                "output_dir": str(machine.folder / "steps"),
                "model": {"path": "none", "config": {"model_type": "llama", **config_of(machine)}},
                "data": {"train": "none", "validation": "none", "sequence_length": length},
                "plan": {"strategy": "random", "budget": {"ratio": 0.3}},
                "train": {
                    "steps": WARM + TIMED,
                    "batch_size": batch,
                    "micro_batch_size": micro,
                    "learning_rate": 1e-5,
                    "precision": "fp32" if machine.is_toy else "bf16",
                    **train,
                },
            }
        )
    except PostshareError as error:
        raise Refused(str(error).splitlines()[0]) from None


def penalty_plan(shape: LlamaShape) -> SharingPlan:
    """30 % of the units tied by chance: q, k and v."""
    layout = HeadLayout.from_config(shape)
    return make_plan(random_matches(layout, 0), layout, units_of_ratio(0.3, layout), "qkv")


def train_steps(machine: Machine, recipe: Recipe, plan: SharingPlan | None = None) -> Values:
    """Medians of the steps after the first; and the start, which is all but the steps."""
    shape, device = shape_of(machine), torch.device(machine.device)
    train, length = recipe.train, recipe.data.sequence_length
    shutil.rmtree(recipe.folder, ignore_errors=True)
    draw = torch.Generator().manual_seed(0)
    documents = torch.randint(shape.vocab_size, (4 * train.batch_size, length), generator=draw)

    def load() -> LlamaForCausalLM:
        torch.manual_seed(0)
        with device:
            return LlamaForCausalLM(LlamaConfig(**config_of(machine)))

    job = TrainJob(
        name="post",
        load=load,
        plan=plan,
        train_blocks=text_blocks(documents.tolist(), length),
        validation_blocks=None,
        folder=recipe.folder,
        steps=WARM + TIMED,
        learning_rate=train.learning_rate,
    )
    needed = memory_per_gpu(
        shape,
        train,
        stage=0,
        gpus=1,
        sequence_length=length,
        checkpointing=train.gradient_checkpointing,
    ).total
    gc.collect()
    if not machine.is_toy:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if needed > (held := torch.cuda.mem_get_info()[1]):
            raise Absent(f"needs about {needed / 1e9:.0f} GB, the GPU has {held / 1e9:.0f}")
    began = time.perf_counter()
    try:
        with patch.object(loop, "finish", lambda *arguments: arguments[-1]):
            loop.train(job, recipe)
    except PostshareError as error:
        raise Refused(str(error).splitlines()[0]) from None
    took = time.perf_counter() - began
    rows = read_rows(recipe.folder / "metrics.jsonl")
    shutil.rmtree(recipe.folder)
    speed = statistics.median(row["tokens_per_second"] for row in rows[WARM:])
    later = sum(row["step_seconds"] for row in rows[1:])
    values: Values = {"tokens/s": speed, **utilization(machine, speed, length)}
    if not machine.is_toy:
        values["peak GB"] = rows[-1]["memory_bytes"] / 1e9
        values["estimated GB"] = needed / 1e9
    return values | {"start and first step s": took - later}


def utilization(machine: Machine, speed: float, length: int) -> Values:
    """Model FLOPs utilization by 6 N + 12 L H Q T a token; nothing where the peak is not known."""
    if machine.is_toy:
        return {"MFU %": "none on a CPU"}
    name = torch.cuda.get_device_name()
    chip = find_chip(name)
    if chip is None:
        return {"MFU %": f"{name} has no peak in train/estimate/throughput.py"}
    return {"MFU %": 100 * speed * training_flops(shape_of(machine), length) / chip.bf16}


def steps(keys: dict[str, Any], whole: bool, machine: Machine) -> Values:
    """Steps with these keys of `train`.

    Args:
        whole: compute all logits at once.
    """
    with ExitStack() as patched:
        if whole:
            for name in ("CHUNK_ELEMENTS", "GPU_CHUNK_ELEMENTS"):
                patched.enter_context(patch.object(logit_chunks, name, 2**62))
        return train_steps(machine, recipe(machine, **keys))


def penalty(machine: Machine) -> Values:
    """What the penalty (l2) costs of a step: two trainings with it between two without."""
    plain, pulled = recipe(machine), penalty_plan(shape_of(machine))
    found = [train_steps(machine, plain, plan) for plan in (None, pulled, pulled, None)]
    speeds = [float(values["tokens/s"]) for values in found]
    without, with_it = (speeds[0] + speeds[3]) / 2, (speeds[1] + speeds[2]) / 2
    return {**found[1], "tokens/s": with_it, "% of a step": 100 * (without / with_it - 1)}


def timed(name: str, whole: bool = False, seconds: float = 60, **keys: Any) -> Row:
    return Row(f"steps {name}", partial(steps, keys, whole), seconds)


ROWS = (
    timed("no checkpointing"),
    timed("checkpointing", gradient_checkpointing=True),
    timed("selective", gradient_checkpointing="selective"),
    timed("every 2nd", gradient_checkpointing=2),
    timed("whole logits", whole=True),
    Row("steps penalty", penalty, 120),
    timed("compile", seconds=180, compile=True),
    Row("steps liger", partial(steps, {"kernels": "liger"}, False), 90, ("gpu", "liger_kernel")),
)
