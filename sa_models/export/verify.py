"""Verification of an export, from the files that it wrote.

Three things are compared: every tensor, bit for bit; one decoder layer at a time, what the stock
layer and the compact layer compute; and the bytes on disk with the plan's arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.projections import Piece, SharedBasisLinear, SharedLinear, transpose_storage_
from sa_models.weights.compact_folder import DenseReader, ExpandedFolder
from sa_models.weights.stock_form import stock_form
from sa_models.weights.uneven_heads import written_config

TOLERANCE = 1e-5
TOKENS = 8

CURE = "the export is not usable and was discarded; export again, and report this if it persists"


def verify_equal(
    exported: DenseReader,
    expected: DenseReader,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Compare two dense readers tensor by tensor, bit for bit.

    Where ``exported`` is an :class:`~sa_models.weights.compact_folder.ExpandedFolder`, the outputs
    of its decoder layers are compared as well (:class:`LayerCheck`). It may have units that its
    plan removes and ``expected`` does not store, see :mod:`sa_models.weights.stock_form`.

    Args:
        progress: called with the bytes of every tensor that was compared.

    Raises:
        PostshareError: names the first tensor or layer that differs.
    """
    if exported.names() != expected.names():
        raise PostshareError(f"{exported.path} lacks weights of the source; {CURE}")
    check = None
    if isinstance(exported, ExpandedFolder):
        check = LayerCheck(exported, expected.config)
        if HeadLayout.from_config(expected.config) != HeadLayout.from_config(exported.config):
            exported = stock_form(exported, exported.plan)
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


def verify_stored(exported: ExpandedFolder, expected: ExpandedFolder) -> None:
    """Compare the compact tensors themselves, bit for bit: factors of one product are many.

    Raises:
        PostshareError: names the first tensor that differs.
    """
    for name in expected.files.names():
        _compare_bits(name, exported.stored(name), expected.stored(name), exported.path)


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
        dense: the config of the dense side.
    """

    def __init__(self, compact: ExpandedFolder, dense: LlamaConfig) -> None:
        self._compact = compact
        self._stock = _without_weights(written_config(dense)).model.layers
        shared = _without_weights(compact.files.config)
        self._shared = shared.model.layers
        self._names = {
            module: f"{name}.weight"
            for name, module in shared.named_modules()
            if isinstance(module, SharedLinear)
        }
        plan = compact.plan
        self._layout = plan.layout(compact.config)
        self._span_of = plan.leader_of()
        self._in_spans = {layer for span in plan.spans for layer in span.layers}
        # By the compact leaders, {(layer, reuse): tensors}.
        self._handed: dict[tuple[int, bool], tuple[torch.Tensor, ...]] = {}
        self._computed: dict[int, dict[str, torch.Tensor]] = {}  # by the reference
        self._memory: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self._input = torch.randn(
            1, TOKENS, compact.config.hidden_size, generator=generator, dtype=torch.float32
        )
        positions = torch.arange(TOKENS)[None]
        self._rotary = LlamaRotaryEmbedding(compact.config)(self._input, positions)
        self._stock_rotary = LlamaRotaryEmbedding(dense)(self._input, positions)
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
        shared, prefix = self._shared[layer], f"model.layers.{layer}."
        if self._compact.plan.basis is not None:  # their rounding is no mistake of the export
            tensors = tensors | self._products(prefix, tensors)
        expected = self._reference(layer, tensors)
        pieces = self._take_owners_slices(shared)
        self._take_bases(shared, layer)
        weights = {
            name: self._compact.files.read(prefix + name).float()
            if name.startswith("self_attn.")
            else tensors[name]
            for name in shared.state_dict()
        }
        _load(shared, weights)
        # Inside spans both by replay and by reuse.
        modes = (False, True) if layer in self._in_spans else (False,)
        computed = torch.stack([self._compute(layer, reuse) for reuse in modes])
        shared.to("meta")
        for module, original in pieces.items():
            module.connect(original)
        scale = max(1.0, expected.abs().max().item())
        difference = (computed - expected).abs().max().item()
        if not difference <= TOLERANCE * scale:  # also true when it is NaN
            raise PostshareError(
                f"{self._compact.path}: layer {layer} computes other outputs than the stock layer "
                f"(max abs difference {difference:.2e}); {CURE}"
            )

    def _compute(self, layer: int, reuse: bool) -> torch.Tensor:
        """The compact layer's output, from what its leader has handed on."""
        span = self._span_of.get(layer)
        leader = () if span is None else self._handed[span.leader, reuse]
        computed, handed = self._shared[layer](
            self._input, leader, reuse, self._rotary, attention_mask=self._mask
        )
        if handed:
            self._handed[layer, reuse] = handed
        return computed

    def _reference(self, layer: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The stock layer's output; with spans, that of their definition, written out plainly."""
        stock = self._stock[layer]
        if layer not in self._in_spans:
            _load(stock, tensors)
            output = stock(
                self._input, attention_mask=self._mask, position_embeddings=self._stock_rotary
            )
            stock.to("meta")
            return output
        for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
            inside = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if name in n}
            _load(getattr(stock, name), inside)
        attended = self._attend(layer, tensors, stock.input_layernorm(self._input))
        output = self._input + attended
        output = output + stock.mlp(stock.post_attention_layernorm(output))
        stock.to("meta")
        return output

    def _attend(self, layer: int, tensors: dict[str, torch.Tensor], x: torch.Tensor):
        """Attention of a layer in a span, head by head: the definition, without any kernel."""
        layout, span = self._layout, self._span_of.get(layer)
        found = {
            p: functional.linear(x, tensors[f"self_attn.{p}_proj.weight"])
            .unflatten(-1, (-1, layout.head_dim))
            .transpose(1, 2)[0]
            for p in "qkv"
            if f"self_attn.{p}_proj.weight" in tensors
        }
        cos, sin = self._rotary
        for p in {"q", "k"} & set(found):
            found[p] = found[p] * cos + rotate_half(found[p]) * sin
        if span is None:
            self._computed[layer] = found
        heads = []
        for head in range(layout.heads):
            group = head // layout.heads_per_unit
            if span is None:
                q, k, v = found["q"][head], found["k"][group], found["v"][group]
            elif span.share == "attention":
                leader = self._computed[span.leader]
                read = (span.map_of(layer) or range(layout.heads))[head]
                q, k = leader["q"][read], leader["k"][read // layout.heads_per_unit]
                v = found["v"][group]
            else:
                leader = self._computed[span.leader]
                read = (span.map_of(layer) or range(layout.kv_heads))[group]
                q, k, v = found["q"][head], leader["k"][read], leader["v"][read]
            scores = q @ k.t() / layout.head_dim**0.5 + self._mask[0, 0]
            heads.append(scores.softmax(-1) @ v)
        o = tensors["self_attn.o_proj.weight"]
        return functional.linear(torch.cat(heads, dim=-1), o)[None]

    def _products(self, prefix: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The dense weights that are products of factors, not rounded to the export's dtype."""
        return {
            name: self._compact.product(prefix + name).float()
            for name in names
            if self._compact.factor_names(prefix + name) is not None
        }

    def _take_bases(self, layer: nn.Module, at: int) -> None:
        """Give projections whose basis another layer holds that of the files."""
        for name, module in layer.named_modules():
            if isinstance(module, SharedBasisLinear) and module.owner is not module:
                dense = f"model.layers.{at}.{name}.weight"
                _, stored = self._compact.factor_names(dense) or ("", "")
                basis = nn.Linear(1, 1, bias=False, device="meta")
                basis.weight = nn.Parameter(self._compact.files.read(stored).float())
                holder = nn.Module()
                holder.basis = basis
                module.connect(holder)  # type: ignore[arg-type]  # all that is read of an owner

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


def _load(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    module.load_state_dict(weights, assign=True)
    transpose_storage_(module)


def _without_weights(config: LlamaConfig | MistralConfig) -> LlamaForCausalLM:
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
