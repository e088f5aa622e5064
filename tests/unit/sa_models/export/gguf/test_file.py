"""GGUF files: what another reader finds in them, and what of a bad one is found out."""

from __future__ import annotations

import importlib.util
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.export.export import export_model
from sa_models.export.gguf import form as forms
from sa_models.export.gguf.file import GgufForm
from sa_models.export.gguf.form import convert_folder
from sa_models.export.manifest import read_manifest
from sa_models.export.quantize import round_to_int4
from sa_models.plan import HeadTie, SharingPlan
from sa_models.weights.compact_folder import open_weights
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support import small_models
from tests.support.gguf_llama import gguf_name, interleaved
from train.models import gguf_folder
from train.models.tokenizer import load_tokenizer

here = importlib.util.find_spec("gguf") is not None
pytestmark = pytest.mark.skipif(not here, reason="pip install 'postshare[gguf]'")

TIE = HeadTie((1, 1), (0, 0), ("q", "k", "v", "o"))
FREE = SharingPlan(removed=((0, 1),), ties=(TIE,))


def convert(source: Path, file: Path, to: str = "f32", **options: Any) -> GgufForm:
    return convert_folder(source, file, to, load_tokenizer(str(source)), "gpt-2", **options)


def compact(folder: Path, plan: SharingPlan = FREE, **options: Any) -> Path:
    """A compact export in fp32: four query heads of 16 on two KV heads, hidden size 64."""
    base = small_models.dense(
        folder / "base", hidden_size=64, intermediate_size=64, tie_word_embeddings=False
    )
    export_model(
        WeightsFolder(base),
        plan,
        folder,
        dtype=torch.float32,
        shard_bytes=10**9,
        formats=("compact",),
        tokenizer=base,
        **options,
    )
    return folder / "compact"


def read(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def refusal(source: Path, file: Path, *arguments: Any) -> str:
    before = sorted(file.parent.iterdir())
    with pytest.raises(PostshareError) as caught:
        convert(source, file, *arguments)
    assert "\n" not in str(caught.value)
    assert sorted(file.parent.iterdir()) == before, "nothing is written"
    return str(caught.value)


def test_only_the_rows_that_are_left_lie_in_the_file(tmp_path: Path) -> None:
    source = compact(tmp_path)
    dense, found = open_weights(source), {}
    form = convert(source, tmp_path / "out.gguf")
    found = read(tmp_path / "out.gguf")
    assert form.layout.architecture == "deci"
    for name in dense.names():
        value = dense.read(name).float().numpy()
        if name.startswith("model.layers.0.self_attn."):  # of two units the first is left
            value = value[:, :32] if "o_proj" in name else value[: len(value) // 2]
        if "q_proj" in name or "k_proj" in name:
            value = interleaved(value)
        stored = found.pop(gguf_name(name))
        assert np.array_equal(stored.data, value), name
    assert not found
    # The tied unit is its source's, written out.
    rows = open_weights(source).read("model.layers.1.self_attn.v_proj.weight")
    assert torch.equal(rows[16:], dense.read("model.layers.0.self_attn.v_proj.weight")[:16])


@pytest.mark.parametrize(("to", "steps"), [("q8_0", 127), ("q4_0", 8), ("q4_1", 15)])
def test_blocks_are_llama_cpps(to: str, steps: int, tmp_path: Path) -> None:
    """The bytes of a block, taken apart by hand: scale (and least), then the numbers."""
    source = compact(tmp_path)
    convert(source, tmp_path / "out.gguf", to)
    stored = read(tmp_path / "out.gguf")["blk.1.ffn_up.weight"].data
    value = open_weights(source).read("model.layers.1.mlp.up_proj.weight")
    blocks = np.frombuffer(stored.tobytes(), np.uint8).reshape(64 * 2, -1)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if to == "q8_0":
        held = blocks[:, 2:].copy().view(np.int8) * scale
        step = np.abs(value.numpy().reshape(128, 32)).max(1) / 127
    else:
        numbers = blocks[:, 4:] if to == "q4_1" else blocks[:, 2:]
        halves = np.concatenate([numbers & 15, numbers >> 4], axis=1).astype(np.float32)
        least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
        held = halves * scale + least if to == "q4_1" else (halves - 8) * scale
        step = np.abs(value.numpy().reshape(128, 32)).max(1) / 8
    if to == "q4_1":  # our own rounding has the same steps
        _, steps_of, _ = round_to_int4(value, 32)
        step = steps_of.numpy().reshape(-1)
    apart = np.abs(held - value.numpy().reshape(128, 32))
    most = 1.01 if to == "q4_0" else 0.51  # of 4 bits without a least the largest is cut
    assert (apart <= step[:, None] * most + 2e-3 * np.abs(held).max()).all()
    assert apart.max() > 0.3 * step.min()


def test_a_file_of_one_shape_is_read_back_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By code that is not ours: GQA, with a tie written out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    source = compact(tmp_path, SharingPlan(ties=(TIE,)))
    form = convert(source, tmp_path / "out.gguf")
    assert form.layout.architecture == "llama"
    folder = gguf_folder.gguf_folder(tmp_path / "out.gguf")
    read_back, dense = WeightsFolder(folder), open_weights(source)
    for name in dense.names():
        assert torch.equal(read_back.read(name), dense.read(name)), name
    fields = ("rms_norm_eps", "head_dim", "bos_token_id", "eos_token_id", "rope_parameters")
    for field in fields:
        assert getattr(read_back.config, field) == getattr(dense.config, field), field
    stock = LlamaForCausalLM.from_pretrained(folder).eval()
    text = torch.arange(20, 60)[None]
    compact_model = open_weights(source)
    assert compact_model.config.num_hidden_layers == stock.config.num_hidden_layers
    assert torch.isfinite(stock(text).logits).all()


def test_uniform_removal_is_a_llama_with_fewer_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    source = compact(tmp_path, SharingPlan(removed=((0, 0), (1, 1))))
    convert(source, tmp_path / "out.gguf")
    folder = gguf_folder.gguf_folder(tmp_path / "out.gguf")
    stock = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (stock.config.num_attention_heads, stock.config.num_key_value_heads) == (2, 1)
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(source).eval()
    text = torch.arange(20, 60)[None]
    with torch.no_grad():
        assert (stock(text).logits - ours(text).logits).abs().max() < 1e-5


def test_one_tensor_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the largest, a part of its rows is compared at a time, as here of all."""
    monkeypatch.setattr("sa_models.export.gguf.file.COMPARED", 2048)
    source = open_weights(compact(tmp_path))
    names, held = source.names(), []

    class Counting:
        path, config, shape, dtype = source.path, source.config, source.shape, source.dtype

        def read(self, name: str) -> torch.Tensor:
            assert sum(tensor() is not None for tensor in held) <= 1
            tensor = source.read(name)
            held.append(weakref.ref(tensor))
            read_names.append(name)
            return tensor

    read_names: list[str] = []
    form = forms.gguf_form(
        source.config, FREE, "q8_0", load_tokenizer(str(tmp_path / "base")), pre="gpt-2"
    )
    form.write(tmp_path / "out.gguf", Counting())  # type: ignore[arg-type]
    assert read_names == names
    form.verify(tmp_path / "out.gguf", Counting())  # type: ignore[arg-type]
    assert read_names == 2 * names
    data = bytearray((tmp_path / "out.gguf").read_bytes())
    data[-1] ^= 0x40  # in the last row of the last matrix
    (tmp_path / "out.gguf").write_bytes(data)
    with pytest.raises(PostshareError, match=r"output\.weight differs from the weights"):
        form.verify(tmp_path / "out.gguf", source)


# --- what is not right ----------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["tensor", "key", "order", "end"])
def test_a_file_that_reads_otherwise_gets_no_name(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = compact(tmp_path)
    write = GgufForm.write

    def damaged(form: GgufForm, file: Path, *rest: Any) -> None:
        write(form, file, *rest)
        data = bytearray(file.read_bytes())
        if part == "tensor":
            data[-4 * 64 * 2048 + 3] ^= 0x40  # a bit of the last matrix
        elif part == "key":
            at = data.index(b"deci.context_length") + len(b"deci.context_length") + 4
            data[at] += 1
        elif part == "end":
            del data[-5000:]
        else:
            at = data.index(b"blk.0.attn_k.weight")
            data[at : at + 19] = b"blk.0.attn_x.weight"
        file.write_bytes(data)

    monkeypatch.setattr(GgufForm, "write", damaged)
    said = refusal(source, tmp_path / "out.gguf")
    assert said.endswith("export again, and report this if it persists")
    what = {
        "tensor": "output.weight differs from the weights",
        "key": "deci.context_length is not what was written",
        "order": "has other tensors than the plan says",
        "end": "cannot be read back",
    }
    assert what[part] in said


@pytest.mark.parametrize("to", ["f16", "q8_0"])
def test_rows_in_the_wrong_order_are_found(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hugging Face layout has them, which llama.cpp would load and compute nonsense with."""
    from sa_models.export.gguf.layout import GgufLayout

    source = compact(tmp_path)
    monkeypatch.setattr(GgufLayout, "rows", lambda layout, name: None)
    assert "differs from the weights" in refusal(
        compact(tmp_path / "other", SharingPlan(ties=(TIE,))), tmp_path / "out.gguf", to
    )
    assert source.is_dir()


def test_a_weight_that_f16_cannot_hold_is_named(tmp_path: Path) -> None:
    base = small_models.dense(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(base)
    said = refusal(base, tmp_path / "out.gguf", "f16")
    assert "model.layers.1.mlp.up_proj.weight has values that float16 cannot hold" in said
    convert(base, tmp_path / "out.gguf", "bf16")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = compact(tmp_path)

    class Disk:
        free = 1000

    monkeypatch.setattr(forms.shutil, "disk_usage", lambda folder: Disk)
    assert "0.000 GB are free" in refusal(source, tmp_path / "out.gguf")
    Disk.free = 10**12

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GgufForm, "write", full)
    assert "could not be written (No space left on device)" in refusal(
        source, tmp_path / "out.gguf"
    )


def test_bad_arguments_are_one_line_each(tmp_path: Path) -> None:
    source = compact(tmp_path)
    assert "cannot write GGUF as 'q5_k'; use one of f32, f16, bf16, q8_0, q4_0, q4_1" in refusal(
        source, tmp_path / "out.gguf", "q5_k"
    )
    assert "does not end in .gguf" in refusal(source, tmp_path / "out")
    (tmp_path / "there.gguf").write_text("mine")
    assert "is there already; choose another file or delete it" in refusal(
        source, tmp_path / "there.gguf"
    )
    assert (tmp_path / "there.gguf").read_text() == "mine"


# --- as one of the formats of an export -----------------------------------------------------------


def export(folder: Path, plan: SharingPlan = FREE, **options: Any) -> Any:
    base = folder / "base"
    if not base.is_dir():
        small_models.dense(base, hidden_size=64, intermediate_size=64)
        settings = json.loads((base / "tokenizer.json").read_text())
        settings["pre_tokenizer"] = {  # cuts that are known
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        (base / "tokenizer.json").write_text(json.dumps(settings))
    values: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "shard_bytes": 10**9,
        "formats": ("compact", "gguf"),
        "tokenizer": base,
        "notes": {"name": "small"},
    }
    return export_model(WeightsFolder(base), plan, folder / "export", **(values | options))


def test_an_export_has_the_file_its_manifest_and_its_card(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    seen: list[tuple[str, int, int]] = []
    result = export(tmp_path, progress=lambda *done: seen.append(done))
    folder = result.paths["gguf"]
    assert sorted(f.name for f in folder.iterdir()) == [
        "README.md",
        "manifest.json",
        "small-bf16.gguf",
    ]
    stored = read(folder / "small-bf16.gguf")
    size = sum(int(tensor.n_bytes) for tensor in stored.values())
    manifest = read_manifest(folder)
    assert (manifest["format"], manifest["gguf"]) == ("gguf", "bf16")
    assert manifest["tensors"]["bytes"] == result.bytes["gguf"] == size
    assert manifest["tensors"]["parameters"] == sum(int(t.n_elements) for t in stored.values())
    card = (folder / "README.md").read_text()
    assert "llama-server -m small-bf16.gguf" in card
    assert "GGUF knows no sharing: shared units are stored where each is used" in card
    assert f"| bytes of weights in this folder | {size:,} (matrices bf16, norms f32) |" in card
    for stage in ("write", "verify"):
        done = [each[1:] for each in seen if each[0] == stage]
        assert done[-1][0] == done[-1][1]
    # A finished one is left as it is, though its source is touched; other weights are refused.
    before = (folder / "small-bf16.gguf").stat()
    (tmp_path / "base" / "model.safetensors").touch()
    export(tmp_path)
    assert (folder / "small-bf16.gguf").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(PostshareError, match=r"holds another export \(gguf 'bf16', not 'q8_0'\)"):
        export(tmp_path, gguf="q8_0")
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    small_models.dense(tmp_path / "base", seed=3, tokenizer=False, **sizes)
    with pytest.raises(PostshareError, match="holds an export of other weights"):
        export(tmp_path)


def test_the_type_of_the_file_is_the_exports_or_ones_own(tmp_path: Path) -> None:
    export(tmp_path, dtype=torch.float32, formats=("dense", "gguf"), gguf="q8_0")
    kinds = {
        t.name: t.tensor_type.name for t in read(tmp_path / "export/gguf/small-q8_0.gguf").values()
    }
    assert kinds["blk.1.ffn_up.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


def test_an_export_that_gguf_cannot_express_writes_nothing(tmp_path: Path) -> None:
    for tokenizer, message in ((None, "and the model has none"), (tmp_path, "has no tokenizer")):
        with pytest.raises(PostshareError, match=message):
            export(tmp_path, tokenizer=tokenizer)
    assert not (tmp_path / "export").exists()
