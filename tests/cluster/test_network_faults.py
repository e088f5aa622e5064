"""What a network can do to two hosts: errors within the time-outs that name who is gone.

Each host has a launcher of its own, as in docs/clusters.md without ssh.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.hosts import ADDRESSES, NAMES, on
from tests.support import REPOSITORY
from tests.support.launcher import environment
from train.tracking.metrics_log import read_rows

PORT = 29541
HANG = 15
RENDEZVOUS = 20
RECIPE = (
    "recipes/demo_postshare.yaml",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.checkpoint_every=5",
    f"train.hang_timeout={HANG}",
    "data.sequence_length=64",
    "evaluate.blocks=4",
    "evaluate.continued=false",
)
pytestmark = [pytest.mark.usefixtures("two_hosts"), pytest.mark.timeout(600)]


@dataclass
class Node:
    """A launcher and its process on one host."""

    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ends(self, seconds: float) -> float:
        """Seconds from its start to its end."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running\n{self.output()[-6000:]}") from None
        return time.monotonic() - self.began


_started: list[Node] = []


@pytest.fixture(autouse=True)
def _end_all() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop().process
        if process.poll() is None:
            # Its own session is its process group; the ranks end when their launcher is gone.
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
    set_link("up")


def node(
    host: int, folder: Path, *overrides: str, address: str = ADDRESSES[0], port: int = PORT,
    before: str = "",
) -> Node:  # fmt: skip
    """Start host 0's or 1's launcher; `before` is a shell command in the host's own mounts."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
        "--config_file", "launch/accelerate/ddp.yaml", "--num_machines", "2",
        "--num_processes", "2", "--machine_rank", str(host), "--main_process_ip", address,
        "--main_process_port", str(port), "--rdzv_conf", f"timeout={RENDEZVOUS}",
        "-m", "train", *RECIPE, *overrides, f"output_dir={folder}",
    ]  # fmt: skip
    log = folder.with_name(f"{folder.name}-{NAMES[host]}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            on(host, "sh", "-c", f'{before or ":"}; exec "$@"', "sh", *command),
            cwd=REPOSITORY, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            env=environment(),
        )  # fmt: skip
    _started.append(Node(process, log, time.monotonic()))
    return _started[-1]


def set_link(state: str) -> None:
    """Both hosts lose their network, or have it again."""
    subprocess.run(["ip", "-n", NAMES[1], "link", "set", "psveth2", state], check=True)


def await_steps(folder: Path, steps: int, *nodes: Node) -> None:
    end = time.monotonic() + 240
    while len(read_rows(folder / "metrics.jsonl")) < steps:
        assert all(n.process.poll() is None for n in nodes), "\n".join(n.output() for n in nodes)
        assert time.monotonic() < end, "\n".join(n.output() for n in nodes)
        time.sleep(0.1)


# --- before the first step ------------------------------------------------------------------------


def test_a_host_that_never_starts(tmp_path: Path) -> None:
    alone = node(0, tmp_path / "run")
    took = alone.ends(RENDEZVOUS + 60)
    assert alone.process.returncode != 0
    assert took > RENDEZVOUS
    assert re.search(r"1/2 clients joined", alone.output()), alone.output()[-3000:]


@pytest.mark.parametrize("wrong", ["port", "address"])
def test_a_wrong_port_or_address(wrong: str, tmp_path: Path) -> None:
    port = PORT + 1 if wrong == "port" else PORT
    address = "10.77.0.9" if wrong == "address" else ADDRESSES[0]
    lost = node(1, tmp_path / "run", port=port, address=address)
    took = lost.ends(RENDEZVOUS + 120)
    assert lost.process.returncode != 0
    assert took > RENDEZVOUS / 2
    assert re.search(rf"{re.escape(address)}\D+{port}", lost.output()), lost.output()[-3000:]


def test_folders_of_their_own_are_found_out_before_anything_is_trained(tmp_path: Path) -> None:
    """Host 1 has another file system under the same name: a node-local disk."""
    place = tmp_path / "runs"
    place.mkdir()
    nodes = [
        node(0, place / "run", "train.steps=5"),
        node(1, place / "run", "train.steps=5", before=f"mount -t tmpfs none {place}"),
    ]
    for each in nodes:
        each.ends(200)
        assert each.process.returncode != 0
    said = nodes[0].output()
    assert re.search(r"error: .* is not the same folder on all nodes: rank 1 does not see", said), (
        said
    )
    assert "file system that all nodes share" in said
    assert read_rows(place / "run" / "metrics.jsonl") == []


# --- in mid-run -----------------------------------------------------------------------------------


def test_a_link_that_drops_for_five_seconds_costs_nothing_else(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    nodes = [node(host, folder, "train.steps=30") for host in (0, 1)]
    await_steps(folder, 6, *nodes)
    set_link("down")
    dropped = len(read_rows(folder / "metrics.jsonl"))
    time.sleep(5)
    assert len(read_rows(folder / "metrics.jsonl")) <= dropped + 2, "nobody can step meanwhile"
    set_link("up")
    for each in nodes:
        each.ends(240)
        assert each.process.returncode == 0, each.output()[-4000:]
    nodes = [node(host, whole, "train.steps=30") for host in (0, 1)]
    for each in nodes:
        each.ends(240)
    mine, theirs = (load_file(f / "weights" / "model.safetensors") for f in (folder, whole))
    for name, value in theirs.items():
        assert float((mine[name] - value).norm()) <= 1e-6 * float(value.norm()), name


def test_a_host_that_disappears_is_named_by_the_other_and_both_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    nodes = [node(host, folder, "train.steps=500") for host in (0, 1)]
    await_steps(folder, 6, *nodes)
    set_link("down")
    cut = time.monotonic()
    ended: list[float] = []
    waits = [threading.Thread(target=lambda n=n: ended.append(n.ends(200))) for n in nodes]  # type: ignore[misc]
    for wait in waits:
        wait.start()
    for wait in waits:
        wait.join()
    print(f"both ended {time.monotonic() - cut:.0f} s after the link was cut")
    assert len(ended) == 2
    here, there = (n.output() for n in nodes)
    assert re.search(
        rf"error: no progress for {HANG} s: rank 1 \(host {NAMES[1]}, process \d+\) is silent", here
    ), here[-4000:]
    assert re.search(
        rf"error: no progress for {HANG} s: .*the launcher of rank 0 \({ADDRESSES[0]}\) cannot be",
        there,
    ) or re.search(r"rank 0 \(host .*\) (is silent|cannot be reached)", there), there[-4000:]
    assert "stacks of rank 0" in here
    assert "stacks of rank 1" in there
