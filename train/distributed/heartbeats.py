"""Heartbeats: where each rank is, kept in the launcher's key-value store during a training.

One thread a rank writes its note every few seconds, whatever its main thread does. So a note that
no longer changes is a process that is stopped, killed or cut off, and a note that changes but stays
behind is a rank that hangs in its own work. The store is apart from the process group: it answers
when a collective does not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass

import torch.distributed as dist

from train.distributed.launcher_store import open_keys

_trainings = itertools.count()
"""Trainings of this process so far; the same on all ranks, so that each has keys of its own."""


@dataclass(frozen=True)
class Note:
    """What a rank says about itself.

    Attributes:
        count: how many notes its main thread has made: ranks run the same program, so the smallest
            count is the rank that is behind.
        beat: how often its thread has written; -1 once its training has ended.
    """

    rank: int
    host: str
    pid: int
    count: int
    step: int
    phase: str
    beat: int = 0

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.phase}"


class Heartbeats:
    """This rank's note, sent every `interval` seconds, and on demand the notes of the others.

    Every store call runs in one daemon thread: none of them can be trusted to return.

    Attributes:
        note: this rank's; replace it at will.
    """

    def __init__(self, rank: int, world: int, interval: float) -> None:
        self.world, self.interval = world, interval
        self.note = Note(rank, socket.gethostname(), os.getpid(), 0, 0, "starting")
        self.verdict: str | None = None
        """What the first rank that found something wrong has said about it."""
        self.author: int | None = None
        """Which rank that is: two may have come to the same words."""
        self._proposal: str | None = None
        self._seen: dict[int, tuple[Note, float]] = {}
        self._observing_since: float | None = None
        self._wake, self._ended = threading.Event(), threading.Event()
        self._prefix = f"health/{next(_trainings)}"
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def observe(self) -> None:
        """From now on read the others' notes too."""
        if self._observing_since is None:
            self._observing_since = time.monotonic()
            self._wake.set()

    def silent(self) -> list[Note]:
        """Ranks that have ended, or whose note has not changed for some beats while observed."""
        limit = time.monotonic() - 3 * self.interval
        began = self._observing_since
        if began is None or began > limit:
            return []
        return [n for n, changed in self._seen.values() if n.beat < 0 or changed < limit]

    def all(self) -> list[Note]:
        """The last known note of every rank, by rank; this one's is up to date."""
        known = {rank: note for rank, (note, _) in self._seen.items()} | {self.note.rank: self.note}
        return [known[rank] for rank in sorted(known)]

    def agree(self, verdict: str, seconds: float) -> str | None:
        """Propose a verdict; the first one of all ranks wins, and is returned.

        None: the store does not answer within `seconds`.
        """
        self._proposal = verdict
        end = time.monotonic() + seconds
        while self.verdict is None and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.05)
        return self.verdict

    def end(self) -> None:
        """Say that this rank's training has ended, and stop; does not wait for the store long."""
        self._ended.set()
        self._wake.set()
        self._thread.join(self.interval)

    def _run(self) -> None:
        # The store is gone when the launcher of rank 0 is: then nothing can be said or learned, and
        # the watchdog judges by what it has. Trying again would only repeat the connection's wait.
        with contextlib.suppress(RuntimeError):
            store = self._connect()
            beat = 0
            while not self._ended.is_set():
                self._exchange(store, beat)
                beat += 1
                self._wake.wait(self.interval)
                self._wake.clear()
            self._write(store, -1)

    def _connect(self) -> dist.Store:
        return dist.PrefixStore(self._prefix, open_keys(max(10.0, 4 * self.interval)))

    def _exchange(self, store: dist.Store, beat: int) -> None:
        self._write(store, beat)
        if self._proposal is not None and self.verdict is None:
            proposal = json.dumps([self.note.rank, self._proposal])
            self._accept(store.compare_set("verdict", "", proposal))
        elif store.check(["verdict"]):
            self._accept(store.get("verdict"))
        if self._observing_since is not None:
            self._read(store)

    def _accept(self, verdict: bytes) -> None:
        self.author, self.verdict = json.loads(verdict)  # in this order: who reads it, reads both

    def _write(self, store: dist.Store, beat: int) -> None:
        note = Note(**{**asdict(self.note), "beat": beat})
        store.set(str(note.rank), json.dumps(asdict(note)))

    def _read(self, store: dist.Store) -> None:
        for rank in range(self.world):
            if rank == self.note.rank or not store.check([str(rank)]):
                continue
            note = Note(**json.loads(store.get(str(rank))))
            before = self._seen.get(rank)
            if before is None or before[0].beat != note.beat:
                self._seen[rank] = (note, time.monotonic())
