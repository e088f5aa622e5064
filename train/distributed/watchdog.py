"""The watchdog: it ends a training that no longer moves or has lost a rank, and says which.

Collectives wait for hours, as long as the main process may export meanwhile. In a training a rank
is expected sooner: the loop notes each phase it enters, and a thread that sees no new note for
`train.hang_timeout` seconds names the late rank, dumps the stacks of all threads of all ranks, and
ends the process, which ends the launch. See docs/faults.md.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from dataclasses import replace
from types import TracebackType

from train.common.exit_codes import ExitCode
from train.common.signals import TrainingStopped
from train.distributed.heartbeats import Heartbeats, Note
from train.distributed.lost_rank import START_AGAIN, RankLostError, lost_connection

FIRST_STEP = 3
"""Times the time-out that the first step may take: kernels are compiled, files are cold."""
ALONE_SECONDS = 10.0
"""How long a rank whose peer has ended may take to find out by itself."""

_HUNG = "no progress"


def _agreed(error: Exception) -> bool:
    """Whether all ranks leave with this error together."""
    return isinstance(error, TrainingStopped)


class Watchdog:
    """Within `with`, a phase must not last longer than `timeout` seconds (None: for ever).

    Seconds in which the whole process was stopped do not count. On leaving, an error that means a
    lost peer becomes RankLostError, which names the ranks that are silent.
    """

    def __init__(self, rank: int, world: int, timeout: float | None) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._alone = Note(rank, os.uname().nodename, os.getpid(), 0, 0, "starting")
        self._beats: Heartbeats | None = None
        self._first: int | None = None
        self._limited = True
        self._ended = threading.Event()

    @property
    def here(self) -> Note:
        """This rank's note."""
        return self._alone if self._beats is None else self._beats.note

    def note(self, phase: str, step: int | None = None, limited: bool = True) -> None:
        """The main thread enters a phase; `step` counts from 1. The same calls on all ranks.

        Args:
            limited: whether the phase must end within the time-out.
        """
        self._limited = limited
        step = self.here.step if step is None else step
        if self._first is None and step:
            self._first = step
        changed = replace(self.here, count=self.here.count + 1, step=step, phase=phase)
        if self._beats is None:
            self._alone = changed
        else:
            self._beats.note = changed

    def __enter__(self) -> Watchdog:
        if self.world > 1:
            interval = 1.0 if self.timeout is None else min(1.0, max(0.2, self.timeout / 20))
            self._beats = Heartbeats(self.rank, self.world, interval)
        if self.timeout is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        reason = None if error is None else lost_connection(error)
        if reason is not None and self._beats is not None:
            lost = self._lost(self._beats, reason)
            self._end()
            raise lost from error
        if self._beats is not None and isinstance(error, Exception) and not _agreed(error):
            text = " ".join(str(error).split())[:300]
            self._beats.agree(f"rank {self.rank} ended: {kind and kind.__name__}: {text}", 2.0)
        self._end()

    def _end(self) -> None:
        self._ended.set()
        if self._beats is not None:
            self._beats.end()

    # --- a lost peer --------------------------------------------------------------------------

    def _lost(self, beats: Heartbeats, reason: str) -> RankLostError:
        beats.observe()
        end = time.monotonic() + 4 * beats.interval
        while beats.verdict is None and time.monotonic() < end and not beats.silent():
            time.sleep(0.05)
        silent = beats.silent()
        named = ", ".join(note.who for note in silent) or "a rank"
        mine = (
            f"{named} cannot be reached any longer at {self.here.where} ({reason}): it has died, "
            f"or its host or the network has; {START_AGAIN}"
        )
        agreed = beats.agree(mine, 2 * beats.interval)
        if agreed is not None and beats.author != self.rank:
            agreed = agreed.removesuffix(f"; {START_AGAIN}")
            return RankLostError(f"{agreed}; {START_AGAIN}", speaks=self.rank == 0)
        return RankLostError(mine)

    # --- a hang -------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self.timeout is not None
        tick = min(1.0, self.timeout / 20)
        seen, quiet, before = -1, 0.0, time.monotonic()
        while not self._ended.wait(tick):
            now = time.monotonic()
            # Not the whole difference: where this process was stopped, nothing was late.
            quiet += min(now - before, 2 * tick)
            before = now
            if self.here.count != seen or not self._limited:
                seen, quiet = self.here.count, 0.0
            patience = self.timeout
            if self._first in (None, self.here.step):
                patience *= FIRST_STEP
            beats = self._beats
            if beats is not None and quiet > patience - 6 * beats.interval:
                beats.observe()
            if quiet > patience:
                self._hung(patience)
            if beats is not None and beats.verdict is not None:
                if beats.verdict.startswith(_HUNG) and quiet > 2 * beats.interval:
                    self._die(None)
                elif quiet > ALONE_SECONDS:
                    # Another rank has ended, and this one waits for it.
                    self._die(beats.verdict)

    def _hung(self, patience: float) -> None:
        mine = f"{_HUNG} for {patience:.0f} s: {self._whose_fault()}; {START_AGAIN}"
        if self._beats is None:
            self._die(mine)
        else:
            agreed = self._beats.agree(mine, 3.0)
            speaks = agreed is None or self._beats.author == self.rank
            self._die(mine if speaks else None)

    def _whose_fault(self) -> str:
        beats = self._beats
        if beats is None:
            return f"the process is still at {self.here.where}"
        silent, notes = beats.silent(), beats.all()
        if silent:
            behind = "; ".join(f"{note.who} is silent since {note.where}" for note in silent)
            return (
                f"{behind}: its process is stopped, or its host or the network is gone "
                f"({self.here.who} waits at {self.here.where})"
            )
        if len(notes) == 1:
            return (
                f"{self.here.who} waits at {self.here.where}, and the launcher of rank 0 "
                f"({os.environ.get('MASTER_ADDR')}) cannot be reached: its host or the network "
                "is gone"
            )
        least = min(note.count for note in notes)
        late = [note for note in notes if note.count == least]
        if len(late) == len(notes):
            return f"all ranks are at {self.here.where}, and none is behind: see the stacks"
        behind = "; ".join(f"{note.who} is late, still at {note.where}" for note in late[:4])
        more = f" and {len(late) - 4} more" if len(late) > 4 else ""
        furthest = max(notes, key=lambda note: note.count)
        return f"{behind}{more} (the others wait at {furthest.where})"

    def _die(self, line: str | None) -> None:
        """End the process from this thread: its main thread cannot be woken."""
        if self._ended.is_set():
            return
        text = "" if line is None else f"error: {line}\n"
        text += f"stacks of rank {self.rank} at {self.here.where}:\n"
        sys.__stderr__.write(text)  # type: ignore[union-attr]
        sys.__stderr__.flush()  # type: ignore[union-attr]
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)  # type: ignore[arg-type]
        if line is not None and self._beats is not None:
            # The launcher ends all ranks as soon as one is gone: let the others dump their stacks.
            time.sleep(3 * self._beats.interval)
        os._exit(ExitCode.HUNG)
