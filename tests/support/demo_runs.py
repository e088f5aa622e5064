"""Recipes of short runs on the demo base, with a text of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.recipe.recipe import Recipe, validate


def recipe(folder: Path, text: str | None = None, **sections: Any) -> Recipe:
    """A run in ``folder``, beside which its text lies; a section given replaces the one here."""
    file = folder.parent / "text.txt"
    if not file.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text or "def sum_of(values):\n    return sum(values)  # of all\n" * 400)
    value: dict[str, Any] = {
        "name": "small",
        "output_dir": str(folder),
        "model": {"path": "demo-base"},
        "data": {"train": str(file), "validation": str(file), "sequence_length": 64},
        "plan": {"budget": {"ratio": 0.3}},
        "train": {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3},
        "evaluate": {"blocks": 4, "continued": False},
    }
    return validate(value | sections)
