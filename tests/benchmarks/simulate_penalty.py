"""What the penalty costs under ZeRO-3 at scale: bytes and seconds per step, from the plan alone.

Nothing is measured: bytes come from the routes that training itself uses
(train/penalty/sharded_exchange.py), seconds from published figures. Run it with `python
tests/benchmarks/simulate_penalty.py`.

Figures, per H100 SXM in a DGX H100 (NVIDIA, "H100 Tensor Core GPU" and "DGX H100" datasheets):
  bf16 dense 989.4 TFLOPS, HBM3 3.35 TB/s, NVLink 4 900 GB/s in both directions together, one
  400 Gb/s InfiniBand port (ConnectX-7) for each of 8 GPUs.
Assumptions: links reach 70 % of that; 40 % model FLOP utilization; 6 FLOP per parameter and token;
  ZeRO-3 hides its own traffic, the penalty hides nothing; 8 us to launch a small operation, 10 us
  for each rank that a rank exchanges with, 20 us for each of log2(N) hops of an all-reduce.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from sa_models.savings import llama_parameters
from sa_models.scores.weight_cosine import random_matches
from sa_models.search.budget import units_of_ratio
from sa_models.search.pairs import make_plan
from train.estimate.llama_shapes import KNOWN, LlamaShape
from train.penalty.coupled import CHUNK_ELEMENTS
from train.penalty.distances import L2
from train.penalty.sharded_exchange import Pair, Routes, route, unit_shape

FLOPS = 989.4e12
MEMORY = 3.35e12  # bytes/s
NVLINK = 450e9  # bytes/s, one direction
INFINIBAND = 50e9
ATTAINED = 0.7
UTILIZATION = 0.4
LAUNCH, PEER, HOP = 8e-6, 10e-6, 20e-6  # seconds
GPUS_PER_NODE = 8
ALLOWED = 0.02  # of a step

MODELS = {
    "7B": KNOWN["meta-llama/Llama-2-7b-hf"],
    "13B": KNOWN["meta-llama/Llama-2-13b-hf"],
    "70B (GQA)": KNOWN["meta-llama/Llama-2-70b-hf"],
}
GPUS = (8, 16, 32, 64, 128, 256, 512)
ZERO3_BYTES = 2 + 2 + 2
"""ZeRO-3 moves, per parameter and step at accumulation 1: it all-gathers the bf16 parameters for
the forward and again for the backward, and reduce-scatters the gradient once. The gradient is taken
as bf16 too, which favours ZeRO-3: postshare reduces it in fp32 (2 + 2 + 4)."""


# --- plans ----------------------------------------------------------------------------------------


def random_plan(layout: HeadLayout, ratio: float, projections: str, seed: int) -> SharingPlan:
    """Each target with any unit of an earlier layer."""
    return make_plan(
        random_matches(layout, seed), layout, units_of_ratio(ratio, layout), projections
    )


def adjacent_plan(layout: HeadLayout, ratio: float, projections: str, seed: int) -> SharingPlan:
    """Each target in an odd layer, with any unit of the layer below; up to 50 % of the units."""
    generator = torch.Generator().manual_seed(seed)
    units = [(layer, u) for layer in range(1, layout.layers, 2) for u in range(layout.units)]
    count = int(ratio * layout.layers * layout.units)
    chosen = torch.randperm(len(units), generator=generator)[:count].tolist()
    sources = torch.randint(layout.units, (count,), generator=generator).tolist()
    return SharingPlan(
        tuple(
            HeadTie(units[i], (units[i][0] - 1, source), tuple(projections))
            for i, source in zip(sorted(chosen), sources, strict=True)
        )
    )


PLANS = {"random": random_plan, "adjacent": adjacent_plan}


# --- one case -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Of one step.

    Attributes:
        share: of the bytes that ZeRO-3 moves, over all ranks.
        busiest: bytes that the busiest rank sends or receives, whichever is more.
        between: bytes between nodes, of the busiest rank.
        seconds: of the penalty, by part.
        step_seconds: of the training step without it.
    """

    model: str
    plan: str
    gpus: int
    bytes: int
    share: float
    busiest: int
    between: int
    seconds: dict[str, float]
    step_seconds: float

    @property
    def cost(self) -> float:
        return sum(self.seconds.values()) / self.step_seconds


def zero3_ranges(layout: HeadLayout, pairs: list[Pair], world: int) -> dict[str, Tensor]:
    """Every parameter in equal parts, the last ones short or empty."""
    ranges = {}
    for layer, p in {(unit[0], x.projection) for x in pairs for unit in (x.target, x.source)}:
        size = math.prod(layout.shape(p))
        ends = (torch.arange(world + 1) * -(-size // world)).clamp(max=size)
        ranges[layout.parameter_name(layer, p)] = torch.stack([ends[:-1], ends[1:]], 1)
    return ranges


def pairs_of(plan: SharingPlan, projections: str) -> list[Pair]:
    return [
        Pair(row, column, p, tie.target, tie.source)
        for column, p in enumerate(projections)
        for row, tie in enumerate(plan.ties)
    ]


def simulate(
    model: str, kind: str, gpus: int, tokens: int, ratio: float, projections: str, seed: int
) -> Case:
    """One case of an l2 penalty; `tokens` a GPU and step."""
    shape: LlamaShape = MODELS[model]
    layout = HeadLayout.from_config(shape)
    pairs = pairs_of(PLANS[kind](layout, ratio, projections, seed), projections)
    routes = Routes(layout, pairs, zero3_ranges(layout, pairs, gpus))

    # Sources go there, their gradients come back: what a rank sends and receives in the end.
    moved = 4 * routes.traffic()
    moved += moved.t().clone()
    moved.fill_diagonal_(0)
    nodes = torch.arange(gpus) // GPUS_PER_NODE
    far = moved * (nodes[:, None] != nodes)
    numbers = 8 * L2().reduced * len(pairs) * 2 * (gpus - 1)
    total = int(moved.sum()) + numbers
    busiest, between = int(moved.sum(1).max()), int(far.sum(1).max())
    parameters = llama_parameters(shape)

    held = (routes.targets + routes.sources).diff(dim=-1).sum((0, 2)).max()
    links = max((busiest - between) / NVLINK, between / INFINIBAND) / ATTAINED
    chunks = route(routes, 0, CHUNK_ELEMENTS)
    launches = sum(
        2 * views(layout, pairs[chunk.pairs], pieces) + 12 / 2
        for chunk in chunks
        for pieces in (chunk.receive, chunk.send)
    )
    peers = int((moved > 0).sum(1).max())
    latency = 2 * peers * PEER + len(chunks) * math.ceil(math.log2(gpus)) * HOP
    seconds = {
        "links": links,
        "memory": 4 * 8 * int(held) / MEMORY,  # some eight passes over what a rank holds
        "launches": launches * LAUNCH,
        "latency": latency,
    }
    return Case(
        model,
        kind,
        gpus,
        total,
        total / (ZERO3_BYTES * parameters * (gpus - 1)),
        busiest,
        between,
        seconds,
        6 * parameters * tokens / (FLOPS * UTILIZATION),
    )


def views(layout: HeadLayout, pairs: list[Pair], pieces: list) -> int:
    """Small copies that pieces take: rows that are cut are copied by themselves."""
    count = 0
    for pair, lo, hi in pieces:
        _, width = unit_shape(layout, pairs[pair].projection)
        first, last = -(-lo // width), hi // width
        count += 1 if first > last else (lo % width > 0) + (last > first) + (hi % width > 0)
    return count


# --- the table ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.3, help="of the units (at most 0.5)")
    parser.add_argument("--projections", default="qkv")
    parser.add_argument("--tokens", type=int, default=16384, help="a GPU and step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = (arguments.tokens, arguments.ratio, arguments.projections, arguments.seed)
    cases = [simulate(m, plan, gpus, *options) for m in MODELS for plan in PLANS for gpus in GPUS]
    show(cases, *options)
    for line in verdicts(cases, arguments.tokens):
        print(line)


def show(cases: list[Case], tokens: int, ratio: float, projections: str, seed: int) -> None:
    title = (
        f"l2 penalty on {ratio:.0%} of the units ({projections}, seed {seed}) under ZeRO-3, "
        f"{tokens:,} tokens a GPU and step"
    )
    table = Table(box=None, title=title, title_justify="left")
    for heading in ("model", "pairs"):
        table.add_column(heading)
    for heading in (
        "GPUs",
        "moved GB",
        "of ZeRO-3",
        "busiest GB",
        "between nodes GB",
        "links ms",
        "memory ms",
        "launches ms",
        "latency ms",
        "step s",
        "cost",
    ):
        table.add_column(heading, justify="right")
    for case in cases:
        table.add_row(
            case.model,
            case.plan,
            str(case.gpus),
            f"{case.bytes / 1e9:.2f}",
            f"{case.share:.2%}",
            f"{case.busiest / 1e9:.3f}",
            f"{case.between / 1e9:.3f}",
            *(f"{1e3 * value:.1f}" for value in case.seconds.values()),
            f"{case.step_seconds:.2f}",
            f"{case.cost:.2%}" + (" *" if case.cost > ALLOWED else ""),
            end_section=case.gpus == GPUS[-1],
        )
    Console(width=150).print(table)


def verdicts(cases: list[Case], tokens: int) -> Iterator[str]:
    """Where it stops paying, model by model."""
    yield f"\nIt stops paying where the penalty takes more than {ALLOWED:.0%} of a step (*):"
    for model in MODELS:
        for plan in PLANS:
            own = [case for case in cases if (case.model, case.plan) == (model, plan)]
            over = [case.gpus for case in own if case.cost > ALLOWED]
            # The penalty does not grow with the tokens, the step does.
            least = max(math.ceil(tokens * case.cost / ALLOWED) for case in own)
            where = f"on {', '.join(map(str, over))} GPUs" if over else f"nowhere up to {GPUS[-1]}"
            yield f"  {model:<10}{plan:<9}{where}; it pays on all from {least:,} tokens a GPU on"


if __name__ == "__main__":
    main()
