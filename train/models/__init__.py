"""Base models and adapters, loaded whole or tensor by tensor, and materialized on text.

Imports `data` and what is below it.
"""
