"""Plans by measured loss: the searches, what auto may change, its best plans rebuilt, the front.

Imports the rest of `train.planning`.
"""
