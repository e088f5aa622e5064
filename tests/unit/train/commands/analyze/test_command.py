"""`postshare analyze`: its numbers against loops over what a stock Llama returns."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.export.export import export_model
from sa_models.plan import AttentionSpan, HeadTie, SharingPlan
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support import small_models
from train.cli import main
from train.models.tokenizer import load_tokenizer

LENGTH, BLOCKS = 24, 2
HEAD_DIM = 8
KNOWN = {
    "BASE": "base",
    "TEXT": "text.txt",
    "SHORT": "short.txt",
    "OTHER": "other",
    "RUN": "run",
    "SPANS": "spans/compact",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of two KV groups; exports with a tie and a removed unit, and with a span."""
    folder = tmp_path_factory.mktemp("analyze")
    base = small_models.dense(folder / "base", num_hidden_layers=3)
    text = folder / "text.txt"
    text.write_text(small_models.TEXT * 12, encoding="utf-8")
    (folder / "short.txt").write_text("Every stage reads files.")
    shutil.copytree(base, folder / "other")
    (folder / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "run").mkdir()
    small_models.recipe(folder / "run", base, text).save(folder / "run" / "recipe.yaml")
    for name, plan in (
        ("tied", SharingPlan(ties=(HeadTie((2, 1), (0, 0), ("q", "k", "v")),), removed=((1, 0),))),
        ("spans", SharingPlan(spans=(AttentionSpan(0, (1,)),))),
    ):
        export_model(
            WeightsFolder(base), plan, folder / name,
            formats=("compact", "dense") if plan.has_stock_form else ("compact",),
            dtype=torch.bfloat16, shard_bytes=10**9, tokenizer=base,
        )  # fmt: skip
    return folder


def analyze(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["analyze", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def analysis(models: Path, model: str, *options: str) -> dict[str, Any]:
    output = models / "out" / model
    text = ["--text", str(models / "text.txt"), "--output", str(output)]
    size = ["--context", str(LENGTH), "--blocks", str(BLOCKS)]
    assert analyze(str(models / model), *text, *size, *options) == 0
    return json.loads((output / "analysis.json").read_text())


def blocks() -> torch.Tensor:
    ids = load_tokenizer("demo-base")(small_models.TEXT * 12, add_special_tokens=False)["input_ids"]
    return torch.tensor([1, *ids][: LENGTH * BLOCKS]).view(BLOCKS, LENGTH)


def stock(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def isotropy_by_hand(
    model: LlamaForCausalLM, one: int, other: int, skip: int, heads: range
) -> float:
    """Mean cosine of the rows of two layers, key by key; `skip`: 1 without the first key."""
    cosines = []
    for row in blocks():
        maps = model(row[None], output_attentions=True).attentions
        for head in heads:
            for query in range(1 + skip, LENGTH):
                a, b = (maps[at][0, head, query, skip : query + 1].double() for at in (one, other))
                cosines.append(float(a @ b / (a.norm() * b.norm())))
    return sum(cosines) / len(cosines)


def cosine_by_hand(model: LlamaForCausalLM, one: tuple[int, int], other: tuple[int, int]) -> float:
    """Of q and k of two KV groups of two query heads each."""

    def flat(layer: int, unit: int) -> torch.Tensor:
        attention = model.model.layers[layer].self_attn
        q = attention.q_proj.weight[2 * unit * HEAD_DIM : 2 * (unit + 1) * HEAD_DIM]
        k = attention.k_proj.weight[unit * HEAD_DIM : (unit + 1) * HEAD_DIM]
        return torch.cat([q.flatten(), k.flatten()]).double()

    return float(torch.cosine_similarity(flat(*one), flat(*other), dim=0))


def loss_by_hand(model: LlamaForCausalLM) -> float:
    total = 0.0
    for row in blocks():
        chances = model(row[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(chances[at, row[at + 1]]) for at in range(LENGTH - 1))
    return total / (BLOCKS * (LENGTH - 1))


@torch.no_grad()
def test_the_numbers_of_a_dense_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = analysis(models, "base", "--sensitivity")
    model = stock(models / "base")
    for key, skip in (("maps", 0), ("without_sink", 1)):
        for one, other in ((0, 1), (0, 2), (1, 2)):
            expected = isotropy_by_hand(model, one, other, skip, range(4))
            assert found["isotropy"][key][other][one] == pytest.approx(expected, abs=1e-5)
    for one, other in (((1, 0), (0, 1)), ((2, 1), (1, 0)), ((2, 0), (0, 0))):
        at = found["similarity"][2 * one[0] + one[1]][2 * other[0] + other[1]]
        assert at == pytest.approx(cosine_by_hand(model, one, other), abs=1e-5)
    candidates = [(layer, unit) for layer in (0, 1) for unit in (0, 1)]
    best = max(candidates, key=lambda source: cosine_by_hand(model, (2, 1), source))
    (entry,) = (pair for pair in found["best"] if pair["target"] == [2, 1])
    assert entry["source"] == list(best)
    assert 0 <= entry["p"] <= 1
    sensitivity, loss = found["sensitivity"], loss_by_hand(model)
    assert sensitivity["loss"] == pytest.approx(loss, abs=1e-5)
    assert [len(row) for row in sensitivity["without_unit"]] == [2, 2, 2]
    for layer in range(3):
        without = stock(models / "base")
        without.model.layers[layer].self_attn.o_proj.weight.zero_()
        rise = loss_by_hand(without) - loss
        assert sensitivity["without_layer"][layer] == pytest.approx(rise, abs=1e-5)
    out = capsys.readouterr().out
    assert f"{found['isotropy']['maps'][2][1]:.3f}" in out
    assert f"{sensitivity['without_layer'][1]:+.3f}" in out
    names = {file.name for file in (models / "out" / "base").iterdir()}
    pictures = {
        f"{n}.{k}" for n in ("isotropy", "similarity", "sensitivity") for k in ("png", "svg")
    }
    assert names == pictures | {"analysis.json"}


@torch.no_grad()
def test_a_compact_export_is_what_it_computes(models: Path) -> None:
    """Its dense export gives the same numbers, but for what is removed: no number at all."""
    found = analysis(models, "tied/compact", "--sensitivity")
    dense = stock(models / "tied" / "dense")
    of_removed = 2 * 1 + 0
    assert found["similarity"][of_removed] == [None] * 6
    assert [row[of_removed] for row in found["similarity"]] == [None] * 6
    assert [1, 0] not in [pair["target"] for pair in found["best"]]
    assert [1, 0] not in [pair["source"] for pair in found["best"]]
    (tied,) = (pair for pair in found["best"] if pair["target"] == [2, 1])
    assert (tied["source"], tied["score"]) == ([0, 0], pytest.approx(1.0))
    expected = isotropy_by_hand(dense, 0, 1, 0, range(2, 4))  # the heads that layer 1 still has
    assert found["isotropy"]["maps"][1][0] == pytest.approx(expected, abs=1e-5)
    assert found["sensitivity"]["loss"] == pytest.approx(loss_by_hand(dense), abs=1e-5)


def test_followers_have_their_leaders_maps_and_no_scores(models: Path) -> None:
    found = analysis(models, "spans/compact", "--sensitivity")
    assert found["isotropy"]["maps"][1][0] == pytest.approx(1.0)
    assert found["isotropy"]["maps"][2][0] < 0.999
    assert {tuple(pair["target"]) for pair in found["best"]} == {(2, 0), (2, 1)}
    assert {pair["source"][0] for pair in found["best"]} == {0}
    assert found["sensitivity"]["without_unit"][1] == [None, None]
    assert all(math.isfinite(rise) for rise in found["sensitivity"]["without_layer"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["BASE"], "pass --text FILE"),
        (["BASE", "--text", "nothing.txt"], "nothing.txt: no such file"),
        (["BASE", "--text", "SHORT"], "the text is too short: 9 tokens, and a block takes 128"),
        (["BASE", "--text", "TEXT", "--blocks", "99"], "--blocks 99: the text has "),
        (["BASE", "--text", "TEXT", "--context", "129"], "has 128 positions"),
        (["BASE", "--text", "TEXT", "--score", "kq"], "--score kq: unknown; use one of q, k,"),
        (["OTHER", "--text", "TEXT"], "is a 'gpt2' model"),
        (["RUN", "--text", "TEXT"], "has no export yet"),
        (["SPANS", "--text", "TEXT", "--score", "output"], "models without spans"),
        (["./nothing", "--text", "TEXT"], "'./nothing' is no folder here"),
        (["BASE", "--text", "TEXT", "--output", "TEXT"], "text.txt is a file, no folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    models: Path,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert analyze(*[str(models / KNOWN[a]) if a in KNOWN else a for a in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []
