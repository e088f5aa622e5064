"""Text that lies on this machine: which files are read, and their rows.

Imports `recipe`.
"""
