"""`postshare compare`: a recipe beside its controls.

Imports no other command.
"""
