"""Folders that are shipped: written, verified, described, quantized.

Imports `materialize` and what is below it.
"""
