"""The compact model: a Llama in which every shared unit is stored, and held, once."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Rotation, SharedAttention, is_readable
from .basis import FACTORED
from .cache import CACHE, fit_cache_
from .configuration import SharedLlamaConfig
from .errors import PostshareError
from .heads import HeadLayout
from .packing import set_packed_
from .plan import SharingPlan
from .projections import (
    Piece,
    SharedBasisLinear,
    SharedLinear,
    transpose_storage_,
)


class SharedDecoderLayer(GradientCheckpointingLayer):
    """A Llama layer that takes its leader's tensors and hands on its own.

    A dropped one has no attention, and no norm before it: it computes x + MLP(norm(x)).

    They are arguments and results, not state: sharing then survives gradient checkpointing, and
    does not depend on a cache.
    """

    def __init__(self, config: SharedLlamaConfig, layer_idx: int, plan: SharingPlan) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = SharedAttention(config, layer_idx, plan)
        self.mlp = LlamaMLP(config)
        self.input_layernorm: LlamaRMSNorm | None = None
        if not self.self_attn.is_dropped:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        leader: tuple[torch.Tensor, ...],
        reuse: bool,
        position_embeddings: Rotation,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(batch, rows, hidden) -> the same, and the tensors that followers need."""
        norm = self.input_layernorm
        attended, _, handed = self.self_attn(
            hidden_states if norm is None else norm(hidden_states),
            leader,
            reuse,
            position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        if norm is not None:
            hidden_states = hidden_states + attended
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + transformed, handed


class TransposedOutputs:
    """What a loaded model needs beside its files."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; also restores the storage order of o, which a file cannot hold."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        transpose_storage_(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


class SharedLlamaModel(TransposedOutputs, LlamaModel):
    """The layers of a Llama under a plan, from embeddings to the last norm."""

    config_class = SharedLlamaConfig
    config: SharedLlamaConfig
    _no_split_modules = ["SharedDecoderLayer"]  # noqa: RUF012 - class attributes in transformers
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SharedDecoderLayer,
        "attentions": SharedAttention,
    }

    def __init__(self, config: SharedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        plan = self.plan = config.plan
        self.layout = plan.layout(config)
        span_of = plan.leader_of()
        self.spans = [span_of.get(layer) for layer in range(config.num_hidden_layers)]
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [SharedDecoderLayer(config, i, plan) for i in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        connect_projections_(self, plan)
        set_packed_(self, config.packed)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As ``LlamaModel.forward``; the cache may have its earlier or its later name.

        Raises PostshareError for a cache that does not fit.
        """
        if cache is None:
            cache = past_key_values
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            fit_cache_(cache, self.plan, self.layout)
        rows = hidden_states.shape[1]
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            index = torch.arange(rows, device=hidden_states.device)
            position_ids = (index + seen).unsqueeze(0)  # type: ignore[assignment]
        given_cache: dict[str, Any] = {CACHE: cache}
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **given_cache,
        )
        reuse = rows <= self.config.reuse_rows and is_readable(
            mask, rows, self.config._attn_implementation
        )
        rotation = self.rotary_emb(hidden_states, position_ids=position_ids)

        handed: dict[int, tuple[torch.Tensor, ...]] = {}
        for at, layer in enumerate(self.layers):
            span, entering = self.spans[at], hidden_states
            hidden_states, given = layer(
                entering,
                () if span is None else handed[span.leader],
                reuse,
                rotation,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=use_cache,
                **kwargs,
            )
            if given:
                refuse_lost_gradient(entering, given)
                handed[at] = given
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **given_cache)


def refuse_lost_gradient(entering: torch.Tensor, given: tuple[torch.Tensor, ...]) -> None:
    """Reentrant checkpointing returns what a leader hands on without its gradient, and no error.

    Raises:
        PostshareError: it is switched on.
    """
    if torch.is_grad_enabled() and entering.requires_grad and not given[0].requires_grad:
        raise PostshareError(
            "gradient checkpointing with use_reentrant=True loses the gradient from followers to "
            "their leader; use activation_checkpointing_enable({'use_reentrant': False})"
        )


class SharedLlamaForCausalLM(TransposedOutputs, LlamaForCausalLM):
    """A Llama that applies the sharing plan of its config.

    Computes what the materialized dense Llama computes; with spans, what their papers define.
    Raises PostshareError when the plan does not fit the config.
    """

    config_class = SharedLlamaConfig
    config: SharedLlamaConfig
    _no_split_modules = ["SharedDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: SharedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = SharedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        transpose_storage_(self)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any):
        """As in transformers; then every layer holds only what it reads, from the start."""
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            fit_cache_(cache, self.model.plan, self.model.layout)

    @classmethod
    def from_materialized(
        cls, model: LlamaForCausalLM, plan: SharingPlan
    ) -> SharedLlamaForCausalLM:
        """The compact form of a model into which the plan has been materialized.

        Own rows are copied; every other parameter is shared with ``model``.

        Args:
            model: with the plan's structure (:func:`~sa_models.weights.structure.convert`) and
                weights that equal where they are tied. What it holds of removed units is left out.

        Raises:
            PostshareError: the model has another structure, or the plan a basis, whose factors
                :func:`~sa_models.materialize.shared_basis.factorized` finds.
        """
        plan = plan.effective()
        if plan.basis is not None:
            raise PostshareError(
                "the plan has a basis, whose factors calibration text decides; use "
                "sa_models.materialize.shared_basis.factorized"
            )
        config = compact_config(model.config, plan)
        compact = without_weights(cls, config, model)
        own = plan.own_units(plan.layout(config))
        lost = plan.dropped_names(plan.layout(config))
        state = {n: p for n, p in model.named_parameters() if n not in lost}
        expected = dict(compact.named_parameters())
        pooled = plan.layout(config) != HeadLayout.from_config(config)
        if pooled or state.keys() != expected.keys():
            raise PostshareError(
                "the model has not the plan's KV heads and spans; convert it first"
            )
        for name, parameter in expected.items():
            value = state[name]
            layer_and_projection = HeadLayout.parse_name(name)
            if layer_and_projection is not None:
                layer, projection = layer_and_projection
                kept = select_units(value.detach(), own[layer][projection], config, projection)
                value = nn.Parameter(kept.clone(), requires_grad=value.requires_grad)
            set_parameter(compact, name, value, parameter)
        compact.tie_weights()
        transpose_storage_(compact)
        return compact.train(model.training)


Model = TypeVar("Model", bound=LlamaForCausalLM)


def without_weights(kind: type[Model], config: LlamaConfig, like: LlamaForCausalLM) -> Model:
    """A model of a config whose parameters are still to be set; all else is as in ``like``."""
    config._attn_implementation = like.config._attn_implementation
    with torch.device("meta"):
        model = kind(config)
    model.model.rotary_emb = like.model.rotary_emb
    model.generation_config = like.generation_config
    return model


def compact_config(config: object, plan: SharingPlan) -> SharedLlamaConfig:
    """The compact config of a dense or compact config and a plan (its effective part)."""
    values = config.to_dict()  # type: ignore[attr-defined]
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "sharing"):
        values.pop(key, None)
    values["architectures"] = ["SharedLlamaForCausalLM"]
    return SharedLlamaConfig(**values, sharing=plan.effective().to_dict())


def select_units(
    weight: torch.Tensor, units: list[int], config: object, projection: str
) -> torch.Tensor:
    """The rows (o: columns) of the given units: what a compact projection stores."""
    layout = HeadLayout.from_config(config)
    width = layout.width(projection)
    index = torch.tensor(units, dtype=torch.long, device=weight.device)
    features = (index[:, None] * width + torch.arange(width, device=weight.device)).flatten()
    return weight.index_select(layout.axis(projection), features)


def connect_projections_(model: LlamaModel, plan: SharingPlan) -> None:
    """Tell every projection where its units, or its basis, are stored."""
    layout = plan.layout(model.config)
    if plan.basis is not None:
        for at in range(layout.layers):
            for p in FACTORED:
                first, _ = plan.basis.place(at, p)
                owner: SharedBasisLinear = getattr(model.layers[first].self_attn, f"{p}_proj")
                getattr(model.layers[at].self_attn, f"{p}_proj").connect(owner)
    own, kept, source_of = plan.own_units(layout), plan.kept_units(layout), plan.sources()
    projections: dict[tuple[int, str], SharedLinear] = {
        (layer, p): getattr(model.layers[layer].self_attn, f"{p}_proj")
        for layer, units in enumerate(own)
        for p in units
        if plan.basis is None or p not in FACTORED
    }
    for (layer, p), shared in projections.items():
        pieces: list[Piece] = []
        for at, unit in enumerate(kept[layer]):
            owner_layer, stored = source_of.get((layer, unit, p), (layer, unit))
            width = layout.width(p)
            piece = Piece(
                owner=projections[owner_layer, p],
                start=at * width,
                stop=(at + 1) * width,
                first=own[owner_layer][p].index(stored) * width,
                tied=(layer, unit, p) in source_of,
            )
            if pieces and pieces[-1].goes_on_with(piece):
                piece = pieces.pop()._replace(stop=piece.stop)
            pieces.append(piece)
        shared.connect(tuple(pieces))


def set_parameter(model: nn.Module, name: str, value: nn.Parameter, expected: torch.Tensor) -> None:
    """Replace a parameter. Raises ValueError when its shape is not the expected one."""
    if value.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)} instead of {tuple(expected.shape)}")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


__all__ = ["SharedLlamaForCausalLM"]
