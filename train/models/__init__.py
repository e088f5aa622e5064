"""Base models and adapters, loaded whole or tensor by tensor, materialized on text; their samples.

Imports `data` and what is below it.
"""
