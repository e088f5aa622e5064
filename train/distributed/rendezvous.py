"""Rendezvous of the ranks before the process group: a rank that does not come is named in minutes.

Collectives have hours of patience, and making the process group is one of them. The launcher's
store is there already, so a rank that never came can be told from one that is slow.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from train.common.exit_codes import ExitCode
from train.distributed.launcher_store import Naming, open_store, store_is_shared
from train.distributed.lost_rank import START_AGAIN, RankLostError

BUILD_SECONDS = 300.0
"""DeepSpeed may compile when the process group is made: that is never cut short."""
SPEAKS_AFTER = 30.0
"""Seconds after which the main rank says for whom it waits."""


@contextmanager
def meeting(patience: float | None) -> Iterator[None]:
    """Around the making of the process group: all ranks are there, and it takes no longer.

    Args:
        patience: seconds, for the ranks to come and again for the group to be made; None: for ever.

    Raises:
        RankLostError: a rank has not come; the store cannot be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield
        return
    # Without torchrun (srun or mpirun alone) rank 0 serves the store, once it makes the group.
    if store_is_shared():
        _meet(int(os.environ["RANK"]), world, math.inf if patience is None else patience)
    if patience is None:
        yield
        return
    limit = max(patience, BUILD_SECONDS)
    late = threading.Timer(limit, _give_up, [limit])
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()


def _meet(rank: int, world: int, patience: float) -> None:
    began = time.monotonic()
    main = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    others = [r for r in range(world) if r != rank]
    missing, spoken, here = others, False, False
    try:
        naming = Naming(open_store(patience), rank)
        while missing and time.monotonic() - began < patience:
            naming.step(missing)
            keys = naming.keys
            if keys is not None:
                if not here:
                    keys.set(str(rank), "here")
                    here = True
                missing = [r for r in missing if not keys.check([str(r)])]
            if rank == 0 and missing and not spoken and time.monotonic() - began > SPEAKS_AFTER:
                print(f"waiting for {_ranks(missing)} to start", file=sys.stderr, flush=True)
                spoken = True
            time.sleep(0.2 if missing else 0)
        if missing and not here:  # rank 0 has not answered, and the others hide behind it
            asking = naming.asking(others[1:])
            missing = [r for r in others if r not in asking]
        elif not missing:
            naming.end(world)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise RankLostError(
            f"rank {rank} cannot reach the launcher of rank 0 at {main} ({reason}); {START_AGAIN}"
        ) from error
    if missing:
        raise RankLostError(
            f"{_ranks(missing)} of {world} did not start within {patience:.0f} s "
            "(three times train.hang_timeout); look at the output of their hosts, then "
            f"{START_AGAIN}",
            speaks=rank == min(r for r in range(world) if r not in missing),
        )


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def _give_up(patience: float) -> None:
    print(
        f"error: rank {os.environ['RANK']} has waited {patience:.0f} s for the process group: the "
        "ranks have started and cannot connect to one another; open all ports between the hosts, "
        "or set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to the network they share: "
        "`... --no_python postshare doctor` finds out which",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(ExitCode.RANK_LOST)
