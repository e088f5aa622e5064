"""Heartbeats and the meeting over a real store in this process; launches: tests/distributed."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from train.distributed import heartbeats, launcher_store
from train.distributed.heartbeats import Heartbeats
from train.distributed.launcher_store import Naming, init_method
from train.distributed.lost_rank import RankLostError, lost_connection
from train.distributed.rendezvous import meeting
from train.distributed.watchdog import Watchdog


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
    monkeypatch.setattr(launcher_store, "_name", None)
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
    assert [rank.author for rank in ranks] == [1, 1]
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


class Other:
    """Another rank, as far as the meeting goes; within `with`."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Other:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        naming = Naming(launcher_store.open_store(5), self.rank)
        while naming.keys is None and not self._over.wait(0.02):
            naming.step([])
        if naming.keys is not None:
            naming.keys.set(str(self.rank), "here")
            self.name = naming.name


def test_a_rank_that_does_not_come_is_named() -> None:
    began = time.monotonic()
    named = r"rank 1 of 3 did not start within 1 s"
    with Other(2), pytest.raises(RankLostError, match=named) as lost, meeting(1.0):
        raise AssertionError("not all are there")
    assert 1 <= time.monotonic() - began < 4
    assert lost.value.speaks
    with Other(2), Other(1), meeting(3.0):
        pass


def test_a_restarted_group_shares_no_key_with_the_one_before(store: dist.TCPStore) -> None:
    assert init_method() is None
    with Other(1) as before, Other(2), meeting(3.0):
        pass
    assert init_method() is not None
    store.set("exception_dump", "1")  # as NCCL's watchdog does when it has lost a peer
    # A rank 1 that asked and was killed before all were there.
    Naming(launcher_store.open_store(5), 1)
    with Other(2), pytest.raises(RankLostError, match="rank 1 of 3"), meeting(0.5):
        raise AssertionError("the rank that asked is dead")
    with Other(1) as one, Other(2) as two, meeting(3.0):
        pass
    assert before.name != one.name == two.name is not None
    assert launcher_store.open_keys(5).check(["meeting/1", "meeting/2"])
    assert not store.check(["exception_dump"])


def test_a_main_rank_that_does_not_come_is_named_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, speaks in (1, True), (2, False):
        monkeypatch.setenv("RANK", str(rank))
        lost = pytest.raises(RankLostError, match="rank 0 of 3")
        with Other(3 - rank), lost as error, meeting(1.0):
            raise AssertionError("nobody has given this start a name")
        assert error.value.speaks is speaks


def test_a_store_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "9")
    with (
        pytest.raises(RankLostError, match=r"cannot reach the launcher of rank 0 at 127.0.0.1:9"),
        meeting(2.0),
    ):
        raise AssertionError("nobody is there")
