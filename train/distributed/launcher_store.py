"""The launcher's key-value store, with keys of its own for each start of the ranks.

With `--max_restarts` torchrun starts all ranks again beside the store of the start before, and
torch 2.13 makes the process group with the same keys every time: ranks read the addresses of
processes that are dead, and wait for those for hours (pytorch issue 135712). The launcher's count
of restarts is no name for a start, as each host's launcher counts the failures it has seen itself.
So the main rank gives the start a name, and answers each process that asks for it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

_SCHEME = "postshare-attempt"
_LONGEST = 24 * 3600.0
_NCCL_SIGNAL = "exception_dump"
"""NCCL's process group keeps it at the top of the store, and one that finds it ends its process."""

_name: str | None = None


def store_is_shared() -> bool:
    """Whether the launcher serves a store, which outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(seconds: float) -> dist.Store:
    """A connection of its own to the store, whose calls wait `seconds` at most.

    Raises:
        RuntimeError: nobody serves it (torch's DistNetworkError).
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=min(seconds, _LONGEST)),
        wait_for_workers=False,
    )


def open_keys(seconds: float) -> dist.Store:
    """The same, under this start's name."""
    return dist.PrefixStore(f"postshare/{_name or 'only'}", open_store(seconds))


def init_method() -> str | None:
    """For `init_process_group`: where the process group finds its keys; None: torch's own way."""
    return None if _name is None else f"{_SCHEME}://"


def _rendezvous(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    keys = open_keys(timeout.total_seconds())
    yield keys, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


register_rendezvous_handler(_SCHEME, _rendezvous)


class Naming:
    """This rank's part in giving the start a name: call `step` until `keys` is there.

    The main rank goes on until all ranks are there: one that asks late is answered late. Questions
    and answers are named by the process that asks, so that none of an earlier start is mistaken.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.name: str | None = None
        self.keys: dist.Store | None = None
        """What all ranks of this start, and no others, share."""
        self._store = dist.PrefixStore("postshare-naming", store)
        self._base, self._rank = store, rank
        self._me = secrets.token_hex(8)
        self._answered: dict[int, bytes] = {}
        self._store.set(f"asks/{rank}", self._me)
        if rank == 0:
            store.delete_key(_NCCL_SIGNAL)  # nobody has a process group yet who could have set it
            self._found(self._me)

    def step(self, missing: list[int]) -> None:
        """Answer the missing ranks that have asked (main rank), or look for the answer."""
        if self._rank == 0:
            for rank in self.asking(missing):
                asked = self._store.get(f"asks/{rank}")
                if self._answered.get(rank) != asked:
                    self._answered[rank] = asked
                    self._store.set(f"answer/{asked.decode()}", self._me)
        elif self.keys is None and self._store.check([f"answer/{self._me}"]):
            self._found(self._store.get(f"answer/{self._me}").decode())
            self._store.delete_key(f"answer/{self._me}")

    def asking(self, ranks: list[int]) -> list[int]:
        """Those of the ranks that have asked, now or in an earlier start that came to nothing."""
        return [rank for rank in ranks if self._store.check([f"asks/{rank}"])]

    def end(self, world: int) -> None:
        """All ranks are there: no question is left for the next start."""
        if self._rank == 0:
            for rank in range(world):
                self._store.delete_key(f"asks/{rank}")

    def _found(self, name: str) -> None:
        global _name
        _name = self.name = name
        self.keys = dist.PrefixStore(f"postshare/{name}/meeting", self._base)
