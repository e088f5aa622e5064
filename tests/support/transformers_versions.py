"""What differs between the versions of transformers that are supported."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import QuantizedCache

HAS_DUMMY_LAYERS = hasattr(cache_utils, "DummyLayer")
"""Layers of a cache that hold nothing; before 5.23 ours take their place."""

CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"  # before 5.23
)
"""What the methods are called that switch it on and off."""


def checkpoint_layers(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})


def keep_activations(model: PreTrainedModel) -> None:
    getattr(model, f"{CHECKPOINTING}_disable")()


def reset_empties() -> bool:
    """Whether the reset of a growing cache makes it empty; earlier it fills it with zeros."""
    cache, one = DynamicCache(), torch.ones(1, 1, 1, 1)
    cache.update(one, one, 0)
    cache.reset()
    return int(cache.get_seq_length()) == 0


def has_fp8_cache() -> bool:
    try:
        QuantizedCache("fp8", None)
    except ValueError:
        return False
    except AttributeError:  # it asks the config that is not there
        return True
    return True
