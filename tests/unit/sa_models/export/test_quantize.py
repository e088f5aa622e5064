"""Quantized folders: nearest values, the bytes, and that torchao computes what is read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_models.basis import SharedBasis
from sa_models.errors import PostshareError
from sa_models.export.export import export_model
from sa_models.export.quantize import quantize_folder
from sa_models.export.quantized_folder import QuantizedFolder, load_dequantized
from sa_models.materialize.shared_basis import factorized
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import ExpandedFolder
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.reference import dense, some_plan, tokens

pytest.importorskip("torchao", reason="pip install 'postshare[quantize]'")


def export(folder: Path, plan: SharingPlan) -> Path:
    """A compact export of a small Llama whose sizes a group of 4 divides."""
    dense(intermediate_size=20).save_pretrained(folder / "source")
    source = WeightsFolder(folder / "source")
    export_model(source, plan, folder, dtype=torch.float32, shard_bytes=10**9, formats=["compact"])
    return folder / "compact"


def export_factors(folder: Path) -> Path:
    """A compact export of which q, k and v of two layers share a basis, of ranks 4 divides."""
    model = dense(intermediate_size=20)
    groups = -(-model.config.num_hidden_layers // 2)
    plan = SharingPlan(basis=SharedBasis(2, (16,) * groups, (8,) * groups, (12,) * groups))
    made = factorized(model, plan, [{"input_ids": tokens()}])
    (folder / "source").mkdir()
    made.config.save_pretrained(folder / "source")
    save_file(
        {name: p.detach().contiguous() for name, p in made.named_parameters()},
        folder / "source" / "model.safetensors",
        metadata={"format": "pt"},
    )
    source = ExpandedFolder(folder / "source")
    export_model(source, plan, folder, dtype=torch.float32, shard_bytes=10**9, formats=["compact"])
    return folder / "compact"


def nearest(weight: np.ndarray, least: np.ndarray, step: np.ndarray, last: int) -> np.ndarray:
    """Of ``least + i step``, i from 0 to ``last``, the value that is nearest to each weight."""
    choices = least[..., None] + step[..., None] * np.arange(last + 1)
    index = np.abs(choices - weight[..., None]).argmin(-1)
    return np.take_along_axis(choices, index[..., None], -1)[..., 0]


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_every_weight_is_the_nearest_value_of_its_row_or_group(
    tmp_path: Path, to: str, factors: bool
) -> None:
    source = (
        export_factors(tmp_path) if factors else export(tmp_path, some_plan("both, ties", "gqa"))
    )
    quantize_folder(source, tmp_path / to, to, 4 if to == "int4" else None)
    before, after = load_file(source / "model.safetensors"), QuantizedFolder(tmp_path / to)
    assert set(after.names()) == set(before)
    rounded = 0
    for name, tensor in before.items():
        weight = tensor.double().numpy()
        if weight.size == 0 or "_proj" not in name:
            assert torch.equal(after.read(name), tensor)
            continue
        if to == "int8":
            step = np.abs(weight).max(1, keepdims=True) / 127.5
            expected = nearest(weight, -128 * step, step, 255)
        else:
            groups = weight.reshape(len(weight), -1, 4)
            least = groups.min(2, keepdims=True)
            step = (groups.max(2, keepdims=True) - least) / 15
            expected = nearest(groups, least, step, 15).reshape(weight.shape)
            step = step.repeat(4, 2).reshape(weight.shape)
        distance = np.abs(after.read(name).double().numpy() - expected)
        # On the grid; and where a weight lies between two values, either of them.
        assert (np.minimum(distance, np.abs(distance - step)) <= 1e-5 * step + 1e-7).all()
        error, best = (
            np.abs(after.read(name).numpy() - weight),
            np.abs(expected - weight.reshape(expected.shape)),
        )
        assert (error <= best + 1e-5 * step + 1e-7).all()
        rounded += 1
    assert rounded >= 30


def test_what_is_shared_is_stored_once_and_bytes_are_those_of_the_formula(tmp_path: Path) -> None:
    plan = some_plan("both, ties", "gqa")
    source = export(tmp_path, plan)
    shapes = {name: tuple(t.shape) for name, t in load_file(source / "model.safetensors").items()}
    assert shapes["model.layers.5.self_attn.o_proj.weight"] == (32, 24)  # one of four units is tied
    expected = {"int8": 0, "int4": 0}
    for name, shape in shapes.items():
        if "_proj" not in name:
            expected = {to: size + 4 * int(np.prod(shape)) for to, size in expected.items()}
            continue
        rows, inputs = shape
        expected["int8"] += rows * inputs + 5 * rows  # a scale in fp32 and a zero point of 8 bits
        expected["int4"] += rows * inputs // 2 + 8 * rows * inputs // 4
    for to, size in expected.items():
        quantize_folder(source, tmp_path / to, to, 4 if to == "int4" else None)
        stored = load_file(tmp_path / to / "model.safetensors")
        assert (
            sum(t.nbytes for t in stored.values()) == size == QuantizedFolder(tmp_path / to).bytes
        )


FRESH = """
import sys, torch, sa_models
from transformers import AutoModelForCausalLM
ids, found = torch.load(sys.argv[1]), []
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kinds = {type(p).__name__ for n, p in model.named_parameters() if "_proj" in n and p.numel()}
    assert kinds == {"Int8Tensor"}, kinds
    with torch.no_grad():
        cache = model(ids[:1, :-1], use_cache=True).past_key_values
        last = model(ids[:1, -1:], past_key_values=cache).logits  # the one row of a decoded token
        found.append((model(ids).logits, last))
torch.save(found, sys.argv[2])
"""


def test_a_fresh_process_computes_with_torchao_what_the_weights_stand_for(tmp_path: Path) -> None:
    """Stock weights, ties that torchao's tensors are sliced for, and factors."""
    compact = export(tmp_path, some_plan("both, ties", "gqa"))
    (tmp_path / "basis").mkdir()
    sources = {
        "stock": tmp_path / "source",
        "shared": compact,
        "factors": export_factors(tmp_path / "basis"),
    }
    folders = [quantize_folder(sources[name], tmp_path / name, "int8") for name in sources]
    torch.save(tokens(), tmp_path / "ids.pt")
    files = map(str, (tmp_path / "ids.pt", tmp_path / "out.pt", *folders))
    subprocess.run([sys.executable, "-c", FRESH, *files], check=True, timeout=300)
    for folder, (whole, last) in zip(folders, torch.load(tmp_path / "out.pt"), strict=True):
        with torch.no_grad():
            expected = load_dequantized(folder).eval()(tokens()).logits
        assert float((whole - expected).abs().max()) <= 1e-4
        assert float((last[0, 0] - expected[0, -1]).abs().max()) <= 1e-4


def test_what_goes_with_the_weights_goes_along(tmp_path: Path) -> None:
    source = export(tmp_path, some_plan("pooled", "gqa"))
    passed_on = ("LICENSE", "tokenizer.json", "additional_chat_templates/a.jinja")
    (source / "additional_chat_templates").mkdir()
    for name in (*passed_on, "pytorch_model.bin"):
        (source / name).write_text(name)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration.SharedLlamaConfig"}  # of an older export
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        del config[key]
    (source / "config.json").write_text(json.dumps(config))
    made = quantize_folder(source, tmp_path / "int8", "int8")
    assert all((made / name).read_text() == name for name in passed_on)
    assert not (made / "pytorch_model.bin").exists()
    written = json.loads((made / "config.json").read_text())
    assert written["auto_map"]["AutoModelForCausalLM"] == "entry.SharedLlamaForCausalLM"
    assert (written["rope_theta"], written["torch_dtype"]) == (10000.0, "float32")
    assert (made / "entry.py").is_file()
    assert (made / "generation_config.json").is_file()


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense().save_pretrained(source := tmp_path / "source")
    there = quantize_folder(source, tmp_path / "there", "int8")
    new = tmp_path / "new"
    for arguments, message in (
        ((source, new, "int4", 8), r"down_proj.weight has 23 inputs.*quantize to int8"),
        ((source, new, "int4", 3), "not even"),
        ((source, new, "int8", 8), "one scale for a whole row"),
        ((source, new, "int2"), "use int8 or int4"),
        ((source, there, "int8"), "is there already"),
        ((there, new, "int8"), "quantized already"),
    ):
        with pytest.raises(PostshareError, match=message):
            quantize_folder(*arguments)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(PostshareError, match=r"postshare\[quantize\]"):
        quantize_folder(source, new, "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "there"]
    with pytest.raises(PostshareError, match="stored as I8"):
        WeightsFolder(there)
