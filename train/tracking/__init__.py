"""The records of a training: metrics.jsonl, wandb, how its ranks compare.

Imports `distributed` and what is below it.
"""
