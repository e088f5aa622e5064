"""The sharing plan: ties, removed units, spans and KV heads, validated against a config.

A plan is one value. It is stored as JSON (version 1) in a run folder and inside a compact export's
``config.json``; initialization, forward, materializing and exporting all read the same value, so
that they cannot disagree. This file imports no torch: it also travels inside compact exports.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .atomic_files import write_json
from .basis import SharedBasis, check_basis, parameter_range, read_basis
from .errors import PostshareError
from .heads import PROJECTIONS, HeadLayout
from .removal import check_removed, dropped_layers
from .savings import PlanSavings, llama_parameters
from .spans import ABSENT, AttentionSpan, check_spans, read_span
from .ties import (
    HeadTie,
    Unit,
    check_ties,
    is_index,
    read_tie,
    read_unit,
    refuse_unknown,
    resolve_roots,
)

VERSION = 1


@dataclass(frozen=True)
class SharingPlan:
    """What is shared, validated against a config with :meth:`validate`.

    KV heads and spans are the plan's *structure*: they are applied to the weights before training
    (:mod:`~sa_models.weights.structure`). Ties are made, and units removed, after it
    (:mod:`~sa_models.materialize.ties`), or weights factorized
    (:mod:`~sa_models.materialize.shared_basis`).

    Attributes:
        ties: every tie points at a root source (a unit that is itself no target for that
            projection), except in a ``released`` plan. Units are those of the model with the
            plan's KV heads.
        kv_heads: KV heads of a layer (GQA; 1: MQA), pooled from those of the base; None: as in
            the base.
        spans: layers that reuse what another layer has computed.
        removed: units that are pruned from their layer, in all four projections. Units are those
            of the model with the plan's KV heads. A layer of which all are removed is *dropped*: it
            has no attention.
        released: the published selection, chains and all, kept for comparison. Its penalty pulls
            every pair; :meth:`effective` leaves out the ties whose target serves as a source, as
            the released forward does, so fewer heads change than were asked for.
        basis: the layers whose q, k and v are products of a shared basis and their coefficients;
            nothing else is shared then.
    """

    ties: tuple[HeadTie, ...] = ()
    kv_heads: int | None = None
    removed: tuple[Unit, ...] = ()
    spans: tuple[AttentionSpan, ...] = ()
    released: bool = False
    basis: SharedBasis | None = None

    # --- JSON ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The version 1 JSON value, of ``plan.json`` and of ``sharing`` in ``config.json``."""
        value: dict[str, Any] = {
            "version": VERSION,
            "kv_heads": self.kv_heads,
            "ties": [
                {
                    "target": list(tie.target),
                    "source": list(tie.source),
                    "projections": list(tie.projections),
                    "score": tie.score,
                }
                for tie in self.ties
            ],
            "removed": [list(unit) for unit in self.removed],
            "spans": [span.to_dict() for span in self.spans],
        }
        if self.released:
            value["released"] = True
        if self.basis is not None:
            value["basis"] = self.basis.to_dict()
        return value

    @classmethod
    def from_dict(cls, value: Any) -> SharingPlan:
        """Read a version 1 value. Raises PostshareError for unknown keys and malformed entries."""
        if not isinstance(value, dict):
            raise PostshareError("the plan is not a JSON object; write it with `postshare plan`")
        known = {"version", "kv_heads", "ties", "removed", "spans", "released", "basis"}
        refuse_unknown(value, known, "plan")
        if value.get("version") != VERSION:
            raise PostshareError(
                f"the plan has version {value.get('version')!r}, this postshare reads version "
                f"{VERSION}; make the plan again with `postshare plan`"
            )
        kv_heads, released = value.get("kv_heads"), value.get("released", False)
        if kv_heads is not None and (not is_index(kv_heads) or kv_heads == 0):
            raise PostshareError(f"plan.kv_heads is {kv_heads!r}; give a positive integer or null")
        if not isinstance(released, bool):
            raise PostshareError(f"plan.released is {released!r}; give true or false")
        return cls(
            ties=tuple(read_tie(i, tie) for i, tie in enumerate(_list(value, "ties"))),
            kv_heads=kv_heads,
            removed=tuple(
                read_unit(unit, f"plan.removed[{i}]")
                for i, unit in enumerate(_list(value, "removed"))
            ),
            spans=tuple(
                read_span(span, f"plan.spans[{i}]") for i, span in enumerate(_list(value, "spans"))
            ),
            released=released,
            basis=read_basis(value.get("basis")),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON, whole or not at all."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharingPlan:
        """Read a plan file. Raises PostshareError when it is missing or is not a plan."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            value = json.loads(text, parse_constant=_no_number)
        except FileNotFoundError:
            raise PostshareError(
                f"the plan {path} does not exist; make one with `postshare plan RECIPE`"
            ) from None
        except (ValueError, OSError, RecursionError) as error:
            raise PostshareError(
                f"the plan {path} cannot be read ({error}); delete it, and make it again with "
                "`postshare plan`"
            ) from None
        return cls.from_dict(value)

    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON: two plans with one hash are the same plan."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    # --- meaning ------------------------------------------------------------------------------

    def effective(self) -> SharingPlan:
        """The chain-free plan that is materialized and exported.

        The plan itself, unless it is ``released``: there a target that is also a source keeps its
        own weights, which is what the released implementation computes.
        """
        if not self.released:
            return self
        sources = {(tie.source, p) for tie in self.ties for p in tie.projections}
        kept = []
        for tie in self.ties:
            free = tuple(p for p in tie.projections if (tie.target, p) not in sources)
            if free:
                kept.append(replace(tie, projections=free))
        return replace(self, ties=tuple(kept), released=False)

    def shared_projections(self) -> frozenset[str]:
        """The projections that ties share."""
        return frozenset(p for tie in self.effective().ties for p in tie.projections)

    def structure(self) -> SharingPlan:
        """The part that is applied before training: KV heads and spans alone."""
        return SharingPlan(kv_heads=self.kv_heads, spans=self.spans)

    @property
    def has_stock_form(self) -> bool:
        """Whether a stock Llama can compute what the plan's model computes."""
        return not self.spans

    def layout(self, config: Any) -> HeadLayout:
        """The attention shape with the plan's KV heads, of a base or a converted model.

        Raises:
            PostshareError: the config's KV heads cannot be pooled into the plan's.
        """
        layout = HeadLayout.from_config(config)
        if self.kv_heads is None:
            return layout
        fitting = [n for n in range(1, layout.kv_heads + 1) if layout.kv_heads % n == 0]
        if self.kv_heads not in fitting:
            raise PostshareError(
                f"kv_heads {self.kv_heads} does not divide the model's {layout.kv_heads} KV heads; "
                f"use one of {fitting}"
            )
        return replace(layout, kv_heads=self.kv_heads)

    def leader_of(self) -> dict[int, AttentionSpan]:
        """{follower: its span}."""
        return {follower: span for span in self.spans for follower in span.followers}

    def absent(self) -> frozenset[tuple[int, str]]:
        """(layer, projection) that followers do not have."""
        return frozenset(
            (follower, p) for follower, span in self.leader_of().items() for p in ABSENT[span.share]
        )

    def dropped(self, layout: HeadLayout) -> frozenset[int]:
        """The layers without attention: all their units are removed.

        Args:
            layout: with the plan's KV heads, see :meth:`layout`.
        """
        return dropped_layers(self.removed, layout)

    def dropped_names(self, layout: HeadLayout) -> frozenset[str]:
        """The parameters that a stock Llama has for the attention of dropped layers, its norm
        included, and the compact form has not.

        Args:
            layout: with the plan's KV heads, see :meth:`layout`.
        """
        dropped = self.dropped(layout)
        names = {layout.parameter_name(layer, p) for layer in dropped for p in PROJECTIONS}
        return frozenset(names | {layout.norm_name(layer) for layer in dropped})

    def kept_units(self, layout: HeadLayout) -> list[list[int]]:
        """For every layer, the units that are not removed, ascending.

        Args:
            layout: with the plan's KV heads, see :meth:`layout`.
        """
        removed = set(self.removed)
        return [
            [unit for unit in range(layout.units) if (layer, unit) not in removed]
            for layer in range(layout.layers)
        ]

    def uniform_units(self, layout: HeadLayout) -> int | None:
        """Units that every layer keeps, where each has lost as many. None: layers differ, nothing
        is removed, or there are spans.

        Args:
            layout: with the plan's KV heads, see :meth:`layout`.
        """
        kept = {len(units) for units in self.kept_units(layout)}
        return kept.pop() if self.removed and not self.spans and len(kept) == 1 else None

    def stock_units(self, config: Any) -> int | None:
        """As :meth:`uniform_units`, where what is left is a stock Llama with fewer heads. None too
        where no stock config takes so many heads (see :mod:`sa_models.weights.uneven_heads`)."""
        layout = self.layout(config)
        units = self.uniform_units(layout)
        uneven = units and layout.hidden_size % layout.with_units(units).heads
        return None if uneven and getattr(config, "mlp_bias", False) else units

    def own_units(self, layout: HeadLayout) -> list[dict[str, list[int]]]:
        """For every layer, {projection that it has: the units that it stores itself, ascending};
        nothing for a dropped layer.

        Args:
            layout: with the plan's KV heads, see :meth:`layout`.
        """
        source_of, absent = self.sources(), self.absent()
        return [
            {
                p: [unit for unit in kept if (layer, unit, p) not in source_of]
                for p in PROJECTIONS
                if kept and (layer, p) not in absent
            }
            for layer, kept in enumerate(self.kept_units(layout))
        ]

    def sources(self) -> dict[tuple[int, int, str], Unit]:
        """{(layer, unit, projection): source unit} of every tied slice."""
        return {(*tie.target, p): tie.source for tie in self.ties for p in tie.projections}

    def validate(self, config: Any) -> None:
        """Check the plan against a Llama config, of the base or of the converted model.

        Raises:
            PostshareError: names the tie, span or removed unit and the reason: see
                :func:`check_spans` and :func:`check_removed`; layer or unit out of range, an
                unknown projection, one that a follower does not have, a projection of a target
                tied twice, a unit tied to itself, a cycle, or a chain (a source that is itself a
                target) outside a ``released`` plan; KV heads that do not divide; attention dropout
                with spans; or a basis beside anything else.
        """
        layout = self.layout(config)
        if self.basis is not None:
            if self.ties or self.removed or self.spans or self.kv_heads is not None:
                raise PostshareError(
                    "the plan has a basis beside ties, removed units, spans or kv_heads, which do "
                    "not go together yet; keep one of them"
                )
            check_basis(self.basis, layout)
        check_spans(self.spans, layout)
        dropout = getattr(config, "attention_dropout", 0.0)
        if self.spans and dropout:
            raise PostshareError(
                f"the model has attention_dropout {dropout}, with which spans do "
                "not work (a follower would draw another mask than its leader); set it to 0 in "
                "config.json"
            )
        check_ties(self.ties, layout, chains=self.released)
        self._check_present()
        check_removed(self.removed, self.ties, self.spans, layout)

    def _check_present(self) -> None:
        absent, span_of = self.absent(), self.leader_of()
        for tie in self.ties:
            for layer in (tie.target[0], tie.source[0]):
                for p in tie.projections:
                    if (layer, p) in absent:
                        raise PostshareError(
                            f"{tie}: layer {layer} has no {p}, because it follows in "
                            f"'{span_of[layer]}'; tie other projections of it, or another layer"
                        )

    def savings(self, config: Any) -> PlanSavings:
        """What the effective plan saves on a Llama of this config (no weights are needed)."""
        base, layout = HeadLayout.from_config(config), self.layout(config)
        ties = self.effective().ties
        tied_units, removed_units = len({tie.target for tie in ties}), len(self.removed)
        dropped = len(self.dropped(layout))
        cache = 2 * layout.kv_heads * layout.head_dim
        saved_cache = sum(
            len(span.followers) * (cache // 2 if span.share == "attention" else cache)
            for span in self.spans
        )
        saved_cache += removed_units * 2 * layout.head_dim
        return PlanSavings(
            units=layout.layers * layout.units,
            tied_units=tied_units,
            heads=layout.layers * layout.heads,
            tied_heads=tied_units * layout.heads_per_unit,
            removed_units=removed_units,
            removed_heads=removed_units * layout.heads_per_unit,
            attention_parameters=base.attention_parameters,
            tied_parameters=sum(layout.unit_parameters(p) for t in ties for p in t.projections),
            removed_unit_parameters=removed_units * sum(map(layout.unit_parameters, PROJECTIONS)),
            span_parameters=sum(layout.units * layout.unit_parameters(p) for _, p in self.absent()),
            pooled_parameters=base.attention_parameters - layout.attention_parameters,
            base_parameters=llama_parameters(config),
            base_cache=2 * base.layers * base.kv_heads * base.head_dim,
            stored_cache=layout.layers * cache - saved_cache,
            basis_parameters=0 if self.basis is None else self._saved_by_basis(layout),
            dropped_layers=dropped,
            dropped_norm_parameters=dropped * layout.hidden_size,
            stock_units=self.stock_units(config),
        )

    def _saved_by_basis(self, layout: HeadLayout) -> int:
        assert self.basis is not None
        _, dense = parameter_range(layout, self.basis.layers)
        return dense - self.basis.parameters(layout)


def _no_number(constant: str) -> float:
    """JSON has neither NaN nor infinity; Python reads them."""
    raise ValueError(f"{constant} is no number")


def _list(value: dict[str, Any], key: str) -> list[Any]:
    entries = value.get(key, [])
    if not isinstance(entries, list):
        raise PostshareError(f"plan.{key} is {type(entries).__name__}; give a list")
    return entries


__all__ = ["HeadTie", "SharingPlan", "resolve_roots"]
