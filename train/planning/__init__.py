"""Planning: a recipe's plan, found, shown and drawn.

Imports `training` and what is below it.
"""
