"""The section of a recipe for Basis Sharing, the control that factorizes instead of tying."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sa_models.basis import Ranks, basis_ranks
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from train.launched import launched_fsdp
from train.sections import ExportSection, MaterializeSection, PenaltySection, Positive, Section

if TYPE_CHECKING:
    from train.recipe import Recipe


class BasisSection(Section):
    """Basis Sharing (2410.03765), attention only: q, k and v of adjacent layers on one basis."""

    layers: Annotated[int, Field(ge=2)] = 2
    """Adjacent layers that share a basis."""
    parameters: Positive
    """Most parameters of the factors of q, k and v of all layers; the ranks follow from it."""
    calibration_blocks: Positive = 32
    """Training blocks that the first factors are fitted on, spread evenly."""


def check_basis(recipe: Recipe) -> None:
    """Raises ValueError for other sharing beside it, or for options that have no effect with it."""
    if recipe.basis is None:
        return
    if recipe.plans:
        raise ValueError(
            "basis: factors have no heads to tie, remove or span; remove plan, spans and heads, or "
            "basis"
        )
    if recipe.model.config is not None:
        raise ValueError("basis: random weights have no basis worth keeping; set model.path")
    if recipe.penalty != PenaltySection() or recipe.materialize != MaterializeSection():
        raise ValueError("basis: nothing is tied; remove penalty and materialize")
    if recipe.export.formats not in (ExportSection().formats, ("dense",)):
        raise ValueError("basis: there is no compact form; set export.formats=[dense]")


def ranks_of(recipe: Recipe, config: Any) -> Ranks:
    """The ranks that the recipe comes to, for a base of this config.

    Raises:
        PostshareError: see :func:`~sa_models.basis.basis_ranks`; or it was launched with FSDP2.
    """
    section = recipe.basis
    assert section is not None
    if launched_fsdp():
        raise PostshareError(
            "basis: layers hold one basis together, which FSDP2 would split up for one of them; "
            "launch with launch/accelerate/zero3.yaml, or without a launch file"
        )
    return basis_ranks(HeadLayout.from_config(config), section.layers, section.parameters)
