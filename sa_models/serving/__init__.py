"""Other people's engines: vLLM.

Imports everything else in `sa_models`.
"""
