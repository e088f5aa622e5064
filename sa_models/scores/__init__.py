"""Scores of units and layers: how alike they are, and how important. One module a score.

Imports `calibration` and what is below it.
"""
