"""Compact models of which accelerate offloads a part: the numbers of the whole model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModel, AutoModelForCausalLM

from sa_models.basis import SharedBasis
from sa_models.errors import PostshareError
from sa_models.modeling import SharedLlamaForCausalLM, compact_config
from sa_models.plan import HeadTie, SharingPlan
from tests.support.reference import LAYERS, dense, some_plan, tokens

# Layer 5 owns no rows of v; units of layers 0 and 2 are read above and below.
TIES = SharingPlan(
    (
        HeadTie((1, 1), (0, 2), ("q", "k", "v", "o")),
        HeadTie((3, 0), (2, 3), ("q", "o")),
        HeadTie((4, 2), (4, 1), ("k", "v")),
        HeadTie((0, 3), (2, 3), ("v", "o")),
        *(HeadTie((5, unit), (0, unit % 3), ("v",)) for unit in range(4)),
    ),
    removed=((3, 2),),
)
PLANS = {
    "ties": TIES,
    "spans and ties": some_plan("both, ties", "gqa"),
    "a basis": SharingPlan(basis=SharedBasis(3, (9, 8), (7, 6), (5, 4))),
}
REST = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def on_disk(*layers: int) -> dict[str, str]:
    """Layers on the disk; all else where it is computed."""
    names = [f"model.layers.{i}" for i in range(LAYERS)]
    chosen = {name: "disk" if i in layers else "cpu" for i, name in enumerate(names)}
    return {**dict.fromkeys(REST, "cpu"), **chosen}


MAPS = {
    "owners": on_disk(0, 2),
    "readers": on_disk(1, 4, 5),
    "every layer": on_disk(*range(LAYERS)),
    "the whole model": {"": "disk"},
}


@pytest.fixture(scope="module", params=PLANS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = compact_config(dense("gqa").config, PLANS[request.param])
    path = tmp_path_factory.mktemp("compact")
    SharedLlamaForCausalLM(config).save_pretrained(path, max_shard_size="20KB")
    return path


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def check(model: Any, folder: Path) -> None:
    """Logits and generated tokens are those of the model in memory.

    To rounding: in memory the weights of o lie in another order.
    """
    expected, ids = load(folder), tokens(rows=2)
    for some in (ids, ids[:1, :1]):
        logits = expected(some).logits
        assert float(logits.std()) > 0.1
        assert float((model(some).logits - logits).abs().max()) <= 1e-5
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


@pytest.mark.parametrize("where", MAPS)
def test_what_lies_on_the_disk_is_read_from_there(where: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder, device_map=MAPS[where], offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    check(model, folder)


@pytest.mark.parametrize("name", ["auto", "sequential", "balanced"])
def test_a_memory_that_is_too_small_offloads_the_rest(
    name: str, folder: Path, tmp_path: Path
) -> None:
    model = load(folder, device_map=name, max_memory={"cpu": 60_000}, offload_folder=tmp_path)
    assert {"cpu", "disk"} == set(map(str, model.hf_device_map.values()))
    check(model, folder)


def test_accelerates_own_functions_offload_as_well(folder: Path, tmp_path: Path) -> None:
    check(cpu_offload(load(folder), torch.device("cpu")), folder)
    check(disk_offload(load(folder), tmp_path, torch.device("cpu")), folder)


def test_the_hidden_states_are_those_of_the_whole_model(folder: Path, tmp_path: Path) -> None:
    """Of ``AutoModel``, which has no lm_head."""
    ids = tokens()
    with torch.no_grad():
        expected = load(folder).model(ids).last_hidden_state
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert info["unexpected_keys"] <= {"lm_head.weight"}
        assert torch.equal(model(ids).last_hidden_state, expected)
        offloaded = AutoModel.from_pretrained(
            folder,
            device_map={
                name.removeprefix("model."): where
                for name, where in on_disk(0, 2).items()
                if name != "lm_head"
            },
            offload_folder=tmp_path,
        )
        assert float((offloaded(ids).last_hidden_state - expected).abs().max()) <= 1e-5


def test_weights_that_no_hook_can_load_are_refused(tmp_path: Path) -> None:
    """accelerate may load whole layers at once: those of other layers are then out of reach."""
    config = compact_config(dense("gqa").config, TIES)
    model = SharedLlamaForCausalLM(config).eval()
    dispatch_model(
        model,
        on_disk(0, 2),
        offload_dir=tmp_path,
        preload_module_classes=["SharedDecoderLayer"],
    )
    with pytest.raises(PostshareError, match="offloaded where they cannot read it") as caught:
        model(tokens())
    assert "\n" not in str(caught.value)
