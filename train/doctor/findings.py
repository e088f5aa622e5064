"""Findings, and what they are drawn from: all that is known on the main rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sa_models.errors import PostshareError
from sa_models.spans import ranges
from train.distributed.launch_env import Offload
from train.doctor.facts import Facts
from train.doctor.probes import BrokenLink, Clock, FolderProbe, Reduction
from train.estimate.llama_shapes import LlamaShape
from train.estimate.throughput import Assumed
from train.recipe.recipe import Recipe

LEFT_WAITING = "left waiting when another rank failed"
"""Why a rank did not join that has no trouble of its own."""


class Level(IntEnum):
    """ok: fine; warn: may cost time or surprise; bad: the job should not start."""

    OK = 0
    WARN = 1
    BAD = 2


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `cure` says what to do where it is not fine."""

    level: Level
    topic: str
    found: str
    cure: str = ""

    def to_json(self) -> list[Any]:
        return [int(self.level), self.topic, self.found, self.cure]

    @classmethod
    def from_json(cls, value: list[Any]) -> Finding:
        return cls(Level(value[0]), *value[1:])


def ok(topic: str, found: str) -> Finding:
    return Finding(Level.OK, topic, found)


def warn(topic: str, found: str, cure: str) -> Finding:
    return Finding(Level.WARN, topic, found, cure)


def bad(topic: str, found: str, cure: str) -> Finding:
    return Finding(Level.BAD, topic, found, cure)


def from_error(topic: str, error: PostshareError) -> Finding:
    """Our errors say the cause, then the cure."""
    found, _, cure = str(error).partition("; ")
    return Finding(Level.BAD, topic, found, cure)


@dataclass(frozen=True)
class Situation:
    """All that is known on the main rank.

    Attributes:
        facts: one for each rank that answered, by rank.
        world: processes that were launched.
        recipe, shape: None where there is none, or where it could not be read.
        stage: ZeRO stage of the launch; None without DeepSpeed.
        fsdp: whether the launch asks for FSDP2.
        offload: what ZeRO-3 keeps in the host's memory.
        folder: None when it was not probed.
        clocks: by rank, one for each host but the main rank's.
        links: connections between hosts that failed; None: not tried.
        joined: {rank: None, or why it could not join the process group}; None: not tried.
        reductions: all-reduces timed.
        backend: of the process group.
        assumed: for the time of the job.
    """

    facts: list[Facts]
    world: int = 1
    recipe: Recipe | None = None
    shape: LlamaShape | None = None
    stage: int | None = None
    fsdp: bool = False
    offload: Offload = field(default_factory=Offload)
    folder: FolderProbe | None = None
    clocks: dict[int, Clock] = field(default_factory=dict)
    links: list[BrokenLink] | None = None
    joined: dict[int, str | None] | None = None
    reductions: list[Reduction] | None = None
    backend: str = "gloo"
    assumed: Assumed = field(default_factory=Assumed)

    @property
    def sharding(self) -> int:
        """What is spread over the ranks, as a ZeRO stage: FSDP2 spreads what ZeRO-3 does."""
        return 3 if self.fsdp else self.stage or 0

    @property
    def missing(self) -> list[int]:
        return sorted(set(range(self.world)) - {f.rank for f in self.facts})

    @property
    def hosts(self) -> dict[str, list[Facts]]:
        """Ranks by the host (and network namespace) they are on, in the order of ranks."""
        hosts = defaultdict(list)
        for f in self.facts:
            hosts[f.network].append(f)
        return dict(hosts)

    def who(self, members: Iterable[int]) -> str:
        """`rank 3 (node-b)`, `ranks 0-3, 7`, `all ranks`."""
        members = sorted(members)
        if len(members) == self.world > 1:
            return "all ranks"
        names = {f.host for f in self.facts if f.rank in members}
        where = f" ({names.pop()})" if len(names) == 1 and len(self.hosts) > 1 else ""
        return f"rank{'s' if len(members) > 1 else ''} {ranges(tuple(members))}{where}"

    @property
    def network_cure(self) -> str:
        """What to do when the process group fails or crawls."""
        name = "NCCL_SOCKET_IFNAME" if self.backend == "nccl" else "GLOO_SOCKET_IFNAME"
        debug = "; NCCL_DEBUG=INFO says more" if self.backend == "nccl" else ""
        compiling = "was DeepSpeed still compiling? then once more with --patience 600; else "
        first = compiling if self.stage is not None and self.backend == "gloo" else ""
        return (
            f"{first}export {name}=<the interface that the hosts share> (`ip addr` lists them) "
            f"and let the firewall pass all ports between the hosts{debug}"
        )
