"""Trainings that are broken off from inside: killed, or told to stop, at a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from train.training import loop


class KilledError(BaseException):
    """Stands in for SIGKILL: no error handling of the product takes it for its own."""


def kill(*arguments: object) -> None:
    """Stands in for any function, and dies in it."""
    raise KilledError


def stop(number: signal.Signals = signal.SIGINT) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


@contextmanager
def at_step(step: int, act: Callable[[], object] = kill) -> Iterator[None]:
    """Inside, `act` is called when this step (from 1) of a training begins."""
    original = loop.seed_step

    def seed_step(seed: int, at: int, rank: int) -> None:
        if at + 1 == step:
            act()
        original(seed, at, rank)

    with patch.object(loop, "seed_step", seed_step):
        yield
