"""Two hosts on one machine: network namespaces with a veth pair, each with a host name of its own.

Needs root and iproute2. They share the file system, as the nodes of a cluster share theirs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("psnode1", "psnode2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HOSTS_FILE = Path("/run/postshare-hosts")


def missing(*commands: str) -> str | None:
    """Why two hosts cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    absent = [name for name in ("ip", "unshare", *commands) if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)}: make test-cluster installs it"
    tried = subprocess.run(["ip", "netns", "add", "pstry"], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", "pstry"], check=True)
    return None


@contextmanager
def two_hosts() -> Iterator[None]:
    """Inside, `on(0, ...)` and `on(1, ...)` are commands on hosts that know each other's names."""
    _remove()
    try:
        _ip("link", "add", "psveth1", "type", "veth", "peer", "name", "psveth2")
        names = [f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True)]
        HOSTS_FILE.write_text("127.0.0.1 localhost\n" + "".join(names))
        for index, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True), 1):
            _ip("netns", "add", name)
            _ip("link", "set", f"psveth{index}", "netns", name)
            inside = ("-n", name)
            _ip(*inside, "address", "add", f"{address}/24", "dev", f"psveth{index}")
            _ip(*inside, "link", "set", f"psveth{index}", "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield
    finally:
        _remove()


def on(host: int, *command: str) -> list[str]:
    """The command line that runs a command on host 0 or 1."""
    # Not `ip netns exec`: it mounts another /sys, without the cgroups that slurmd wants to see.
    space = ["nsenter", f"--net=/run/netns/{NAMES[host]}", "unshare", "--uts", "--mount"]
    named = f'hostname {NAMES[host]}; mount --bind {HOSTS_FILE} /etc/hosts; exec "$@"'
    return [*space, "sh", "-c", named, "sh", *command]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)
    HOSTS_FILE.unlink(missing_ok=True)
    subprocess.run(["ip", "link", "delete", "psveth1"], stderr=subprocess.DEVNULL, check=False)
