"""The weight-similarity regularizer, and its gradient on each engine.

Imports `distributed` and what is below it.
"""
