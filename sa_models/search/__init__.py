"""From scores, measured losses and a budget to a plan.

Imports `scores` and what is below it.
"""
