"""Statistics of the ranks: whose step is slow, who waits for data, whose memory or loss is off.

Ranks wait for one another in every step, so their steps all take as long as the slowest one's. What
differs is the time that a rank needs by itself: it waits for its data, and computes its forwards.
(Under ZeRO-3 a forward waits for the others' weights too, and evens these times out.)
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from train.tracking.metrics_log import memory_bytes

if TYPE_CHECKING:
    from train.distributed.engines.base import Engine


class Health:
    """Compares the ranks every `every` steps (0: never). Alone there is nothing to compare.

    Args:
        model: the unwrapped one: DDP's forward waits for the other ranks before it calls it.
    """

    def __init__(self, engine: Engine, model: nn.Module, every: int) -> None:
        self.engine, self.every = engine, every
        self._measuring = False
        self._forward = self._began = 0.0
        if engine.world > 1 and every > 0:
            model.register_forward_pre_hook(self._enter)
            model.register_forward_hook(self._leave)

    def begin(self, step: int) -> None:
        """A step begins; `step` counts from 1."""
        self._measuring = self.engine.world > 1 and self.every > 0 and step % self.every == 0
        self._forward = 0.0

    def compare(self, data_wait: float, loss: float) -> dict[str, Any]:
        """The columns of metrics.jsonl for this step; a collective. {} between comparisons.

        Args:
            data_wait: seconds that this rank has waited for data in this step.
            loss: mean loss of this rank's tokens in nats; -inf where it predicts none.
        """
        if not self._measuring:
            return {}
        table = torch.zeros(self.engine.world, 4, dtype=torch.float64, device=self.engine.device)
        mine = [data_wait + self._forward, data_wait, float(memory_bytes()), loss]
        table[self.engine.rank] = torch.tensor(mine, dtype=torch.float64)
        # A sum of rows that only one rank fills; -inf stays in its own row as 0 + -inf.
        seconds, waits, memory, losses = self.engine.reduce_sum(table).T.tolist()
        return {
            "lm_loss_max": max(losses),
            "slowest_rank": max(range(len(seconds)), key=seconds.__getitem__),
            "rank_seconds_max": max(seconds),
            "rank_seconds_median": sorted(seconds)[(len(seconds) - 1) // 2],
            "data_wait_seconds_max": max(waits),
            "memory_bytes_max": int(max(memory)),
        }

    def culprits(self, value: float) -> str:
        """` on rank 3` where only some ranks' values are not finite; a collective."""
        bad = torch.zeros(self.engine.world, device=self.engine.device)
        bad[self.engine.rank] = float(not math.isfinite(value))
        ranks = [rank for rank, flag in enumerate(self.engine.reduce_sum(bad).tolist()) if flag]
        if not ranks or len(ranks) == self.engine.world:
            return ""
        listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        return f" on rank{'s' * (len(ranks) > 1)} {listed}"

    def _enter(self, *_: Any) -> None:
        if self._measuring:
            self._wait_for_device()
            self._began = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        if self._measuring:
            self._wait_for_device()
            self._forward += time.perf_counter() - self._began

    def _wait_for_device(self) -> None:
        if self.engine.device.type != "cpu":
            torch.accelerator.synchronize()
