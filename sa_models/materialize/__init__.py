"""A plan written into dense weights: copies, merges, reconstruction, factors, residuals.

Imports `search` and what is below it.
"""
