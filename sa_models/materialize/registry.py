"""Merges of tied units: where each is, by the name that a recipe gives it.

A function or class is named as `module:name` and imported when it is used: no torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

PLAIN = {
    "copy": "sa_models.materialize.ties:first",
    "mean": "sa_models.materialize.ties:mean",
}
"""Functions of the slices that become one, the source first."""
GAUGED = {
    "aligned_mean": "sa_models.materialize.merge:averaged",
    "absorb": "sa_models.materialize.merge:absorbing",
}
"""Functions of a :class:`~sa_models.materialize.merge.Group`, which look at a head's gauge."""
MEASURED = {
    "weighted_mean": "sa_models.materialize.merge_calibrated:Fisher",
    "least_squares": "sa_models.materialize.merge_calibrated:Inputs",
}
"""Classes that need calibration text, see :mod:`sa_models.materialize.merge_calibrated`."""
IN_GAUGE = (*GAUGED, *MEASURED)
"""Merges that bring units into their source's gauge first."""
KEEPS_SOURCES = ("copy", "absorb")
"""Merges that leave the source of a tie as it is."""
if TYPE_CHECKING:
    Merge = str
else:
    Merge = Literal[(*PLAIN, *GAUGED, *MEASURED)]
