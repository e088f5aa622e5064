"""From text and records to blocks of tokens, and calibration text.

Imports `demo`, `recipe` and `common`.
"""
