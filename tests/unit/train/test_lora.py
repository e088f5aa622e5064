"""LoRA instead of full training: the penalty on effective weights, what is merged, what is refused.

The references compute with explicit weights W + s B A, and know neither PEFT nor the engine.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from tests.unit.train import tiny
from train import estimate
from train.distances import DISTANCES
from train.engine import start
from train.known_models import find_shape
from train.launched import check_launch
from train.lora import TRAINABLE, adapt, check_gpu, distances
from train.lora_penalty import LoraPenalty
from train.loop import TrainJob, prepare, train
from train.optimizer import learning_rate_factor
from train.pipeline import run
from train.recipe import Recipe, validate
from train.run_folder import Run

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "lora.md"
ALL = ("q", "k", "v", "o")
GROUPS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# A source with two targets, one of them in its own layer; a unit tied for some projections only.
PLAN = SharingPlan(
    (HeadTie((1, 0), (0, 1), ALL), HeadTie((1, 1), (0, 1), ("q", "o")), HeadTie((0, 0), (0, 1), ALL))
)


def recipe(folder: Path, lora: dict[str, Any], **train: Any) -> Recipe:
    made = tiny.recipe(folder, **train).model_dump(mode="json")
    return validate(made | {"lora": lora})


def adapted(made: Recipe, seed: int | None = 3, **config: Any) -> LlamaForCausalLM:
    """With B away from zero, unless `seed` is None."""
    model = adapt(tiny.model(**config), made)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(0, 0.1, generator=generator)
    return model


def job(made: Recipe, model: LlamaForCausalLM, plan: SharingPlan | None = tiny.PLAN) -> TrainJob:
    return tiny.job(made, plan, model=model, trainable=TRAINABLE)


def effective_weights(
    weights: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], scaling: float
) -> dict[str, torch.Tensor]:
    """By the model's own names, differentiable in the factors."""
    found = dict(weights)
    for name, a in factors.items():
        if ".lora_A." in name:
            b = factors[name.replace(".lora_A.", ".lora_B.")]
            plain = name.replace(".lora_A.default", "")
            found[plain] = weights[plain] + scaling * (b @ a)
    return found


def unit_of(weights: dict[str, torch.Tensor], layout: HeadLayout, p: str, place: Any) -> Any:
    layer, unit = place
    rows = layout.width(p)
    weight = weights[f"model.layers.{layer}.self_attn.{p}_proj.weight"]
    at = slice(unit * rows, (unit + 1) * rows)
    return (weight[:, at].t() if p == "o" else weight[at]).flatten()


def penalty_of(
    weights: dict[str, torch.Tensor], layout: HeadLayout, plan: SharingPlan, kind: str
) -> torch.Tensor:
    value = sum(
        DISTANCES[kind](
            unit_of(weights, layout, p, tie.target)[None],
            unit_of(weights, layout, p, tie.source)[None],
        ).sum()
        for tie in plan.ties
        for p in tie.projections
    )
    return value / len({(tie.target, tie.source) for tie in plan.ties})


def split(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Frozen weights by their plain names, and factors that want a gradient."""
    weights, factors = {}, {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().clone()
        if ".lora_" in name:
            factors[name] = value.requires_grad_()
        else:
            weights[name.replace(".base_layer", "")] = value.float()
    return weights, factors


# --- the penalty ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l2", "mse", "js"])
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_the_gradient_is_autograds_through_effective_weights(
    kind: str, base: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"precision": "bf16"} if base == "bf16" else {}
    made = recipe(tmp_path, {"rank": 3, "alpha": 5.0, "base": base}, **options)
    model = adapted(made, **GROUPS)
    weights, factors = split(model)
    layout = HeadLayout.from_config(model.config)
    engine = start(made)
    prepare(engine, job(made, model), made)
    penalty = LoraPenalty(model, PLAN, layout, kind, chunk_elements=1500)  # more than one chunk
    found = penalty.apply(engine, 0.7)
    expected = penalty_of(effective_weights(weights, factors, 5 / 3), layout, PLAN, kind)
    assert found.value == pytest.approx(float(expected), rel=1e-5)
    (0.7 * expected).backward()
    moved = 0
    for name, shard in engine.shards().items():
        gradient = factors[name].grad
        ours = shard.read_gradient().view(shard.shape)
        if gradient is None:
            assert not ours.any(), name
            continue
        moved += 1
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-7)
    assert moved == 2 * 4 * 2  # A and B of q, k, v, o in both layers
    engine.close()


def test_a_projection_without_an_adapter_is_not_pulled_silently(tmp_path: Path) -> None:
    made = recipe(tmp_path, {"rank": 2, "targets": ["q", "k", "v"]})
    model = adapted(made, **GROUPS)
    with pytest.raises(PostshareError, match=r"o_proj\.weight has no adapter.*lora\.targets"):
        LoraPenalty(model, PLAN, HeadLayout.from_config(model.config))


# --- a training -----------------------------------------------------------------------------------


def reference(made: Recipe, alpha: float, rank: int, steps: int) -> dict[str, torch.Tensor]:
    """The final weights of the same training, by autograd on explicit weights."""
    model = tiny.model()
    weights, factors = split(adapted(made, seed=None))
    factors = {name: value.detach().requires_grad_() for name, value in factors.items()}
    section, scaling = made.train, alpha / rank
    optimizer = torch.optim.AdamW(
        list(factors.values()), betas=section.betas, eps=section.eps,
        weight_decay=section.weight_decay,
    )  # fmt: skip
    blocks, layout = tiny.blocks(), HeadLayout.from_config(model.config)
    from train.data import PositionSampler

    sampler = PositionSampler(
        len(blocks), batch_size=section.batch_size, micro_batch_size=section.batch_size,
        seed=made.seed, rank=0, world=1, position=0, steps=steps,
    )  # fmt: skip
    for step, rows in enumerate(sampler):
        ids = torch.stack([blocks[row]["input_ids"] for row in rows])
        computed = effective_weights(weights, factors, scaling)
        logits = functional_call(model, computed, args=(), kwargs={"input_ids": ids}).logits
        lm = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (0.5 * lm + 0.5 * penalty_of(computed, layout, tiny.PLAN, "l2")).backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), section.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = section.learning_rate * learning_rate_factor(step, steps, section)
        optimizer.step()
        optimizer.zero_grad()
    return effective_weights(weights, factors, scaling)


def test_the_weights_that_are_left_are_those_of_explicit_low_rank_training(tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 12.0, "targets": ["q", "k", "v", "down"]}
    made = recipe(tmp_path / "run", lora, eps=1e-5)
    result = train(job(made, adapted(made, seed=None)), made)
    found = load_file(result.weights / "model.safetensors")
    start_weights = dict(tiny.model().named_parameters())
    with torch.no_grad():
        expected = reference_without_grad(made)
    assert found.keys() == start_weights.keys()
    for name, value in found.items():
        adapts = re.search(r"\.(q|k|v|down)_proj\.", name) is not None
        assert torch.equal(value, start_weights[name]) != adapts, name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6)
    rows = tiny.curve(made.folder)
    assert rows[-1]["pair_distance_mean"] < 0.95 * rows[0]["pair_distance_mean"]


def reference_without_grad(made: Recipe) -> dict[str, torch.Tensor]:
    with torch.enable_grad():
        found = reference(made, 12.0, 4, 6)
    return {name: value.detach() for name, value in found.items()}
