"""The commands of docs/tutorial.md and README.md, typed one after the other in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pages import DOCS, REPOSITORY, blocks, lines
from train.recipe.recipe import load_recipe
from train.recipe.shipped import shipped_recipes

PAGE = DOCS / "tutorial.md"


def hurried() -> str:
    """The override that the tutorial itself gives to whoever is in a hurry."""
    found = re.search(r"\*\*In a hurry\?\*\* Add `([^`]+)`", PAGE.read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


Typed = Callable[[str, str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def typed(tmp_path: Path) -> Typed:
    """Runs what a reader types, who has installed the package, in an empty folder."""
    commands = tmp_path / "bin"
    commands.mkdir()
    script = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m train "$@"\n'
    (commands / "postshare").write_text(script)
    (commands / "postshare").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }

    def run(language: str, code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash" if language == "bash" else sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


def shortened(line: str) -> str:
    """A line as whoever is in a hurry types it."""
    if line == "make demo":  # what it types, after it has installed everything
        line = "postshare run demo output_dir=runs/demo"
    line = line.partition("#")[0].strip()
    training = line.startswith("postshare run ") and "--dry-run" not in line
    return f"{line} {hurried()}" if training and "train.steps=" not in line else line


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("demo")])
@pytest.mark.parametrize("overrides", [hurried(), "train.steps=50"])
def test_every_demo_takes_the_same_overrides(name: str, overrides: str) -> None:
    recipe = load_recipe(name, overrides.split())
    assert recipe.steps == (50 if overrides == "train.steps=50" else 4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial(typed: Typed, tmp_path: Path) -> None:
    printed = []
    for block in blocks(PAGE, "bash", "python"):
        bash = block.language == "bash"
        for line in map(shortened, lines(block)) if bash else [block.code]:
            if line.startswith("source "):
                continue
            done = typed(block.language, line)
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            printed.append(done.stdout)
    runs = tmp_path / "runs"
    demo, short = (json.loads((runs / n / "summary.json").read_text()) for n in ("demo", "short"))
    assert demo["bytes"] == short["bytes"]  # one plan
    assert 0.05 < 1 - demo["bytes"]["compact"] / demo["bytes"]["base"] < 0.06
    assert "</html>" in (tmp_path / "both.html").read_text()
    ties = json.loads((runs / "pairs" / "plan.json").read_text())["ties"]
    assert len(ties) == 12  # floor(0.2 x 64)
    assert sorted(path.suffix for path in (runs / "pairs").glob("plan-*.png")) == [".png", ".png"]
    assert "Llama-3.2-1B" in " ".join(printed)
    words, parameters = printed[-1].splitlines()
    assert "def __init__(self" in words
    assert int(parameters.split()[0]) == demo["parameters"]["stored"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readme(typed: Typed, tmp_path: Path) -> None:
    """Its commands for one machine; those for many are in tests/cluster."""
    page, printed = REPOSITORY / "README.md", {}
    (recipe,) = blocks(page, "yaml")
    text = recipe.code.replace("meta-llama/Llama-3.2-1B", "demo-base")  # there is no hub here
    (tmp_path / "mine.yaml").write_text(text.replace("2048", "256").replace("bf16", "fp32"))
    rows = [{"text": f"Document {i}. " + "It says one more thing. " * 40} for i in range(200)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for block in blocks(page, "bash"):
        for line in map(shortened, lines(block)):
            if not line.startswith("postshare "):
                continue
            done = typed("bash", line)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-4000:]}"
            printed[line] = done.stdout
    assert len(printed) == 3
    assert "go" in printed["postshare doctor mine.yaml"]
    assert "weight bytes" in printed["postshare run mine.yaml --dry-run"]
    assert "</html>" in (tmp_path / "runs" / "demo" / "report.html").read_text()
