"""One training of one model: what post-training, its control and healing differ in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sa_models.plan import SharingPlan
from train.data.blocks import Blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from train.models.sharded_source import Source


@dataclass(frozen=True)
class TrainJob:
    """One training of one model: what differs between post-training, its control and heal.

    Attributes:
        name: post, continued, heal or pretrain.
        load: makes the model, a Llama with fp32 parameters; not called when this training has
            finished before. It is trained in place, and unusable afterwards under ZeRO.
        source: the same model in files, for an engine that loads it tensor by tensor (`streams`);
            None: it lies in none, and `load` makes it whole.
        plan: the ties that the penalty pulls together; None: no penalty.
        trainable: patterns of the parameters that train, where the model has residuals or adapters;
            None: the recipe's `train.trainable`.
        validation_blocks: for `train.evaluate_every`; None: no evaluation.
        folder: metrics.jsonl, checkpoints/ and, at the end, weights/ go here.
        group: of its wandb run; None: the recipe's name.
        later_steps: of the run's trainings after this one, for the time that is left.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    plan: SharingPlan | None
    train_blocks: Blocks
    validation_blocks: Blocks | None
    folder: Path
    steps: int
    learning_rate: float
    source: Callable[[], Source | None] = lambda: None
    trainable: tuple[str, ...] | None = None
    group: str | None = None
    later_steps: int = 0

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.load()
