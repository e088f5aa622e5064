"""`postshare evaluate`: models side by side, perplexity and tasks of lm-eval.

Imports no other command.
"""
