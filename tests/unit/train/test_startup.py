"""What a start imports: only what its answer needs. Each test asks a fresh interpreter."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LARGE = {
    "torch", "transformers", "accelerate", "datasets", "deepspeed", "peft", "matplotlib", "wandb",
    "numpy", "safetensors",
}  # fmt: skip
CLI = """
import sys
from train import cli
try:
    cli.main(ARGUMENTS)
except SystemExit as end:
    print(end.code, file=sys.stderr)
"""
TRAINING = """
import os
import sys
import train.training.loop as loop

def first_step(seed, step, rank):
    print(sorted({name.partition(".")[0] for name in sys.modules}), flush=True)
    os._exit(0)

loop.seed_step = first_step
"""


def large(code: str, folder: Path) -> tuple[set[str], str]:
    """Which large packages code has imported at its end, and the last line of its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(sorted(set(sys.modules)))"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    return LARGE & loaded, done.stderr.strip()


def command(*arguments: str) -> str:
    return CLI.replace("ARGUMENTS", repr(list(arguments)))


def test_recipes_are_listed_without_any_large_package(tmp_path: Path) -> None:
    assert large(command("recipes"), tmp_path) == (set(), "0")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("plan.budget.bytes=-4", "plan.budget"),  # a value that a section refuses
        ("penalty.weights=[1, 1]", "penalty"),  # two sections that disagree
    ],
)
def test_an_error_in_a_recipe_is_said_without_any_large_package(
    override: str, said: str, tmp_path: Path
) -> None:
    loaded, error = large(command("run", "demo", override), tmp_path)
    assert loaded == set()
    assert said in error
    assert error.endswith("\n2")


@pytest.mark.parametrize("recipe", ["llama2-7b-postshare-30", "demo", "demo_sa", "llama2-7b-auto"])
def test_estimates_come_without_any_large_package(recipe: str, tmp_path: Path) -> None:
    assert large(command("run", recipe, "--dry-run"), tmp_path) == (set(), "0")


@pytest.mark.parametrize(
    "module",
    ["sa_models", "train.recipe.recipe", "train.recipe.warnings", "train.estimate.dry_run"],
)
def test_what_reads_and_estimates_imports_no_large_package(module: str, tmp_path: Path) -> None:
    assert large(f"import sys, {module}", tmp_path) == (set(), "")


def test_a_training_imports_what_it_uses(tmp_path: Path) -> None:
    """At its first step, of the shipped base, without adapters, wandb and pictures."""
    text = "".join(f"A sentence, the {i}th of them, and another one.\n" for i in range(200))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    recipe = {
        "name": "start",
        "model": {"path": "demo-base"},
        "data": {"train": "text.jsonl", "validation": "text.jsonl", "sequence_length": 32},
        "plan": {"strategy": "none"},
        "train": {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 1e-4},
    }
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(recipe))
    loaded, _ = large(TRAINING + command("run", "start.yaml"), tmp_path)
    assert {"torch", "transformers", "datasets"} <= loaded
    assert not {"deepspeed", "peft", "matplotlib", "wandb"} & loaded
