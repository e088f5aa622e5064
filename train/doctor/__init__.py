"""`postshare doctor`: would this job start, run and save here? Findings with cures, go or no-go.

Imports everything of `train` but the other commands.
"""
