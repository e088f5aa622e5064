"""A stand-in for Liger: what its functions compute, in plain torch, with its habits.

Like the kernels, it writes rotated queries and keys over what it is given, and gradients over
activations, in ways that autograd does not see.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, heads, rows, head_dim), by pairs of a first and a second half."""
    low, high = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-high, low), -1) * sin.unsqueeze(1)


def overwrite(x: Tensor, values: Tensor) -> Tensor:
    """A tensor at the same place, of which no version is counted."""
    place = x.transpose(1, 2).contiguous()
    place.data.copy_(values.transpose(1, 2))
    return place.transpose(1, 2)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return tuple(overwrite(x, rotate(x, cos, sin)) for x in (query, key))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return *(overwrite(g, rotate(g, cos, -sin)) for g in gradients), None, None


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        by_up = gradients[0] * gate * sigmoid
        by_gate = gradients[0] * up * sigmoid * (1 + gate * (1 - sigmoid))
        gate.data.copy_(by_gate)
        up.data.copy_(by_up)
        return gate, up


def stand_in() -> tuple[ModuleType, Counter[str]]:
    """In place of `liger_kernel.transformers.functional`; and how often each was called."""
    module, calls = ModuleType("liger_kernel.transformers.functional"), Counter[str]()

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls["norm"] += 1
        wide = x.float()
        return weight * (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        calls["swiglu"] += 1
        return SwiGLU.apply(gate, up)

    def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        calls["rope"] += 1
        return Rope.apply(query, key, cos, sin)

    def entropy(
        rows: Tensor, weight: Tensor, target: Tensor, ignore_index: int, reduction: str, **_: Any
    ) -> Tensor:
        calls["entropy"] += 1
        assert not torch.is_autocast_enabled(rows.device.type)
        logits = F.linear(rows, weight).float()
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    module.__dict__.update(
        liger_rms_norm=rms_norm,
        liger_swiglu=swiglu,
        liger_rope=rope,
        liger_fused_linear_cross_entropy=entropy,
    )
    return module, calls
