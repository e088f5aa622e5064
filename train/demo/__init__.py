"""The embedded default: a corpus and a base model that need no network.

Imports `recipe` and `common`.
"""

from __future__ import annotations

from pathlib import Path

DEMO_BASE = "demo-base"
"""``model.path`` of the shipped base model."""


def demo_base_path() -> Path:
    """The folder of the shipped base model (`model.path: demo-base` in a recipe)."""
    return Path(__file__).resolve().parent / "base"
