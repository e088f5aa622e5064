"""Scores of models: perplexity and speed; intervals, tables, the summary of a run.

Imports `models` and what is below it.
"""
