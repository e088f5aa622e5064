"""LoRA instead of full training: the penalty on effective weights, what is merged, what is refused.

The references compute with explicit weights W + s B A, and know neither PEFT nor the engine.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
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
from tests.support import REPOSITORY, tiny
from tests.support.interruption import KilledError, at_step
from train.data.blocks import PositionSampler
from train.distributed.engines.start import start
from train.distributed.launch_env import check_launch
from train.estimate import parameters
from train.estimate.gpu_memory import memory_per_gpu
from train.estimate.llama_shapes import LlamaShape
from train.models.base_model import base_folder
from train.models.lora import TRAINABLE, adapt, check_gpu, merged
from train.penalty.distances import distance
from train.penalty.lora import LoraPenalty
from train.recipe.recipe import Recipe, validate
from train.stages.materialize import distances
from train.stages.pipeline import run
from train.stages.run import Run
from train.training.job import TrainJob
from train.training.loop import prepare, train
from train.training.optimizer import learning_rate_factor, select_trainable

pytestmark = pytest.mark.usefixtures("sketched")

torch.set_num_threads(1)
ALL = ("q", "k", "v", "o")
GROUPS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# A source with two targets, one of them in its own layer; a unit tied for some projections only.
PLAN = SharingPlan(
    (
        HeadTie((1, 0), (0, 1), ALL),
        HeadTie((1, 1), (0, 1), ("q", "o")),
        HeadTie((0, 0), (0, 1), ALL),
    )
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
        distance(kind)
        .between(
            unit_of(weights, layout, p, tie.target)[None],
            unit_of(weights, layout, p, tie.source)[None],
        )
        .sum()
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
    assert found.value == pytest.approx(float(expected.detach()), rel=1e-5)
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
    began, expected = dict(tiny.model().named_parameters()), reference(made, 12.0, 4, 6)
    assert found.keys() == began.keys()
    for name, value in found.items():
        adapts = re.search(r"\.(q|k|v|down)_proj\.", name) is not None
        assert torch.equal(value, began[name]) != adapts, name
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-4, atol=2e-6)
    rows = tiny.curve(made.folder)
    assert rows[-1]["pair_distance_mean"] < 0.95 * rows[0]["pair_distance_mean"]


def test_a_killed_training_resumes_exactly(tmp_path: Path) -> None:
    lora = {"rank": 2, "dropout": 0.3}
    whole, killed = (recipe(tmp_path / n, lora, checkpoint_every=2) for n in ("whole", "killed"))
    train(job(whole, adapted(whole, seed=None)), whole)

    with at_step(6), pytest.raises(KilledError):
        train(job(killed, adapted(killed, seed=None)), killed)
    torch.rand(3)  # the adapters' beginnings must not depend on what was drawn before
    other = adapted(killed, seed=1)  # B anywhere: all that counts is in the checkpoint
    train(job(killed, other), killed)
    tiny.assert_same_run(whole.folder, killed.folder)
    (part,) = (whole.folder / "checkpoints/step-000004").glob("part-*.safetensors")
    with safe_open(part, framework="pt") as file:
        names = {name for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118
    factors = {n for n, p in other.named_parameters() if p.requires_grad}
    assert names == factors
    assert len(factors) == 2 * 4 * 2


def test_another_adapter_is_another_run(tmp_path: Path) -> None:
    made = recipe(tmp_path, {"rank": 2}, steps=2)
    train(job(made, adapted(made, seed=None)), made)
    other = recipe(tmp_path, {"rank": 2, "alpha": 5.0}, steps=2)
    with pytest.raises(PostshareError, match=r"lora\.alpha"):
        train(job(other, adapted(other, seed=None)), other)


def test_frozen_weights_in_bf16_are_rounded_once(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", {"rank": 2, "base": "bf16"}, steps=2, precision="bf16")
    model = adapted(made, seed=None)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    result = train(job(made, model), made)
    found, began = load_file(result.weights / "model.safetensors"), tiny.model()
    weights = {n: p.detach().bfloat16().float() for n, p in began.named_parameters()}
    expected = effective_weights(weights, split(model)[1], 2.0)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-6, atol=1e-7)
    moved = [n for n, w in weights.items() if not torch.equal(found[n], w)]
    assert sorted({n.split(".")[4] for n in moved}) == ["k_proj", "o_proj", "q_proj", "v_proj"]


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_shares_the_merged_weights_and_says_how_far_apart_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    modules = sorted((REPOSITORY / "sa_models").glob("*.py"))[:6]
    text.write_text("".join(module.read_text() for module in modules))
    made = validate(
        {
            "name": "small",
            "output_dir": str(tmp_path / "run"),
            "model": {"path": "demo-base"},
            "data": {"train": str(text), "validation": str(text), "sequence_length": 64},
            "plan": {"strategy": "random", "budget": {"ratio": 0.3}},
            "heads": {"kv_heads": 4},
            "lora": {"rank": 16, "targets": ["q", "k", "v", "up"]},
            "train": {"steps": 3, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2},
            "distill": {"attention_weight": 0.1},
            "export": {"dtype": "float32"},
            "evaluate": {"blocks": 2},
        }
    )
    run(made)
    current = Run(made, start(made))
    trained, continued = (load_file(made.folder / f / "weights/model.safetensors") for f in
                          (".", "continued"))  # fmt: skip
    dense = load_file(made.folder / "export/dense/model.safetensors")
    tie = current.plan.ties[0]
    layout = current.plan.layout(current.config)
    for p in ("q", "k", "v", "o"):
        to, of = (unit_of(dense, layout, p, at) for at in (tie.target, tie.source))
        source = unit_of(trained, layout, p, tie.source)
        assert torch.equal(of, source)
        assert torch.equal(to, of) == (p in tie.projections)
    apart = []
    for tie in current.plan.ties:
        for p in tie.projections:
            to, of = (unit_of(trained, layout, p, at) for at in (tie.target, tie.source))
            apart.append(float((to - of).norm() / of.norm()))
    assert distances(current, made.folder / "weights") == pytest.approx(apart, rel=1e-5)
    said = " ".join(capsys.readouterr().out.split())
    assert f"merged: tied units are {sum(apart) / len(apart):.1%} of their norm apart" in said
    # The control trains the same adapters, on the model with all its KV heads.
    assert continued["model.layers.0.self_attn.k_proj.weight"].shape == (128, 128)
    base = load_file(base_folder(made.model) / "model.safetensors")
    for name, value in base.items():
        adapts = re.search(r"\.(q|k|v|up)_proj\.", name) is not None
        assert torch.equal(continued[name], value.float()) != adapts, name


# --- what it needs --------------------------------------------------------------------------------


def test_the_estimate_counts_what_trains(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", {"rank": 3, "targets": ["q", "k", "v", "down"]}, steps=2,
                  checkpoint_every=1)  # fmt: skip
    model = adapted(made, seed=None, **GROUPS)
    shape = LlamaShape.from_dict(model.config.to_dict(), "this test")
    trained = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    section = made.lora
    assert parameters.trainable_parameters(shape, ("*",), lora=section) == trained
    train(job(made, model, None), made)
    (part,) = made.folder.glob("checkpoints/*/part-*.safetensors")
    expected = parameters.checkpoint_bytes(shape, made.train, section)
    assert expected < part.stat().st_size < expected + 12_000  # the names are the rest
    held = {
        base: memory_per_gpu(
            shape, made.train.model_copy(update={"precision": precision}), stage=0, gpus=1,
            sequence_length=16, checkpointing=False,
            lora=section.model_copy(update={"base": base}),
        )
        for base, precision in (("fp32", "fp32"), ("bf16", "bf16"), ("nf4", "bf16"))
    }  # fmt: skip
    sizes = {name: p.numel() for name, p in tiny.model(**GROUPS).named_parameters()}
    whole, small = sum(sizes.values()), sum(n for name, n in sizes.items() if "_proj" in name)
    assert held["fp32"].weights == 4 * (whole + trained)
    assert held["bf16"].weights == 2 * whole + 6 * trained
    nf4 = 2 * (whole - small) + small * (4 + 8 / 64) / 8 + 6 * trained
    assert held["nf4"].weights == round(nf4)
    assert held["fp32"].optimizer == 8 * trained
    assert held["fp32"].gradients == 4 * trained


# --- in 4 bits ------------------------------------------------------------------------------------


class Stored(torch.nn.Parameter):
    """A stand-in for bitsandbytes' parameter: int8 halves of the weight, and how to read them."""

    quant_state: float


def test_with_a_stand_in_for_four_bits_the_penalty_reads_what_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = ModuleType("bitsandbytes.functional")
    library.dequantize_4bit = lambda data, state: (data.float() * state).bfloat16()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", library)
    made = recipe(tmp_path, {"rank": 2, "base": "nf4"}, precision="bf16")
    monkeypatch.setattr("train.models.nf4.quantize_", lambda model: None)
    model = adapted(made)
    names = [n for n, _ in model.named_parameters() if ".base_layer." in n]
    held = {}
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        scale = float(module.weight.abs().max()) / 100
        data = (module.weight.float() / scale).round().to(torch.int8)
        held[name] = (data.float() * scale).bfloat16().float()
        module.weight = Stored(data, requires_grad=False)
        module.weight.quant_state = scale
    layout = HeadLayout.from_config(model.config)
    weights, factors = split(model)
    weights |= {n.replace(".base_layer", ""): value for n, value in held.items()}
    engine = start(made)
    select_trainable(model, TRAINABLE)
    engine.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    found = LoraPenalty(model, tiny.PLAN, layout).apply(engine, 1.0)
    expected = penalty_of(effective_weights(weights, factors, 2.0), layout, tiny.PLAN, "l2")
    assert found.value == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()
    for name, shard in engine.shards().items():
        gradient = torch.zeros(shard.shape) if factors[name].grad is None else factors[name].grad
        torch.testing.assert_close(
            shard.read_gradient().view(shard.shape), gradient, rtol=1e-4, atol=1e-7
        )
    left = dict(merged(engine.full_weights(), made.lora))
    for name, value in effective_weights(weights, factors, 2.0).items():
        torch.testing.assert_close(left[name], value.detach(), rtol=1e-6, atol=1e-7)
    engine.close()


def test_four_bits_are_refused_without_a_gpu_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    made = recipe(tmp_path / "run", {"rank": 2, "base": "nf4"}, precision="bf16")
    without = r"nf4 needs a CUDA GPU; set lora\.base=bf16"
    with monkeypatch.context() as idle:  # a GPU that the launch leaves idle
        idle.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(PostshareError, match=without):
            check_gpu(made, on_gpu=False)
        check_gpu(made, on_gpu=True)
    with pytest.raises(PostshareError, match=without):
        run(made)  # its model is no folder: that would be the error of loading it
    assert not made.folder.exists()


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": 0}}, "train.steps is 0, nothing trains; remove lora"),
        ({"materialize": {"heal_steps": 2}}, "an adapter changes one layer; set materialize"),
        ({"train": {"trainable": ["*.mlp.*"]}}, "with lora none train; set lora.targets"),
        ({"lora": {"base": "bf16"}}, "lora.base bf16 .* set train.precision=bf16"),
        ({"penalty": {"mode": "decoupled"}}, "no adapter of a rank can follow"),
        ({"lora": {"targets": ["q", "v"]}}, "the penalty pulls k, which lora.targets leaves"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"targets": ["q", "x"]}}, "lora.targets"),
    ],
)
def test_what_a_recipe_may_not_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    value = recipe(tmp_path, {"rank": 2}).model_dump(mode="json", exclude_defaults=True)
    for section, fields in changes.items():
        value[section] = {**value.get(section, {}), **fields}
    with pytest.raises(PostshareError, match=message):
        validate(value)


def test_a_rank_that_no_matrix_has(tmp_path: Path) -> None:
    with pytest.raises(PostshareError, match=r"lora\.rank is 40.*set lora\.rank to 32 or less"):
        adapted(recipe(tmp_path, {"rank": 40}))


@pytest.mark.parametrize("launch", ["ZeRO-2", "FSDP2"])
def test_launches_that_split_adapters_are_refused(
    launch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, {"rank": 2})
    check_launch(made, None)
    if launch == "FSDP2":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(PostshareError, match=rf"asks for {launch}; launch with .*ddp\.yaml"):
        check_launch(made, 2 if launch == "ZeRO-2" else None)
