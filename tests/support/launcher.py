"""Real processes through `accelerate launch` and the shipped launch files.

The one way to start several processes in this suite: a free port, a time-out, every rank's output
in the failure message, and no retry.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
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


def surroundings() -> dict[str, str]:
    """The environment of a launch."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crashed rank prints its stack
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
        ),
        # The command postshare, and the ninja with which DeepSpeed compiles.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def launch(
    config: str | Path,
    script: str | Path,
    *arguments: str | Path,
    processes: int | None = None,
    timeout: float = 300,
    environment: dict[str, str] | None = None,
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
        meanwhile: called with the launcher once it has been started.
        folder: the working folder.
    """
    file = config if isinstance(config, Path) else LAUNCH_FILES / f"{config}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    # Port 0: the launcher takes a free one. --tee 3: lines carry the rank they come from.
    command += ["--config_file", str(file), "--main_process_port", "0", "--tee", "3"]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    command += [str(script), *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
        env={**surroundings(), **(environment or {})},
        start_new_session=True,
    )
    try:
        if meanwhile is not None:
            meanwhile(process)
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Launch(command, process.returncode, output, timed_out=True)
    return Launch(command, process.returncode, output)


def run(config: str | Path, script: str | Path, *arguments: str | Path, **options: object) -> str:
    """`launch`, and its output; raises AssertionError with every rank's output when it failed."""
    result = launch(config, script, *arguments, **options)  # type: ignore[arg-type]
    assert not result.failed, result.report()
    return result.output
