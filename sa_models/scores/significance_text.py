"""The null of scores that compare two units on the same text: one side's blocks are shuffled.

Both scores are means over blocks of text, or come from sums over them. With every block of the
target set against another block of the source, at the same positions, what position alone makes
alike stays, and what the text makes alike is gone. Under document masks the
borders of documents are part of the text. Blocks must have equal lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import Unit
from sa_models.scores.activations import RIDGE, HeadOutputs
from sa_models.scores.attention_maps import Maps, calibration_blocks, visit_maps
from sa_models.scores.significance import DRAWS, PairTerms, over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_BLOCKS = 6
"""265 ways to shuffle 6 blocks so that none stays in its place; 5 have 44."""
ROWS = 16
"""Rows of a block's maps that are kept, evenly spaced: 2.1 MB for a head and 64 blocks of 512."""


@lru_cache(maxsize=2)
def shuffles(blocks: int, seed: int) -> torch.Tensor:
    """Permutations without a fixed point, int64 (DRAWS, blocks)."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[torch.Tensor] = []
    while sum(map(len, kept)) < DRAWS:
        drawn = torch.rand(4 * DRAWS, blocks, generator=generator).argsort(1)
        kept.append(drawn[(drawn != torch.arange(blocks)).all(1)])
    return torch.cat(kept)[:DRAWS]


def check_blocks(blocks: int, score: str) -> None:
    """Raises PostshareError where there are too few blocks to shuffle."""
    if blocks < MIN_BLOCKS:
        raise PostshareError(
            f"{blocks} calibration blocks are too few to tell score {score} from chance; set "
            f"plan.calibration_blocks to at least {MIN_BLOCKS}"
        )


# --- attention maps -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapPair:
    """Mean cosines of a pair's maps: float64 (target's blocks, source's blocks)."""

    cosines: torch.Tensor

    @property
    def score(self) -> float:
        return float(self.cosines.diagonal().mean())

    def null(self, seed: int) -> torch.Tensor:
        blocks = len(self.cosines)
        return self.cosines[torch.arange(blocks), shuffles(blocks, seed)].mean(1)


def map_terms(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    progress: Progress | None = None,
) -> PairTerms:
    """Score ``attention`` of pairs, on :data:`ROWS` rows of every block, and its null.

    Raises:
        PostshareError: see :func:`~sa_models.scores.attention_maps.measure_isotropy`; or fewer than
            :data:`MIN_BLOCKS` blocks.
    """
    layout, blocks = HeadLayout.from_config(model.config), calibration_blocks(batches)
    check_blocks(len(blocks), "attention")
    length = blocks[0]["input_ids"].shape[1]
    chosen = torch.linspace(1, length - 1, min(ROWS, length - 1)).long()
    kept: list[torch.Tensor] = []
    counted: list[torch.Tensor] = []

    def visit(attentions: Maps, keys: torch.Tensor) -> None:
        rows = torch.stack([maps[0][:, chosen].float().cpu() for maps in attentions])
        # A single key says nothing, see sa_models.scores.attention_maps.
        counts = keys.cpu()[chosen] > 1
        kept.append(torch.nn.functional.normalize(rows, dim=-1) * counts[:, None])
        counted.append(counts.double())

    visit_maps(model, blocks, visit, progress)

    both = torch.stack(counted) @ torch.stack(counted).T * layout.heads_per_unit

    def terms(target: Unit, source: Unit) -> MapPair:
        a, b = (_rows_of(kept, layout, unit).flatten(1).double() for unit in (target, source))
        return MapPair(a @ b.T / both.clamp_min(1))

    return terms


def _rows_of(kept: list[torch.Tensor], layout: HeadLayout, unit: Unit) -> torch.Tensor:
    """(blocks, heads_per_unit, rows, keys) of one unit."""
    heads = slice(unit[1] * layout.heads_per_unit, (unit[1] + 1) * layout.heads_per_unit)
    return torch.stack([block[unit[0], heads] for block in kept])


# --- linear maps between head outputs -------------------------------------------------------------


@dataclass(frozen=True)
class LinearMapPair:
    """What R^2 of the best linear map is made of.

    Attributes:
        cross: float64 (blocks, blocks, head_dim, head_dim), products of the target's blocks,
            weighted by o, with the source's, whitened: R^2 = |sum over blocks|^2.
    """

    cross: torch.Tensor

    @property
    def score(self) -> float:
        blocks = len(self.cross)
        return float(self.cross[torch.arange(blocks), torch.arange(blocks)].sum(0).square().sum())

    def null(self, seed: int) -> torch.Tensor:
        blocks = len(self.cross)
        picked = torch.arange(blocks)
        draws = [self.cross[picked, other].sum(0) for other in shuffles(blocks, seed)]
        return torch.stack([total.square().sum() for total in draws])


def linear_map_terms(outputs: HeadOutputs, blocks: int) -> PairTerms:
    """Score ``output_map`` of pairs and its null.

    Args:
        blocks: of equal lengths, in which ``outputs`` were measured.

    Raises:
        PostshareError: fewer than :data:`MIN_BLOCKS` blocks.
    """
    check_blocks(blocks, "output_map")
    layout = outputs.layout

    def samples(unit: Unit) -> torch.Tensor:
        width = layout.width("o")
        h = outputs.heads[unit[0]][:, unit[1] * width : (unit[1] + 1) * width].double()
        return h.reshape(blocks, -1, layout.head_dim)  # (blocks, tokens * heads, head_dim)

    def terms(target: Unit, source: Unit) -> LinearMapPair:
        a, b = samples(target), samples(source)
        own = (b.mT @ b).sum(0)
        eye = torch.eye(layout.head_dim, dtype=torch.float64)
        scale = own.diagonal().mean()
        factor = torch.linalg.cholesky(own + (RIDGE * scale if scale > 0 else 1.0) * eye)
        b = torch.linalg.solve_triangular(factor.mT, b, upper=True, left=False)
        o = outputs.o_of(target)
        weight = (o.mT @ o).sum(0)
        if bool(weight.any()):
            a = a @ torch.linalg.cholesky(weight + 1e-12 * weight.diagonal().mean() * eye)
            a = over(a, torch.sqrt(a.square().sum()))
        else:  # it writes nothing
            a = torch.zeros_like(a)
        return LinearMapPair(torch.einsum("ite,jtf->ijef", a, b))

    return terms
