"""Runs on every rank: penalty and pull on ranges of parameters against those on whole ones.

A stand-in engine without a model, so that every kind, shape and way to cut is tried in one start.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from sa_models.heads import PROJECTIONS, HeadLayout, unit_view
from sa_models.plan import SharingPlan
from tests.support.pulled import LAYOUTS, Weights, chained_plan, star_plan
from train.distributed.engines.base import Shard
from train.penalty.coupled import Penalty, PenaltyResult
from train.penalty.decoupled import Pull
from train.recipe.recipe import PenaltySection
from train.recipe.sections.penalty import KINDS

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
WEIGHT = 0.7
# float64 numbers for each pair: three squared lengths and what the kind needs besides.
NUMBERS = {"l2": 3, "mse": 3, "cosine": 6, "kl": 8, "symmetric_kl": 9, "js": 9}


@dataclass
class Range(Shard):
    gradient: torch.Tensor

    def read_gradient(self) -> torch.Tensor:
        return self.gradient.clone()

    def write_gradient(self, gradient: torch.Tensor) -> None:
        self.gradient.copy_(gradient)


class Ranks:
    """Stands in for a sharded engine: rank r holds elements owner == r of every parameter."""

    rank, world = RANK, WORLD
    sharded, whole_gradients = True, False
    device = torch.device("cpu")

    def __init__(self, layout: HeadLayout, cuts: dict[str, list[tuple[int, int]]]) -> None:
        self.ranges = {}
        for name, p in Weights(layout).parameters.items():
            start, stop = cuts[name][RANK]
            values = p.detach().reshape(-1)[start:stop].clone()
            self.ranges[name] = Range(name, p.shape, start, stop, values, torch.ones(stop - start))

    def shards(self, names: list[str]) -> dict[str, Shard]:
        return {name: self.ranges[name] for name in names}

    def refresh(self, names: list[str]) -> int:
        return 0  # there is no model

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def reduce_sum(self, value: float) -> float:
        return float(self.all_reduce_(torch.tensor(float(value), dtype=torch.float64)))


# --- ways to cut parameters: {name: (start, stop) of every rank} ----------------------------------


def each(sizes: dict[str, int]) -> dict[str, list[tuple[int, int]]]:
    """Every parameter in equal parts, the last one short: ZeRO-3."""
    parts = {}
    for name, size in sizes.items():
        part = -(-size // WORLD)
        ends = [min(r * part, size) for r in range(WORLD + 1)]
        parts[name] = list(itertools.pairwise(ends))
    return parts


def joined(sizes: dict[str, int]) -> dict[str, list[tuple[int, int]]]:
    """All parameters as one array in equal parts: ZeRO-1 and 2; most ranges are empty."""
    part, begin, parts = -(-sum(sizes.values()) // WORLD), 0, {}
    for name, size in sizes.items():
        ends = [min(max(r * part - begin, 0), size) for r in range(WORLD + 1)]
        parts[name] = [(a, b) if b > a else (0, 0) for a, b in itertools.pairwise(ends)]
        begin += size
    return parts


def ragged(sizes: dict[str, int]) -> dict[str, list[tuple[int, int]]]:
    """At random places, some ranges empty, the last rank first."""
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for name, size in sizes.items():
        places = torch.randint(size + 1, (WORLD - 1,), generator=generator).sort().values.tolist()
        if WORLD > 2 and size % 3 == 0:
            places[0] = places[1]
        parts[name] = list(itertools.pairwise([0, *places, size]))[::-1]
    return parts


# --- one case -------------------------------------------------------------------------------------


def count_bytes(
    layout: HeadLayout,
    plan: SharingPlan,
    kind: str,
    cuts: dict[str, list[tuple[int, int]]],
    gradients: bool,
) -> int:
    """Bytes that this rank sends, element by element."""
    moved = 0
    for tie in plan.ties:
        for p in tie.projections:
            owners = []
            for layer, unit in (tie.target, tie.source):
                owner = torch.full(layout.shape(p), -1)
                for rank, (start, stop) in enumerate(cuts[layout.parameter_name(layer, p)]):
                    owner.view(-1)[start:stop] = rank
                # Elements in the order of memory, which is that of columns first for o.
                owners.append(unit_view(owner, layout, p)[unit])
            at_target, at_source = owners
            apart = at_target != at_source
            moved += 4 * int((apart & (at_source == RANK)).sum())
            if gradients:
                moved += 4 * int((apart & (at_target == RANK)).sum())
    pairs = sum(len(tie.projections) for tie in plan.ties)
    return moved + NUMBERS[kind] * 8 * pairs * 2 * (WORLD - 1) // WORLD


def same_everywhere(result: PenaltyResult) -> bool:
    numbers = torch.cat(
        [torch.tensor([result.value]), result.distance.flatten(), result.cosine.flatten()]
    ).nan_to_num(-1)
    everyone = [torch.empty_like(numbers) for _ in range(WORLD)]
    dist.all_gather(everyone, numbers)
    return all(torch.equal(one, numbers) for one in everyone)


def check(name: str, kind: str, cut: str, chunk: int) -> None:
    layout = LAYOUTS[name]
    plan = chained_plan(layout, PROJECTIONS)
    case = f"{name} {kind} {cut} chunk {chunk}"
    whole = Weights(layout)
    expected = Penalty(plan, layout, kind).apply(whole, WEIGHT)
    cuts = CUTS[cut]({key: p.numel() for key, p in whole.parameters.items()})
    engine = Ranks(layout, cuts)
    penalty = Penalty(plan, layout, kind, chunk_elements=chunk)

    measured = penalty.apply(engine, None)
    assert all(bool((one.gradient == 1).all()) for one in engine.ranges.values()), case
    assert measured.bytes_moved == count_bytes(layout, plan, kind, cuts, False), case
    result = penalty.apply(engine, WEIGHT)
    assert result.value == measured.value, case
    assert same_everywhere(result), case
    assert abs(result.value - expected.value) <= 1e-5 * abs(expected.value), case
    torch.testing.assert_close(result.distance, expected.distance, msg=case)
    torch.testing.assert_close(result.cosine, expected.cosine, rtol=1e-5, atol=1e-6, msg=case)
    assert result.bytes_moved == count_bytes(layout, plan, kind, cuts, True), case
    assert result.bytes_of_all_ranks == engine.reduce_sum(result.bytes_moved), case
    for key, gradient in whole.gradients().items():
        one = engine.ranges[key]
        own = gradient.reshape(-1)[one.start : one.stop]
        difference = float((one.gradient - 1 - own).norm())
        # Added to ones, which costs digits.
        assert difference <= 1e-5 * float(own.norm()) + 1e-7 * own.numel() ** 0.5, f"{case} {key}"


def check_pull(name: str, section: PenaltySection, cut: str, chunk: int) -> None:
    """Two steps, of which the second finds pairs that are equal already."""
    layout = LAYOUTS[name]
    plan = star_plan(layout, PROJECTIONS)
    case = f"{name} {section.mode} {cut} chunk {chunk}"
    whole = Weights(layout)
    cuts = CUTS[cut]({key: p.numel() for key, p in whole.parameters.items()})
    engine = Ranks(layout, cuts)
    expected, pull = Pull(plan, layout, section, chunk), Pull(plan, layout, section, chunk)
    still = 0
    for step in range(2):
        other = expected.apply(whole, step, 1.0)
        result = pull.apply(engine, step, 1.0)
        assert same_everywhere(result), case
        torch.testing.assert_close(result.distance, other.distance, msg=case)
        torch.testing.assert_close(result.cosine, other.cosine, rtol=1e-5, atol=1e-6, msg=case)
        assert torch.equal(result.distance == 0, other.distance == 0), case
        still += int((result.distance > 0).sum())
        # There and back, and two measurements.
        numbers = NUMBERS["l2"] * 8 * 4 * len(plan.ties) * 2 * (WORLD - 1) // WORLD
        assert result.bytes_moved == count_bytes(layout, plan, "l2", cuts, True) + numbers, case
        assert result.bytes_of_all_ranks == engine.reduce_sum(result.bytes_moved), case
        for key, p in whole.parameters.items():
            one = engine.ranges[key]
            own = p.detach().reshape(-1)[one.start : one.stop]
            torch.testing.assert_close(one.values, own, rtol=1e-5, atol=1e-6, msg=f"{case} {key}")
    merged = int((result.distance == 0).sum())
    assert merged > 0 if section.mode == "decoupled" else merged == 4 * len(plan.ties), case
    assert still > 0, case
    for column, p in enumerate(PROJECTIONS):
        for row, tie in enumerate(plan.ties):
            units = []
            for layer, unit in (tie.target, tie.source):
                one = engine.ranges[layout.parameter_name(layer, p)]
                bits = torch.zeros(one.shape.numel(), dtype=torch.int32)
                bits[one.start : one.stop] = one.values.view(torch.int32)
                dist.all_reduce(bits)
                units.append(unit_view(bits.view(one.shape), layout, p)[unit])
            assert torch.equal(*units) == (result.distance[row, column] == 0), case


# Random units lie about sqrt(2) apart.
SECTIONS = (
    PenaltySection(mode="decoupled", coefficient=1.41, loss_weights=(1.0, 1.0)),
    PenaltySection(mode="progressive", schedule="linear", ramp_steps=2),
)
CUTS = {"each": each, "joined": joined, "ragged": ragged}


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.use_deterministic_algorithms(True)
    cells = list(itertools.product(LAYOUTS, KINDS, CUTS, (2**20,)))
    cells += itertools.product(LAYOUTS, KINDS, ("ragged",), (500,))
    for cell in cells:
        check(*cell)
    print(f"{len(cells)} cells hold")
    pulls = list(itertools.product(LAYOUTS, SECTIONS, CUTS, (2**20, 500)))
    for pull in pulls:
        check_pull(*pull)
    print(f"{len(pulls)} pulls hold")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
