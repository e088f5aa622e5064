"""Files, progress, signals, versions: what every room of `train` may use.

Imports nothing else of `train`.
"""
