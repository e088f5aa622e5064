"""Our loop against transformers' Trainer and TRL's SFTTrainer, a step of each in turn.

Each training is a process of its own (trainers.py), and takes a step when it is its turn: a round
is one step of each, forwards and backwards by turns, so that what else the machine does slows all
of them down alike. A ratio is the median over the rounds, its spread the quartiles. Without
arguments everything is measured; with a folder, finished shapes are kept there, and the same
command goes on:

    python tests/benchmarks/bench_trainers.py .bench/trainers

About 9 minutes on two idle cores; up to 16 GB of memory, as all five trainings wait side by side.
TRL is installed by this script alone, into .site/trl; where it cannot be, its row says why.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import trainers

VERSION = "trl==1.16.0"
OURS = ("ours", "penalty", "span")
NAMES = {
    "trainer": "Trainer",
    "trl": "SFTTrainer",
    "ours": "ours, no plan",
    "penalty": "ours, ties and penalty",
    "span": "ours, a span of every two layers",
}
PAIRS = (("ours", "trainer"), ("ours", "trl"), ("penalty", "ours"), ("span", "ours"))
ROUNDS = {"7M": 10, "52M": 8, "1024x8": 5}
FIRST_LOSSES = 3
CLOSE = 1e-5


class Training:
    """One of the trainings, in a process of its own.

    Attributes:
        first_step: seconds from its start until its first step has ended, imports included.
        steps: (seconds, CPU seconds of all its threads) of each later one.
    """

    def __init__(self, name: str, shape: str, folder: Path) -> None:
        context = get_context("spawn")
        self._turns, theirs = context.Pipe()
        began = time.perf_counter()
        self._process = context.Process(
            target=trainers.run, args=(name, shape, folder, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self._printed = folder / "printed"
        self._said()
        self._go()
        self.first_step = time.perf_counter() - began
        self.steps: list[tuple[float, float]] = []

    def _go(self) -> tuple[float, float]:
        self._turns.send("go")
        return self._said()

    def _said(self) -> Any:
        try:
            return self._turns.recv()
        except EOFError:
            raise RuntimeError(self._printed.read_text(encoding="utf-8")[-4000:]) from None

    def step(self) -> None:
        self.steps.append(self._go())

    def end(self) -> dict[str, Any]:
        """What is kept of it."""
        self._turns.send("stop")
        more = self._said()
        self._process.join()
        return {"first_step": self.first_step, "steps": self.steps, **more}


def install_trl() -> str:
    """Why there is none; empty where it is there."""
    wanted = trainers.TRL / f"{VERSION.replace('==', '-')}.dist-info"
    if wanted.is_dir():
        return ""
    print(f"installing {VERSION} into {trainers.TRL}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--upgrade", "--target", str(trainers.TRL), VERSION]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def read_files(trl: bool) -> None:
    """Import everything once: a first step then waits for no disk."""
    code = "import transformers.trainer, train.training.loop\n"
    if trl:
        code += f"import sys; sys.path.insert(0, {str(trainers.TRL)!r}); from trl import SFTTrainer"
    subprocess.run([sys.executable, "-c", code], check=True)


def measure_shape(shape: str, rounds: int) -> dict[str, Any]:
    """What each training took, and why one is missing."""
    why = install_trl()
    read_files(trl=not why)
    names = ("trainer", *(() if why else ("trl",)), *OURS)
    with tempfile.TemporaryDirectory() as home:
        every = {}
        for name in names:
            print(f"{shape}: {name} starts", file=sys.stderr, flush=True)
            every[name] = Training(name, shape, Path(home) / name)
        for turn in range(rounds):
            print(f"{shape}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
            for name in names if turn % 2 else reversed(names):
                every[name].step()
        trained = {name: training.end() for name, training in every.items()}
    require_same(trained)
    return {"why": {"trl": why} if why else {}, "trained": trained}


def require_same(trained: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError where trainings without a plan differ in the losses of the first steps."""
    expected = trained["trainer"]["losses"][:FIRST_LOSSES]
    for name in ("trl", "ours"):
        if name in trained:
            found = trained[name]["losses"][:FIRST_LOSSES]
            if not all(abs(a / b - 1) < CLOSE for a, b in zip(found, expected, strict=True)):
                raise ValueError(f"{name} does not train what Trainer does: {found}, {expected}")


def summary(measured: dict[str, Any]) -> dict[str, float]:
    """Tokens/s, seconds, bytes, and ratios of the rounds, as the report of `make bench` has it."""
    trained = measured["trained"]
    tokens = trainers.ROWS * trainers.LENGTH
    result: dict[str, float] = {}
    for name, one in trained.items():
        result[f"tokens_per_second_{name}"] = tokens / statistics.median(s for s, _ in one["steps"])
        result[f"first_step_seconds_{name}"] = one["first_step"]
        result[f"peak_bytes_{name}"] = one["peak_bytes"]
        result[f"step_bytes_{name}"] = one["peak_bytes"] - one["held_bytes"]
    for name, base in PAIRS:
        if base in trained:
            low, middle, high = ratios(trained, name, base, 0)
            key = f"{name}_over_{base}"
            result |= {key: middle, f"{key}_lower": low, f"{key}_upper": high}
            result[f"{key}_cpu"] = ratios(trained, name, base, 1)[1]
    step = statistics.median(seconds for seconds, _ in trained["penalty"]["steps"])
    result["penalty_share_of_step"] = trained["penalty"]["penalty_seconds"] / step
    return result


def ratios(trained: dict[str, Any], name: str, base: str, clock: int) -> list[float]:
    """Quartiles, over the rounds, of the speed of one training over that of another."""
    both = zip(trained[name]["steps"], trained[base]["steps"], strict=True)
    return statistics.quantiles((b[clock] / a[clock] for a, b in both), method="inclusive")


def table(shape: str, measured: dict[str, Any]) -> str:
    """Rows of docs/results.md."""
    figures, trained = summary(measured), measured["trained"]
    lines = []
    for name in ("trainer", "trl", *OURS):
        if name not in trained:
            lines.append(f"| {shape} | {NAMES[name]} | {measured['why'][name]} |")
            continue
        ratio = ""
        if name in OURS:
            bases = ("trainer", "trl") if name == "ours" else ("ours",)
            ratio = ", ".join(spread(figures, name, base) for base in bases if base in trained)
        cells = (
            shape,
            NAMES[name],
            f"{figures[f'tokens_per_second_{name}']:,.0f}",
            ratio,
            f"{figures[f'first_step_seconds_{name}']:.1f} s",
            f"{figures[f'peak_bytes_{name}'] / 1e9:.2f} GB",
            f"{figures[f'step_bytes_{name}'] / 1e9:.2f} GB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    share = figures["penalty_share_of_step"]
    lines.append(f"| {shape} | the penalty itself | | {share:.2%} of its step | | | |")
    return "\n".join(lines)


def spread(figures: dict[str, float], name: str, base: str) -> str:
    """A ratio, its quartiles, and that of the CPU seconds, which others slow down less."""
    key = f"{name}_over_{base}"
    low, middle, high, cpu = (
        f"{figures[key + end]:.3f}" for end in ("_lower", "", "_upper", "_cpu")
    )
    return f"{middle} of {NAMES[base]} ({low} to {high}; CPU {cpu})"


def measure(folder: Path | None = None) -> dict[str, dict[str, float]]:
    """Every shape; those that a folder holds are read there."""
    results = {}
    for shape, rounds in ROUNDS.items():
        kept = None if folder is None else folder / f"{shape}.json"
        if kept is not None and kept.is_file():
            print(f"{shape}: as {kept} has it; delete it to measure anew", file=sys.stderr)
            measured = json.loads(kept.read_text(encoding="utf-8"))
        else:
            measured = measure_shape(shape, rounds)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(measured) + "\n", encoding="utf-8")
        results[f"trainers_{shape}"] = summary(measured)
        print(table(shape, measured), file=sys.stderr)
    return results


if __name__ == "__main__":
    print(json.dumps(measure(*map(Path, sys.argv[1:])), indent=2))
