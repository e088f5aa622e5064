"""The frozen teacher: found, compared with the student, placed, asked.

On one process, under DDP and ZeRO-0, 1 and 2 it is whole on every rank's device. Under ZeRO-3 and
FSDP2 it is whole on none: torch's own `fully_shard` spreads it over the ranks, also beside
DeepSpeed, and every forward gathers one layer at a time. It is no part of a checkpoint.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sa_models.calibration.logit_chunks import in_place_of
from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.weights.config_file import read_config
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.whole_model import load_whole
from train.models.base_model import base_folder
from train.models.sharded_source import base_source
from train.models.tokenizer import load_tokenizer
from train.recipe.sections.inputs import ModelSection
from train.training.distill_loss import Projection, TopK, likeliest

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

    from train.distributed.engines.base import Engine
    from train.recipe.recipe import Recipe
    from train.recipe.sections.distill import DistillSection

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """What the teacher says about a micro-batch.

    Attributes:
        distribution: of each position [batch, length]; whole, or the top k.
        hidden, attention: [batch, length, hidden size] of each layer; empty where not asked for.
    """

    distribution: Projection | TopK
    hidden: list[Tensor]
    attention: list[Tensor]


class Taps:
    """Keeps, within `with`, what a Llama's layers and attention blocks put out, in their order.

    The attention block's output is that of o. Outside of `with` nothing is kept: layers that are
    computed a second time for the backward pass put out nothing new.
    """

    def __init__(self, model: nn.Module, hidden: bool, attention: bool) -> None:
        self.hidden: list[Tensor] = []
        self.attention: list[Tensor] = []
        self._open = False
        for layer in model.model.layers:  # type: ignore[union-attr]
            if hidden:
                layer.register_forward_hook(partial(self._keep, self.hidden))
            if attention:
                layer.self_attn.register_forward_hook(partial(self._keep, self.attention))

    def _keep(self, kept: list[Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
        if self._open:
            kept.append(output[0] if isinstance(output, tuple) else output)

    def __enter__(self) -> Taps:
        self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._open = False

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """(hidden, attention) of the forward before; they are not kept any longer."""
        taken = self.hidden[:], self.attention[:]
        self.hidden.clear()
        self.attention.clear()
        return taken


class Teacher:
    """The teacher beside the student, asked for every micro-batch."""

    def __init__(self, recipe: Recipe, engine: Engine) -> None:
        assert recipe.distill is not None
        self.section = recipe.distill
        self.model = place(recipe, engine)
        self._sharded = engine.streams
        self._taps = Taps(
            self.model, self.section.hidden_weight > 0, self.section.attention_weight > 0
        )

    @contextmanager
    def __call__(self, batch: Batch) -> Iterator[Lesson]:
        """A collective where the teacher is sharded; within, what it says can be read.

        Args:
            batch: on the device; without labels.
        """
        lm_head: Any = self.model.lm_head
        with torch.no_grad(), self._taps, in_place_of(lm_head, lambda hidden: hidden):
            hidden: Any = self.model(**batch, use_cache=False).logits
        whole = Projection(hidden, lm_head.weight)
        answer: Projection | TopK = whole
        if self.section.top_k is not None:
            answer = likeliest(whole, self.section.top_k, self.section.temperature)
        yield Lesson(answer, *self._taps.take())
        if self._sharded:
            self.model.reshard()  # type: ignore[operator]  # of torch's FSDPModule


def teacher_model(recipe: Recipe) -> ModelSection:
    """The teacher as a `model` section: the base itself, or another Llama."""
    assert recipe.distill is not None
    if recipe.distill.teacher is None:
        return recipe.model
    return ModelSection(path=recipe.distill.teacher, attention=recipe.model.attention)


def teacher_folder(recipe: Recipe) -> Path:
    """Its local folder.

    Raises:
        PostshareError: as `base_folder`.
    """
    assert recipe.distill is not None
    key = "model.path" if recipe.distill.teacher is None else "distill.teacher"
    return base_folder(teacher_model(recipe), key)


# --- checks ---------------------------------------------------------------------------------------


def check_teacher(
    recipe: Recipe,
    folder: Path,
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    engine: Engine,
) -> None:
    """Refuse a teacher that cannot teach this student.

    Args:
        folder: of the teacher.
        config, tokenizer: the student's; the tokenizer only for another teacher than the base.

    Raises:
        PostshareError: another vocabulary or tokenizer; layers that cannot be compared; a top_k
            that leaves nothing out; a precision that cannot be had here.
    """
    section = recipe.distill
    assert section is not None
    WeightsFolder(folder)
    theirs = read_config(folder)
    if theirs.vocab_size != config.vocab_size:
        raise PostshareError(
            f"distill.teacher: {folder} has a vocabulary of {theirs.vocab_size}, the student one "
            f"of {config.vocab_size}; choose a teacher with the student's tokenizer"
        )
    if tokenizer is not None:
        _compare_tokenizers(folder, tokenizer)
    if section.top_k is not None and section.top_k >= config.vocab_size:
        raise PostshareError(
            f"distill.top_k is {section.top_k}, and there are {config.vocab_size} tokens; lower "
            "it, or set distill.top_k=null"
        )
    if section.features:
        for name in ("num_hidden_layers", "hidden_size"):
            own, other = getattr(config, name), getattr(theirs, name)
            if own != other:
                raise PostshareError(
                    f"distill.teacher: {folder} has {name} {other}, the student {own}, so their "
                    "layers cannot be compared; set hidden_weight=0 and attention_weight=0"
                )
    require_placeable(section, engine)


def _compare_tokenizers(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    theirs, ours = load_tokenizer(str(folder)).get_vocab(), tokenizer.get_vocab()
    if theirs == ours:
        return
    token, number = min(theirs.items() ^ ours.items(), key=lambda item: (item[1], item[0]))
    raise PostshareError(
        f"distill.teacher: the tokenizer of {folder} is another than the student's (token "
        f"{token!r} is number {number} in one of them only), so its numbers mean other text; "
        "choose a teacher with the student's tokenizer"
    )


def require_placeable(section: DistillSection, engine: Engine) -> None:
    """Raises PostshareError where the engine's device or sharding cannot hold this precision."""
    if section.precision != "int8":
        return
    if engine.streams:
        raise PostshareError(
            "distill.precision: an int8 teacher cannot be spread over the ranks, as ZeRO-3 and "
            "FSDP2 need it; set distill.precision=bf16"
        )
    if engine.device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        raise PostshareError(
            "distill.precision: int8 needs an NVIDIA GPU and bitsandbytes; install postshare[gpu] "
            "there, or set distill.precision=bf16"
        )


# --- placement ------------------------------------------------------------------------------------


def place(recipe: Recipe, engine: Engine) -> LlamaForCausalLM:
    """The teacher where the engine needs it: frozen, in its precision. A collective.

    Raises:
        PostshareError: as `teacher_folder` and `require_placeable`.
    """
    assert recipe.distill is not None
    require_placeable(recipe.distill, engine)
    model = _sharded(recipe, engine) if engine.streams else _whole(recipe, engine)
    return model.eval().requires_grad_(False)


def _whole(recipe: Recipe, engine: Engine) -> LlamaForCausalLM:
    assert recipe.distill is not None
    precision = recipe.distill.precision
    weights, attention = WeightsFolder(teacher_folder(recipe)), recipe.model.attention
    if precision != "int8":
        model = load_whole(weights, attention, DTYPES[precision])
        return model.to(engine.device)  # type: ignore[arg-type]  # transformers' decorator hides it
    from transformers import BitsAndBytesConfig

    return LlamaForCausalLM.from_pretrained(
        None,
        config=weights.config,
        state_dict={name: tensor.bfloat16() for name, tensor in weights.items()},
        dtype=torch.bfloat16,
        attn_implementation=attention,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": engine.device},
    )


def _sharded(recipe: Recipe, engine: Engine) -> LlamaForCausalLM:
    from torch.distributed.fsdp import fully_shard

    from train.distributed.engines.fsdp2 import device_mesh, load_sharded

    assert recipe.distill is not None
    source = base_source(teacher_model(recipe), SharingPlan())
    assert source is not None
    model = source.skeleton(engine.device)
    mesh = device_mesh(engine.device, engine.world)

    def shard(module: nn.Module) -> None:
        # The root alone stays gathered: lm_head is read until the student's loss is computed.
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)

    load_sharded(model, source, engine.device, shard, DTYPES[recipe.distill.precision])
    return model
