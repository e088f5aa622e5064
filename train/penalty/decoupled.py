"""The decoupled penalty: after the optimizer's step, master weights of tied units are moved.

For each tie and projection, D = target - source becomes f D, with a factor f in [0, 1] of its own:

* `decoupled`: f = max(0, 1 - tau / ||D||), the proximal step of tau ||D||;
* `progressive`: f = left(t + 1) / left(t) after step t, where left falls from 1 to 0.

A source and its targets are one family, of n units. The source moves by the mean over the family
of what the differences lose, sum (1 - f) D / n, and each target lies at its own f D from it: so the
family's mean stays, and a pair with f = 0 has the same bits. Until a progressive replacement has
ended, the source stays instead.

Targets meet their source on the ranks that hold it, where a family is complete; element by element,
through :class:`train.penalty.sharded_exchange.Exchange`, wherever values are spread over ranks.
Optimizer states are left alone: each unit keeps its own, and equal units move by the mean of their
updates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sa_models.errors import PostshareError
from train.distributed.ranks import Ranks
from train.penalty.coupled import CHUNK_ELEMENTS, Penalty, PenaltyResult, penalty_coefficient
from train.penalty.distances import L2, cosines
from train.penalty.sharded_exchange import Exchange, Sums, Transfer

if TYPE_CHECKING:
    from sa_models.heads import HeadLayout
    from sa_models.plan import SharingPlan
    from train.distributed.engines.base import Engine, Shard
    from train.recipe.recipe import PenaltySection

Factors = Callable[[Tensor, Tensor], Tensor]
"""f of every pair from the lengths of their differences and the elements of their units."""


def left(step: int, section: PenaltySection) -> float:
    """The share of a target's way to its source that is left after `step` progressive steps."""
    done = min(1.0, step / section.ramp_steps)
    return 1 - done if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def decoupled_factors(tau: float) -> Factors:
    """f = max(0, 1 - tau / RMS of D), float64; tau > 0 is in units of a weight.

    With the Frobenius norm, tau x sqrt(elements) / ||D||: units of all sizes come together alike.
    """
    return lambda apart, size: (1 - tau * size.double().sqrt() / apart).clamp(min=0)


class Pull:
    """The pull of a plan on a model of the given layout, for `decoupled` and `progressive`.

    Raises:
        PostshareError: the plan has chains, whose pairs cannot all be equal.
    """

    def __init__(
        self,
        plan: SharingPlan,
        layout: HeadLayout,
        section: PenaltySection,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        if plan.released:
            raise PostshareError(
                f"penalty.mode {section.mode} makes units equal, which the chains of a released "
                "plan undo; make a plan with plan.strategy=cosine, or set penalty.mode=coupled"
            )
        self.section = section
        self.penalty = Penalty(plan, layout, "l2", section.projections)
        self.chunk_elements = chunk_elements
        self._exchange: JointExchange | None = None  # made with the engine, which it stays with
        self._engine: Engine | None = None

    def apply(self, engine: Engine, step: int, learning_rate: float) -> PenaltyResult:
        """Move the units after update `step` (from 0), which had this learning rate.

        Call it on all ranks after `step`. The result is that of the moved weights, and its bytes
        count what the engine moves to compute with them.

        Raises:
            PostshareError: a pulled parameter is frozen.
        """
        names = self.penalty.parameter_names
        shards = engine.shards(names)
        exchange = self._on(engine, shards)
        factors, ended = self._factors(step, learning_rate)
        shape = (len(self.penalty.ties), len(self.penalty.projections))
        distance = torch.full(shape, math.nan, device=engine.device)
        cosine = distance.clone()
        total = exchange.move(shards, factors, ended, distance, cosine)
        moved, of_all = exchange.bytes_moved(factors is not None)
        if factors is not None:
            refreshed = engine.refresh(names)
            moved, of_all = moved + refreshed, of_all + int(engine.reduce_sum(refreshed))
        value = total / max(self.penalty.pairs, 1)
        return PenaltyResult(value, distance.cpu(), cosine.cpu(), moved, of_all)

    def _factors(self, step: int, learning_rate: float) -> tuple[Factors | None, bool]:
        """How differences shrink (None: not at all), and whether sources move with them."""
        section = self.section
        if section.mode == "decoupled":
            tau = learning_rate * section.weights[1] * penalty_coefficient(step, section)
            return (decoupled_factors(tau) if tau else None), True
        if step >= section.ramp_steps:
            return lambda apart, _: torch.zeros_like(apart), True
        factor = left(step + 1, section) / left(step, section)
        return lambda apart, _: torch.full_like(apart, factor), False

    def _on(self, engine: Engine, shards: dict[str, Shard]) -> JointExchange:
        if self._exchange is None or self._engine is not engine:
            ranks: Ranks = engine if engine.sharded else Alone(engine.device)
            # Families one after the other, so that none is cut.
            pairs = sorted(self.penalty.each, key=lambda pair: (pair.column, pair.source))
            self._exchange = JointExchange(
                ranks, self.penalty.layout, pairs, L2(), shards, self.chunk_elements, joint=True
            )
            self._engine = engine
        return self._exchange


class Alone:
    """A rank that holds whole parameters, and needs nobody: its copy is every other's."""

    rank, world = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce_max(self, value: Any) -> Any:
        return value

    def reduce_sum(self, value: Any) -> Any:
        return value


class JointExchange(Exchange):
    """Pairs that are moved: targets go to their source's ranks, and come back as they shall be."""

    def _sent(self, sources: int, targets: int, numbers: int) -> dict[bool, int]:
        return {False: targets + numbers, True: targets + sources + 2 * numbers}

    @torch.no_grad()
    def move(
        self,
        shards: dict[str, Shard],
        factors: Factors | None,
        sources_move: bool,
        distance: Tensor,
        cosine: Tensor,
    ) -> float:
        """Move the units, fill in `distance` and `cosine` (as then), return the distances' sum.

        Args:
            factors: None: measure alone.
            distance, cosine: fp32 [ties, columns] on the engine's device.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for chunk, add_up in zip(self.chunks, self._sums, strict=True):
            pairs = self.pairs[chunk.pairs]
            targets, sources = self._units(chunk)
            out = self._pack(shards, chunk.receive, targets)
            x = out.new_empty(sum(chunk.send_sizes))
            self._swap(x, out, chunk.send_sizes, chunk.receive_sizes)
            y = self._pack(shards, chunk.send, sources)
            spread = self._spread(x, y, chunk.send, pairs)
            lengths = spread.measure()
            if factors is not None:
                kept = factors(spread.apart, spread.size).tolist()
                self._close_in(shards, chunk, add_up, kept, sources_move, x, y)
                self._swap(out, x, chunk.receive_sizes, chunk.send_sizes)
                flat = {name: shard.values for name, shard in shards.items()}
                sizes = [hi - lo for _, lo, hi in chunk.receive]
                views, parts = self._views(flat, shards, chunk.receive, targets, out.split(sizes))
                if views:
                    torch._foreach_copy_(views, parts)
                lengths = spread.measure()
            total += lengths.sum()
            at = [pair.tie for pair in pairs], [pair.column for pair in pairs]
            distance[at] = spread.apart.float()
            cosine[at] = cosines(spread.squares, spread.apart)
        return float(total)

    def _close_in(
        self,
        shards: dict[str, Shard],
        chunk: Transfer,
        add_up: Sums,
        kept: list[float],
        sources_move: bool,
        x: Tensor,
        y: Tensor,
    ) -> None:
        """Turn targets x and sources y into where they shall be, and write the sources."""
        sizes = [hi - lo for _, lo, hi in chunk.send]
        own, source = list(x.split(sizes)), list(y.split(sizes))
        factor = [kept[piece.pair] for piece in chunk.send]
        if not own:
            return
        torch._foreach_sub_(own, source)
        if sources_move:
            _, units = self._units(chunk)
            targets = Counter(units)
            lost = [(1 - f) / (1 + targets[unit]) for f, unit in zip(kept, units, strict=True)]
            moves = x.clone()
            torch._foreach_mul_(
                list(moves.split(sizes)), [lost[piece.pair] for piece in chunk.send]
            )
            flat = {name: shard.values for name, shard in shards.items()}
            self._add_sums(flat, shards, add_up, units, moves, 1)
            y.copy_(self._pack(shards, chunk.send, units))
        torch._foreach_mul_(own, factor)
        torch._foreach_add_(own, source)
        # 0 D + y is y but for the sign of a zero.
        equal = [i for i, one in enumerate(factor) if one == 0]
        if equal:
            torch._foreach_copy_([own[i] for i in equal], [source[i] for i in equal])
