"""What a training says about itself: metrics.jsonl, wandb, how its ranks compare.

Imports `distributed` and what is below it.
"""
