"""Attention sharing: plans, units, spans, similarity, materializing, compact models, exporting.

Importing the package registers the compact model with transformers' Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` loads a compact folder.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from sa_models.weights.structure import convert

from .cache import cache_bytes
from .configuration import SharedLlamaConfig
from .errors import PostshareError
from .modeling import SharedLlamaForCausalLM
from .plan import HeadTie, SharingPlan
from .spans import AttentionSpan

AutoConfig.register(SharedLlamaConfig.model_type, SharedLlamaConfig)
AutoModelForCausalLM.register(SharedLlamaConfig, SharedLlamaForCausalLM)

__all__ = [
    "AttentionSpan",
    "HeadTie",
    "PostshareError",
    "SharedLlamaConfig",
    "SharedLlamaForCausalLM",
    "SharingPlan",
    "cache_bytes",
    "convert",
]
