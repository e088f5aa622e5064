"""What text says about a model: losses of tokens, moments of inputs, partial forward passes.

Imports `weights` and the top level.
"""
