"""`postshare analyze`: what a model's attention has in common, without training.

Imports no other command.
"""
