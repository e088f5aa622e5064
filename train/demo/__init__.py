"""The embedded default: a corpus and a base model that need no network."""

from __future__ import annotations

from pathlib import Path


def demo_base_path() -> Path:
    """The folder of the shipped base model (config, weights, tokenizer): `model.path: demo-base`."""
    return Path(__file__).resolve().parent / "base"
