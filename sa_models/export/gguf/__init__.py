"""GGUF files, which llama.cpp loads: what they say and store of a shared Llama, written, verified.

Imports `weights` and what is below it. The package gguf is imported when a file is written.
"""
