"""Other people's engines: transformers' Auto classes, vLLM.

Imports everything else in `sa_models`.
"""
