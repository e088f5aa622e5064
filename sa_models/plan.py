"""The sharing plan: which units take the weights of which, and what that saves.

A plan is one value. It is stored as JSON (version 1) in a run folder and inside a compact export's
``config.json``; initialization, forward, materializing and exporting all read the same value, so
that they cannot disagree. This file imports no torch: it also travels inside compact exports.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import PostshareError
from .heads import PROJECTIONS, HeadLayout

VERSION = 1

Unit = tuple[int, int]
"""(layer, unit), both 0-based. A unit is a head under MHA and a KV group under GQA and MQA."""


@dataclass(frozen=True)
class HeadTie:
    """The target unit takes the weights of the source unit, for the named projections."""

    target: Unit
    source: Unit
    projections: tuple[str, ...]
    score: float | None = None

    def __str__(self) -> str:
        return f"tie {list(self.target)} <- {list(self.source)} ({''.join(self.projections)})"


@dataclass(frozen=True)
class PlanSavings:
    """Arithmetic of what a plan saves. Parameters are counted in elements, ratios are in [0, 1]."""

    units: int
    tied_units: int
    heads: int
    tied_heads: int
    attention_parameters: int
    tied_parameters: int
    base_parameters: int

    @property
    def effective_ratio(self) -> float:
        """Share of the heads whose weights really change."""
        return self.tied_units / self.units

    @property
    def stored_ratio(self) -> float:
        """Share of the attention parameters that are no longer stored."""
        return self.tied_parameters / self.attention_parameters

    @property
    def stored_parameters(self) -> int:
        return self.base_parameters - self.tied_parameters

    def bytes(self, element_size: int) -> tuple[int, int]:
        """Bytes of the parameters (base, stored) at ``element_size`` bytes an element."""
        return self.base_parameters * element_size, self.stored_parameters * element_size


@dataclass(frozen=True)
class SharingPlan:
    """Ties, and what later methods add, validated against a config with :meth:`validate`.

    Attributes:
        ties: every tie points at a root source (a unit that is itself no target for that
            projection), except in a ``released`` plan.
        released: the published selection, chains and all, kept for comparison. Its penalty pulls
            every pair; :meth:`effective` leaves out the ties whose target serves as a source, as
            the released forward does, so fewer heads change than were asked for.
        kv_heads, removed, spans: part of the version 1 JSON. Not supported yet: a plan that
            names them is refused by :meth:`validate`.
    """

    ties: tuple[HeadTie, ...] = ()
    kv_heads: int | None = None
    removed: tuple[Unit, ...] = ()
    spans: tuple[dict[str, Any], ...] = ()
    released: bool = False

    # --- JSON ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The version 1 JSON value (DESIGN: ``plan.json`` and ``sharing`` in ``config.json``)."""
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
            "spans": [dict(span) for span in self.spans],
        }
        if self.released:
            value["released"] = True
        return value

    @classmethod
    def from_dict(cls, value: Any) -> SharingPlan:
        """Read a version 1 value. Raises PostshareError for unknown keys and malformed entries."""
        if not isinstance(value, dict):
            raise PostshareError("the plan is not a JSON object; write it with `postshare plan`")
        known = {"version", "kv_heads", "ties", "removed", "spans", "released"}
        _refuse_unknown(value, known, "plan")
        if value.get("version") != VERSION:
            raise PostshareError(
                f"the plan has version {value.get('version')!r}, this postshare reads version "
                f"{VERSION}; make the plan again with `postshare plan`"
            )
        kv_heads, released = value.get("kv_heads"), value.get("released", False)
        if kv_heads is not None and not _is_index(kv_heads):
            raise PostshareError(f"plan.kv_heads is {kv_heads!r}; give a positive integer or null")
        if not isinstance(released, bool):
            raise PostshareError(f"plan.released is {released!r}; give true or false")
        return cls(
            ties=tuple(_read_tie(i, tie) for i, tie in enumerate(_list(value, "ties"))),
            kv_heads=kv_heads,
            removed=tuple(
                _read_unit(unit, f"plan.removed[{i}]")
                for i, unit in enumerate(_list(value, "removed"))
            ),
            spans=tuple(_list(value, "spans")),
            released=released,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON beside and rename it into place."""
        path = Path(path)
        beside = path.with_name(path.name + ".tmp")
        beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharingPlan:
        """Read a plan file. Raises PostshareError when it is missing or is not a plan."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PostshareError(
                f"the plan {path} does not exist; make one with `postshare plan RECIPE`"
            ) from None
        except (ValueError, OSError) as error:
            raise PostshareError(
                f"the plan {path} cannot be read ({error}); make it again with `postshare plan`"
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
        own weights, which is what the released implementation computes (METHODS.md).
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

    def sources(self) -> dict[tuple[int, int, str], Unit]:
        """{(layer, unit, projection): source unit} of every tied slice."""
        return {(*tie.target, p): tie.source for tie in self.ties for p in tie.projections}

    def validate(self, config: Any) -> None:
        """Check the plan against a Llama config.

        Raises:
            PostshareError: names the tie and the reason: layer or unit out of range, an unknown
                projection, a projection of a target tied twice, a unit tied to itself, a cycle,
                or a chain (a source that is itself a target) outside a ``released`` plan.
        """
        layout = HeadLayout.from_config(config)
        for name in ("kv_heads", "removed", "spans"):
            if getattr(self, name):
                raise PostshareError(
                    f"the plan uses {name!r}, which this version does not support; remove it "
                    "from the plan and keep to ties"
                )
        for tie in self.ties:
            _check_range(tie, tie.target, "target", layout)
            _check_range(tie, tie.source, "source", layout)
            _check_projections(tie)
            if tie.target == tie.source:
                raise PostshareError(f"{tie}: a unit cannot be its own source; remove the tie")
        self._check_once()
        self._check_chains()

    def _check_once(self) -> None:
        seen: dict[tuple[Unit, str], HeadTie] = {}
        for tie in self.ties:
            for projection in tie.projections:
                other = seen.setdefault((tie.target, projection), tie)
                if other is not tie:
                    raise PostshareError(
                        f"{tie}: {projection} of this target is already tied by '{other}'; "
                        "keep one of the two"
                    )

    def _check_chains(self) -> None:
        for projection in PROJECTIONS:
            source_of = {
                tie.target: tie.source for tie in self.ties if projection in tie.projections
            }
            for tie in self.ties:
                if projection not in tie.projections or tie.source not in source_of:
                    continue
                unit, path = tie.source, [tie.target]
                while unit in source_of and unit not in path:
                    path.append(unit)
                    unit = source_of[unit]
                if unit in path:
                    raise PostshareError(
                        f"{tie}: the {projection} ties form a cycle through {list(unit)}; "
                        "point every tie at a unit that is no target"
                    )
                if not self.released:
                    raise PostshareError(
                        f"{tie}: the source is itself a target for {projection}; "
                        f"point the tie at the root source {list(unit)}"
                    )

    def savings(self, config: Any) -> PlanSavings:
        """What the effective plan saves on a Llama of this config (no weights are needed)."""
        layout = HeadLayout.from_config(config)
        ties = self.effective().ties
        tied = sum(layout.unit_parameters(p) for tie in ties for p in tie.projections)
        tied_units = len({tie.target for tie in ties})
        return PlanSavings(
            units=layout.layers * layout.units,
            tied_units=tied_units,
            heads=layout.layers * layout.heads,
            tied_heads=tied_units * layout.heads_per_unit,
            attention_parameters=layout.attention_parameters,
            tied_parameters=tied,
            base_parameters=llama_parameters(config),
        )


def llama_parameters(config: Any) -> int:
    """Number of parameters of a dense Llama of this config, tied embeddings counted once."""
    layout = HeadLayout.from_config(config)
    hidden, middle, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    mlp = 3 * hidden * middle
    if getattr(config, "mlp_bias", False):
        mlp += 2 * middle + hidden
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2)
    norms = (2 * layout.layers + 1) * hidden
    return embeddings + norms + layout.layers * mlp + layout.attention_parameters


def resolve_roots(ties: Iterable[HeadTie]) -> tuple[HeadTie, ...]:
    """Follow every tie's source to a unit that is itself no target, projection by projection.

    Ties must be free of cycles (sources in strictly earlier layers always are). A tie whose
    projections end at different roots becomes several ties. Scores are kept: they are those of
    the pair that was matched.
    """
    ties = tuple(ties)
    source_of = {(tie.target, p): tie.source for tie in ties for p in tie.projections}
    resolved = []
    for tie in ties:
        by_root: dict[Unit, list[str]] = {}
        for projection in tie.projections:
            root = tie.source
            for _ in range(len(ties)):
                if (root, projection) not in source_of:
                    break
                root = source_of[(root, projection)]
            else:
                raise PostshareError(f"{tie}: the ties form a cycle; a source must be no target")
            by_root.setdefault(root, []).append(projection)
        resolved += [
            HeadTie(tie.target, root, tuple(ps), tie.score) for root, ps in by_root.items()
        ]
    return tuple(resolved)


# --- reading and checking -------------------------------------------------------------------------


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list(value: dict[str, Any], key: str) -> list[Any]:
    entries = value.get(key, [])
    if not isinstance(entries, list):
        raise PostshareError(f"plan.{key} is {type(entries).__name__}; give a list")
    return entries


def _refuse_unknown(value: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(value) - known)
    if unknown:
        raise PostshareError(f"{where} has an unknown key {unknown[0]!r}; known: {sorted(known)}")


def _read_unit(value: Any, where: str) -> Unit:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_index, value)):
        raise PostshareError(f"{where} is {value!r}; give [layer, unit], both integers from 0")
    return value[0], value[1]


def _read_tie(index: int, value: Any) -> HeadTie:
    where = f"plan.ties[{index}]"
    if not isinstance(value, dict):
        raise PostshareError(f"{where} is {value!r}; give target, source and projections")
    _refuse_unknown(value, {"target", "source", "projections", "score"}, where)
    for key in ("target", "source", "projections"):
        if key not in value:
            raise PostshareError(f"{where} has no {key!r}; give target, source and projections")
    projections, score = value["projections"], value.get("score")
    if not isinstance(projections, list) or not all(isinstance(p, str) for p in projections):
        raise PostshareError(f"{where}.projections is {projections!r}; give a list of q, k, v, o")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise PostshareError(f"{where}.score is {score!r}; give a number or null")
    return HeadTie(
        target=_read_unit(value["target"], f"{where}.target"),
        source=_read_unit(value["source"], f"{where}.source"),
        projections=tuple(projections),
        score=score,
    )


def _check_range(tie: HeadTie, unit: Unit, end: str, layout: HeadLayout) -> None:
    layer, index = unit
    if not 0 <= layer < layout.layers:
        raise PostshareError(
            f"{tie}: the {end} layer {layer} is out of range; the model has layers 0 to "
            f"{layout.layers - 1}"
        )
    if not 0 <= index < layout.units:
        kind = "heads" if layout.heads_per_unit == 1 else f"KV groups of {layout.heads_per_unit}"
        raise PostshareError(
            f"{tie}: the {end} unit {index} is out of range; a layer of this model has "
            f"{layout.units} units ({kind}), 0 to {layout.units - 1}"
        )


def _check_projections(tie: HeadTie) -> None:
    for projection in tie.projections:
        if projection not in PROJECTIONS:
            raise PostshareError(f"{tie}: unknown projection {projection!r}; use q, k, v or o")
    if not tie.projections:
        raise PostshareError(f"{tie}: no projection is named; give at least one of q, k, v, o")
    if len(set(tie.projections)) != len(tie.projections):
        raise PostshareError(f"{tie}: a projection is named twice; name each once")
