"""Compiled layers: every decoder layer's forward and backward by torch.compile, one by one.

As in torchtitan a layer is compiled and not the model: layers of one structure share what is
compiled, and hooks (FSDP2's, DDP's) stay around it. What gradient checkpointing computes again is
part of what is compiled. Parameters, their names and checkpoints know nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sa_models.errors import PostshareError

VARIANTS = 2
"""How often a layer of its own structure may be compiled: with a mask, and without one."""
OPTIONS: dict[str, str | int | bool | Callable] = {"fallback_random": True}
"""Dropout draws the numbers that it draws where nothing is compiled."""

Forward = Callable[..., Any]


def compile_layers(model: nn.Module, evaluated: bool = False) -> None:
    """Let the decoder layers compute compiled from their next call on, where they train.

    In evaluation, whose batches have many shapes, they compute as before. Each shape, and each
    structure of a layer (its ties, span, factors, removed units), is compiled once.

    Args:
        evaluated: the model only answers, in evaluation mode, in one shape: compile that.
    """
    import torch._dynamo as dynamo

    # It warns that what `selective` computes again must change nothing in place; where a layer
    # does, `enable_checkpointing` has chosen another way.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    # It splits what is compiled within DDP's forward by DDP's buckets: layers are split already.
    dynamo.config.optimize_ddp = False
    # Beyond it a layer would go on without being compiled; as one graph it is an error instead.
    most = VARIANTS * len(layers)
    dynamo.config.recompile_limit = max(most, dynamo.config.recompile_limit)
    dynamo.config.accumulated_recompile_limit = max(most, dynamo.config.accumulated_recompile_limit)
    compiled: dict[type, Forward] = {}
    for layer in layers:
        layer.forward = _forward(layer, compiled, evaluated)


def _forward(layer: nn.Module, compiled: dict[type, Forward], evaluated: bool) -> Forward:
    def forward(*arguments: Any, **options: Any) -> Any:
        kind = type(layer)  # FSDP2 changes it
        if not evaluated and not layer.training:
            return kind.forward(layer, *arguments, **options)
        if kind not in compiled:
            compiled[kind] = torch.compile(
                kind.forward, dynamic=False, fullgraph=True, options=OPTIONS
            )
        return compiled[kind](layer, *arguments, **options)

    return forward


def release_compiled(model: nn.Module) -> None:
    """Let the layers compute as before `compile_layers`, and free what was compiled."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            vars(module).pop("forward", None)
    torch.compiler.reset()


@contextmanager
def compile_errors() -> Iterator[None]:
    """Around what compiles: a forward, and its backward.

    Raises:
        PostshareError: a layer cannot be compiled, or would have to be too often.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise PostshareError(
            "train.compile: the layers were compiled again and again, because their inputs have "
            "ever other shapes; set train.compile=false"
        ) from error
    except TorchDynamoException as error:
        raise PostshareError(
            f"train.compile: a layer cannot be compiled ({_reason(error)}); install what it needs, "
            "or set train.compile=false"
        ) from error


def _reason(error: BaseException) -> str:
    """The cause in one line: of a compiler's output its first error, else how torch begins."""
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    first = next((line for line in lines if " error: " in line), " ".join(lines[:2]))
    return f"{type(inner).__name__}: {first[:300]}"
