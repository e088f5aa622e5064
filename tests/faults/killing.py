"""Runs of the demo recipe that are killed again and again from outside, and started again.

A black box: a command, SIGKILL, and the files that a user looks at. Nothing here knows how a
checkpoint is written.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from tests.support import REPOSITORY, launcher

STEPS = 60
"""Of the training that is killed."""
RECIPE = (
    "recipes/demo_postshare.yaml",
    "train.micro_batch_size=2",
    "train.warmup_steps=2",
    "train.checkpoint_every=5",
    "data.sequence_length=64",
    "evaluate.blocks=2",
    "evaluate.continued=false",
)


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        options: of the demo recipe.
        trained: below the run folder, where the training that is killed lies.
    """

    options: tuple[str, ...]
    trained: str = "."


_LONG = f"train.steps={STEPS}"
WAYS = {
    "demo": Way((_LONG,)),
    "decoupled": Way((_LONG, "penalty.mode=decoupled", "penalty.coefficient=12.0")),
    "progressive": Way(
        (
            _LONG,
            "penalty.mode=progressive",
            "penalty.schedule=cosine",
            f"penalty.ramp_steps={STEPS * 2 // 3}",
        )
    ),
    "distill": Way((_LONG, "distill.top_k=7", "distill.hidden_weight=0.1")),
    "distill cached": Way((_LONG, "distill.top_k=7", "distill.cache=true")),
    "heal": Way(("train.steps=6", f"materialize.heal_steps={STEPS}"), "heal"),
    "basis": Way(
        (
            "plan={strategy: basis, budget: {parameters: -9%}}",
            "penalty={}",
            "train.steps=0",
            f"materialize.heal_steps={STEPS}",
        ),
        "heal",
    ),
    "residual": Way(
        ("train.steps=6", f"materialize.heal_steps={STEPS}", "residual.rank=4"), "heal"
    ),
    "residual alone": Way(
        (
            "train.steps=0",
            f"materialize.heal_steps={STEPS}",
            "residual.rank=4",
            "residual.train=residual",
        ),
        "heal",
    ),
    "lora": Way((_LONG, "lora.rank=4")),
}

LIMIT = 600.0
"""Seconds after which a start that has not ended is a failure."""


@dataclass
class Count:
    """What happened to one way of training on one backend.

    Attributes:
        training, elsewhere: kills after the first new step, and before it or after the last one.
        writing: kills that left something half written among the checkpoints.
        lost: steps that had to be done again, of each kill.
        resumed: seconds from a restart to the first new step.
    """

    name: str
    training: int = 0
    elsewhere: int = 0
    writing: int = 0
    runs: int = 0
    difference: float = 0.0
    lost: list[int] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.training + self.elsewhere


def command(config: str, way: Way, folder: Path) -> list[str]:
    """The demo under a launch file; `one` is a process without a launcher."""
    arguments = ["-m", "train", *RECIPE, *way.options, f"output_dir={folder}"]
    if config == "one":
        return [sys.executable, *arguments]
    return launcher.command(config, *arguments)


def start(config: str, way: Way, folder: Path) -> subprocess.Popen[bytes]:
    """Its output is appended to `<folder>.log`."""
    environment = launcher.environment(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="10")
    with folder.with_name(f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            command(config, way, folder), cwd=REPOSITORY, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def ranks_of(process: subprocess.Popen[bytes], config: str) -> list[int]:
    """Process ids of the ranks that run now."""
    return [process.pid] if config == "one" else launcher.ranks_of(process)


def end(process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    """Wait for it; what does not end is killed with all that it started.

    torch's agent alone gives the ranks that are left 30 s, on a machine that may be busy.
    """
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [*map(int, children), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        raise AssertionError("the launcher did not end after a rank was killed") from None


def half_written(folder: Path) -> bool:
    """Whether something lies among the checkpoints that has no checkpoint's name."""
    try:
        names = os.listdir(folder / "checkpoints")
    except OSError:
        return False
    return any(not re.fullmatch(r"step-\d+", name) for name in names)


class Metrics:
    """The rows that one start adds to metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.before = self._identity()
        self.first: int | None = None

    def _identity(self) -> int:
        return self.path.stat().st_ino if self.path.exists() else 0

    def last(self) -> int:
        """The last complete row's step, 0 without one."""
        text = self.path.read_bytes() if self.path.exists() else b""
        rows = [line for line in text.split(b"\n")[:-1] if line]
        return int(re.search(rb'"step": (\d+)', rows[-1])[1]) if rows else 0  # type: ignore[index]

    def stepped(self) -> bool:
        """Whether this start has finished a step: a resumed file is written anew, then grows."""
        if self._identity() == self.before:
            return False
        if self.first is None:
            self.first = self.last()
        return self.last() > self.first


def undisturbed(config: str, way: Way, folder: Path) -> None:
    process = start(config, way, folder)
    process.wait(LIMIT)
    assert process.returncode == 0, log_of(folder)


def log_of(folder: Path) -> str:
    return folder.with_name(f"{folder.name}.log").read_text(errors="replace")[-6000:]


def killed(
    config: str, way: Way, folder: Path, chance: random.Random, count: Count, kills: int
) -> None:
    """Start, kill and start again until the run ends; at most `kills` kills in all."""
    reached = 0
    startup = 8.0
    training = folder / way.trained
    while True:
        process, metrics, began = start(config, way, folder), Metrics(training), time.monotonic()
        # Of twenty kills three fall at any moment of the start, seven on a checkpoint that is being
        # written, and ten at any moment of some steps and what follows the training.
        kind = chance.choices(["start", "writing", "steps"], [3, 7, 10])[0]
        moment = chance.uniform(0, startup if kind == "start" else 4.0)
        stepped: float | None = None
        while process.poll() is None:
            now = time.monotonic()
            if stepped is None and metrics.stepped():
                stepped = now
                startup = now - began
                if reached:
                    count.resumed.append(startup)
                    count.lost.append(reached - (metrics.first or 0))
            since = began if kind == "start" else stepped
            due = since is not None and now - since >= moment
            if kind == "writing" and since is not None and now - since < 20:
                due = half_written(training)
            if count.kills < kills and due and (ranks := ranks_of(process, config)):
                break
            assert now - began < LIMIT, log_of(folder)
            time.sleep(0.002)
        if process.poll() is not None:
            assert process.returncode == 0, log_of(folder)
            return
        os.kill(chance.choice(ranks), signal.SIGKILL)
        in_training = stepped is not None and metrics.last() < STEPS
        count.training += in_training
        count.elsewhere += not in_training
        end(process)
        count.writing += half_written(training)
        reached = max(reached, metrics.last())


def largest_difference(folder: Path, reference: Path) -> float:
    """Norm of the difference over the norm, of the worst tensor; 0.0 means bitwise equal.

    With residuals theirs too, which lie in a folder of their own.
    """
    worst = 0.0
    files = sorted((reference / "weights").rglob("*.safetensors"))
    assert files
    for file in files:
        theirs = load_file(file)
        mine = load_file(folder / file.relative_to(reference))
        assert theirs.keys() == mine.keys()
        for name, value in theirs.items():
            if not mine[name].equal(value):
                difference = float((mine[name] - value).norm() / value.norm())
                worst = max(worst, difference, 1e-30)
    return worst
