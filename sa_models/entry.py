"""Entry of the compact model: the classes that transformers loads by name, here and from an export.

Of an export's modeling files, transformers 4 copies those that its entry imports, and not what they
import in turn. All are imported here, so that it comes as far as the line that says why it cannot
run them.
"""

# ruff: noqa: E402, F401

import re

from transformers import __version__

NEEDED = "5.16"
"""The first version of transformers that runs the compact model."""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


if _numbers(__version__) < _numbers(NEEDED):
    raise ImportError(
        f"a compact export needs transformers {NEEDED} or newer, and this is {__version__}; "
        f"pip install 'transformers>={NEEDED}', or load the dense export, which any version reads"
    )

from .atomic_files import write_json
from .attention import SharedAttention
from .basis import SharedBasis
from .cache import fit_cache_
from .configuration import SharedLlamaConfig
from .errors import PostshareError
from .heads import HeadLayout
from .modeling import SharedLlamaForCausalLM, SharedLlamaModel
from .packing import PackedWeight
from .plan import SharingPlan
from .projections import SharedLinear
from .removal import check_removed
from .savings import PlanSavings
from .spans import AttentionSpan
from .ties import HeadTie

__all__ = ["SharedLlamaConfig", "SharedLlamaForCausalLM", "SharedLlamaModel"]
