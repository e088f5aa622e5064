"""What sharing is: plans, units, similarity, materializing, compact models, exporting.

Importing the package registers the compact model with transformers' Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` loads a compact folder.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration import SharedLlamaConfig
from .errors import PostshareError
from .modeling import SharedLlamaForCausalLM
from .plan import HeadTie, SharingPlan

AutoConfig.register(SharedLlamaConfig.model_type, SharedLlamaConfig)
AutoModelForCausalLM.register(SharedLlamaConfig, SharedLlamaForCausalLM)

__all__ = [
    "HeadTie",
    "PostshareError",
    "SharedLlamaConfig",
    "SharedLlamaForCausalLM",
    "SharingPlan",
]
