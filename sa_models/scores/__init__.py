"""How alike units and layers are, and how important: one module a score.

Imports `calibration` and what is below it.
"""
