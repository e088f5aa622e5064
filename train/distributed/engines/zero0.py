"""ZeRO-0: DeepSpeed's engine without partitioning; its own reduction, boundary and step.

Every rank holds the whole fp32 parameters, gradients and optimizer state, as under DDP, and they
are one another's equals: shards, weights and their restoring are those of the plain engine.

bf16 is autocast over fp32 parameters, as under DDP. DeepSpeed's own bf16 mode adds up gradients in
bf16 where it does not partition (0.19.8 refuses an fp32 sum there), which the contract rules out.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from sa_models.errors import PostshareError
from train.distributed.engines.base import require_fp32
from train.distributed.engines.ddp import PlainEngine, autocast_forward
from train.distributed.engines.zero import DrivenEngine, deepspeed_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.recipe.recipe import Recipe


class WholeEngine(DrivenEngine, PlainEngine):
    """DeepSpeed's engine with `zero_stage: 0`: fp32 parameters, bf16 by autocast."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe) -> None:
        super().__init__(accelerator, recipe)
        self.resolved = deepspeed_config(recipe, 0, self.world, self.device.type == "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import deepspeed

        require_fp32(model)
        if self._autocast:
            autocast_forward(model, self.device)
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.resolved, dist_init_required=False
        )
        if self.model.zero_optimization_stage() != 0 or self.model.optimizer is not optimizer:
            raise PostshareError(
                f"DeepSpeed prepared ZeRO stage {self.model.zero_optimization_stage()} with a "
                f"{type(self.model.optimizer).__name__} where the launch asks for stage 0; use the "
                "DeepSpeed version of constraints.txt"
            )
        self.optimizer = optimizer
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def step(self) -> float:
        # DeepSpeed clips by the same norm, and does not say it.
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self.model.step()
        return float(norm)

    def close(self) -> None:
        if not hasattr(self, "model"):
            return
        self.model.destroy()
        self.model.optimizer = self.model.basic_optimizer = None
        super().close()
        gc.collect()
