"""The four figures that every plan is judged by: weights, KV cache, decode time, perplexity.

`--dry-run`, the last table of a run, its report and its model card show the same four, in the same
words. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from train.common.sizes import size

if TYPE_CHECKING:
    from sa_models.savings import PlanSavings

CONTEXT = 8192
"""Tokens of a sequence whose cache is stated, or as many as the model has positions for."""
BATCH = 8
"""Sequences whose cache is stated."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class DecodeRatio:
    """Time to decode a token with the plan's compact model, over that of the dense base.

    Attributes:
        how: what it was measured with, for the reader.
        quartiles: of the ratio, over the rounds that were timed.
    """

    ratio: float
    how: str
    quartiles: tuple[float, float]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> DecodeRatio:
        """The inverse of :func:`dataclasses.asdict`, through JSON."""
        return cls(**{**value, "quartiles": tuple(value["quartiles"])})


@dataclass(frozen=True)
class Figures:
    """The four figures of a plan. Stock is the base as a dense Llama in the dtype of the export.

    Attributes:
        weight_bytes: of the compact form, residuals included.
        weight_ratio: stored parameters over those of stock.
        cache_bytes, stock_cache_bytes: of one token, in the dtype of the export.
        context: tokens of each of :data:`BATCH` sequences whose cache is stated.
        decode: None where it was not measured.
        perplexity: over that of *continued*; None where either was not measured.
    """

    weight_bytes: int
    weight_ratio: float
    cache_bytes: int
    stock_cache_bytes: int
    context: int
    decode: DecodeRatio | None = None
    perplexity: float | None = None

    @classmethod
    def of_plan(
        cls, savings: PlanSavings, element_bytes: int, positions: int, residual: int = 0
    ) -> Figures:
        """What the arithmetic of a plan tells; nothing has been measured.

        Args:
            element_bytes: of one exported parameter.
            positions: the most tokens that the model reads.
            residual: parameters of the adapter.
        """
        stored = savings.stored_parameters + residual
        return cls(
            weight_bytes=stored * element_bytes,
            weight_ratio=stored / savings.base_parameters,
            cache_bytes=savings.stored_cache * element_bytes,
            stock_cache_bytes=savings.base_cache * element_bytes,
            context=min(CONTEXT, positions),
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Figures:
        """The inverse of :func:`dataclasses.asdict`: of ``figures`` in ``summary.json``."""
        decode = value["decode"]
        return cls(**{**value, "decode": None if decode is None else DecodeRatio.from_dict(decode)})

    def rows(self) -> dict[str, str]:
        """Each figure in words, by its name; the cache has a second row, of whole sequences."""
        held, stock = (
            size(BATCH * self.context * each) for each in (self.cache_bytes, self.stock_cache_bytes)
        )
        decode, perplexity = NOT_MEASURED, NOT_MEASURED
        if self.decode is not None:
            decode = f"{_against(self.decode.ratio)} ({self.decode.how})"
        if self.perplexity is not None:
            perplexity = f"{self.perplexity - 1:+.1%}"
        return {
            "weight bytes": f"{self.weight_bytes:,}, {_against_stock(self.weight_ratio)}",
            "cache bytes per token": f"{self.cache_bytes:,}, "
            f"{_against_stock(self.cache_bytes / self.stock_cache_bytes)}",
            f"cache of {BATCH} x {self.context:,} tokens": f"{held}, stock {stock}",
            "decode time against stock": decode,
            "perplexity against continued": perplexity,
        }


def rows_table(rows: Mapping[str, str]) -> Table:
    """The rows for a terminal; no cell is wrapped."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for row in rows.items():
        table.add_row(*row)
    return table


def _against_stock(ratio: float) -> str:
    return "as stock" if ratio == 1 else f"{_against(ratio)} than stock"


def _against(ratio: float) -> str:
    return f"{abs(ratio - 1):.1%} {'less' if ratio < 1 else 'more'}"
