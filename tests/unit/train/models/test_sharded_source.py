"""Weights read tensor by tensor are those of the model that is loaded whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_models.errors import PostshareError
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import HeadTie, SharingPlan
from sa_models.spans import AttentionSpan
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import convert, converted
from tests.support import tiny
from train.models.base_model import load_dense
from train.models.sharded_source import Source, base_source, compact_source, exported_weights
from train.recipe.recipe import ModelSection

SPANS = (AttentionSpan(0, (1,), "kv"), AttentionSpan(2, (3,), "attention"))
REMOVED = ((1, 1), (2, 2), (2, 3))
"""With KV heads as in the base, and without spans."""
TIES = (
    HeadTie((2, 0), (0, 1), ("q", "o")),
    HeadTie((3, 1), (0, 1), ("o",)),
    HeadTie((2, 1), (0, 0), ("v",)),
)
PLANS = {
    "none": SharingPlan(),
    "pooled": SharingPlan(kv_heads=2),
    "spans": SharingPlan(spans=SPANS),
    "both": SharingPlan(kv_heads=2, spans=SPANS),
}


@pytest.fixture(params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    dtype = getattr(torch, request.param)
    model = tiny.model(num_hidden_layers=4, tie_word_embeddings=request.param == "float32")
    model.to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def section(folder: Path) -> ModelSection:
    return ModelSection(path=str(folder), attention="eager")


def check_same(source: Source, model: torch.nn.Module) -> None:
    expected = dict(model.named_parameters())
    assert set(source) == expected.keys()
    for name, parameter in expected.items():
        value = source[name]
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert torch.equal(value, parameter), name
    skeleton = source.skeleton(torch.device("cpu"))
    assert type(skeleton) is type(model)
    assert [name for name, _ in skeleton.named_parameters()] == list(expected)
    assert all(p.is_meta for p in skeleton.parameters())
    for (name, ours), (other, theirs) in zip(
        skeleton.named_buffers(), model.named_buffers(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    ours, theirs = skeleton.config.to_dict(), model.config.to_dict()
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert not different - {"_name_or_path", "transformers_version"}
    assert skeleton.config._attn_implementation == model.config._attn_implementation
    assert skeleton.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("leaders", ["mean", "copy"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_source_of_training_equals_the_loaded_and_converted_base(
    folder: Path, plan: SharingPlan, leaders: str
) -> None:
    source = base_source(section(folder), plan, leaders)
    check_same(source, convert(load_dense(folder, "eager"), plan, leaders))


@pytest.mark.parametrize("merge", ["copy", "mean", "aligned_mean"])
@pytest.mark.parametrize("structure", PLANS.values(), ids=PLANS)
def test_source_of_healing_equals_the_compact_model(
    folder: Path, structure: SharingPlan, merge: str
) -> None:
    plan = SharingPlan(
        TIES[:1] + TIES[2:] if structure.spans else TIES,
        structure.kv_heads,
        removed=() if structure.spans or structure.kv_heads else REMOVED,
        spans=structure.spans,
    )
    source = compact_source(folder, section(folder), plan, "mean", merge)
    model = convert(load_dense(folder, "eager"), plan, "mean")
    layout = plan.layout(model.config)
    materialize_(dict(model.named_parameters()), layout, plan, merge)
    check_same(source, SharedLlamaForCausalLM.from_materialized(model, plan))


def test_names_that_do_not_fit_are_errors(folder: Path) -> None:
    source = base_source(section(folder), SharingPlan())
    with pytest.raises(PostshareError, match=r"has no model\.layers\.3\.self_attn\.k_proj"):
        Source(source.kind, source.config, Without(source.reader), folder).skeleton(
            torch.device("cpu")
        )
    smaller = base_source(section(folder), SharingPlan())
    smaller.config.num_hidden_layers = 3
    with pytest.raises(PostshareError, match=r"holds, beyond the model, model\.layers\.3"):
        smaller.skeleton(torch.device("cpu"))
    narrow = base_source(section(folder), SharingPlan())
    narrow.config.intermediate_size = 16
    with pytest.raises(PostshareError, match=r"mlp.*has shape \[48, 32\].*\[16, 32\]"):
        narrow.skeleton(torch.device("cpu"))


class Without:
    def __init__(self, reader) -> None:
        self.reader, self.path = reader, reader.path

    def names(self) -> list[str]:
        missing = "model.layers.3.self_attn.k_proj.weight"
        return [name for name in self.reader.names() if name != missing]


def test_a_missing_tensor_is_an_error_by_name(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, file)
    with pytest.raises(PostshareError, match=gone.replace(".", r"\.")):
        base_source(section(folder), SharingPlan())


def test_an_fp32_export_has_the_means_of_the_fp32_model(folder: Path) -> None:
    """Also of a base with fewer bits, whose own dtype would round them."""
    plan = SharingPlan(kv_heads=2)
    model = convert(load_dense(folder, "eager"), plan)
    reader = converted(exported_weights(folder, torch.float32), plan)
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read(name), parameter), name
    same = exported_weights(folder, torch.bfloat16)
    assert {same.read(name).dtype for name in same.names()} == {stored_dtype(folder)}


def stored_dtype(folder: Path) -> torch.dtype:
    return WeightsFolder(folder).dtype("model.norm.weight")
