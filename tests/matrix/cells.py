"""What every backend must compute like one process: the cells of the equality matrix."""

from __future__ import annotations

import itertools
from dataclasses import replace

from tests.support.training import Setting
from train.recipe.recipe import PenaltySection

BACKENDS = (
    "ddp",
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero3-offload-optimizer",
    "zero3-offload",
    "fsdp2",
)
WORLDS = (1, 2, 4)

CELLS: dict[str, Setting] = {
    f"{model} x{accumulation} {'clipped' if clip else 'free'}": Setting(
        model=model, accumulation=accumulation, clip_norm=clip
    )
    for model, accumulation, clip in itertools.product(
        ("ties", "spans", "both"), (1, 4), (0.5, None)
    )
}
# Only some parameters trained, another kind of distance; layers computed twice.
CELLS |= {
    "frozen": Setting(
        kind="js", clip_norm=None, trainable="model.layers", learning_rate=1e-3, accumulation=4
    ),
    "recomputed": Setting(model="both", checkpointing=True, accumulation=4),
    "recomputed in part": Setting(model="both", checkpointing="selective", clip_norm=0.2),
    "every second recomputed": Setting(model="spans", checkpointing=2, accumulation=4),
}
# The compact model, in which several layers read one parameter.
CELLS |= {
    "heal x1 clipped": Setting(model="owned", heal=True, clip_norm=0.2),
    "heal x4 free": Setting(model="owned", heal=True, clip_norm=None, accumulation=4),
    "heal recomputed": Setting(model="owned", heal=True, checkpointing=True, accumulation=4),
    "heal removed": Setting(model="removed", heal=True, clip_norm=0.2),
    "heal dropped": Setting(model="dropped", heal=True, clip_norm=0.2),
    "heal spans": Setting(model="both", heal=True, clip_norm=0.2, accumulation=4),
    # Factors of which layers share one.
    "heal basis": Setting(model="basis", heal=True, clip_norm=0.2, accumulation=4),
    "heal basis recomputed": Setting(model="basis", heal=True, checkpointing=True, clip_norm=None),
    "bf16 heal basis": Setting(model="basis", heal=True, precision="bf16"),
    # With low-rank corrections of tied units, and these alone.
    "residual": Setting(model="owned", heal=True, residual="both", clip_norm=0.2, accumulation=4),
    "residual alone": Setting(model="removed", heal=True, residual="alone", clip_norm=0.01),
    "residual recomputed": Setting(model="both", heal=True, residual="both", checkpointing=True),
}
# Adapters that train alone, pulled through the weights that they make; on one process and DDP.
CELLS |= {
    "lora": Setting(lora=3, accumulation=4, clip_norm=0.2),
    "bf16 lora": Setting(model="both", lora=3, precision="bf16", clip_norm=None),
}
# A teacher beside the student, whole or sharded as the student is.
CELLS |= {
    "distill x1 clipped": Setting(distill=(("weight", 0.8), ("temperature", 2.0))),
    "distill x4 free": Setting(
        model="both",
        clip_norm=None,
        accumulation=4,
        checkpointing=True,
        distill=(("top_k", 7), ("hidden_weight", 0.3), ("attention_weight", 0.2)),
    ),
    "distill heal": Setting(
        model="owned", heal=True, accumulation=4, clip_norm=0.2, distill=(("weight", 1.0),)
    ),
    "bf16 distill": Setting(precision="bf16", distill=(("precision", "bf16"), ("top_k", 7))),
}
# Losses by chunks of rows that divide no micro-batch, against whole logits: lm_head tied to the
# embeddings and not, frozen, in bf16; those of distillation, by chunks always, in small ones.
CELLS |= {
    "chunked": Setting(model="both", chunk=7, accumulation=4, clip_norm=0.2, checkpointing=True),
    "chunked untied": Setting(model="spans", chunk=50, clip_norm=None),
    "chunked lora": Setting(lora=3, chunk=7, accumulation=4, clip_norm=0.2),
    "chunked distill": Setting(model="spans", chunk=7, distill=(("temperature", 2.0),)),
    "bf16 chunked": Setting(chunk=7, precision="bf16"),
}
# Compiled layers against layers that are not: of one structure, and each of its own.
CELLS |= {
    "compiled": Setting(compiled=True, accumulation=4, clip_norm=0.2),
    "compiled both": Setting(model="both", compiled=True, checkpointing="selective", clip_norm=0.2),
    "compiled heal": Setting(model="owned", heal=True, compiled=True, checkpointing=2),
    "compiled basis": Setting(model="basis", heal=True, compiled=True, checkpointing=True),
    "compiled lora": Setting(lora=3, compiled=True, accumulation=4, clip_norm=0.2),
}
# Units that are moved after the step: some of them equal after three, all of them after two.
DECOUPLED = PenaltySection(mode="decoupled", coefficient=19.0)
PROGRESSIVE = PenaltySection(mode="progressive", schedule="linear", ramp_steps=2)
_PULLED = Setting(model="stars", pull=DECOUPLED)
CELLS |= {
    "decoupled x1 clipped": _PULLED,
    "decoupled x4 free": replace(_PULLED, accumulation=4, clip_norm=None),
    "progressive x4 clipped": Setting(model="both", pull=PROGRESSIVE, accumulation=4),
    "progressive x1 free": Setting(model="stars", pull=PROGRESSIVE, clip_norm=None),
    # Only the pull: in fp32, on fp32 masters, whatever the model computes in.
    "bf16 decoupled": replace(_PULLED, precision="bf16", lm_weight=0.0, clip_norm=None),
    "bf16 progressive": Setting(model="both", pull=PROGRESSIVE, precision="bf16"),
}
CELLS |= {
    # Only the penalty: computed in fp32 from fp32 masters, whatever the model computes in.
    "bf16 penalty": Setting(kind="mse", precision="bf16", lm_weight=0.0, clip_norm=1e-3),
    "bf16 ties x1": Setting(precision="bf16"),
    "bf16 both x4": replace(CELLS["both x4 clipped"], precision="bf16"),
}
# The default suite's part: with every backend each model, accumulation and clipping, and every pair
# of these three; heal, pulls, bf16 and the rest where they differ most between backends.
_GRID = (
    ("ties x4 clipped", "spans x1 free", "both x1 clipped"),
    ("ties x1 free", "spans x4 clipped", "both x4 free"),
)
_MOVED = ("decoupled x1 clipped", "bf16 decoupled")
SUBSET: dict[tuple[str, int], tuple[str, ...]] = {
    ("ddp", 2): (
        *_GRID[0],
        "heal x1 clipped",
        "heal basis",
        "residual",
        "lora",
        "bf16 lora",
        "distill x4 free",
        "decoupled x4 free",
        "chunked",
    ),
    ("ddp", 3): ("compiled", "compiled lora"),
    ("zero0", 2): (*_GRID[1], "bf16 ties x1", "compiled both"),
    ("zero1", 2): (*_GRID[0], "bf16 penalty", "heal x4 free", "residual alone", *_MOVED),
    ("zero2", 2): (
        *_GRID[1],
        "bf16 penalty",
        "progressive x4 clipped",
        "bf16 heal basis",
        "compiled both",
    ),
    ("zero3", 3): (
        *_GRID[0],
        "bf16 penalty",
        "frozen",
        "heal recomputed",
        "heal basis recomputed",
        "residual",
        "distill x4 free",
        "chunked",
        "recomputed in part",
        _MOVED[0],
    ),
    ("zero3", 2): (
        "heal removed",
        "heal dropped",
        "residual alone",
        "distill x1 clipped",
        "distill heal",
    ),
    ("zero3-offload-optimizer", 2): _GRID[1],
    ("zero3-offload", 2): (*_GRID[0], "bf16 both x4", "heal spans"),
    ("fsdp2", 2): (
        *_GRID[1],
        "bf16 penalty",
        "heal x1 clipped",
        "heal removed",
        "heal dropped",
        "heal basis",
        "residual alone",
        "distill x1 clipped",
        "distill heal",
        "chunked untied",
        "recomputed in part",
        "progressive x1 free",
        "compiled heal",
        "compiled basis",
    ),
}
RESUMED = (
    "ties x4 clipped",
    "spans x4 clipped",
    "bf16 both x4",
    "decoupled x1 clipped",
    "bf16 progressive",
    "residual",
    "lora",
)
"""Also stopped after a step, carried through the shards' state into another engine, and ended."""


def exact(name: str) -> bool:
    """Whether fp32's tolerance holds: only the rounding of bf16 gradients may differ."""
    return CELLS[name].precision == "fp32" or not CELLS[name].lm_weight
