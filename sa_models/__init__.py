"""Attention sharing: plans, units, spans, similarity, materializing, compact models, exporting.

Importing the package registers the compact model with transformers' Auto classes, so that
``AutoModelForCausalLM.from_pretrained`` loads a compact folder. It imports neither torch nor
transformers: names that need them are imported when they are asked for, and the registration waits
for the Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sa_models.serving.auto_classes import register_with_transformers

from .errors import PostshareError
from .plan import HeadTie, SharingPlan
from .spans import AttentionSpan

if TYPE_CHECKING:
    from sa_models.weights.structure import convert

    from .cache import cache_bytes
    from .configuration import SharedLlamaConfig
    from .modeling import SharedLlamaForCausalLM

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

_MODULES = {
    "SharedLlamaConfig": "sa_models.configuration",
    "SharedLlamaForCausalLM": "sa_models.modeling",
    "cache_bytes": "sa_models.cache",
    "convert": "sa_models.weights.structure",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
