"""A training step of compiled layers against the same of layers that are not.

Llamas of random weights in fp32: hidden 1024, 2 layers, 256 tokens, and the demo's shape, each as
it is and with gradient checkpointing; forward, backward and AdamW. Seconds of compiling are of
the first step, which compiles everything, from an empty cache.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable

import torch
from bench_losses import random_llama
from timing import interleaved, once

from train.models.checkpointing import enable_checkpointing
from train.models.compiled_layers import compile_layers

SHAPES = {
    "hidden1024": (2048, 1024, 2, 1, 256),
    "demo": (2048, 128, 8, 4, 256),
}
"""Vocabulary, hidden size, layers, sequences, and tokens of each."""


def step_of(name: str, compiled: bool, checkpointing: bool) -> Callable[[], None]:
    vocabulary, hidden, layers, rows, length = SHAPES[name]
    model = random_llama(vocabulary, hidden, layers, hidden // 64 if hidden > 128 else 8)
    enable_checkpointing(model, checkpointing)
    if compiled:
        compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(vocabulary, (rows, length))

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(rounds: int = 7) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    for name in SHAPES:
        values: dict[str, float] = {}
        for key, checkpointing in (("", False), ("_recomputed", True)):
            eager, compiled = (step_of(name, on, checkpointing) for on in (False, True))
            eager()
            values[f"seconds_compiling{key}"] = once(compiled)
            times = interleaved(rounds, eager=eager, compiled=compiled)
            values[f"seconds_eager{key}"] = times["eager"]
            values[f"compiled_over_eager{key}"] = times["compiled"] / times["eager"]
            torch.compiler.reset()
        results[f"compile_{name}"] = values
    return results


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        print(json.dumps(measure(), indent=2))
