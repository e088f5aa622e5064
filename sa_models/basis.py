"""Basis Sharing (2410.03765), attention only: adjacent layers whose projections share one basis.

The weights (out_features, hidden_size) of q of a group of layers are stacked, likewise those of k
and of v, and factorized: W_l ~ C_l B with one B (rank, hidden_size) for the group and coefficients
C_l (out_features, rank) for every layer. The factors minimize sum |X W' - X (C B)'|^2, X the inputs
of all layers of the group on calibration text: the truncated SVD of W L, L L' = X'X (the paper's
whitening). o, and what is outside of attention, stays: the paper finds o worse to share.

How C B is split up between its factors changes no function, but how they train: every component's
column of C and row of B are given the same norm.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from .errors import PostshareError
from .heads import HeadLayout
from .input_grams import InputGrams, run_text
from .readers import dense_config
from .restart import Batch
from .savings import llama_parameters
from .similarity import Progress
from .weights import WeightsFolder, llama_shapes, read_config

SHARED = ("q", "k", "v")
RIDGE = 1e-6
"""Added to the diagonal of X'X, relative to its mean: directions that the text lacks stay."""

Ranks = dict[str, list[int]]
"""{projection: the rank of every group of layers}."""


@strict
class BasisLlamaConfig(LlamaConfig):
    """A LlamaConfig whose ``basis`` field says which layers share one, and of which ranks:
    ``{"layers": 2, "ranks": {"q": [96, 96], "k": ..., "v": ...}}``."""

    model_type = "shared_basis_llama"
    base_model_tp_plan = {}  # noqa: RUF012 - a class attribute in transformers
    base_model_pp_plan = {}  # noqa: RUF012

    basis: dict[str, Any] | None = None


def layer_groups(layers: int, size: int) -> list[range]:
    """Groups of ``size`` adjacent layers; the last one may be smaller."""
    return [range(start, min(start + size, layers)) for start in range(0, layers, size)]


def factor_sizes(layout: HeadLayout, size: int) -> dict[tuple[str, int], tuple[int, int]]:
    """{(projection, group): (parameters of one rank, parameters of the dense weights)}."""
    found = {}
    for p in SHARED:
        rows, columns = layout.shape(p)
        for at, group in enumerate(layer_groups(layout.layers, size)):
            found[p, at] = (columns + len(group) * rows, len(group) * rows * columns)
    return found


def parameter_range(layout: HeadLayout, size: int) -> tuple[int, int]:
    """Parameters of q, k and v of all layers: of factors of rank 1, and of the dense weights."""
    sizes = factor_sizes(layout, size).values()
    return sum(one for one, _ in sizes), sum(dense for _, dense in sizes)


def basis_ranks(layout: HeadLayout, size: int, parameters: int) -> Ranks:
    """The ranks with which q, k and v of all layers take at most so many parameters.

    All factors get the same share of their dense size, rounded down; what is left goes to them one
    rank at a time, from the first group on, as long as a rank fits.

    Args:
        size: adjacent layers that share a basis.
        parameters: of all factors.

    Raises:
        PostshareError: a factor would have no rank, or the dense weights are no larger.
    """
    sizes, (least, whole) = factor_sizes(layout, size), parameter_range(layout, size)
    if not least <= parameters < whole:
        raise PostshareError(
            f"basis: {parameters:,} parameters for q, k and v do not lie between those of rank 1, "
            f"{least:,}, and the {whole:,} of the dense weights; change basis.parameters"
        )
    ranks = {
        key: max(1, parameters * dense // (whole * one)) for key, (one, dense) in sizes.items()
    }
    left = parameters - sum(ranks[key] * one for key, (one, _) in sizes.items())
    while fitting := [
        key for key, (one, dense) in sizes.items() if one <= left and ranks[key] * one < dense
    ]:
        for key in fitting:
            if sizes[key][0] <= left:
                ranks[key] += 1
                left -= sizes[key][0]
    if left < 0:
        raise PostshareError(
            f"basis: {parameters:,} parameters are too few for the ranks of all groups; raise "
            "basis.parameters"
        )
    groups = len(layer_groups(layout.layers, size))
    return {p: [ranks[p, at] for at in range(groups)] for p in SHARED}


def factored_parameters(layout: HeadLayout, size: int, ranks: Ranks) -> int:
    """Parameters of the factors of q, k and v of all layers."""
    return sum(ranks[p][at] * one for (p, at), (one, _) in factor_sizes(layout, size).items())


def stored_parameters(config: BasisLlamaConfig) -> int:
    """Parameters of the factorized model, each basis counted once."""
    layout, size, ranks = HeadLayout.from_config(config), *_fields(config)
    dense = parameter_range(layout, size)[1]
    return llama_parameters(config) - dense + factored_parameters(layout, size, ranks)


def _fields(config: BasisLlamaConfig) -> tuple[int, Ranks]:
    assert config.basis is not None
    return config.basis["layers"], config.basis["ranks"]


# --- the factorization ----------------------------------------------------------------------------


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
    size: int,
    ranks: Ranks,
    batches: Iterable[Batch],
    progress: Progress | None = None,
) -> BasisLlamaForCausalLM:
    """A Llama whose q, k and v are replaced by factors; all other parameters are its own.

    Args:
        model: a stock Llama.
        size, ranks: see :func:`basis_ranks`.
        batches: calibration text, see :data:`~sa_models.restart.Batch`.

    Raises:
        PostshareError: see :func:`factorize` and :func:`~sa_models.input_grams.run_text`.
    """
    layout = HeadLayout.from_config(model.config)
    grams = InputGrams(model, range(layout.layers))
    with torch.no_grad(), grams.recording():
        run_text(model, batches, lambda logits, targets: None, progress)
    dense = dict(model.named_parameters())
    state = {
        name: p for name, p in dense.items() if (HeadLayout.parse_name(name) or (0, "o"))[1] == "o"
    }
    for p in SHARED:
        for at, group in enumerate(layer_groups(layout.layers, size)):
            weights = [dense[layout.parameter_name(layer, p)].detach() for layer in group]
            gram = torch.stack([grams.of_layer[layer] for layer in group]).sum(0)
            basis, coefficients = factorize(weights, gram, ranks[p][at])
            state[basis_name(group[0], p)] = nn.Parameter(basis.float())
            for layer, part in zip(group, coefficients, strict=True):
                state[coefficients_name(layer, p)] = nn.Parameter(part.float().contiguous())
    made = BasisLlamaForCausalLM(basis_config(model.config, size, ranks))
    made.generation_config = model.generation_config
    return _filled(made, state)


def basis_config(config: LlamaConfig, size: int, ranks: Ranks) -> BasisLlamaConfig:
    """The config of the factorized form of a stock Llama."""
    values = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    made = BasisLlamaConfig(**values, basis={"layers": size, "ranks": ranks})
    made.architectures = ["BasisLlamaForCausalLM"]
    made._attn_implementation = config._attn_implementation
    return made


# --- the model ------------------------------------------------------------------------------------


class SharedBasisLinear(nn.Module):
    """x -> C (B x). ``basis`` is one parameter in all layers of a group."""

    def __init__(self, basis: nn.Parameter, out_features: int) -> None:
        super().__init__()
        self.basis = basis
        self.coefficients = nn.Parameter(torch.empty(out_features, len(basis)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., out_features)."""
        return functional.linear(functional.linear(x, self.basis), self.coefficients)


class BasisLlamaForCausalLM(LlamaForCausalLM):
    """A stock Llama with :class:`SharedBasisLinear` in the place of q, k and v.

    A model to train and to compare with: it is made by :func:`factorized` and read by
    :func:`load_basis`; what is shipped are its dense weights (:class:`BasisFolder`).
    """

    config_class = BasisLlamaConfig
    config: BasisLlamaConfig

    def __init__(self, config: BasisLlamaConfig) -> None:
        super().__init__(config)
        layout, size, ranks = HeadLayout.from_config(config), *_fields(config)
        for p in SHARED:
            rows, columns = layout.shape(p)
            for at, group in enumerate(layer_groups(layout.layers, size)):
                basis = nn.Parameter(torch.empty(ranks[p][at], columns))
                for layer in group:
                    attention = self.model.layers[layer].self_attn
                    setattr(attention, f"{p}_proj", SharedBasisLinear(basis, rows))


def basis_name(first: int, projection: str) -> str:
    """The parameter's name in the first layer of its group."""
    return f"model.layers.{first}.self_attn.{projection}_proj.basis"


def coefficients_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}_proj.coefficients"


@torch.no_grad()
def _filled(
    model: BasisLlamaForCausalLM, state: Mapping[str, torch.Tensor]
) -> BasisLlamaForCausalLM:
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])
    return model


# --- its files ------------------------------------------------------------------------------------


class BasisFiles(WeightsFolder):
    """The safetensors of a factorized model as they are stored. Raises as its base class does."""

    config: BasisLlamaConfig

    def _read_config(self) -> LlamaConfig:
        return read_config(self.path, BasisLlamaConfig.model_type)

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        layout, size, ranks = HeadLayout.from_config(self.config), *_fields(self.config)
        shapes = llama_shapes(self.config)
        for p in SHARED:
            rows, columns = layout.shape(p)
            for at, group in enumerate(layer_groups(layout.layers, size)):
                shapes[basis_name(group[0], p)] = (ranks[p][at], columns)
                for layer in group:
                    del shapes[layout.parameter_name(layer, p)]
                    shapes[coefficients_name(layer, p)] = (rows, ranks[p][at])
        return shapes


class BasisFolder:
    """The folder of a factorized model read as dense Llama weights: products of its factors.

    Products are computed in float64 and rounded once to the dtype of the factors.

    Attributes:
        files: the factors as they are stored.
        config: the dense ``LlamaConfig``.

    Raises:
        PostshareError: as :class:`~sa_models.weights.WeightsFolder`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = BasisFiles(path)
        self.config = dense_config(self.files.config)
        self._shapes = llama_shapes(self.config)
        size = _fields(self.files.config)[0]
        self._first = {
            layer: group[0]
            for group in layer_groups(self.config.num_hidden_layers, size)
            for layer in group
        }

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.files.dtype(self._stored(name)[0])

    def shards(self) -> list[Path]:
        return self.files.shards()

    def read(self, name: str) -> torch.Tensor:
        """The dense tensor."""
        factors = [self.files.read(stored) for stored in self._stored(name)]
        if len(factors) == 1:
            return factors[0]
        coefficients, basis = factors
        return (coefficients.double() @ basis.double()).to(basis.dtype)

    def slice(self, name: str) -> Any:
        """The tensor; index it."""
        return self.read(name)

    def _stored(self, name: str) -> tuple[str, ...]:
        layer, p = HeadLayout.parse_name(name) or (0, "")
        if p not in SHARED:
            return (name,)
        return coefficients_name(layer, p), basis_name(self._first[layer], p)


def load_basis(path: str | os.PathLike[str], attention: str) -> BasisLlamaForCausalLM:
    """A factorized model as it was written, fp32, on the CPU. Raises as :class:`BasisFolder`."""
    files = BasisFiles(path)
    files.config._attn_implementation = attention
    model = BasisLlamaForCausalLM(files.config)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return _filled(model, {name: files.read(name) for name in files.names()}).float()
