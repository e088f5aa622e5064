"""Time things against each other in one run: ratios are less noisy than seconds."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path


def interleaved(rounds: int, **functions: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each function; every round runs each of them once, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def once(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class PeakMemory:
    """Peak of a line of /proc/self/status (RssAnon, VmRSS) above its start, in bytes."""

    def __init__(self, line: str = "RssAnon", seconds: float = 0.01) -> None:
        self.line, self.seconds = line, seconds
        self.peak = 0

    def _read(self) -> int:
        for row in Path("/proc/self/status").read_text().splitlines():
            if row.startswith(self.line + ":"):
                return int(row.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {self.line}")

    def _watch(self) -> None:
        while not self._stop.wait(self.seconds):
            self.peak = max(self.peak, self._read() - self._start)

    def __enter__(self) -> PeakMemory:
        self._start = self._read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._read() - self._start)
