"""The bf16 of a device: whether it has the instructions, and what their emulation costs."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import torch

_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of x86 (the first two) and Arm."""


def has_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether a device multiplies bf16 matrices by instructions of its own.

    False where that cannot be told: on an accelerator that is no GPU of CUDA or ROCm, and on the
    CPU of a system without /proc/cpuinfo.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return bool(_FLAGS & set(next(flags, "").split()))


@functools.cache
def bf16_factor(device: torch.device, seconds: float = 1.0) -> float:
    """How many times as long bf16 takes as fp32: a linear layer, 256 tokens, there and back.

    Args:
        seconds: how long to measure, both together.
    """
    # Ones, not random numbers: a measurement must not move the seed of what follows.
    weight = torch.ones(512, 512, device=device, requires_grad=True)
    tokens = torch.ones(256, 512, device=device, requires_grad=True)
    took = []
    for enabled in (False, True):
        durations: list[float] = []
        end = time.perf_counter() + seconds / 2
        while len(durations) < 2 or time.perf_counter() < end:
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                out = torch.nn.functional.linear(tokens, weight)
            out.float().sum().backward()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            durations.append(time.perf_counter() - began)
        took.append(min(durations))  # the first ones prepare kernels
    return took[1] / took[0]
