"""Spans: layers that reuse another layer's attention weights (SA), or its keys and values (CLA).

This file imports no torch: it also travels inside compact exports.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import PostshareError
from .heads import HeadLayout
from .ties import is_index

ABSENT = {"attention": ("q", "k"), "kv": ("k", "v")}
"""{what is shared: the projections that a follower does not have}."""

SHARES = tuple(ABSENT)


@dataclass(frozen=True)
class AttentionSpan:
    """One leader layer, and the layers above it that reuse what it computes.

    Attributes:
        leader, followers: 0-based layers; every follower lies above the leader.
        share: ``attention``: followers apply the leader's attention weights to their own values
            (Shared Attention, 2407.12866); ``kv``: they attend with their own queries to the
            leader's keys and values (CLA, 2405.12981).
        head_map: one row for each follower: which head of the leader its head h reads (query heads
            for ``attention``, KV heads for ``kv``). None: head h reads head h.
    """

    leader: int
    followers: tuple[int, ...]
    share: str = "attention"
    head_map: tuple[tuple[int, ...], ...] | None = None

    def __str__(self) -> str:
        return f"span {self.leader} -> {list(self.followers)} ({self.share})"

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.leader, *self.followers)

    def map_of(self, follower: int) -> tuple[int, ...] | None:
        """The head map of one follower, None when it reads head for head."""
        if self.head_map is None:
            return None
        heads = self.head_map[self.followers.index(follower)]
        return None if heads == tuple(range(len(heads))) else heads

    def to_dict(self) -> dict[str, Any]:
        """The version 1 JSON value of a plan's span."""
        return {
            "leader": self.leader,
            "followers": list(self.followers),
            "share": self.share,
            "head_map": None if self.head_map is None else [list(row) for row in self.head_map],
        }


def ranges(layers: tuple[int, ...]) -> str:
    """`23, 24, 25` as `23-25`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return " ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def read_span(value: Any, where: str) -> AttentionSpan:
    """A span from its JSON value. Raises PostshareError: ``where`` is malformed."""
    cure = "give leader, followers and share"
    if not isinstance(value, dict):
        raise PostshareError(f"{where} is {value!r}; {cure}")
    unknown = sorted(set(value) - {"leader", "followers", "share", "head_map"})
    if unknown:
        raise PostshareError(f"{where} has an unknown key {unknown[0]!r}; {cure}")
    for key in ("leader", "followers"):
        if key not in value:
            raise PostshareError(f"{where} has no {key!r}; {cure}")
    if not is_index(value["leader"]):
        raise PostshareError(f"{where}.leader is {value['leader']!r}; give a layer, from 0")
    if not _are_indices(value["followers"]):
        raise PostshareError(f"{where}.followers is {value['followers']!r}; give a list of layers")
    share, head_map = value.get("share", "attention"), value.get("head_map")
    if head_map is not None and not (
        isinstance(head_map, list | tuple) and all(map(_are_indices, head_map))
    ):
        raise PostshareError(
            f"{where}.head_map is no list of lists of heads; give one list for each follower"
        )
    return AttentionSpan(
        leader=value["leader"],
        followers=tuple(value["followers"]),
        share=share,
        head_map=None if head_map is None else tuple(tuple(row) for row in head_map),
    )


def _are_indices(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_index, value))


def check_spans(spans: Iterable[AttentionSpan], layout: HeadLayout) -> None:
    """Check spans against the model's attention shape.

    Raises:
        PostshareError: names the span and the reason: ``share`` misspelt, a layer out of range, no
            follower, a follower that is not above its leader or named twice, two spans that have a
            layer in common, or a head map of the wrong length.
    """
    taken: dict[int, AttentionSpan] = {}
    for span in spans:
        if span.share not in SHARES:
            near = difflib.get_close_matches(str(span.share), SHARES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "use 'attention' or 'kv'"
            raise PostshareError(f"{span}: unknown share {span.share!r}; {hint}")
        for layer in span.layers:
            if not 0 <= layer < layout.layers:
                raise PostshareError(
                    f"{span}: layer {layer} is out of range; the model has layers 0 to "
                    f"{layout.layers - 1}"
                )
        if not span.followers:
            raise PostshareError(f"{span}: it has no followers; name at least one, or remove it")
        if list(span.followers) != sorted(set(span.followers)):
            raise PostshareError(f"{span}: the followers are not ascending; name each once")
        if span.followers[0] <= span.leader:
            raise PostshareError(
                f"{span}: follower {span.followers[0]} is not above its leader {span.leader}; a "
                "layer can reuse only what a layer below it has computed"
            )
        for layer in span.layers:
            other = taken.setdefault(layer, span)
            if other is not span:
                raise PostshareError(
                    f"{span}: it overlaps '{other}' in layer {layer}; a layer belongs to one span"
                )
        _check_head_map(span, layout)


def _check_head_map(span: AttentionSpan, layout: HeadLayout) -> None:
    if span.head_map is None:
        return
    if len(span.head_map) != len(span.followers):
        raise PostshareError(
            f"{span}: the head map has {len(span.head_map)} rows for {len(span.followers)} "
            "followers; give one row for each follower"
        )
    heads, kind = (
        (layout.heads, "heads") if span.share == "attention" else (layout.kv_heads, "KV heads")
    )
    for row in span.head_map:
        if len(row) != heads:
            raise PostshareError(
                f"{span}: a row of the head map has {len(row)} entries; give one for each of the "
                f"{heads} {kind}"
            )
        for head in row:
            if not 0 <= head < heads:
                raise PostshareError(
                    f"{span}: the head map names head {head}; the leader has {kind} 0 to "
                    f"{heads - 1}"
                )


__all__ = ["ABSENT", "SHARES", "AttentionSpan", "check_spans", "ranges", "read_span"]
