"""Checkpoints, read and written tensor by tensor, and changed in structure.

Imports the top level of `sa_models` alone.
"""
