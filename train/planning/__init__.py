"""How a recipe's plan is found, shown and drawn.

Imports `training` and what is below it.
"""
