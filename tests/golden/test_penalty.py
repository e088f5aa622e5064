"""The four published penalties and the gradients of two, on a real checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.safetensors_folder import WeightsFolder
from train.distributed.engines.base import Shard
from train.distributed.engines.ddp import PlainShard
from train.penalty.coupled import Penalty

KINDS = {"norm": "l2", "MSE": "mse", "KL": "kl", "JS": "js"}


class Folder:
    """Stands in for an engine of one process: the weights of a checkpoint folder."""

    sharded = False
    device = torch.device("cpu")

    def __init__(self, folder: WeightsFolder) -> None:
        self.folder = folder
        self.parameters: dict[str, nn.Parameter] = {}

    def shards(self, names: list[str]) -> dict[str, Shard]:
        for name in names:
            if name not in self.parameters:
                self.parameters[name] = nn.Parameter(self.folder.read(name).clone())
        pulled = {name: self.parameters[name] for name in names}
        return {
            name: PlainShard(name, p.shape, 0, p.numel(), p.detach().view(-1), p, SGD([p]))
            for name, p in pulled.items()
        }


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture
def weights(shared: Path) -> Folder:
    return Folder(WeightsFolder(shared / "models" / "stories260K-mha"))


def released_plan(golden: Path, projections: tuple[str, ...]) -> SharingPlan:
    pairs = json.loads((golden / "selection_qk_0.3.json").read_text())["pairs"]
    return SharingPlan(
        tuple(
            HeadTie(
                (pair["target_layer"], pair["target_head"]),
                (pair["source_layer"], pair["source_head"]),
                projections,
            )
            for pair in pairs
        ),
        released=True,
    )


def penalty(golden: Path, weights: Folder, kind: str) -> Penalty:
    projections = ("q", "k", "v") if kind == "norm" else ("q", "k")
    layout = HeadLayout.from_config(weights.folder.config)
    return Penalty(released_plan(golden, projections), layout, KINDS[kind])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_published_penalties(golden: Path, weights: Folder, kind: str) -> None:
    expected = json.loads((golden / "postshare_loss_0.3.json").read_text())[kind]
    result = penalty(golden, weights, kind).apply(weights, 1.0)
    assert result.value == pytest.approx(expected["penalty_float64_independent"], rel=1e-4)
    assert result.value == pytest.approx(expected["penalty"], rel=1e-4)
    for name, norm in expected.get("grad_l2_norms", {}).items():
        parameter = weights.parameters.get(name)
        own = 0.0 if parameter is None else float(parameter.grad.norm())
        assert own == pytest.approx(norm, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("kind", ["norm", "MSE"])
def test_published_gradients(golden: Path, weights: Folder, kind: str) -> None:
    expected = np.load(golden / f"postshare_grad_{kind}_0.3.npz")
    penalty(golden, weights, kind).apply(weights, 1.0)
    assert len(expected.files) > 0
    for name in expected.files:
        reference = torch.from_numpy(expected[name])
        parameter = weights.parameters.get(name)
        own = torch.zeros_like(reference) if parameter is None else parameter.grad
        assert float((own - reference).norm()) <= 1e-4 * float(reference.norm()), name
