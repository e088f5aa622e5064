"""Basis Sharing (2410.03765), attention only: the factors that lose least on calibration text.

The weights of q of a group of adjacent layers are stacked, likewise those of k and of v, and
factorized: W_l ~ C_l B (:mod:`~sa_models.basis`). The factors minimize sum |X W' - X (C B)'|^2, X
the inputs of all layers of the group on calibration text: the truncated SVD of W L, L L' = X'X (the
paper's whitening).

How C B is split up between its factors changes no function, but how they train: every component's
column of C and row of B are given the same norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import LlamaForCausalLM

from sa_models.basis import FACTORED, basis_name, coefficients_name
from sa_models.calibration.input_moments import InputGrams, run_text
from sa_models.calibration.partial_forward import Batch
from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.modeling import (
    SharedLlamaForCausalLM,
    compact_config,
    set_parameter,
    without_weights,
)
from sa_models.plan import SharingPlan
from sa_models.projections import transpose_storage_

RIDGE = 1e-6
"""Added to the diagonal of X'X, relative to its mean: directions that the text lacks stay."""


def factorize(
    weights: Sequence[torch.Tensor], gram: torch.Tensor, rank: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The factors of the least error on the text, as this module says.

    Args:
        weights: of every layer, (out_features, hidden_size).
        gram: X'X of all these layers, float64 (hidden_size, hidden_size).
        rank: at most hidden_size and the rows of all weights.

    Returns:
        B (rank, hidden_size) and C_l (out_features, rank) of every layer, float64.

    Raises:
        PostshareError: the text says nothing: the Gram matrix is zero, or not finite.
    """
    size = float(gram.diagonal().mean())
    if not 0 < size < float("inf"):
        raise PostshareError(
            "the inputs of a layer are zero or not finite on calibration text, so that no basis "
            "can be chosen by them; give other text, or check the weights"
        )
    ridge = RIDGE * size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(gram + ridge)
    stacked = torch.cat([w.double() for w in weights])
    left, values, right = torch.linalg.svd(stacked @ root, full_matrices=False)
    coefficients = left[:, :rank]
    scaled = values[:rank, None] * right[:rank]
    basis = torch.linalg.solve_triangular(root, scaled, upper=False, left=False)
    balance = basis.norm(dim=1).clamp_min(torch.finfo(basis.dtype).tiny).sqrt()
    coefficients = coefficients * balance
    return basis / balance[:, None], list(coefficients.split([len(w) for w in weights]))


def factorized(
    model: LlamaForCausalLM,
    plan: SharingPlan,
    batches: Iterable[Batch],
    progress: Progress | None = None,
) -> SharedLlamaForCausalLM:
    """The compact model of a plan with a basis; all other parameters are the model's own.

    Args:
        model: a stock Llama.
        plan: validated.
        batches: calibration text, see :data:`~sa_models.calibration.partial_forward.Batch`.

    Raises:
        PostshareError: see :func:`factorize` and
        :func:`~sa_models.calibration.input_moments.run_text`.
    """
    basis, layout = plan.basis, HeadLayout.from_config(model.config)
    assert basis is not None
    grams = InputGrams(model, range(layout.layers))
    with torch.no_grad(), grams.recording():
        run_text(model, batches, lambda logits, targets: None, progress)
    dense, factors = dict(model.named_parameters()), dict[str, torch.Tensor]()
    for p in FACTORED:
        for at, group in enumerate(basis.groups(layout.layers)):
            weights = [dense[layout.parameter_name(layer, p)].detach() for layer in group]
            gram = torch.stack([grams.of_layer[layer] for layer in group]).sum(0)
            shared, coefficients = factorize(weights, gram, basis.ranks(p)[at])
            factors[basis_name(group[0], p)] = shared.float()
            for layer, part in zip(group, coefficients, strict=True):
                factors[coefficients_name(layer, p)] = part.float().contiguous()
    return with_factors(model, plan, factors)


def with_factors(
    model: LlamaForCausalLM, plan: SharingPlan, factors: Mapping[str, torch.Tensor]
) -> SharedLlamaForCausalLM:
    """The compact model of a plan with a basis, made of these factors and the model's own rest.

    Args:
        model: a stock Llama.
        plan: validated.
        factors: of every name and shape that the plan needs, see
            :func:`~sa_models.weights.parameter_shapes.compact_shapes`.
    """
    state = {name: p for name, p in model.named_parameters() if not _is_factored(name)}
    state |= {name: nn.Parameter(factor) for name, factor in factors.items()}
    made = without_weights(SharedLlamaForCausalLM, compact_config(model.config, plan), model)
    for name, expected in list(made.named_parameters()):
        set_parameter(made, name, state[name], expected)
    made.tie_weights()
    transpose_storage_(made)
    return made.train(model.training)


def _is_factored(name: str) -> bool:
    return (HeadLayout.parse_name(name) or (0, "o"))[1] in FACTORED


__all__ = ["factorize", "factorized", "with_factors"]
