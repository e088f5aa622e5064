"""The sweep file: what wandb's own agent makes of it is a command that postshare understands."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from tests.support import REPOSITORY
from train.recipe.recipe import load_recipe
from train.tracking.dashboard_panels import SECTIONS, keys


def sweep() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "launch" / "wandb" / "sweep.yaml").read_text())


def agent_command(config: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """As `wandb agent` puts it together: a word in `${}` stands for one or several arguments."""
    made = create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    made["env"] = ["/usr/bin/env"]
    command: list[str] = []
    for word in create_sweep_command(config["command"]):
        macro = word.startswith("${") and word.endswith("}")
        command += made[word[2:-1]] if macro else [word]
    return command


def test_an_agent_starts_the_recipe_with_the_values(tmp_path: Path) -> None:
    config = sweep()
    assert config["method"] == "grid"
    assert config["metric"]["name"] in keys(*SECTIONS)
    values = {name: choice["values"][-1] for name, choice in config["parameters"].items()}
    assert values == {"plan.budget.ratio": 0.3, "penalty.coefficient": 0.9}
    postshare = tmp_path / "postshare"  # says what it was called with
    postshare.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    postshare.chmod(0o755)
    done = subprocess.run(
        agent_command(config, values), capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "WANDB_RUN_ID": "abcd1234"},
    )  # fmt: skip
    stage, recipe, *overrides = done.stdout.splitlines()
    assert stage == "run"
    loaded = load_recipe(recipe, overrides)
    assert loaded.plan.budget is not None
    assert (loaded.plan.budget.ratio, loaded.penalty.coefficient) == (0.3, 0.9)
    assert loaded.folder == Path("runs/sweep/abcd1234")
    assert (loaded.wandb.mode, loaded.evaluate.continued) == ("online", False)


def test_every_parameter_is_a_key_of_the_recipe_and_each_value_is_allowed() -> None:
    config = sweep()
    for name, choice in config["parameters"].items():
        for value in choice["values"]:
            loaded: Any = load_recipe("demo_postshare", [f"{name}={value}"])
            for key in name.split("."):
                loaded = getattr(loaded, key)
            assert loaded == value
