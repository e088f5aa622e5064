from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.basis import SharedBasis
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from sa_models.savings import llama_parameters
from sa_models.search.budget import units_of_ratio
from sa_models.spans import AttentionSpan
from sa_models.weights.structure import convert
from train.common.sizes import count
from train.estimate import llama_shapes
from train.estimate import parameters as estimate
from train.estimate.dry_run import print_dry_run
from train.estimate.gpu_memory import (
    Memory,
    layer_activations,
    logits_memory,
    memory_per_gpu,
    whole_models,
)
from train.estimate.llama_shapes import KNOWN, LlamaShape, find_shape
from train.planning.problem import PlanProblem
from train.recipe.recipe import PlanSection, Recipe, TrainSection, load_recipe, validate
from train.recipe.sections.training import Checkpointing

PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
}
TINY = LlamaShape(97, 64, 176, 3, 4, 2, 16, 128)


def train_section(**values: object) -> TrainSection:
    base = {"steps": 1, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3}
    return TrainSection.model_validate(base | values)


def recipe_for(path: str, **sections: dict[str, object]) -> Recipe:
    return validate(
        {
            "name": "x",
            "model": {"path": path} | sections.get("model", {}),
            "data": {"train": "stdlib", "validation_fraction": 0.1, "sequence_length": 4096},
            "plan": {"budget": {"ratio": 0.3}} | sections.get("plan", {}),
            "train": train_section(batch_size=128, micro_batch_size=8).model_dump(mode="json")
            | sections.get("train", {}),
        }
    )


def config_of(shape: LlamaShape) -> LlamaConfig:
    fields = {k: v for k, v in vars(shape).items() if v is not None and k != "dtype"}
    return LlamaConfig(**fields)


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_known_models_have_their_published_size(name: str, parameters: int) -> None:
    assert llama_parameters(KNOWN[name]) == parameters


@pytest.mark.parametrize("name", sorted(set(KNOWN) & set(PUBLISHED)))
def test_counts_are_those_of_the_model_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(KNOWN[name]))
    assert sum(p.numel() for p in model.parameters()) == llama_parameters(KNOWN[name])
    attention = sum(p.numel() for n, p in model.named_parameters() if ".self_attn." in n)
    assert estimate.trainable_parameters(KNOWN[name], ("*.self_attn.*",)) == attention


@pytest.mark.parametrize("name", ["mixed7M", "stories260K", "stories260K-mha"])
def test_a_config_is_read_as_transformers_reads_it(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    shape, origin = find_shape(recipe_for(str(folder)).model)
    assert origin == str(folder / "config.json")
    config = LlamaConfig.from_pretrained(folder)
    for field in vars(shape).keys() - {"dtype"}:
        assert getattr(shape, field) == getattr(config, field), field
    assert f"torch.{shape.dtype}" == str(config.dtype)


def test_absent_fields_have_the_defaults_of_llama_config() -> None:
    shape, config = LlamaShape.from_dict({"model_type": "llama"}, "x"), LlamaConfig()
    assert HeadLayout.from_config(shape) == HeadLayout.from_config(config)
    assert llama_parameters(shape) == llama_parameters(config)


def test_the_table_is_the_last_resort_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_shapes, "_cached", lambda model: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shape, origin = find_shape(recipe_for("meta-llama/Llama-3.2-1B").model)
    assert shape.tie_word_embeddings
    assert origin == "built-in table of Llama shapes (HF_HUB_OFFLINE is set)"
    with pytest.raises(PostshareError, match="hf auth login"):
        find_shape(recipe_for("someone/unknown-llama").model)


def test_the_cache_comes_before_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 7}))
    monkeypatch.setattr(llama_shapes, "_cached", lambda model: str(file))
    shape, origin = find_shape(recipe_for("meta-llama/Llama-2-7b-hf").model)
    assert (shape.num_hidden_layers, origin) == (7, "the hub's cache")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"model_type": "mistral"}', "only the Llama architecture"),
        ('{"model_type": "llama", "hidden_size": -1}', "hidden_size is -1"),
        ('{"model_type": "llama", "vocab_size": "big"}', "vocab_size is 'big'"),
        ('{"model_type": "llama", "dtype": "int3"}', "dtype is 'int3'"),
        ("{", "not valid JSON"),
        ("[]", "names no model_type"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PostshareError, match=part):
        find_shape(recipe_for(str(tmp_path)).model)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.29, 0.3, 0.57, 0.9])
@pytest.mark.parametrize("layers", [10, 25, 32])
@pytest.mark.parametrize("units", [1, 8, 10, 32])
def test_units_asked_for_are_those_that_selection_ties(
    ratio: float, layers: int, units: int
) -> None:
    layout = HeadLayout(layers, 4 * units, 4 * units, units, 1)
    expected = units_of_ratio(ratio, layout)
    section = PlanSection.model_validate({"budget": {"ratio": ratio}})
    shape = LlamaShape(
        num_hidden_layers=layers,
        hidden_size=4 * units,
        num_attention_heads=4 * units,
        num_key_value_heads=units,
        head_dim=1,
    )
    assert HeadLayout.from_config(shape) == layout
    if expected:
        assert estimate.requested_units(PlanProblem(section, shape)) == expected
    else:
        with pytest.raises(PostshareError, match="asks for 0 of"):
            estimate.requested_units(PlanProblem(section, shape))


@pytest.mark.parametrize(
    ("plan", "part"),
    [
        ({"budget": {"ratio": 0.99}}, "possible are 1 to 4"),
        ({"budget": {"heads": 10}}, "asks for 5 of 6 units"),
        (
            {"budget": {"heads": 3}},
            "splits a KV group of 2 heads, which are tied",
        ),
        ({"budget": {"ratio": 0.5}, "skip_layers": [0, 2]}, "possible are 1 to 2"),
        ({"budget": {"ratio": 0.2}, "skip_layers": [3]}, "names layer 3"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(plan: dict[str, object], part: str) -> None:
    with pytest.raises(PostshareError, match=part):
        estimate.plan_savings(PlanProblem(PlanSection.model_validate(plan), TINY))


def test_savings_before_the_plan_are_those_of_the_plan(tmp_path: Path) -> None:
    ties = tuple(HeadTie((layer, 0), (0, 1), ("q", "v")) for layer in (1, 2))
    plan = SharingPlan(ties)
    plan.save(tmp_path / "plan.json")
    from_file = {"strategy": "file", "path": str(tmp_path / "plan.json")}
    by_budget = {"share": ["q", "v"], "budget": {"heads": 4}}
    for section in (from_file, by_budget):
        problem = PlanProblem(PlanSection.model_validate(section), TINY)
        assert estimate.plan_savings(problem) == plan.savings(TINY)
    none = estimate.plan_savings(PlanProblem(PlanSection(strategy="none"), TINY))
    assert (none.tied_units, none.stored_parameters) == (0, llama_parameters(TINY))


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize(
    "spans",
    [
        None,
        [{"leader": 0, "followers": [1, 2]}, {"leader": 3, "followers": [5], "share": "kv"}],
        {"strategy": "loss", "layers": 3, "share": "kv"},
        {"strategy": "late", "layers": 4, "max_followers": 2},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_with_spans_and_kv_heads_are_those_of_the_converted_model(
    kv_heads: int | None, spans: Any, tied: bool
) -> None:
    shape = LlamaShape(97, 64, 176, 8, 8, 4, 8, 128, tied)
    structured = {"spans": spans, "heads": {"kv_heads": kv_heads}}
    if kv_heads is None and spans is None:
        return
    recipe = recipe_for("x").model_dump(mode="json") | structured | {"plan": {"strategy": "none"}}
    structure = estimate.expected_structure(validate(recipe), shape)
    with torch.device("meta"):
        dense = LlamaForCausalLM(config_of(shape))
    model = convert(dense, structure)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    savings = estimate.plan_savings(PlanProblem(PlanSection(strategy="none"), shape, structure))
    assert savings.base_parameters == sum(p.numel() for p in dense.parameters())
    assert savings.stored_parameters == sum(sizes.values())
    assert estimate.trainable_parameters(shape, ("*",), structure) == sum(sizes.values())
    attention = sum(size for name, size in sizes.items() if ".self_attn." in name)
    trained = estimate.trainable_parameters(shape, ("*.self_attn.*",), structure)
    assert trained == attention
    everything = sum(p.numel() for n, p in dense.named_parameters() if ".self_attn." in n)
    assert savings.stored_ratio == pytest.approx(1 - attention / everything, rel=1e-12)
    # The cache, from the projections that a layer has: keys 8 wide, values 8 wide, for each head.
    kept = sum(size // 64 for name, size in sizes.items() if "k_proj" in name or "v_proj" in name)
    assert (savings.base_cache, savings.stored_cache) == (8 * 2 * 4 * 8, kept)


def test_a_dry_run_prints_spans_and_kv_heads(tmp_path: Path) -> None:
    def facts(**sections: Any) -> list[str]:
        value = recipe_for("x", model={"config": {}}, train={"steps": 0}).model_dump(mode="json")
        if "plan" not in sections:
            value["plan"] = {"strategy": "none"}
        out = Console(file=io.StringIO(), width=160)
        print_dry_run(validate(value | sections), console=out)
        text = out.file.getvalue()  # type: ignore[attr-defined]
        return [line.strip() for line in text[text.index("\nparameters ") :].splitlines()]

    # LlamaConfig's defaults are Llama-2-7B: 32 layers, 32 heads of 128, 4,096 wide.
    spans = [
        {"leader": 22, "followers": [23, 24, 25, 26]},
        {"leader": 28, "followers": [30], "share": "kv"},
    ]
    lines = facts(spans=spans)
    assert not any(line.startswith("layers") for line in lines)
    assert "span        22 -> 23-26: attention weights" in lines
    assert "span        28 -> 30: keys and values" in lines
    removed = 4 * 2 * 4096**2 + 2 * 4096**2
    saved = f"{removed:,} parameters: {removed / (32 * 4 * 4096**2):.1%} of attention, 2.5%"
    assert f"saved       {saved} of the model" in lines
    (export,) = (line for line in lines if line.startswith("export"))
    assert "no dense form" in export
    (cache,) = (line for line in lines if line.startswith("cache bytes per token"))
    # 4 layers of keys and 1 of both, of 64; 4 bytes an element, as the config says.
    kept = 4096 * 4 * (64 - 4 - 2)
    assert cache.split(maxsplit=4)[4] == f"{kept:,}, 9.4% less than stock"
    lines = facts(heads={"kv_heads": 8})
    assert "KV heads    8 of 32 in a layer, mean-pooled" in lines
    assert any(line.startswith("export      dense ") for line in lines)
    assert any("75.0% less" in line for line in lines if line.startswith("cache bytes"))
    lines = facts(spans={"strategy": "isotropy", "layers": 8, "share": "attention"})
    assert "spans       8 layers reuse the attention weights of a layer below, by isotropy" in lines
    assert any("12.5% less" in line for line in lines if line.startswith("cache bytes"))
    # Ties besides: followers are no targets, and the count is of the pooled model's units.
    lines = facts(spans=spans, heads={"kv_heads": 8}, plan={"budget": {"ratio": 0.3}})
    assert "plan        76 of 256 units (KV groups) tied, 29.7%" in lines
    assert "projections q, k, v" in lines
    # A plan file.
    plan = SharingPlan(spans=(AttentionSpan(1, (2,)),), kv_heads=16)
    plan.save(tmp_path / "plan.json")
    lines = facts(plan={"strategy": "file", "path": str(tmp_path / "plan.json")})
    assert "span        1 -> 2: attention weights" in lines
    assert "KV heads    16 of 32 in a layer, mean-pooled" in lines


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"heads": {"kv_heads": 5}}, "kv_heads 5 does not divide the model's 32 KV heads"),
        ({"heads": {"kv_heads": 32}}, "as many as the model has"),
        ({"spans": [{"leader": 1, "followers": [32]}]}, "layer 32 is out of range"),
        ({"spans": {"strategy": "late", "layers": 31, "max_followers": 31}}, "1 to 30 are possi"),
        ({"spans": {"strategy": "loss", "layers": 31}}, "1 to 25 are possible"),
        (
            {"spans": {"strategy": "loss", "layers": 1}, "export": {"formats": ["dense"]}},
            r"export\.formats=\[compact\]",
        ),
        (
            {"spans": {"strategy": "late", "layers": 24}, "plan": {"budget": {"ratio": 0.5}}},
            "asks for 512 of 1024 units",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_will_refuse(sections: dict[str, Any], part: str) -> None:
    value = recipe_for("x", model={"config": {}}).model_dump(mode="json")
    recipe = validate(value | {"plan": {"strategy": "none"}} | sections)
    with pytest.raises(PostshareError, match=part):
        print_dry_run(recipe, console=Console(quiet=True))


def test_compiled_layers_are_told() -> None:
    value = recipe_for("x", model={"config": {}}).model_dump(mode="json")
    value["train"]["compile"] = True
    out = Console(file=io.StringIO(), width=160)
    print_dry_run(validate(value), console=out)
    assert "layers      compiled before the first step; " in out.file.getvalue()  # type: ignore[attr-defined]


def test_whole_models_are_two_where_one_is_reconstructed(tmp_path: Path) -> None:
    recipe = recipe_for("x", model={"config": {}})
    whole = whole_models(recipe, KNOWN["meta-llama/Llama-2-7b-hf"])
    assert (whole.count, whole.stage, whole.bytes) == (1, "evaluate", 4 * 6_738_415_616)
    value = recipe.model_dump(mode="json") | {"materialize": {"reconstruct": True}}
    out = Console(file=io.StringIO(), width=160)
    print_dry_run(validate(value), console=out)
    assert (
        "held whole  53.9 GB: 2 fp32 models on the main process's device to materialize\n"
        in out.file.getvalue()  # type: ignore[attr-defined]
    )


def test_a_plan_file_with_a_basis_is_estimated_as_strategy_basis_is(tmp_path: Path) -> None:
    """Both write `merged/`, and hold the factors beside the model that they are of."""
    shape = KNOWN["meta-llama/Llama-2-7b-hf"]
    plans = {
        "basis": SharingPlan(basis=SharedBasis(2, *((1024,) * 16 for _ in "qkv"))),
        "ties": SharingPlan((HeadTie((1, 0), (0, 0), ("q",)),)),
    }
    found = {}
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.json")
        section = {"strategy": "file", "path": str(tmp_path / f"{name}.json"), "budget": None}
        of = recipe_for("x", plan=section, train={"steps": 0})
        found[name] = (estimate.disk_space(of, shape).weights, whole_models(of, shape).count)
    assert found == {"basis": (4 * 6_738_415_616, 2), "ties": (0, 1)}


def test_a_dry_run_warns_about_what_a_plan_file_shares_and_is_not_pulled(tmp_path: Path) -> None:
    SharingPlan((HeadTie((1, 0), (0, 0), ("q", "o")),)).save(tmp_path / "plan.json")
    section = {"strategy": "file", "path": str(tmp_path / "plan.json"), "budget": None}
    value = recipe_for("x", model={"config": {}}, plan=section).model_dump(mode="json")
    out = Console(file=io.StringIO(), width=300)
    print_dry_run(validate(value | {"penalty": {"projections": ["q", "k"]}}), console=out)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    first, second = (line for line in lines if "pulled" in line)
    assert first.startswith("warning: o will be shared without having been pulled")
    assert second.startswith("warning: k will be pulled and not shared")


def saved_bytes(
    shape: LlamaShape, dtype: torch.dtype, attention: str, autocast: bool = False
) -> int:
    """Bytes that autograd really keeps for the backward of one decoder layer, 2 x 128 tokens, but
    for autocast's copies of its weights."""
    config = config_of(shape)
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).to(dtype).model
    layer, hidden = model.layers[1], torch.randn(2, 128, shape.hidden_size, dtype=dtype)
    rotary = model.rotary_emb(hidden, torch.arange(128)[None])
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *rotary)}
    kept: dict[int, int] = {}
    held = []  # alive to the end, so that no address is used twice

    weights = {tuple(sorted(p.shape)) for p in layer.parameters() if p.dim() == 2}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        is_copy = autocast and tuple(sorted(tensor.shape)) in weights
        if storage.data_ptr() not in known and not is_copy:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = None
    if attention == "eager":
        mask = torch.zeros(1, 1, 128, 128, dtype=dtype)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(hidden.requires_grad_(), position_embeddings=rotary, attention_mask=mask)
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_activations_are_what_autograd_keeps(
    attention: str, dtype: torch.dtype, kv_heads: int
) -> None:
    shape = LlamaShape(97, 128, 352, 2, 8, kv_heads, 16, 128)
    estimated = layer_activations(shape, 256, 128, dtype.itemsize, attention == "eager")
    if attention == "sdpa":
        estimated -= 256 * 128 * dtype.itemsize  # o's copy of its input, which a GPU alone keeps
    assert estimated == pytest.approx(saved_bytes(shape, dtype, attention), rel=0.01)


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_activations_under_autocast_are_what_autograd_keeps(kv_heads: int) -> None:
    shape = LlamaShape(97, 128, 352, 2, 8, kv_heads, 16, 128)
    estimated = layer_activations(shape, 256, 128, 2, eager=False, autocast=True)
    found = saved_bytes(shape, torch.float32, "sdpa", autocast=True)
    assert estimated - 256 * 128 * 2 == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(("checkpointing", "measured"), [(True, 34.216e9), (False, 52.018e9)])
def test_what_an_h100_was_measured_to_hold(checkpointing: bool, measured: float) -> None:
    """docs/results.md: the peak of torch's allocator, Llama-3.2-1B, 4 x 2,048 tokens, bf16.

    It was measured with whole logits, of which nothing is left but a chunk.
    """
    shape = KNOWN["meta-llama/Llama-3.2-1B"]
    estimate = memory_per_gpu(
        shape,
        train_section(precision="bf16", batch_size=8, micro_batch_size=4),
        stage=0,
        gpus=1,
        sequence_length=2048,
        checkpointing=checkpointing,
    )
    with_logits = estimate.total - estimate.logits + 12 * 4 * 2048 * shape.vocab_size
    assert measured <= with_logits <= 1.03 * measured
    # A chunk of 1,046 rows, the gradient of the embeddings and a bf16 part of it.
    assert estimate.logits == 8 * 1046 * 128_256 + 6 * 128_256 * 2048


def test_losses_need_whole_logits_or_a_chunk_of_them() -> None:
    def needed(tokens: int, size: int = 4, trained: bool = True, taught: bool = False) -> int:
        return logits_memory(TINY, tokens, size, trained=trained, taught=taught)

    words, hidden = TINY.vocab_size, TINY.hidden_size
    assert needed(512) == 12 * 512 * words
    most = 2**27 // words
    assert needed(most) == 12 * most * words
    assert needed(9 * most) == 8 * most * words + 4 * words * hidden
    assert needed(9 * most, size=2) == 8 * most * words + 6 * words * hidden
    assert needed(9 * most, trained=False) == 8 * most * words
    assert needed(512, taught=True) == 20 * 512 * words + 4 * words * hidden


def test_memory_is_divided_as_zero_divides_it() -> None:
    shape = KNOWN["meta-llama/Llama-2-7b-hf"]
    n = llama_parameters(shape)
    section = train_section(precision="bf16", batch_size=64, micro_batch_size=1)

    def memory(stage: int, gpus: int, checkpointing: bool = True) -> Memory:
        return memory_per_gpu(
            shape,
            section,
            stage=stage,
            gpus=gpus,
            sequence_length=4096,
            checkpointing=checkpointing,
        )

    plain = memory(0, 8)
    layer = (n - 2 * 32000 * 4096) // 32
    whole = memory(0, 8, checkpointing=False)
    assert (whole.weights, plain.gradients, plain.optimizer) == (6 * n, 4 * n, 8 * n)
    # With checkpointing a bf16 copy of one layer, and of lm_head.
    assert plain.weights == 4 * n + 2 * (layer + 32000 * 4096)
    one, two, three = (memory(stage, 8) for stage in (1, 2, 3))
    assert (one.weights, one.gradients, one.optimizer) == (2 * n, 4 * n, 12 * n // 8)
    assert (two.weights, two.gradients, two.optimizer) == (2 * n, 4 * n // 8, 12 * n // 8)
    assert three.gradients == two.gradients
    assert three.weights == 2 * n // 8 + 2 * layer
    assert memory(0, 8) == memory(0, 1)
    assert memory(3, 8).total < memory(3, 4).total < memory(2, 4).total < memory(1, 4).total
    # With checkpointing 32 layers keep their input only, and one is recomputed in full.
    everything = memory(2, 8, checkpointing=False).activations
    assert two.activations == 32 * 4096 * 4096 * 2 + everything // 32


def test_memory_of_each_way_of_checkpointing() -> None:
    shape = KNOWN["meta-llama/Llama-2-7b-hf"]
    section = train_section(precision="bf16", batch_size=64, micro_batch_size=1)

    def memory(mode: Checkpointing, stage: int = 2) -> Memory:
        options = {"stage": stage, "gpus": 8, "sequence_length": 4096}
        return memory_per_gpu(shape, section, checkpointing=mode, **options)

    layer = memory(False).activations // 32
    entering = 2 * 4096 * 4096
    # q, k, v, o, down and attention's output, gate and up; a number per query.
    products = 4096 * (2 * (6 * 4096 + 2 * 11008) + 4 * 32)
    assert memory(True).activations == 32 * entering + layer
    assert memory(3).activations == 11 * entering + 21 * layer + layer
    assert memory("selective").activations == 32 * (entering + products) + layer
    assert entering + products < 0.65 * layer
    one = (llama_parameters(shape) - 2 * 32000 * 4096) // 32
    assert memory(3, stage=0).weights - memory(True, stage=0).weights == 2 * 21 * one


def test_frozen_parameters_need_no_gradients() -> None:
    sections = train_section(), train_section(trainable=["*.self_attn.*"])
    everything, attention = (
        memory_per_gpu(TINY, s, stage=0, gpus=1, sequence_length=64, checkpointing=False)
        for s in sections
    )
    assert everything.weights == attention.weights
    trained = HeadLayout.from_config(TINY).attention_parameters
    assert (attention.gradients, attention.optimizer) == (4 * trained, 8 * trained)


@pytest.mark.parametrize(
    ("batch", "micro", "limit", "most"),
    [(128, 8, 8, 8), (24, 8, 8, 3), (7, 7, 8, 1), (64, 1, 4, 4)],
)
def test_gpus_divide_the_batch(batch: int, micro: int, limit: int, most: int) -> None:
    section = train_section(batch_size=batch, micro_batch_size=micro)
    assert estimate.most_gpus(section, limit) == most


@pytest.mark.parametrize(
    ("path", "tied"),
    [
        ("meta-llama/Llama-2-7b-hf", "307 of 1,024 units (heads)"),
        ("meta-llama/Llama-2-13b-hf", "480 of 1,600 units (heads)"),
        ("meta-llama/Llama-2-70b-hf", "192 of 640 units (KV groups)"),
    ],
)
def test_a_dry_run_prints_it_all(path: str, tied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_shapes, "_cached", lambda model: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = Console(file=io.StringIO(), width=160)
    print_dry_run(recipe_for(path, train={"steps": 100}), gpus=4, console=out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert f"model       {path}\n" in text
    assert "output_dir:" not in text  # the resolved recipe
    assert count(PUBLISHED[path]) in text
    assert tied in text
    assert "training    100 steps\n" in text
    assert "tokens      524,288 per step, 52,428,800 (52.4 M) in all\n" in text
    assert "4 GPU(s) x 8 x accumulation 4" in text
    assert [
        line.split()[0] for line in text.splitlines() if line[:3] in {f" {i} " for i in range(4)}
    ]


def test_a_dry_run_refuses_gpus_that_do_not_divide_the_batch() -> None:
    with pytest.raises(PostshareError, match=r"nearest is train\.batch_size="):
        print_dry_run(recipe_for("x", model={"config": {}}), gpus=3, console=Console(quiet=True))


def test_a_dry_run_without_training_estimates_no_memory() -> None:
    out = Console(file=io.StringIO(), width=160)
    print_dry_run(recipe_for("x", model={"config": {}}, train={"steps": 0}), console=out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "none (train.steps is 0)" in text
    assert "ZeRO" not in text


def test_a_dry_run_counts_healing() -> None:
    out = Console(file=io.StringIO(), width=160)
    print_dry_run(load_recipe("demo_auto"), console=out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "training    200 steps (200 of healing)\n" in text
    assert "tokens      2,048 per step, 409,600 (410 K) in all\n" in text
    assert "1,869,952 (1.87 M)" in text.split("trained", 1)[1].splitlines()[0]
    assert "ZeRO" in text
