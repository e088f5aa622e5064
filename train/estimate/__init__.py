"""Parameters, memory and traffic from a config alone.

Imports `planning` and what is below it. Imports no torch.
"""
