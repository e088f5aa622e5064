"""Scores of models: perplexity, tasks of lm-eval, speed; intervals, tables, the summary of a run.

Imports `models` and what is below it.
"""
