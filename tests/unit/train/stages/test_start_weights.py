"""What a start makes of the files of its base, before it writes anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_models.errors import PostshareError
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.spans_base import recipe
from train.demo import demo_base_path
from train.evaluation.models import Judged, find_models
from train.evaluation.summary import weight_bytes
from train.models.base_model import load_dense, read_through
from train.stages.pipeline import plan, prepare, run
from train.stages.start import begin

pytestmark = pytest.mark.usefixtures("sketched", "own_cache")
BROKEN = "model.layers.4.mlp.down_proj.weight"


@pytest.fixture
def own(home: Path, tmp_path: Path) -> Path:
    """A copy of the base and the text, to be changed."""
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home"


def edit(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(path) | named, path, metadata={"format": "pt"})


def break_(folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")[BROKEN]
    weight[3, 5] = float("nan")
    edit(folder, **{BROKEN: weight})


@pytest.mark.parametrize("command", [run, plan, prepare])
@pytest.mark.parametrize("strategy", [{"strategy": "auto", "budget": {"bytes": "-4%"}}, {}])
def test_weights_that_are_no_numbers_end_it_before_anything_is_written(
    own: Path, tmp_path: Path, command: Any, strategy: dict[str, Any]
) -> None:
    break_(own / "base")
    made = recipe(own, tmp_path / "run", plan=strategy or {"budget": {"ratio": 0.25}})
    with pytest.raises(PostshareError, match=rf"{BROKEN} has 1 of .*\[3, 5\]: nan\); download"):
        command(made)
    assert not (tmp_path / "run").exists()


def test_weights_of_a_teacher_and_of_a_judged_model_are_read_through(
    own: Path, home: Path, tmp_path: Path
) -> None:
    break_(own / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_base_path() / name, own / "base" / name)
    distill = {"teacher": str(own / "base")}
    with pytest.raises(PostshareError, match=BROKEN):
        run(recipe(home, tmp_path / "run", heads={"kv_heads": 1}, distill=distill))
    assert not (tmp_path / "run").exists()
    with pytest.raises(PostshareError, match=BROKEN):
        find_models([str(own / "base")])


def test_every_rank_reads_its_share(own: Path) -> None:
    break_(own / "base")
    weights = WeightsFolder(own / "base")
    at = weights.names().index(BROKEN)
    for world in (2, 3):
        for rank in range(world):
            if rank == at % world:
                with pytest.raises(PostshareError, match=BROKEN):
                    read_through(weights, rank, world)
            else:
                read_through(weights, rank, world)


def test_what_is_not_read_is_said_once(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "base" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    begin(recipe(own, tmp_path / "run", heads={"kv_heads": 1}), needs_data=False)
    said = capsys.readouterr().err
    assert said.count("note: ") == said.count("which is not applied") == 1
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_base_path() / name, own / "base" / name)
    find_models([str(own / "base")])
    assert capsys.readouterr().err == said


def test_bytes_of_a_base_are_those_of_its_model(own: Path) -> None:
    """What only its files hold is not saved by a plan, and is in none of the exports."""
    folder = own / "base"
    clean, judged = weight_bytes(folder), Judged("base", folder, folder).size()
    tied = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, lm_head__weight=tied, model__layers__0__rotary_emb__inv_freq=torch.ones(9))
    save_file({"a": tied}, folder / "adapter_model.safetensors")
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    size = sum(p.numel() * p.element_size() for p in load_dense(folder, "sdpa").parameters())
    assert weight_bytes(folder) == header + size
    assert abs(weight_bytes(folder) - clean) < 400, "a header of two names more"
    assert Judged("base", folder, folder).size() == judged == (size // 4, size)
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    edit(folder, model__norm__weight=norm.bfloat16())
    assert Judged("base", folder, folder).size() == (size // 4, size - 2 * norm.numel())
