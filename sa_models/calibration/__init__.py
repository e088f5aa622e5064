"""Calibration of a model on text: losses of tokens, moments of inputs, partial forward passes.

Imports `weights` and the top level.
"""
