"""The recipe: its fields, the rules between them, where it is read from, what is wrong with it.

Imports `common`, and of `sa_models` what needs no weights. Imports no torch.
"""
