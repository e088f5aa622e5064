"""The optimizer: trainable parameters, their groups, AdamW, the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sa_models.errors import PostshareError
from sa_models.export.peft_adapter import plain_name

if TYPE_CHECKING:
    from train.recipe.recipe import TrainSection


def select_trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze every parameter whose name matches none of the fnmatch `patterns`.

    A tied embedding has one name, `model.embed_tokens.weight`; a projection with a residual has the
    name that it has without.

    Returns:
        the names that stay trainable, in the model's order.
    Raises:
        PostshareError: a pattern matches no parameter: a typo would freeze silently.
    """
    names = [plain_name(name) for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PostshareError(
                f"train.trainable: {pattern!r} matches no parameter; names look like {names[1]!r}"
            )
    chosen = []
    for name, parameter in model.named_parameters():
        trainable = any(fnmatchcase(plain_name(name), pattern) for pattern in patterns)
        parameter.requires_grad_(trainable)
        if trainable:
            chosen.append(name)
    if not chosen:
        raise PostshareError('train.trainable is empty: nothing would be trained; use ["*"]')
    return chosen


def parameter_groups(
    model: nn.Module, weight_decay: float, exclude: Sequence[str]
) -> list[dict[str, Any]]:
    """AdamW groups: trainable parameters with weight decay, and those without.

    `exclude` holds fnmatch patterns on names, `train.weight_decay_exclude` in a recipe. By default
    norms and biases are left out (decay would pull a gain of 1 towards 0), and the input embedding
    too: a row whose token does not occur gets no gradient, so that decay alone would erase it.

    Raises:
        PostshareError: a pattern matches no parameter (except for biases, which few Llamas have).
    """
    names = [plain_name(name) for name, _ in model.named_parameters()]
    for pattern in exclude:
        if not pattern.endswith("bias") and not any(fnmatchcase(name, pattern) for name in names):
            raise PostshareError(
                f"train.weight_decay_exclude: {pattern!r} matches no parameter; "
                f"names look like {names[-1]!r}"
            )
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = any(fnmatchcase(plain_name(name), pattern) for pattern in exclude)
            (kept if free else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_optimizer(section: TrainSection, on_gpu: bool) -> None:
    """Refuse `adamw_8bit` where it cannot run. Raises PostshareError: no GPU, no bitsandbytes.

    Args:
        on_gpu: whether the training is one on a CUDA GPU; a launch may leave one idle.
    """
    if section.optimizer != "adamw_8bit":
        return
    if not on_gpu:
        raise PostshareError(
            "train.optimizer adamw_8bit needs a CUDA GPU; use train.optimizer=adamw"
        )
    _eight_bit()


def _eight_bit() -> Any:
    """The class of bitsandbytes."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise PostshareError(
            f"train.optimizer adamw_8bit needs bitsandbytes ({error}); "
            "pip install 'postshare[gpu]' or use train.optimizer=adamw"
        ) from None
    return AdamW8bit


def build_optimizer(
    model: nn.Module, section: TrainSection, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW over the model's trainable parameters, fused.

    Raises:
        PostshareError: `adamw_8bit` without bitsandbytes.
    """
    groups = parameter_groups(model, section.weight_decay, section.weight_decay_exclude)
    betas = (section.betas[0], section.betas[1])
    if section.optimizer == "adamw_8bit":
        return _eight_bit()(groups, lr=learning_rate, betas=betas, eps=section.eps)
    # Fused on the CPU too: about nine times faster there than one small operation after another.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=section.eps, fused=True)


def learning_rate_factor(step: int, steps: int, section: TrainSection) -> float:
    """The learning rate of update `step` (0-based, of `steps`) over the peak, in [0, 1].

    Warm-up is linear and ends at 1 with update `warmup_steps - 1`; unlike transformers' schedules,
    its first update is not wasted on a rate of 0. Then, from 1 down to
    `min_learning_rate_ratio`, which update `steps` (one past the last) would have:

    - `constant`: stays 1;
    - `linear`, `cosine`: over all the updates after the warm-up;
    - `wsd`: stays 1, then falls linearly over the last `decay_steps` updates (default: a tenth).

    A pure function of the step: nothing to store in a checkpoint, nothing to drift on resume.
    """
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return 1.0
    length = steps - section.warmup_steps
    if section.schedule == "wsd":
        length = min(length, section.decay_steps or math.ceil(steps / 10))
    progress = min(1.0, max(0.0, (step - (steps - length)) / max(1, length)))
    falling = (
        (1 + math.cos(math.pi * progress)) / 2 if section.schedule == "cosine" else 1 - progress
    )
    low = section.min_learning_rate_ratio
    return low + (1 - low) * falling
