"""The training loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_models.plan import SharingPlan

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from train.recipe import Recipe


@dataclass(frozen=True)
class TrainJob:
    """One training of one model: what differs between post-training, its control and heal."""

    name: str  # "post" | "continued" | "heal" | "pretrain"
    model: nn.Module
    plan: SharingPlan | None  # None: no penalty
    train_blocks: Dataset[Any]
    validation_blocks: Dataset[Any] | None
    folder: Path
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class TrainResult:
    """What a finished training leaves: `weights` is a Hugging Face folder with fp32 values."""

    steps: int
    tokens: int  # predicted tokens, over all ranks
    seconds: float
    weights: Path


def train(job: TrainJob, recipe: Recipe) -> TrainResult:
    """Train `job.model` for `job.steps` optimizer steps; resume from `job.folder` if it can."""
    raise NotImplementedError
