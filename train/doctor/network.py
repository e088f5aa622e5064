"""Checks: addresses, settings of NCCL and gloo, bandwidth, clocks."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator

from sa_models.errors import PostshareError
from train.common.sizes import size
from train.doctor.facts import Facts
from train.doctor.findings import Finding, Situation, bad, ok, warn
from train.estimate import parameters

CLOCK_LIMIT = 1.0
"""Seconds that clocks may differ."""
SLOW_NCCL = 1e9
"""Bytes a second below which NCCL has surely not found the fast network."""
LEAST_SHARED_MEMORY = 10**9
LOOPBACK = ("127.", "localhost", "::1")


def check_address(s: Situation) -> Iterator[Finding]:
    """Where the ranks meet."""
    address = s.facts[0].environment.get("MASTER_ADDR", "")
    port = s.facts[0].environment.get("MASTER_PORT", "")
    if s.world == 1:
        return
    if address.startswith(LOOPBACK) and len(s.hosts) > 1:
        yield bad(
            "address",
            f"MASTER_ADDR is {address}, and there are {len(s.hosts)} hosts",
            "give the first host's address to all: --main_process_ip <address>",
        )
    elif not s.missing:
        yield ok("address", f"{address}, port {port}, reached by all ranks")


def check_links(s: Situation) -> Iterator[Finding]:
    """Whether every host can connect to every other."""
    if s.links is None:
        return
    for link in s.links:
        yield bad(
            "links",
            f"{s.who([link.source])} cannot connect to {s.who([link.target])} at {link.address}: "
            f"{link.reason}",
            "let the firewall pass all ports between the hosts; is that the network they share?",
        )
    if not s.links:
        yield ok("links", f"each of {len(s.hosts)} hosts connects to all others, on any port")


def check_settings(s: Situation) -> Iterator[Finding]:
    """NCCL's and gloo's variables, and what they name."""
    topic, found = "network settings", False
    on_gpu = any(f.gpu is not None for f in s.facts)
    for ranks in s.hosts.values():
        f = ranks[0]
        for finding in _interfaces(f):
            found = True
            yield finding
        if (
            len(s.hosts) > 1
            and not on_gpu
            and "GLOO_SOCKET_IFNAME" not in f.environment
            and (f.host_address or "").startswith("127.")
        ):
            found = True
            yield bad(
                topic,
                f"{f.host} resolves its own name to {f.host_address}, where gloo would listen and "
                "no other host can reach it",
                "export GLOO_SOCKET_IFNAME=<the interface that the hosts share>",
            )
        if on_gpu and f.infiniband and f.environment.get("NCCL_IB_DISABLE") == "1":
            found = True
            yield warn(
                topic,
                f"{f.host} has InfiniBand ({', '.join(f.infiniband)}), and "
                "NCCL_IB_DISABLE=1 leaves it unused",
                "unset NCCL_IB_DISABLE",
            )
        active = any("ACTIVE" in port for port in f.infiniband)
        if on_gpu and active and 0 <= f.locked_memory < 2**30:
            found = True
            yield warn(
                topic,
                f"locked memory is limited to {size(f.locked_memory)} on "
                f"{f.host}; InfiniBand registers more",
                "ulimit -l unlimited, for Slurm in its unit",
            )
        enough = f.shared_memory is None or f.shared_memory >= LEAST_SHARED_MEMORY
        if on_gpu and len(ranks) > 1 and not enough:
            found = True
            yield warn(
                topic,
                f"/dev/shm has {size(f.shared_memory or 0)} free on {f.host}; "
                "NCCL exchanges through it within a host",
                "docker run --shm-size=16g, or an emptyDir of medium Memory at /dev/shm",
            )
    for finding in _differences(s):
        found = True
        yield finding
    if not found:
        names = ("NCCL_", "GLOO_", "TORCH_NCCL_")
        given = [f"{k}={v}" for k, v in s.facts[0].environment.items() if k.startswith(names)]
        ports = s.facts[0].infiniband
        fabric = f"; InfiniBand: {', '.join(ports)}" if ports else ""
        yield ok(topic, (", ".join(given) or "libraries' own choice") + fabric)


def _interfaces(f: Facts) -> Iterator[Finding]:
    """NCCL takes prefixes, `=` for whole names and `^` for all but these; gloo whole names."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = f.environment.get(variable, "")
        if not value or value.startswith("^"):
            continue
        exact = variable.startswith("GLOO") or value.startswith("=")
        asked = value.removeprefix("=").split(",")
        there = [a for a in asked for i in f.interfaces if (i == a if exact else i.startswith(a))]
        if not there or (variable.startswith("GLOO") and len(set(there)) < len(asked)):
            yield bad(
                "network settings",
                f"{variable}={value}, and {f.host} has only {', '.join(f.interfaces)}",
                f"export {variable}=<one of these>",
            )


def _differences(s: Situation) -> Iterator[Finding]:
    """Variables that differ between ranks; interfaces and adapters may, and devices do."""
    names = {n for f in s.facts for n in f.environment if n.startswith(("NCCL_", "TORCH_NCCL_"))}
    names |= {"HF_HUB_OFFLINE", "OMP_NUM_THREADS"}
    for name in sorted(names):
        ranks = defaultdict(list)
        for f in s.facts:
            ranks[f.environment.get(name, "(unset)")].append(f.rank)
        if len(ranks) > 1 and not name.endswith(("_IFNAME", "_HCA")):
            listed = ", ".join(f"{value} on {s.who(r)}" for value, r in ranks.items())
            yield warn(
                "network settings",
                f"{name} differs: {listed}",
                "export it in the job script, so that every process gets the same",
            )


def check_bandwidth(s: Situation) -> Iterator[Finding]:
    """The all-reduces, and what a step of the recipe would spend at that rate."""
    if not s.reductions:
        return
    topic = "bandwidth"
    listed = ", ".join(
        f"{r.size / 2**20:.0f} MiB in {r.seconds * 1e3:.1f} ms" for r in s.reductions
    )
    best = s.reductions[-1].rate(s.world)
    said = f"all-reduce of {listed}: {size(best)}/s over each link"
    if s.recipe is not None and s.shape is not None and s.recipe.train.steps != 0:
        try:
            traffic = parameters.step_traffic(
                s.shape, s.recipe.train, s.sharding, s.world, s.recipe.lora
            )
        except PostshareError:  # the batch does not divide: `launch` says so
            pass
        else:
            said += f"; gradients of a step: {size(traffic.gradients)}, "
            said += f"{traffic.gradients / best:.3g} s"
            if traffic.weights:
                said += f"; its weights: {size(traffic.weights)}, {traffic.weights / best:.3g} s"
    if s.backend == "nccl" and best < SLOW_NCCL:
        yield warn(topic, said, "that is a slow network for GPUs: " + s.network_cure)
    else:
        yield ok(topic, said)


def check_clocks(s: Situation) -> Iterator[Finding]:
    """Logs of several hosts, and times of files, are compared."""
    if not s.clocks:
        return
    off = {r: c for r, c in s.clocks.items() if abs(c.ahead) - c.uncertainty > CLOCK_LIMIT}
    for rank, clock in off.items():
        word = "ahead of" if clock.ahead > 0 else "behind"
        yield warn(
            "clocks",
            f"the clock of {s.who([rank])} is {abs(clock.ahead):.1f} s {word} that of rank 0; "
            "logs and times of files will disagree",
            "start chrony or systemd-timesyncd on that host (`timedatectl` shows it)",
        )
    if not off:
        worst = max(s.clocks.values(), key=lambda c: abs(c.ahead))
        within = abs(worst.ahead) + worst.uncertainty
        yield ok("clocks", f"agree within {within * 1e3:.3g} ms")


def free_port(port: int) -> Finding:
    """Alone: whether the port that a launch on this host would take is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return warn(
                "port",
                f"{port}, accelerate's own choice, is taken: {error.strerror or error}",
                "launch with --main_process_port <another>, or 0 on one host",
            )
    return ok("port", f"{port}, accelerate's own choice, is free")
