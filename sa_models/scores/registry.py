"""Scores of two units and importances of one: where each is, by the name in a recipe.

A function is named as `module:function` and imported when it is used: no torch here.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from sa_models.calibration.progress import Progress
    from sa_models.heads import HeadLayout
    from sa_models.scores.significance import PairTerms
    from sa_models.scores.weight_cosine import Reader


class WeightScore(NamedTuple):
    """A score that the weights alone say.

    Attributes:
        matrix: (reader, layout, score, progress) -> all pairs, see
            :func:`~sa_models.scores.weight_cosine.unit_scores`.
        terms: (reader, layout, score) -> the terms of one pair, for its p-value, see
            :data:`~sa_models.scores.significance.PairTerms`.
    """

    matrix: str
    terms: str


class TextScore(NamedTuple):
    """A score that is measured on calibration text.

    Attributes:
        matrix: (what is measured, progress) -> all pairs.
        of: what is measured, attributes of :class:`train.planning.scores.CalibrationText`.
        terms, terms_of: likewise, the terms of one pair.
        shuffles: the null shuffles blocks of text, and so needs some.
    """

    matrix: str
    of: tuple[str, ...]
    terms: str
    terms_of: tuple[str, ...]
    shuffles: bool


_COSINE = WeightScore(
    "sa_models.scores.weight_cosine:unit_scores", "sa_models.scores.weight_cosine:cosine_terms"
)
_ALIGNED = WeightScore(
    "sa_models.scores.gauge_invariant:aligned_scores",
    "sa_models.scores.gauge_invariant:aligned_terms",
)
OF_WEIGHTS = {
    "q": _COSINE,
    "k": _COSINE,
    "v": _COSINE,
    "qk": _COSINE,
    "qkv": _COSINE,
    "softmax": _COSINE,
    "qk_aligned": _ALIGNED,
    "vo": _ALIGNED,
    "qkvo_aligned": _ALIGNED,
}
OF_TEXT = {
    "attention": TextScore(
        "sa_models.scores.attention_maps:unit_map_similarity",
        ("model", "batches"),
        "sa_models.scores.significance_text:map_terms",
        ("model", "batches"),
        shuffles=True,
    ),
    "output": TextScore(
        "sa_models.scores.activations:output_scores",
        ("outputs",),
        "sa_models.scores.activations:output_terms",
        ("outputs",),
        shuffles=False,
    ),
    "output_map": TextScore(
        "sa_models.scores.activations:output_map_scores",
        ("outputs",),
        "sa_models.scores.significance_text:linear_map_terms",
        ("outputs", "blocks"),
        shuffles=True,
    ),
}
SCORES = (*OF_WEIGHTS, *OF_TEXT)

IMPORTANCES_OF_WEIGHTS = {"magnitude": "sa_models.scores.magnitude:unit_norms"}
"""Functions of (reader, layout) -> float64 (layers, units); the least important are removed."""
IMPORTANCES_OF_TEXT = {"gradient": "sa_models.scores.fisher:gradient_importance"}
"""Functions of (model, batches, layers to leave out, progress), likewise."""
IMPORTANCES = (*IMPORTANCES_OF_WEIGHTS, *IMPORTANCES_OF_TEXT)


def weight_scores(
    reader: Reader, layout: HeadLayout, score: str, progress: Progress | None = None
) -> torch.Tensor:
    """A score of weights of all pairs, float64 (layers * units, layers * units)."""
    return resolve_name(OF_WEIGHTS[score].matrix)(reader, layout, score, progress)


def weight_terms(reader: Reader, layout: HeadLayout, score: str) -> PairTerms:
    """The terms of a score of weights. The features are the inputs of q, k and v: hidden_size."""
    return resolve_name(OF_WEIGHTS[score].terms)(reader, layout, score)
