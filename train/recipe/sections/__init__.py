"""The sections of a recipe, one module each, with the checks within a section.

Imports nothing else of `train.recipe`.
"""
