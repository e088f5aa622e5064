"""The kinds of merge, by name: what recipes may ask for. Imports no torch."""

from __future__ import annotations

from typing import Literal

Merge = Literal["copy", "mean", "aligned_mean", "absorb", "weighted_mean", "least_squares"]
GAUGED: tuple[Merge, ...] = ("aligned_mean", "absorb")
MEASURED: tuple[Merge, ...] = ("weighted_mean", "least_squares")
"""Merges that need calibration text."""
