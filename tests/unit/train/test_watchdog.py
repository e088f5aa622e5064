"""Heartbeats and the meeting over a real store in this process; launches: tests/distributed."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from train import heartbeats
from train.heartbeats import Heartbeats
from train.meeting import meeting
from train.watchdog import RankLostError, Watchdog, lost_connection


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """What the launcher of rank 0 serves."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "0",
        "WORLD_SIZE": "3", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # All ranks are here: each is the first training of its process.
    monkeypatch.setattr(heartbeats, "_trainings", itertools.repeat(0))
    return server


def wait_for(condition: object, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_rank_that_stops_writing_is_silent_and_one_that_stays_behind_is_not() -> None:
    ranks = [Heartbeats(rank, 3, 0.1) for rank in range(3)]
    for count, rank in zip((7, 5, 7), ranks, strict=True):
        rank.note = replace(rank.note, count=count, step=count, phase="penalty")
    ranks[0].observe()
    wait_for(lambda: [n.count for n in ranks[0].all()] == [7, 5, 7])
    time.sleep(0.5)
    assert ranks[0].silent() == []
    ranks[2].end()
    wait_for(lambda: [n.rank for n in ranks[0].silent()] == [2])
    assert ranks[0].silent()[0].where == "step 7, penalty"
    for rank in ranks[:2]:
        rank.end()


def test_the_first_verdict_wins() -> None:
    ranks = [Heartbeats(rank, 2, 0.1) for rank in range(2)]
    assert ranks[1].agree("rank 0 is late", 5) == "rank 0 is late"
    assert ranks[0].agree("rank 1 is late", 5) == "rank 0 is late"
    for rank in ranks:
        rank.end()


def test_a_lost_peer_is_named_and_other_errors_stay_what_they_are() -> None:
    other = Heartbeats(1, 2, 0.2)
    gloo = (
        "[/a/b/pair.cc:537] Read error [127.0.0.1]:1459: Connection reset by peer. This is typical"
    )
    watch = Watchdog(0, 2, 4.0)

    def lose() -> None:
        with watch:
            watch.note("penalty", 9)
            time.sleep(0.5)
            other.end()
            raise RuntimeError(gloo)

    with pytest.raises(RankLostError, match=r"rank 1 \(host \S+, process \d+\) cannot be") as lost:
        lose()
    assert "at step 9, penalty (Read error [127.0.0.1]:1459: Connection reset by peer)" in str(
        lost.value
    )
    assert lost.value.speaks
    assert lost_connection(RuntimeError("shapes do not fit")) is None
    assert lost_connection(ValueError(gloo)) is None


def test_a_rank_that_does_not_come_is_named(store: dist.TCPStore) -> None:
    began = time.monotonic()
    store.set("postshare-meeting/0/2", "here")
    with pytest.raises(RankLostError, match=r"rank 1 of 3 did not start within 1 s"), meeting(1.0):
        raise AssertionError("not all are there")
    assert 1 <= time.monotonic() - began < 4
    store.set("postshare-meeting/0/1", "here")
    with meeting(1.0):
        pass


def test_a_store_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "9")
    with (
        pytest.raises(RankLostError, match=r"cannot reach the launcher of rank 0 at 127.0.0.1:9"),
        meeting(2.0),
    ):
        raise AssertionError("nobody is there")
