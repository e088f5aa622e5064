"""Verification of an export, from the files that it wrote (contract 1 and contract 2).

Three things are compared: every tensor, bit for bit; one decoder layer at a time, what the stock
layer and the compact layer compute; and the bytes on disk with the plan's arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .errors import PostshareError
from .projections import Piece, SharedLinear, transpose_storage_
from .readers import DenseReader, ExpandedFolder

TOLERANCE = 1e-5
TOKENS = 8

CURE = "the export is not usable and was discarded; export again, and report this if it persists"


def verify_equal(
    exported: DenseReader,
    expected: DenseReader,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Compare two dense readers tensor by tensor, bit for bit.

    Where ``exported`` is an :class:`~sa_models.readers.ExpandedFolder`, the outputs of its decoder
    layers are compared as well (:class:`LayerCheck`).

    Args:
        progress: called with the bytes of every tensor that was compared.

    Raises:
        PostshareError: names the first tensor or layer that differs.
    """
    if exported.names() != expected.names():
        raise PostshareError(f"{exported.path} lacks weights of the source; {CURE}")
    check = LayerCheck(exported) if isinstance(exported, ExpandedFolder) else None
    # The layers last: the memory of their check is not held beside the large embeddings.
    names = sorted(exported.names(), key=lambda name: _layer_of(name) is not None)
    for layer, inside_layer in groupby(names, key=_layer_of):
        tensors = {}
        for name in inside_layer:
            tensor = expected.read(name)
            _compare_bits(name, exported.read(name), tensor, exported.path)
            progress(tensor.nbytes)
            if layer is not None and check is not None:
                inside = name.split(".", 3)[3]
                tensors[inside] = check.in_fp32(inside, tensor)
        if layer is not None and check is not None:
            check(layer, tensors)


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def _compare_bits(name: str, ours: torch.Tensor, other: torch.Tensor, path: Path) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if ours.shape != other.shape or ours.dtype != other.dtype:
        raise PostshareError(f"{path}: {name} is {_kind(ours)} instead of {_kind(other)}; {CURE}")
    # As integers, so that NaN equals itself and -0 differs from 0.
    as_integers = integers[ours.element_size()]
    if not torch.equal(ours.view(as_integers), other.view(as_integers)):
        raise PostshareError(f"{path}: {name} differs from the materialized weights; {CURE}")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class LayerCheck:
    """Runs one decoder layer at a time, stock and compact, and compares what they compute.

    Both models are built by transformers without weights; a layer's weights are put in for its
    check only. The compact layer runs the very forward of the compact model, on own weights and
    owners' slices from the compact files. fp32, a fixed seeded input, the config's rotary
    embeddings.

    Args:
        compact: the compact folder; its tensors have been compared already, so that weights
            outside q, k, v and o are taken from the dense side.
    """

    def __init__(self, compact: ExpandedFolder) -> None:
        self._compact = compact
        self._stock = _without_weights(compact.config).model.layers
        shared = _without_weights(compact.files.config)
        self._shared = shared.model.layers
        self._names = {
            module: f"{name}.weight"
            for name, module in shared.named_modules()
            if isinstance(module, SharedLinear)
        }
        self._memory: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self._input = torch.randn(
            1, TOKENS, compact.config.hidden_size, generator=generator, dtype=torch.float32
        )
        positions = torch.arange(TOKENS)[None]
        self._rotary = LlamaRotaryEmbedding(compact.config)(self._input, positions)
        self._mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]

    def in_fp32(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The weight in fp32, in memory that the next layer's weight of this name will take."""
        if tensor.dtype == torch.float32:
            return tensor
        if name not in self._memory:
            self._memory[name] = torch.empty(tensor.shape, dtype=torch.float32)
        return self._memory[name].copy_(tensor)

    @torch.no_grad()
    def __call__(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Compare the outputs of one layer.

        Args:
            tensors: the layer's dense weights in fp32, by their names inside the layer.

        Raises:
            PostshareError: the outputs differ by more than 1e-5 (of the largest output, where
                that is above 1), or are not finite.
        """
        stock, shared = self._stock[layer], self._shared[layer]
        expected = self._run(stock, tensors)
        pieces = self._take_owners_slices(shared)
        own = {
            name: self._compact.files.read(f"model.layers.{layer}.{name}").float()
            for name in tensors
            if name.startswith("self_attn.")
        }
        computed = self._run(shared, tensors | own)
        for module, original in pieces.items():
            module.connect(original)
        scale = max(1.0, expected.abs().max().item())
        difference = (computed - expected).abs().max().item()
        if not difference <= TOLERANCE * scale:  # also true when it is NaN
            raise PostshareError(
                f"{self._compact.path}: layer {layer} computes other outputs than the stock layer "
                f"(max abs difference {difference:.2e}); {CURE}"
            )

    def _run(self, layer: nn.Module, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        layer.load_state_dict(weights, assign=True)
        transpose_storage_(layer)
        output = layer(self._input, attention_mask=self._mask, position_embeddings=self._rotary)
        layer.to("meta")
        return output

    def _take_owners_slices(self, layer: nn.Module) -> dict[SharedLinear, tuple]:
        """Point tied pieces at the owners' slices, read from the files. Returns the old pieces."""
        before = {}
        for module in layer.modules():
            if not isinstance(module, SharedLinear):
                continue
            before[module] = module.pieces
            pieces = tuple(
                piece if piece.owner is module else self._with_weights(piece)
                for piece in module.pieces
            )
            module.connect(pieces)
        return before

    def _with_weights(self, piece: Piece) -> Piece:
        """The piece with an owner that holds, from the files, no more than the piece reads."""
        owner = piece.owner
        stored = self._compact.files.slice(self._names[owner])
        features = slice(piece.first, piece.last)
        part = stored[:, features] if owner.axis else stored[features]
        holder = type(owner)(owner.in_features, owner.out_features, part.float())
        return piece._replace(owner=holder, first=0)


def _without_weights(config: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
    return model.eval()


def verify_bytes(folder: str | os.PathLike[str], shards: list[Path], predicted: int) -> int:
    """The bytes of the tensors on disk, headers left out.

    Raises:
        PostshareError: they are not the ``predicted`` bytes.
    """
    stored = sum(tensor_bytes(shard) for shard in shards)
    if stored != predicted:
        raise PostshareError(
            f"{folder} holds {stored:,} bytes of tensors, the plan says {predicted:,}; {CURE}"
        )
    return stored


def tensor_bytes(shard: Path) -> int:
    """Bytes of a safetensors file without its header."""
    with shard.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return shard.stat().st_size - 8 - header
