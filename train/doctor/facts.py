"""Facts that one rank sees of itself and of its machine: read, timed, judged elsewhere."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from train.common.versions import driver, versions
from train.distributed.bf16 import bf16_factor, has_bf16
from train.doctor.builds import find_locks

T = TypeVar("T")

SETTINGS = (
    "NCCL_",
    "GLOO_",
    "TORCH_NCCL_",
    "MASTER_",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
)
"""Environment variables that are looked at, or how their names begin. Nothing else is read."""
LIMIT = 20.0
"""Seconds that one reading may take: a file system that hangs must not hang the doctor."""


class TooLate(Exception):  # noqa: N818 - an answer that did not come
    """Something did not end within its time."""


def limited(work: Callable[[], T], seconds: float, vain: Callable[[], bool] = lambda: False) -> T:
    """``work()``; its thread is left behind when it takes longer, or when it is in vain.

    Args:
        vain: asked once a second whether there is anything left to wait for.

    Raises:
        TooLate: no result.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def attempt() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    end = time.monotonic() + seconds
    while thread.is_alive() and (left := end - time.monotonic()) > 0:
        thread.join(min(left, 1.0))
        if thread.is_alive() and vain():
            break
    if not outcome:
        raise TooLate
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


@dataclass(frozen=True)
class Gpu:
    """The device that this rank will use; bytes."""

    name: str
    uuid: str
    free: int
    total: int


@dataclass(frozen=True)
class Facts:
    """One rank. Bytes where a size is meant.

    Attributes:
        network: host name and network namespace: ranks that share a loopback interface.
        versions: of Python, of the packages, of CUDA and its driver, of postshare's own sources.
        gpus: devices that the process sees.
        driver: version of the NVIDIA driver on this machine, whether torch uses it or not.
        host_address: what the host's name resolves to, where gloo listens by default.
        shared_memory: free bytes of /dev/shm.
        locked_memory: limit of locked memory; -1: none.
        folder: absolute path of the run folder.
        disk: free bytes where the run folder is.
        recipe: hash of the resolved recipe.
        bf16: whether the device multiplies in bf16 by instructions of its own.
        bf16_factor: how many times as long as fp32 it takes where it has none; measured once on
            each host, where the recipe asks for bf16.
        compiler: what torch.compile would build with; None: there is none.
        locks: see `train.doctor.builds.find_locks`; read once on each host.
        late: readings that did not end within their time.
    """

    rank: int
    local_rank: int
    host: str
    network: str
    versions: dict[str, str]
    gpu: Gpu | None = None
    gpus: int = 0
    driver: str | None = None
    ram: int = 0
    ram_total: int = 0
    cpus: int = 1
    shared_memory: int | None = None
    locked_memory: int = -1
    interfaces: list[str] = field(default_factory=list)
    infiniband: list[str] = field(default_factory=list)
    host_address: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    folder: str | None = None
    disk: int | None = None
    recipe: str | None = None
    bf16: bool = True
    bf16_factor: float | None = None
    compiler: str | None = None
    locks: list[tuple[str, float]] = field(default_factory=list)
    late: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Facts:
        gpu = value["gpu"]
        locks = [(path, age) for path, age in value["locks"]]
        return cls(**{**value, "gpu": Gpu(**gpu) if gpu else None, "locks": locks})


def collect(folder: Path | None, recipe: str | None, in_bf16: bool = False) -> Facts:
    """Read everything; what hangs is left out and named in `late`.

    Args:
        folder: the run folder, which need not exist.
        recipe: hash of the resolved recipe.
        in_bf16: whether the recipe asks for bf16.
    """
    late: list[str] = []

    def read(name: str, work: Callable[[], T], otherwise: T) -> T:
        try:
            return limited(work, LIMIT)
        except TooLate:
            late.append(name)
        except (OSError, RuntimeError):  # absent here: no /proc, no such device
            pass
        return otherwise

    host = socket.gethostname()
    count = read("the number of GPUs", torch.cuda.device_count, 0)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    address: str | None = read("the address of this host", lambda: socket.gethostbyname(host), None)
    free: int | None = None
    if folder is not None:
        free = read(f"the file system of {folder}", lambda: disk_free(folder), None)
    gpu: Gpu | None = None
    if count and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        # The device that Accelerate will choose.
        gpu = read("the GPU", lambda: read_gpu(local_rank % count), None)
    available, total = read("the memory of this host", memory, (0, 0))
    device = torch.device("cpu") if gpu is None else torch.device("cuda", local_rank % count)
    bf16 = read("the instructions of the device", lambda: has_bf16(device), False)
    factor: float | None = None
    if in_bf16 and not bf16 and local_rank == 0:
        factor = read("the time of bf16", lambda: bf16_factor(device), None)
    return Facts(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=local_rank,
        host=host,
        network=f"{host} {read('/proc', lambda: os.readlink('/proc/self/ns/net'), '')}".strip(),
        versions=read("the versions of the packages", versions, {}),
        gpu=gpu,
        gpus=count,
        driver=read("the driver", driver, None),
        ram=available,
        ram_total=total,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        shared_memory=read("/dev/shm", lambda: shutil.disk_usage("/dev/shm").free, None),
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        interfaces=[name for _, name in socket.if_nameindex()],
        infiniband=read("/sys/class/infiniband", infiniband, []),
        host_address=address,
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
        folder=None if folder is None else os.path.abspath(folder),
        disk=free,
        recipe=recipe,
        bf16=bf16,
        bf16_factor=factor,
        compiler=read("the compiler", lambda: find_compiler(gpu is not None), None),
        locks=read("torch's folder of extensions", find_locks, []) if local_rank == 0 else [],
        late=late,
    )


def read_gpu(index: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, str(getattr(properties, "uuid", index)), free, total)


def find_compiler(for_gpu: bool) -> str | None:
    """The path of what torch.compile builds kernels with: a C++ compiler, for Triton one of C."""
    given = os.environ.get("CC" if for_gpu else "CXX")
    usual = ("gcc", "clang") if for_gpu else ("clang++" if sys.platform == "darwin" else "g++",)
    return next(filter(None, map(shutil.which, (given,) if given else usual)), None)


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory that are available and that there are: of the machine, or of the job.

    Slurm and Kubernetes limit a job by a control group, which kills what the machine could hold.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    available, total = table["MemAvailable"], table["MemTotal"]
    for limit, used in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            most, now = int((root / limit).read_text()), int((root / used).read_text())
        except (OSError, ValueError):  # not this version of control groups, or "max"
            continue
        total, available = min(total, most), min(available, max(most - now, 0))
    return available, total


def infiniband(root: Path = Path("/sys/class/infiniband")) -> list[str]:
    """`mlx5_0 ACTIVE` for every port of every InfiniBand or RoCE device."""
    found = []
    for state in sorted(root.glob("*/ports/*/state")):
        found.append(f"{state.parents[2].name} {state.read_text().split()[-1]}")
    return found


def disk_free(folder: Path) -> int:
    """Free bytes where `folder` is, or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
