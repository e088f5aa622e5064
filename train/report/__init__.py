"""`report.html`: one file that shows what a run saved and what it cost, or several runs together.

Imports `estimate` and what is below it.
"""
