"""Probes that need the other ranks: who answers, whose folder, whose clock, how fast.

Ranks talk through the launcher's key-value store, not through the process group that a training
will use: so a rank that never comes can be named, and the process group itself is a thing to probe.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.doctor.facts import TooLate

EXCHANGES = 7
"""Timed exchanges with each host; the fastest tells the most."""
SIZES = (2**20, 2**23, 2**26)
"""Bytes of the all-reduces."""
PROBE_SECONDS = 2.0
LINK_SECONDS = 5.0
VISIBLE_SECONDS = 5.0
"""How long a file may take to appear on another host: NFS caches directories."""


class Channel:
    """JSON values between ranks, by key; every wait has a limit. Alone, it talks to itself.

    Raises:
        TooLate: the store cannot be reached within `patience` seconds.
    """

    def __init__(self, rank: int, world: int, patience: float) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self._store: dist.Store
        if world == 1:
            self._store = dist.HashStore()
            return
        launcher_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
        try:
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=rank == 0 and not launcher_serves,
                timeout=timedelta(seconds=patience),
                wait_for_workers=False,
                multi_tenant=True,  # the process group will want the same port
            )
        except (RuntimeError, KeyError, ValueError) as error:
            raise TooLate(str(error)) from error
        self._store = dist.PrefixStore("postshare-doctor", store)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def put(self, key: str, value: Any) -> None:
        """Raises TooLate: the store is gone."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise TooLate(key) from error

    def get(self, key: str, seconds: float | None = None) -> Any:
        """The value, once it is there. Raises TooLate."""
        try:
            limit = timedelta(seconds=self.patience if seconds is None else seconds)
            self._store.wait([key], limit)
            return json.loads(self._store.get(key))
        except RuntimeError as error:  # also: the store is gone
            raise TooLate(key) from error

    def has(self, key: str) -> bool:
        """Whether it is there already. Where the store is gone, so is whoever would set it."""
        try:
            return self._store.check([key])
        except RuntimeError:
            return True

    def gather(
        self, key: str, value: Any, seconds: float | None = None, ranks: Iterable[int] | None = None
    ) -> dict[int, Any]:
        """The values of all ranks that answer in time (on the main rank; {} on the others)."""
        expected = list(range(self.world) if ranks is None else ranks)
        if self.rank in expected:
            self.put(f"{key}/{self.rank}", value)
        if not self.is_main:
            return {}
        end = time.monotonic() + (self.patience if seconds is None else seconds)
        found: dict[int, Any] = {}
        for rank in expected:
            try:
                found[rank] = self.get(f"{key}/{rank}", max(0.05, end - time.monotonic()))
            except TooLate:
                continue
        return found

    def decide(self, key: str, decision: Callable[[], Any], seconds: float | None = None) -> Any:
        """What the main rank decides, on all ranks. Raises TooLate where it stays silent."""
        if self.is_main:
            self.put(key, decision())
        return self.get(key, seconds)


# --- the shared folder ----------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderProbe:
    """What became of the token files in the run folder.

    Attributes:
        problem: why the main rank could not write there; then nothing else was tried.
        unseen: ranks that do not see the main rank's file, or whose file it does not see.
        unwritable: {rank: why it could not write}.
    """

    folder: str
    problem: str | None = None
    unseen: tuple[int, ...] = ()
    unwritable: tuple[tuple[int, str], ...] = ()


def probe_folder(channel: Channel, folder: Path) -> FolderProbe | None:
    """Write a token on the main rank, read it on all, and the other way round; leave nothing.

    Returns:
        what was found, on the main rank; None on the others.
    """
    made: list[Path] = []
    name = ".postshare-doctor-"

    def write_token() -> dict[str, Any]:
        token = secrets.token_hex(8)
        try:
            made.extend(p for p in (folder, *folder.parents) if not p.exists())
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / f"{name}{token}-0", token)
        except OSError as error:
            return {"token": token, "problem": error.strerror or str(error)}
        return {"token": token, "problem": None}

    answer = channel.decide("folder", write_token)
    token, problem = answer["token"], answer["problem"]
    own = folder / f"{name}{token}-{channel.rank}"
    seen, error = False, None
    if problem is None:
        seen = _appears(folder / f"{name}{token}-0", token)
        if seen and not channel.is_main:
            try:
                _write(own, token)
            except OSError as caught:
                error = caught.strerror or str(caught)
    answers = channel.gather("folder/seen", {"seen": seen, "error": error})
    unseen, unwritable = [], []
    end = time.monotonic() + VISIBLE_SECONDS
    if channel.is_main and problem is None:
        for rank in range(channel.world):
            found = answers.get(rank, {"seen": False, "error": None})
            if found["error"] is not None:
                unwritable.append((rank, found["error"]))
            elif not found["seen"] or not _appears(folder / f"{name}{token}-{rank}", token, end):
                unseen.append(rank)
    channel.decide("folder/done", lambda: True, seconds=channel.patience + 60)
    with contextlib.suppress(OSError):
        own.unlink()
    channel.gather("folder/clean", True)
    for path in made:
        with contextlib.suppress(OSError):  # somebody else has begun to use it
            path.rmdir()
    if not channel.is_main:
        return None
    return FolderProbe(str(folder.absolute()), problem, tuple(unseen), tuple(unwritable))


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _appears(path: Path, text: str, end: float | None = None) -> bool:
    end = time.monotonic() + VISIBLE_SECONDS if end is None else end
    while True:
        try:
            if path.read_text(encoding="utf-8") == text:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


# --- links ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BrokenLink:
    """A rank that cannot open a connection to another: gloo and NCCL connect any two, any port."""

    source: int
    target: int
    address: str
    reason: str


def probe_links(channel: Channel, ranks: list[int]) -> list[BrokenLink]:
    """Connect each of `ranks` (one on each host, the main rank first) to every other.

    The address is the one from which a host reaches the main one. Returns the connections that
    failed, on the main rank; a host that has seen three failures stops looking.
    """
    if channel.rank not in ranks:
        return []
    broken: list[list[Any]] = []
    with socket.create_server(("", 0), backlog=len(ranks) + 8) as server:
        own = _address_towards(os.environ["MASTER_ADDR"])
        channel.put(f"link/{channel.rank}", [own, server.getsockname()[1]])
        for other in ranks:
            if other == channel.rank or len(broken) == 3:
                continue
            host, port = channel.get(f"link/{other}")
            try:
                socket.create_connection((host, port), LINK_SECONDS).close()
            except OSError as error:
                reason = error.strerror or str(error)
                broken.append([channel.rank, other, f"{host}:{port}", reason])
        patience = channel.patience + 4 * LINK_SECONDS
        answers = channel.gather("links", broken, seconds=patience, ranks=ranks)
        channel.decide("links/done", lambda: True, seconds=patience + 5)
    return [BrokenLink(*link) for links in answers.values() for link in links]


def _address_towards(host: str) -> str:
    """This host's address on the route to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:  # not an IPv4 address, say
            return socket.gethostname()
        return probe.getsockname()[0]


# --- clocks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Seconds by which a clock is ahead of the main rank's, and how far off that may be."""

    ahead: float
    uncertainty: float


def clock_from(exchanges: Iterable[tuple[float, float, float]]) -> Clock:
    """From (own clock before, the main rank's answer, own clock after): the fastest decides."""
    before, answer, after = min(exchanges, key=lambda e: e[2] - e[0])
    return Clock((before + after) / 2 - answer, (after - before) / 2)


def probe_clocks(
    channel: Channel, ranks: list[int], now: Callable[[], float] = time.time
) -> dict[int, Clock]:
    """The clocks of `ranks` (one on each host) against the main rank's, on the main rank."""
    mine: list[float] | None = None
    if channel.is_main:
        for rank in ranks:
            try:
                for i in range(EXCHANGES):
                    channel.get(f"clock/{rank}/{i}/ask")
                    channel.put(f"clock/{rank}/{i}/answer", now())
            except TooLate:
                continue
    elif channel.rank in ranks:
        exchanges = []
        for i in range(EXCHANGES):
            before = now()
            channel.put(f"clock/{channel.rank}/{i}/ask", True)
            answer = channel.get(f"clock/{channel.rank}/{i}/answer")
            exchanges.append((before, answer, now()))
        clock = clock_from(exchanges)
        mine = [clock.ahead, clock.uncertainty]
    answers = channel.gather("clock", mine, ranks=ranks)
    return {rank: Clock(*value) for rank, value in answers.items() if value is not None}


# --- speed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """One size of all-reduce: bytes, and seconds for one on the slowest rank."""

    size: int
    seconds: float

    def rate(self, world: int) -> float:
        """Bytes a second over each rank's link: a ring sends 2 (n - 1) / n of the size."""
        return 2 * (world - 1) / world * self.size / self.seconds


def probe_bandwidth(
    device: torch.device,
    sizes: Iterable[int] = SIZES,
    budget: float = PROBE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Reduction]:
    """Time all-reduces of growing size until the budget (seconds) is spent. A collective.

    Every rank stops after the same size: what decides is the slowest rank's time.
    """
    results: list[Reduction] = []
    _reduce(torch.zeros(1024, device=device), 2, clock)  # connections are made at the first one
    for size in sizes:
        # A size is left out when four of it, judged by the last one, would not fit.
        if results and 4 * results[-1].seconds * size / results[-1].size > budget:
            break
        buffer = torch.zeros(size // 4, device=device)
        _reduce(buffer, 1, clock)
        seconds = _reduce(buffer, 3, clock)
        results.append(Reduction(size, seconds))
        budget -= 4 * seconds
    return results


def _reduce(buffer: torch.Tensor, times: int, clock: Callable[[], float]) -> float:
    """Seconds for one all-reduce, the slowest rank's."""
    dist.barrier()
    start = clock()
    for _ in range(times):
        dist.all_reduce(buffer)
    if buffer.device.type != "cpu":
        torch.accelerator.synchronize(buffer.device)
    slowest = torch.tensor([(clock() - start) / times], dtype=torch.float64, device=buffer.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return max(float(slowest), 1e-9)
