"""Backward and step on one process, DDP, DeepSpeed ZeRO and FSDP2, behind one interface.

Imports the rest of `train.distributed`, which does not import it.
"""
