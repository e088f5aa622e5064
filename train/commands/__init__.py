"""Commands that are no stage of a run, one module or room each.

Imports everything but the command line.
"""
