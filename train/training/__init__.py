"""One training: the loop, its objective, optimizer, checkpoints and teacher.

Imports `penalty`, `tracking` and what is below them.
"""
