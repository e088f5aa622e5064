"""The stages of a run, from the plan to the report, and what they share.

Imports `report` and what is below it.
"""
