"""Real processes through `accelerate launch` and the shipped launch files.

The one way to start several processes in this suite: a free port, a time-out, every rank's output
in the failure message, and no retry. Tests that watch a launcher of their own take its command line
and environment from here.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import REPOSITORY

LAUNCH_FILES = REPOSITORY / "launch" / "accelerate"


@dataclass(frozen=True)
class Launch:
    """A finished launch: the launcher's exit status and everything all ranks printed."""

    command: list[str]
    status: int
    output: str
    timed_out: bool = False

    @property
    def failed(self) -> bool:
        return self.timed_out or self.status != 0

    def report(self) -> str:
        ending = "timed out" if self.timed_out else f"exited with {self.status}"
        return f"{' '.join(self.command)}\n{ending}\n{self.output}"


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds this checkout, as a user's finds the package that is installed."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # The command postshare, and the ninja with which DeepSpeed compiles.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        **more,
    }


def command(config: str | Path, *arguments: str | Path, processes: int | None = None) -> list[str]:
    """`accelerate launch --config_file launch/accelerate/<config>.yaml arguments`."""
    file = config if isinstance(config, Path) else LAUNCH_FILES / f"{config}.yaml"
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    # Port 0: the launcher takes a free one. --tee 3: lines carry the rank they come from.
    words += ["--config_file", str(file), "--main_process_port", "0", "--tee", "3"]
    if processes is not None:
        words += ["--num_processes", str(processes)]
    return [*words, *map(str, arguments)]


def ranks_of(launcher: subprocess.Popen[Any]) -> list[int]:
    """Process ids of the ranks that a launcher of `-m train` or `postshare run` runs now."""
    try:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        return [
            int(pid) for pid in children
            if re.search(
                rb"-m\0train\0|/postshare\0run\0", Path(f"/proc/{pid}/cmdline").read_bytes()
            )
        ]  # fmt: skip
    except OSError:  # gone since
        return []


def launch(
    config: str | Path,
    script: str | Path,
    *arguments: str | Path,
    processes: int | None = None,
    timeout: float = 300,
    variables: dict[str, str] | None = None,
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
    folder: Path = REPOSITORY,
) -> Launch:
    """Run `accelerate launch --config_file launch/accelerate/<config>.yaml script arguments`.

    Args:
        config: the name of a shipped launch file, or a path.
        script: a Python file, or "-m" with the module first among `arguments`, or "--no_python"
            with a command.
        processes: overrides the launch file's number.
        timeout: seconds, after which the whole process group is killed.
        variables: of the environment.
        meanwhile: called with the launcher once it has been started.
        folder: the working folder.
    """
    words = command(config, script, *arguments, processes=processes)
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
        # A crashed rank prints its stack.
        env=environment(PYTHONFAULTHANDLER="1", **(variables or {})),
        start_new_session=True,
    )
    try:
        if meanwhile is not None:
            meanwhile(process)
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Launch(words, process.returncode, output, timed_out=True)
    return Launch(words, process.returncode, output)


def run(config: str | Path, script: str | Path, *arguments: str | Path, **options: object) -> str:
    """`launch`, and its output; raises AssertionError with every rank's output when it failed."""
    result = launch(config, script, *arguments, **options)  # type: ignore[arg-type]
    assert not result.failed, result.report()
    return result.output
