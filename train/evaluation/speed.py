"""Speed of models on this machine, and the memory they hold: measured side by side.

Every round runs each model once, so that what else the machine does falls on all of them. A round
is what serving one request is: a prompt of random tokens is read (prefill) until its first new
token is chosen, then one token after the other is decoded with the cache.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from sa_models.calibration.progress import Progress
from train.evaluation.models import Judged
from train.evaluation.score import Score

TASK = "speed"


@dataclass(frozen=True)
class SpeedSettings:
    """What a round is. One sequence at a time."""

    rounds: int = 7
    prompt: int = 256
    new_tokens: int = 32


@dataclass(frozen=True)
class Round:
    """Seconds to the first new token, seconds of decoding the others, and bytes of the cache."""

    first: float
    decode: float
    cache_bytes_per_token: float


def measure_speed(
    models: Sequence[Judged],
    settings: SpeedSettings,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> list[list[Score]]:
    """The scores of each model: all of them are in memory together.

    Args:
        progress: called with (done, total) after each round of each model.
    """
    stated = {
        "prompt": settings.prompt,
        "new_tokens": settings.new_tokens,
        "batch": 1,
        "rounds": settings.rounds,
        "dtype": str(dtype)[6:],
        "device": device_name(device),
    }
    resident = [resident_bytes(model, settings, dtype, device) for model in models]
    loaded = [model.load(dtype, device) for model in models]
    taken: list[list[Round]] = [[] for _ in models]
    for number in range(settings.rounds + 1):
        for at, one in enumerate(loaded):
            measured = run_round(one, settings)
            if number:  # the first warms up
                taken[at].append(measured)
                progress(sum(map(len, taken)), len(models) * settings.rounds)
    both = zip(taken, resident, strict=True)
    return [_scores(rounds, held, settings, stated) for rounds, held in both]


@torch.inference_mode()
def run_round(model: PreTrainedModel, settings: SpeedSettings) -> Round:
    """One prompt of random tokens, and greedy decoding after it."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, settings.prompt), generator=draw)
    ids = ids.to(model.device)
    cache = DynamicCache(config=model.config)
    synchronize(model.device)
    start = time.perf_counter()
    token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    synchronize(model.device)
    first = time.perf_counter()
    for _ in range(settings.new_tokens - 1):
        token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
    synchronize(model.device)
    end = time.perf_counter()
    held = cache_size(cache) / (settings.prompt + settings.new_tokens - 1)
    return Round(first - start, end - first, held)


def cache_size(cache: DynamicCache) -> int:
    """Bytes of the keys and values that a cache holds."""
    layers: list[Any] = cache.layers
    held = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.nbytes for tensor in held)


def synchronize(device: torch.device) -> None:
    """Wait for what the device has still to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def resident_bytes(
    model: Judged, settings: SpeedSettings, dtype: torch.dtype, device: torch.device
) -> int:
    """Growth of the memory of a fresh process that loads the model and answers once.

    On the CPU of its resident set (as far as /proc tells it), else of what the device has allotted.
    """
    context = multiprocessing.get_context("spawn")  # nothing of this process may be counted
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_growth, model, settings, dtype, device).result()


def _growth(
    model: Judged, settings: SpeedSettings, dtype: torch.dtype, device: torch.device
) -> int:
    logging.disable_progress_bar()
    # What libraries load when a model runs first is no model's memory.
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    small = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).to(device)  # type: ignore[arg-type]
    run_round(small, settings)
    before = _memory(device)
    loaded = model.load(dtype, device)
    run_round(loaded, settings)
    return _memory(device) - before


def _memory(device: torch.device) -> int:
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_name(device: torch.device) -> str:
    """What was measured on, for the reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} {'thread' if threads == 1 else 'threads'}"


def _scores(
    rounds: Sequence[Round], resident: int, settings: SpeedSettings, stated: dict[str, object]
) -> list[Score]:
    decoded = settings.new_tokens - 1
    measured = {
        "prefill tokens/s": [settings.prompt / r.first for r in rounds],
        "first token, ms": [1000 * r.first for r in rounds],
        "decode tokens/s": [decoded / r.decode for r in rounds],
    }
    scores = [Score.of_rounds(TASK, name, values, stated) for name, values in measured.items()]
    sizes = {"cache bytes/token": rounds[0].cache_bytes_per_token, "resident bytes": resident}
    return scores + [Score(TASK, n, "size", float(v), stated=stated) for n, v in sizes.items()]
