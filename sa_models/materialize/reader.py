"""Dense weights with a plan written into them, read tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.materialize.merge import Group, groups, merge_group
from sa_models.materialize.registry import GAUGED, Merge
from sa_models.materialize.ties import merge_slices, shared_slices
from sa_models.plan import SharingPlan, Unit
from sa_models.weights.compact_folder import DenseReader, cast, features_of


class MaterializedReader:
    """Dense weights with the ties and removed units of a plan written in, in one dtype.

    Args:
        source: the weights before materializing.
        plan: validated; a ``released`` plan is reduced to its effective ties.
        merge: see :func:`~sa_models.materialize.ties.merge_slices`, whose value, rounded to the
            source's dtype, is then cast to ``dtype``: what
            :func:`~sa_models.materialize.ties.materialize_` and a cast compute.
    """

    def __init__(
        self,
        source: DenseReader,
        plan: SharingPlan,
        merge: Merge = "copy",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path = source.path
        self.config = source.config
        self._source = source
        self._merge = merge
        self._dtype = dtype
        self._layout = plan.layout(source.config)
        # {(layer, projection): {unit that changes: the units whose slices are merged into it}}; of
        # a removed unit none.
        self._changes: dict[tuple[int, str], dict[int, list[Unit]]] = {}
        # {(layer, projection): groups of units that may change in it}, for the other merges
        self._groups: dict[tuple[int, str], list[Group]] = {}
        ties = plan.effective().ties
        for group in groups(ties) if merge in GAUGED else ():
            for where in {(layer, p) for layer, _ in group.units for p in group.pair}:
                self._groups.setdefault(where, []).append(group)
        for (p, layer, unit), targets in shared_slices(ties if merge not in GAUGED else ()).items():
            members = [(layer, unit)] if merge == "copy" else [(layer, unit), *targets]
            changed = targets if merge == "copy" else members
            for target_layer, target_unit in changed:
                self._changes.setdefault((target_layer, p), {})[target_unit] = members
        self._without_reader = {
            self._layout.norm_name(layer) for layer in plan.dropped(self._layout)
        }
        for layer, unit in plan.removed:  # nothing is merged into it
            for p in PROJECTIONS:
                self._changes.setdefault((layer, p), {})[unit] = []

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def shards(self) -> list[Path]:
        return self._source.shards()

    def read(self, name: str) -> torch.Tensor:
        """The materialized tensor. Raises PostshareError when float16 cannot hold it."""
        if name in self._without_reader:
            return torch.ones(self.shape(name), dtype=self._dtype)
        where = HeadLayout.parse_name(name)
        changes = self._changes.get(where, {}) if where else {}
        merged_groups = self._groups.get(where, []) if where else []
        if where is None or not (changes or merged_groups):
            return cast(self._source.read(name), self._dtype, name)
        layer, p = where
        weight = self._source.read(name).to(self._dtype, copy=True)
        width, axis = self._layout.width(p), self._layout.axis(p)
        for unit, members in changes.items():
            changed = weight.narrow(axis, unit * width, width)
            if members:
                slices = [self._unit(p, *member) for member in members]
                changed.copy_(merge_slices(slices, self._merge))
            else:
                changed.zero_()
        for group in merged_groups:
            for unit, value in self._merged(group, layer, p).items():
                weight.narrow(axis, unit * width, width).copy_(value)
        return cast(weight, self._dtype, name)

    def _merged(self, group: Group, layer: int, projection: str) -> dict[int, torch.Tensor]:
        """{unit of the layer: its rows (o: columns) of the projection}, of a merged group."""
        new = merge_group(
            group,
            self._merge,
            self._layout.head_dim,
            lambda p, u: self._unit(p, *u).t() if p == "o" else self._unit(p, *u),
        )
        return {
            unit: value.t() if p == "o" else value
            for (p, (at, unit)), value in new.items()
            if (at, p) == (layer, projection)
        }

    def slice(self, name: str) -> Any:
        return self.read(name)

    def _unit(self, projection: str, layer: int, unit: int) -> torch.Tensor:
        """One unit's rows (o: columns) of the source."""
        view = self._source.slice(self._layout.parameter_name(layer, projection))
        width = self._layout.width(projection)
        return features_of(view, self._layout.axis(projection), unit * width, (unit + 1) * width)
