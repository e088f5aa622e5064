"""Rows of the table: what each is called, how long it may take, what it needs, and the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Values = dict[str, float | str]
"""What a row has measured, by name; of an equality also its `tolerance`."""


@dataclass(frozen=True)
class Machine:
    """What the rows run on.

    Attributes:
        device: "cuda", or "cpu", where everything is of toy size.
        gpus: that torch sees; 0 on the CPU.
        folder: for what rows write; those of one table share it.
    """

    device: str
    gpus: int
    folder: Path

    @property
    def is_toy(self) -> bool:
        return self.device == "cpu"


class Absent(Exception):  # noqa: N818 - no error: a row's reason not to run
    """What a row needs is not here."""


class Refused(Exception):  # noqa: N818 - likewise
    """The recipe, or the launch, does not take what a row asks for."""


@dataclass(frozen=True)
class Row:
    """A row: a function that returns what it measured, and asserts what must hold.

    Attributes:
        seconds: its time limit.
        needs: "gpu", "2 gpus", or modules that must be installed.
    """

    name: str
    measure: Callable[[Machine], Values]
    seconds: float
    needs: tuple[str, ...] = ()

    def run(self, machine: Machine) -> Values:
        """Raises Absent, Refused, AssertionError (a number is not what it should be), or whatever
        went wrong."""
        for need in self.needs:
            if need == "gpu":
                if machine.is_toy:
                    raise Absent("needs a GPU")
            elif need == "2 gpus":
                if machine.gpus < 2:
                    raise Absent("needs two GPUs")
            elif importlib.util.find_spec(need) is None:
                raise Absent(f"not installed: {need}")
        return self.measure(machine)


def within(found: float, tolerance: float, what: str = "difference") -> Values:
    """The values of an equality. Raises AssertionError where it does not hold."""
    assert found <= tolerance, f"{what} {found:.3g} is above {tolerance:g}"
    return {what: found, "tolerance": tolerance}
