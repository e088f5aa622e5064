"""Ranks: their launch, how they meet and watch one another, and the engines.

Imports `evaluation` and what is below it.
"""
