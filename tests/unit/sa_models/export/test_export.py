"""Exports: materialized = exported = loaded, and the plan's bytes are those on disk."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import sa_models.export.job as job_module
from sa_models.errors import PostshareError
from sa_models.export.manifest import update_notes
from sa_models.export.model_card import model_card
from sa_models.export.verify import verify_equal
from sa_models.heads import HeadLayout
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import HeadTie, SharingPlan
from sa_models.projections import Piece, SharedLinear
from sa_models.weights.compact_folder import ExpandedFolder, open_weights
from sa_models.weights.safetensors_folder import ShardWriter, WeightsFolder
from tests.support.exports import check_without_package, export, load, printed, sha256
from tests.support.reference import exact_norm
from train.demo import demo_base_path

LAYERS, HIDDEN, HEADS = 3, 32, 4


def make_source(
    folder: Path,
    kv_heads: int = HEADS,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: int | str = "1GB",
    **fields: Any,
) -> WeightsFolder:
    """A random Llama on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        **fields,
    )
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return WeightsFolder(folder)


def make_plan(kv_heads: int, projections: str) -> SharingPlan:
    """Ties across and inside layers; for MQA, layers that own nothing of a projection."""
    shared = tuple(projections)
    if kv_heads == 1:
        return SharingPlan((HeadTie((1, 0), (0, 0), shared), HeadTie((2, 0), (0, 0), shared)))
    last = kv_heads - 1
    ties = [
        HeadTie((1, 0), (0, last), shared),
        HeadTie((2, last), (0, last), shared),
        HeadTie((2, 0), (1, last), shared[:1]),
        HeadTie((2, 0), (0, 0), shared[1:]),
    ]
    return SharingPlan(tuple(tie for tie in ties if tie.projections))


def materialized(source: WeightsFolder, plan: SharingPlan, merge: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(source.path)
    layout = HeadLayout.from_config(model.config)
    materialize_(dict(model.named_parameters()), layout, plan, merge)  # type: ignore[arg-type]
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    if ids is None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(model.config.vocab_size, (2, 12), generator=generator)
    return model.float().eval()(ids).logits


@torch.no_grad()
def exact_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.double().eval()(ids).logits


CASES = [
    # KV heads, projections, tied embeddings, merge, source dtype, export dtype
    (4, "qkvo", False, "copy", "float32", "float32"),
    (4, "qk", True, "mean", "float32", "bfloat16"),
    (4, "v", False, "mean", "bfloat16", "bfloat16"),
    (4, "o", True, "copy", "float32", "float32"),
    (2, "qkvo", True, "mean", "float32", "float32"),
    (2, "qkv", False, "copy", "bfloat16", "float32"),
    (2, "ko", False, "copy", "float32", "float16"),
    (1, "qkvo", False, "copy", "float32", "bfloat16"),
    (1, "kv", True, "mean", "float32", "float32"),
    (1, "qo", False, "mean", "bfloat16", "bfloat16"),
]


@pytest.mark.parametrize(("kv_heads", "projections", "tied", "merge", "stored", "dtype"), CASES)
def test_materialized_is_exported_is_loaded(
    tmp_path: Path,
    kv_heads: int,
    projections: str,
    tied: bool,
    merge: str,
    stored: str,
    dtype: str,
) -> None:
    kind = getattr(torch, dtype)
    source = make_source(tmp_path / "source", kv_heads, tied, getattr(torch, stored))
    plan = make_plan(kv_heads, projections)
    result = export(source, plan, tmp_path / "export", dtype=kind, merge=merge)

    expected = materialized(source, plan, merge)
    for parameter in expected.parameters():  # not .to(): that rounds the rotary frequencies too
        parameter.data = parameter.data.to(kind)
    compact, dense = load(result.paths["compact"]), load(result.paths["dense"])
    assert type(compact) is SharedLlamaForCausalLM
    assert type(dense) is LlamaForCausalLM
    assert dense.dtype == compact.dtype == kind

    weights = dict(expected.named_parameters())
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, weights.pop(name)), name
    assert not weights
    expanded = ExpandedFolder(result.paths["compact"])
    for name, parameter in dense.named_parameters():
        assert torch.equal(expanded.read(name), parameter), name

    reference = logits(expected)
    assert (logits(dense) - reference).abs().max() <= 1e-5
    assert (logits(compact) - reference).abs().max() <= 1e-5

    base, small = plan.savings(source.config).bytes(kind.itemsize)
    assert result.bytes == {"compact": small, "dense": base}
    assert small < base
    assert (
        sum(
            p.nbytes
            for p in SharedLlamaForCausalLM.from_pretrained(result.paths["compact"]).parameters()
        )
        == small
    )


def test_sharded_input_and_output_equal_one_file(tmp_path: Path) -> None:
    whole = make_source(tmp_path / "whole", kv_heads=2)
    split = make_source(tmp_path / "split", kv_heads=2, shard_size=9000)
    assert len(split.shards()) > 5
    plan = make_plan(2, "qkvo")
    one = export(whole, plan, tmp_path / "one", merge="mean")
    many = export(split, plan, tmp_path / "many", merge="mean", shard_bytes=5000)
    for kind, path in many.paths.items():
        shards = open_weights(path).shards()
        assert len(shards) > 5
        largest = HIDDEN * 64 * 4  # the embedding has a shard of its own
        assert all(shard.stat().st_size < largest + 1000 for shard in shards)
        verify_equal(open_weights(path), open_weights(one.paths[kind]))
        assert torch.equal(logits(load(path)), logits(load(one.paths[kind])))


def test_a_single_format_is_written_and_verified_alone(tmp_path: Path) -> None:
    source, plan = make_source(tmp_path / "source"), make_plan(4, "qkv")
    both = export(source, plan, tmp_path / "both")
    for kind in ("compact", "dense"):
        alone = export(source, plan, tmp_path / kind, formats=[kind])
        assert list(alone.paths) == [kind]
        assert [p.name for p in (tmp_path / kind).iterdir()] == [kind]
        name = "model.safetensors"
        assert sha256(alone.paths[kind] / name) == sha256(both.paths[kind] / name)


def test_progress_counts_every_byte_and_threads_are_given_back(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    before = torch.get_num_threads()
    result = export(
        make_source(tmp_path / "source"),
        make_plan(4, "q"),
        tmp_path / "export",
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )
    size = result.bytes["dense"]
    assert seen["write"][-1] == (2 * size, 2 * size)
    assert seen["verify"][-1] == (size, size)
    assert all(steps == sorted(steps) for steps in seen.values())
    assert torch.get_num_threads() == before


def test_expanded_slices_equal_slices_of_the_dense_tensors(tmp_path: Path) -> None:
    plan = make_plan(4, "qkvo")
    result = export(make_source(tmp_path / "source"), plan, tmp_path / "export")
    expanded, dense = (open_weights(result.paths[kind]) for kind in ("compact", "dense"))
    layout = HeadLayout.from_config(dense.config)
    for p in "qkvo":
        name = layout.parameter_name(2, p)
        for start, stop in ((0, 8), (24, 32), (3, 29)):
            key = (slice(None), slice(start, stop)) if p == "o" else slice(start, stop)
            assert torch.equal(expanded.slice(name)[key], dense.slice(name)[key])


def test_a_compact_folder_is_an_export_source(tmp_path: Path) -> None:
    """As a healed compact model: exporting it again gives the same bytes."""
    plan = make_plan(2, "qkvo")
    first = export(make_source(tmp_path / "source", kv_heads=2), plan, tmp_path / "first")
    second = export(ExpandedFolder(first.paths["compact"]), plan, tmp_path / "second")
    for kind in ("compact", "dense"):
        for name in ("model.safetensors", "config.json"):
            assert sha256(first.paths[kind] / name) == sha256(second.paths[kind] / name)


def test_a_released_plan_exports_its_effective_ties(tmp_path: Path) -> None:
    chain = (HeadTie((2, 0), (1, 0), ("q", "k")), HeadTie((1, 0), (0, 0), ("q", "k")))
    plan = SharingPlan(chain, released=True)
    result = export(make_source(tmp_path / "source"), plan, tmp_path / "export")
    config = json.loads((result.paths["compact"] / "config.json").read_text())
    assert config["sharing"] == SharingPlan((chain[0],)).to_dict()
    assert result.bytes["dense"] - result.bytes["compact"] == 2 * 8 * HIDDEN * 4


def test_mlp_biases_and_an_own_head_dim_survive(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", kv_heads=2, mlp_bias=True, head_dim=12)
    result = export(source, make_plan(2, "qkvo"), tmp_path / "export")
    reference = logits(load(result.paths["dense"]))
    assert (logits(load(result.paths["compact"])) - reference).abs().max() <= 1e-5


# --- what the folders hold ------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["stories260K", "stories260K-mha"])
def test_real_checkpoint_generates_the_same_tokens(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Logits reach 23 here: two correct fp32 forwards of the stock model (eager, sdpa) differ by
    2.5e-5, and each is 5e-5 off the exact value. So equality is asserted in float64."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    source = WeightsFolder(shared / "models" / model)
    units = HeadLayout.from_config(source.config).units
    ties = [HeadTie((layer, 1), (0, units - 1), ("q", "k", "v")) for layer in range(1, 5)]
    plan = SharingPlan((*ties, HeadTie((4, 0), (3, 0), ("o",))))
    result = export(source, plan, tmp_path / "export", tokenizer=source.path)
    expected = materialized(source, plan, "copy")
    text = torch.from_numpy(np.load(shared / "golden" / "input_ids.npy"))
    tokenizer = AutoTokenizer.from_pretrained(result.paths["compact"])
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    story = expected.generate(prompt, max_new_tokens=24, do_sample=False)
    reference = exact_logits(expected, text)
    for path in result.paths.values():
        loaded = load(path)
        assert (logits(loaded, text) - reference).abs().max() <= 2e-4
        assert (exact_logits(loaded, text) - reference).abs().max() <= 1e-10
        loaded = load(path)
        tokens = loaded.generate(prompt, max_new_tokens=24, do_sample=False)
        assert tokens.tolist() == story.tolist()
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (path / name).read_bytes() == (source.path / name).read_bytes()


def test_manifest_hashes_every_file_and_the_card_has_the_numbers(tmp_path: Path) -> None:
    source, plan = make_source(tmp_path / "source"), make_plan(4, "qkv")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer" / "LICENSE.txt").write_text("terms")
    result = export(
        source,
        plan,
        tmp_path / "export",
        tokenizer=tmp_path / "tokenizer",
        recipe={"name": "demo", "seed": 7},
        written="name: demo # as it was typed\n",
        notes={"base_model": "a/base", "figures": {"weight bytes": "900, 10.0% less than stock"}},
    )
    measured = {"base": 11.0, "continued": None, "post": 12.345678}
    update_notes(result.paths["compact"], {"numbers": {"perplexity": measured}})
    for kind, path in result.paths.items():
        manifest = json.loads((path / "manifest.json").read_text())
        present = {file.name for file in path.iterdir()} - {"manifest.json"}
        assert set(manifest["files"]) == present
        assert {"LICENSE.txt", "tokenizer.json", "README.md", "config.json"} <= present
        for name, facts in manifest["files"].items():
            assert facts == {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
        assert manifest["plan"] == plan.to_dict()
        assert manifest["notes"]["recipe"] == {"name": "demo", "seed": 7}
        assert (path / "recipe-as-written.yaml").read_text() == "name: demo # as it was typed\n"
        card = (path / "README.md").read_text()
        assert f"{manifest['tensors']['parameters']:,}" in card
        assert "| weight bytes | 900, 10.0% less than stock |" in card
        assert ("| perplexity of this model | 12.35 |" in card) == (kind == "compact")
        assert "perplexity of *continued*" not in card, "it was not trained"
        assert len(card.splitlines()) <= 60
        assert ModelCard(card).data.to_dict() == {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "base_model": "a/base",
            "license": "other",
            "license_name": "of-the-base",
            "license_link": "LICENSE.txt",
            "tags": ["llama", "postshare", "attention-sharing"],
        }


def test_compact_config_and_carried_code(tmp_path: Path) -> None:
    plan = make_plan(4, "qk")
    result = export(make_source(tmp_path / "source"), plan, tmp_path / "export")
    config = json.loads((result.paths["compact"] / "config.json").read_text())
    assert config["model_type"] == "shared_llama"
    assert config["dtype"] == "float32"
    assert config["sharing"] == plan.to_dict()
    assert config["auto_map"] == {
        "AutoConfig": "entry.SharedLlamaConfig",
        "AutoModel": "entry.SharedLlamaModel",
        "AutoModelForCausalLM": "entry.SharedLlamaForCausalLM",
    }
    code = {file.name for file in result.paths["compact"].glob("*.py")}
    assert code == {
        f"{name}.py"
        for name in (
            "atomic_files",
            "attention",
            "basis",
            "cache",
            "configuration",
            "entry",
            "errors",
            "heads",
            "modeling",
            "packing",
            "plan",
            "projections",
            "removal",
            "savings",
            "spans",
            "ties",
        )
    }
    assert not list(result.paths["dense"].glob("*.py"))
    dense = json.loads((result.paths["dense"] / "config.json").read_text())
    assert dense["architectures"] == ["LlamaForCausalLM"]
    assert not {"sharing", "auto_map"} & set(dense)


@pytest.mark.more  # test_export_spans.py has it with ties, spans and pooled heads
def test_compact_loads_where_the_package_is_not_installed(tmp_path: Path) -> None:
    result = export(make_source(tmp_path / "source"), make_plan(4, "qkvo"), tmp_path / "export")
    check_without_package(result.paths["compact"], tmp_path)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_an_export(mask: int, mode: int, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", shard_size="20KB")
    (source.path / "tokenizer.json").write_text("{}")
    (source.path / "additional_chat_templates").mkdir()
    (source.path / "additional_chat_templates" / "a.jinja").write_text("")
    for path in source.path.rglob("*"):
        path.chmod(0o700)  # not what decides
    before = os.umask(mask)
    try:
        export(source, make_plan(4, "qk"), tmp_path / "export", tokenizer=source.path)
    finally:
        os.umask(before)
    found = [tmp_path / "export", *(tmp_path / "export").rglob("*")]
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_file()} == {mode}
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_dir()} == {0o777 & ~mask}


# --- verification ---------------------------------------------------------------------------------


def test_verification_catches_one_changed_byte_of_a_compact_slice(tmp_path: Path) -> None:
    source, plan = make_source(tmp_path / "source"), make_plan(4, "qkvo")
    result = export(source, plan, tmp_path / "export")
    reference = MaterializedReader(source, plan)
    verify_equal(ExpandedFolder(result.paths["compact"]), reference)
    file = result.paths["compact"] / "model.safetensors"
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    name = "model.layers.0.self_attn.k_proj.weight"
    raw[8 + size + header[name]["data_offsets"][0] + 41] ^= 1
    file.write_bytes(raw)
    with pytest.raises(PostshareError, match=r"layers\.0\.self_attn\.k_proj\.weight differs"):
        verify_equal(ExpandedFolder(result.paths["compact"]), reference)


def test_export_refuses_wrong_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = job_module.select_units

    def wrong(weight: Any, units: list[int], *rest: Any) -> torch.Tensor:
        return right(weight, units[::-1], *rest)

    monkeypatch.setattr(job_module, "select_units", wrong)
    with pytest.raises(PostshareError, match="differs from the materialized weights"):
        export(make_source(tmp_path / "source"), make_plan(4, "q"), tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_layer_check_catches_a_forward_that_reads_the_wrong_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are right, the compact model's arithmetic is not."""
    right = SharedLinear.connect

    def swapped(self: SharedLinear, pieces: tuple[Piece, ...]) -> None:
        """A tied piece is taken from where its neighbour lies."""
        wrong = [
            piece._replace(first=piece.first - 1)
            if piece.owner is not self and piece.first
            else piece
            for piece in pieces
        ]
        right(self, tuple(wrong))

    monkeypatch.setattr(SharedLinear, "connect", swapped)
    with pytest.raises(PostshareError, match=r"layer \d computes other outputs"):
        export(make_source(tmp_path / "source"), make_plan(4, "k"), tmp_path / "export")


def test_verification_compares_the_bytes_with_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"compact": 1, "dense": 1}
    monkeypatch.setattr(job_module.ExportJob, "sizes", sizes)
    with pytest.raises(PostshareError, match="bytes of tensors, the plan says 1;"):
        export(make_source(tmp_path / "source"), make_plan(4, "k"), tmp_path / "export")


# --- interrupted, repeated, full ------------------------------------------------------------------


def test_a_finished_export_is_left_alone_and_a_missing_format_is_added(tmp_path: Path) -> None:
    source, plan = make_source(tmp_path / "source"), make_plan(4, "qk")
    options: dict[str, Any] = {"folder": tmp_path / "export"}
    first = export(source, plan, **options, formats=["compact"])
    before = {p: p.stat().st_mtime_ns for p in first.paths["compact"].iterdir()}
    both = export(source, plan, **options)
    assert {p: p.stat().st_mtime_ns for p in both.paths["compact"].iterdir()} == before
    assert both.paths["dense"].is_dir()
    os.utime(source.shards()[0])  # touched, with equal weights: still the same export
    export(source, plan, **options)
    assert {p: p.stat().st_mtime_ns for p in both.paths["compact"].iterdir()} == before


def test_another_export_is_never_overwritten(tmp_path: Path) -> None:
    source, plan, folder = make_source(tmp_path / "a"), make_plan(4, "qk"), tmp_path / "export"
    export(source, plan, folder)
    hashes = {p: sha256(p) for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(PostshareError, match=r"compact holds another export \(plan_sha256"):
        export(source, make_plan(4, "qkv"), folder)
    with pytest.raises(PostshareError, match=r"compact holds another export \(dtype 'float32'"):
        export(source, plan, folder, dtype=torch.bfloat16)
    weight = "model.layers.2.mlp.up_proj.weight"
    other = LlamaForCausalLM.from_pretrained(source.path)
    other.get_parameter(weight).data[0, 0] += 1
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(PostshareError, match="compact holds an export of other weights"):
        export(WeightsFolder(tmp_path / "b"), plan, folder)
    assert {p: sha256(p) for p in folder.rglob("*") if p.is_file()} == hashes
    (folder / "dense" / "manifest.json").unlink()
    with pytest.raises(PostshareError, match="dense is no finished export"):
        export(source, plan, folder)


def test_what_an_interrupted_export_left_is_made_again(tmp_path: Path) -> None:
    leftover = tmp_path / "export" / "compact.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.safetensors").write_bytes(b"half")
    result = export(make_source(tmp_path / "source"), make_plan(4, "q"), tmp_path / "export")
    assert not leftover.exists()
    assert not (result.paths["compact"] / "half.safetensors").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(self: ShardWriter) -> None:
        raise error

    monkeypatch.setattr(ShardWriter, "close", interrupted)
    with pytest.raises(error):
        export(make_source(tmp_path / "source"), make_plan(4, "q"), tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(job_module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(PostshareError, match="GB are free; free disk space"):
        export(make_source(tmp_path / "source"), make_plan(4, "q"), tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """A real, small file system: the tensors fit by the arithmetic, the files do not."""
    source = make_source(tmp_path / "source")
    pages = -(-SharingPlan().savings(source.config).bytes(2)[0] // 4096)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={pages * 4}k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        with pytest.raises(PostshareError, match=r"could not be written .*[Nn]o space left"):
            export(
                source, make_plan(4, "q"), small / "export", dtype=torch.bfloat16, formats=["dense"]
            )
        assert list((small / "export").iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


# --- bad arguments --------------------------------------------------------------------------------


def test_bad_arguments(tmp_path: Path) -> None:
    source, folder = make_source(tmp_path / "source"), tmp_path / "export"
    for options, message in (
        ({"formats": ["onnx"]}, "unknown export formats"),
        ({"formats": []}, "unknown export formats"),
        ({"dtype": torch.int8}, "cannot export as"),
        ({"tokenizer": tmp_path}, "has no tokenizer"),
    ):
        with pytest.raises(PostshareError, match=message):
            export(source, make_plan(4, "q"), folder, **options)
    with pytest.raises(PostshareError, match="target layer 7 is out of range"):
        export(source, SharingPlan((HeadTie((7, 0), (0, 0), ("q",)),)), folder)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(make_source(tmp_path / "source").path)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 1e6
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(PostshareError, match=r"layers\.1\.mlp\.up_proj\.weight has values that"):
        export(
            WeightsFolder(tmp_path / "large"),
            make_plan(4, "q"),
            tmp_path / "export",
            dtype=torch.float16,
        )


TOKENIZER = """
import sys
sys.modules["sa_models"] = None
from transformers import AutoTokenizer
loaded = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
print(loaded("def main")["input_ids"])
"""


def test_the_tokenizer_of_a_compact_folder_asks_nobody_to_run_code(tmp_path: Path) -> None:
    """As the card says it is loaded, where postshare is not installed."""
    base = demo_base_path()
    export(open_weights(base), SharingPlan(removed=((1, 0),)), tmp_path / "export", tokenizer=base)
    folder = tmp_path / "export" / "compact"
    assert "trust_remote_code=False" in (folder / "README.md").read_text()
    said = printed(TOKENIZER, tmp_path, folder)
    assert "[y/N]" not in said
    assert said.split("\n")[-2] == str(AutoTokenizer.from_pretrained(base)("def main")["input_ids"])


def test_the_longest_card_has_60_lines() -> None:
    """Every kind of row at once, which no plan has, and 20 spans."""
    spans = [
        {"leader": layer, "followers": [layer + 1], "share": "kv", "head_map": None}
        for layer in range(0, 40, 2)
    ]
    tie = {"projections": ["q", "k"]}
    plan = {"ties": [tie], "removed": [[0, 0]], "spans": spans, "kv_heads": 2, "basis": None}
    figures = dict.fromkeys(("weights", "cache", "caches", "decode", "perplexity"), "words")
    licence = {"license": "other", "license_name": "llama2", "license_link": "LICENSE.txt"}
    measured = {"perplexity": dict.fromkeys(("base", "continued", "direct", "post"), 10.0)}
    notes = {"name": "a", "base_model": "a/base", "licence": licence, "recipe_file": "recipe.yaml"}
    card = model_card(
        {
            "format": "compact",
            "notes": {**notes, "figures": figures, "numbers": measured},
            "plan": plan,
            "merge": "copy",
            "leaders": "mean",
            "dtype": "bfloat16",
            "cache": {"bytes_per_token": 1, "base_bytes_per_token": 2},
            "heads": {"tied": 1, "removed": 1, "total": 9, "dropped_layers": 1, "stored_ratio": 0},
            "tensors": {"base_parameters": 9, "parameters": 8, "bytes": 16},
        }
    )
    assert len(card.splitlines()) <= 60
    assert "| layers that reuse another's kv | 1 of 0; 3 of 2; " in card
    assert card.count("license") == 3
