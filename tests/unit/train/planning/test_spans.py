"""The spans that a recipe finds, against every combination, measured by another implementation."""

from __future__ import annotations

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cosine_similarity
from transformers import LlamaForCausalLM

from sa_models.calibration.partial_forward import Restart
from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.spans import ABSENT, AttentionSpan
from tests.support.reference import Reference
from tests.support.spans_base import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    base_model,
    calibration_ids,
    ids,
    read,
    recipe,
    reference_loss,
)
from train.common.run_files import SEARCH_CACHE
from train.distributed.engines.start import start
from train.planning.spans import SpanFinder, spans_table
from train.stages.pipeline import plan, run
from train.stages.run import Run

pytestmark = pytest.mark.usefixtures("sketched")

BLOCKS = 3
"""Calibration blocks."""

Combination = tuple[tuple[int, tuple[int, ...]], ...]


def found_spans(folder: Path) -> tuple[AttentionSpan, ...]:
    return SharingPlan.load(folder / "plan.json").spans


def combinations(followers: int, most: int, skip: tuple[int, ...] = ()) -> list[Combination]:
    """Every set of contiguous spans, no two of which share a layer, with that many followers."""
    spans = [
        (leader, tuple(range(leader + 1, last + 1)))
        for leader, last in itertools.combinations(range(LAYERS), 2)
        if last - leader <= most and not {*range(leader, last + 1)} & {*skip}
    ]
    found = []
    for size in range(1, followers + 1):
        for some in itertools.combinations(spans, size):
            layers = [layer for leader, f in some for layer in (leader, *f)]
            if len(set(layers)) == len(layers) == followers + size:
                found.append(some)
    return found


def isotropy_by_row(home: Path, tokens: torch.Tensor, sink: bool) -> torch.Tensor:
    """(layers, heads, layers, heads): mean cosine of attention rows, one pair of rows at a time."""
    maps = Reference.of(base_model(home), SharingPlan())(tokens).maps
    first = 1 if sink else 2  # rows with a single key are left out
    rows = torch.stack(maps)[:, :, :, first:]  # (layers, blocks, heads, rows, keys)
    if not sink:
        rows = rows[..., 1:]
    value = torch.zeros(LAYERS, HEADS, LAYERS, HEADS, dtype=torch.float64)
    for a, h, b, g in itertools.product(range(LAYERS), range(HEADS), range(LAYERS), range(HEADS)):
        value[a, h, b, g] = cosine_similarity(rows[a, :, h], rows[b, :, g], dim=-1).mean()
    return value


def of_layers(by_head: torch.Tensor) -> torch.Tensor:
    return torch.stack([by_head[:, h, :, h] for h in range(HEADS)]).mean(0)


# --- what is found --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "leaders", "kv_heads"),
    [
        ("attention", "mean", None),
        ("kv", "mean", None),
        ("kv", "copy", None),
        ("attention", "mean", 2),
    ],
)
def test_loss_finds_the_best_of_all_combinations(
    home: Path, tmp_path: Path, share: str, leaders: str, kv_heads: int | None
) -> None:
    section = {"strategy": "loss", "layers": 2, "max_followers": 2, "skip_layers": [0]}
    section |= {"share": share, "leaders": leaders, "calibration_blocks": BLOCKS}
    made = recipe(home, tmp_path / "run", spans=section, heads={"kv_heads": kv_heads})
    plan(made)
    tokens, base = calibration_ids(made, BLOCKS), base_model(home)

    def loss(*spans: tuple[int, tuple[int, ...]]) -> float:
        shared = tuple(AttentionSpan(leader, f, share) for leader, f in spans)
        return reference_loss(base, SharingPlan(kv_heads=kv_heads, spans=shared), tokens, leaders)

    dense, measured = loss(), read(made.folder, "spans.json")
    assert measured["base_loss"] == pytest.approx(dense, abs=1e-5)
    rises = {
        (entry["leader"], tuple(entry["followers"])): entry["loss_rise"]
        for entry in measured["candidates"]
    }
    possible = combinations(2, 2, skip=(0,))
    # All of one follower are measured; of the others those that may be among the best.
    assert {span for (span,) in combinations(1, 2, (0,))} <= rises.keys()
    assert rises.keys() <= {span for some in possible for span in some}
    expected = {span: loss(span) - dense for span in rises}
    for span, rise in rises.items():
        assert rise == pytest.approx(expected[span], abs=1e-5), span
    known = [some for some in possible if rises.keys() >= {*some}]
    best = min(known, key=lambda some: sum(expected[span] for span in some))
    spans = found_spans(made.folder)
    assert [(s.leader, s.followers) for s in spans] == sorted(best)
    assert {s.share for s in spans} == {share}
    # All ways to choose are compared by what their spans cost together, the recipe's way first.
    assert [choice["strategy"] for choice in measured["choices"]] == ["loss", "isotropy", "late"]
    for choice in measured["choices"]:
        together = loss(*((s["leader"], tuple(s["followers"])) for s in choice["spans"]))
        assert choice["loss"] == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize("sink", [True, False])
def test_isotropy_finds_the_most_similar_maps(home: Path, tmp_path: Path, sink: bool) -> None:
    section = {"strategy": "isotropy", "layers": 3, "max_followers": 3, "sink": sink}
    section |= {"calibration_blocks": BLOCKS}
    made = recipe(home, tmp_path / "run", spans=section)
    plan(made)
    tokens, measured = calibration_ids(made, BLOCKS), read(made.folder, "spans.json")
    for counted, name in ((True, "maps"), (False, "without_sink")):
        cosines = of_layers(isotropy_by_row(home, tokens, counted))
        difference = torch.tensor(measured["isotropy"][name], dtype=torch.float64) - cosines
        assert float(difference.abs().max()) < 1e-5
        if counted == sink:
            used = cosines

    def score(some: Combination) -> float:
        return sum(float(used[leader, f]) for leader, followers in some for f in followers)

    best = max(combinations(3, 3), key=score)
    assert [(s.leader, s.followers) for s in found_spans(made.folder)] == sorted(best)
    first = measured["choices"][0]
    assert (first["strategy"], measured["candidates"]) == ("isotropy", [])
    assert first["isotropy"] == pytest.approx(score(best) / 3, abs=1e-5)


def test_late_is_the_published_rule(home: Path, tmp_path: Path) -> None:
    section = {"strategy": "late", "layers": 3, "max_followers": 2, "share": "kv"}
    made = recipe(home, tmp_path / "run", spans=section)
    plan(made)
    # The last layer, 5, is left alone; 3 and 4 follow 2; of the layers below, 1 follows 0.
    late = (AttentionSpan(0, (1,), "kv"), AttentionSpan(2, (3, 4), "kv"))
    assert found_spans(made.folder) == late
    names = [choice["strategy"] for choice in read(made.folder, "spans.json")["choices"]]
    assert names == ["late", "isotropy"]


def test_more_followers_than_the_published_rule_has(home: Path, tmp_path: Path) -> None:
    """All layers but the first follow it; the rule would leave the last one alone."""
    section = {"layers": LAYERS - 1, "max_followers": LAYERS - 1, "calibration_blocks": 1}
    made = recipe(home, tmp_path / "run", spans={"strategy": "isotropy", **section})
    plan(made)
    assert found_spans(made.folder) == (AttentionSpan(0, tuple(range(1, LAYERS))),)
    names = [choice["strategy"] for choice in read(made.folder, "spans.json")["choices"]]
    assert names == ["isotropy"]
    with pytest.raises(PostshareError, match="5 followers, 1 to 4 are possible"):
        plan(recipe(home, tmp_path / "late", spans={"strategy": "late", **section}))
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("sink", [True, False])
def test_heads_are_matched_by_their_maps(home: Path, tmp_path: Path, sink: bool) -> None:
    spans = [{"leader": 1, "followers": [2, 4]}, {"leader": 0, "followers": [3]}]
    section = {"spans": spans, "match_heads": True, "calibration_blocks": BLOCKS, "sink": sink}
    made = recipe(home, tmp_path / "run", spans=section)
    plan(made)
    tokens, found = calibration_ids(made, BLOCKS), found_spans(made.folder)
    cosines = isotropy_by_row(home, tokens, sink)
    assert [(s.leader, s.followers) for s in found] == [(1, (2, 4)), (0, (3,))]
    for span in found:
        assert span.head_map is not None
        for follower, heads in zip(span.followers, span.head_map, strict=True):
            # (heads of the follower, heads of the leader)
            assert heads == tuple(cosines[follower, :, span.leader].argmax(-1).tolist())
    assert any(row != tuple(range(HEADS)) for span in found for row in span.head_map or ())
    (choice,) = read(made.folder, "spans.json")["choices"]
    assert choice["strategy"] == "listed"
    mapped = reference_loss(base_model(home), SharingPlan(spans=found), tokens)
    assert choice["loss"] == pytest.approx(mapped, abs=1e-5)
    plain = tuple(AttentionSpan(s.leader, s.followers) for s in found)
    other = reference_loss(base_model(home), SharingPlan(spans=plain), tokens)
    assert mapped != pytest.approx(other, abs=1e-4)


def test_found_spans_can_be_matched_too(home: Path, tmp_path: Path) -> None:
    section = {"strategy": "late", "layers": 2, "match_heads": True, "calibration_blocks": 1}
    made = recipe(home, tmp_path / "run", spans=section)
    plan(made)
    (span,) = found_spans(made.folder)
    assert (span.leader, span.followers) == (2, (3, 4))
    assert span.head_map is not None
    assert [len(row) for row in span.head_map] == [HEADS, HEADS]


# --- what is written and said ---------------------------------------------------------------------


def test_the_measurements_are_kept_and_not_made_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"strategy": "loss", "layers": 2, "max_followers": 1, "calibration_blocks": 1}
    made = recipe(home, tmp_path / "run", spans=section, train={"steps": 1})
    plan(made)
    starts = made.folder / "provenance.json"  # the one file that every start adds to
    assert starts.is_file()
    before = {f: f.read_bytes() for f in made.folder.iterdir() if f != starts}
    names = {"recipe.yaml", "plan.json", "spans.json", "plan-isotropy.png", "plan-isotropy.svg"}
    names |= {"plan-search.md", "plan-search-cache.jsonl"}
    assert {f.name for f in before} == {*names, ".lock", "inputs.json"}
    assert (made.folder / "plan-isotropy.png").read_bytes().startswith(b"\x89PNG")
    assert read(made.folder, "spans.json")["calibration_blocks"] == 1
    monkeypatch.setattr(SpanFinder, "find", lambda *_: pytest.fail("measured again"))
    run(made)
    run(made)
    assert {f: f.read_bytes() for f in before} == before
    assert read(made.folder, "summary.json")["structure"]["spans"] == [
        span.to_dict() for span in found_spans(made.folder)
    ]


def test_a_second_start_measures_what_is_missing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of its measurements: the same spans, each measured once."""
    section = {"strategy": "loss", "layers": 2, "max_followers": 2, "calibration_blocks": 2}
    whole = recipe(home, tmp_path / "whole", spans=section)
    plan(whole)
    lines = (whole.folder / SEARCH_CACHE).read_text().splitlines(keepends=True)
    half = len(lines) // 2
    of = recipe(home, tmp_path / "half", spans=section)
    of.folder.mkdir()
    (of.folder / SEARCH_CACHE).write_text("".join(lines[:half]) + lines[half][:9])
    measured: list[int] = []
    loss_of = Restart.loss_of

    def counted(restart: Restart, other: LlamaForCausalLM, layer: int) -> float:
        measured.append(layer)
        return loss_of(restart, other, layer)

    monkeypatch.setattr(Restart, "loss_of", counted)
    plan(of)
    assert found_spans(of.folder) == found_spans(whole.folder)
    assert read(of.folder, "spans.json") == read(whole.folder, "spans.json")
    assert len(measured) == len(lines) - half > 2
    assert (of.folder / SEARCH_CACHE).read_text().splitlines(keepends=True) == lines


def test_another_recipe_measures_again_until_something_was_trained(
    home: Path, tmp_path: Path
) -> None:
    section = {"strategy": "late", "calibration_blocks": 1}
    for layers in (1, 2):
        plan(recipe(home, tmp_path / "run", spans={**section, "layers": layers}))
        assert sum(len(s.followers) for s in found_spans(tmp_path / "run")) == layers
    listed = [{"leader": 0, "followers": [1]}]
    plan(recipe(home, tmp_path / "run", spans=listed))
    left = sorted(f.name for f in (tmp_path / "run").iterdir())
    kept = ["plan-search-cache.jsonl", "plan.json", "provenance.json", "recipe.yaml"]
    assert left == [".lock", "inputs.json", *kept]


@pytest.mark.parametrize("asked", [2, 1000])
def test_calibration_blocks_are_those_asked_for_or_all(
    home: Path, tmp_path: Path, asked: int
) -> None:
    """Also where the training itself would read less of a stream."""
    there = len(Run(made := recipe(home, tmp_path, heads={"kv_heads": 2}), start(made)).blocks[0])
    assert 2 < there < 1000
    section = {"strategy": "late", "layers": 1, "calibration_blocks": asked}
    for name, data in (("text", {}), ("stream", {"streaming": True})):
        made = recipe(
            home, tmp_path / name, spans=section, data=data, train={"steps": 0, "batch_size": 2}
        )
        plan(made)
        assert read(made.folder, "spans.json")["calibration_blocks"] == min(asked, there)


def test_the_table_compares_the_strategies(home: Path, tmp_path: Path) -> None:
    made = recipe(home, tmp_path / "run", spans={"strategy": "loss", "layers": 2})
    tables: list[Any] = []
    original = spans_table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "train.stages.plan.spans_table", lambda found: tables.append(found) or original(found)
        )
        plan(made)
    console = Console(file=io.StringIO(), width=120)
    console.print(spans_table(tables[0]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert rows[0] == "spans"
    assert rows[2:] == ["none", "loss", "isotropy", "late"]
    late = next(line for line in text.splitlines() if line.split()[:1] == ["late"])
    assert "2 -> 3-4" in late
    assert "%" in late


# --- with ties and KV heads -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "kv_heads", "share"),
    [  # every pair of these three
        ("cosine", None, "attention"),
        ("cosine", 2, "kv"),
        ("random", None, "kv"),
        ("random", 2, "attention"),
    ],
)
def test_ties_leave_followers_out(
    home: Path, tmp_path: Path, strategy: str, kv_heads: int | None, share: str
) -> None:
    made = recipe(
        home,
        tmp_path / "run",
        plan={"strategy": strategy, "budget": {"ratio": 0.3}, "share": ["q", "k", "v", "o"]},
        spans={"strategy": "late", "layers": 2, "share": share, "calibration_blocks": 1},
        heads={"kv_heads": kv_heads},
    )
    plan(made)
    found = SharingPlan.load(made.folder / "plan.json")
    followers = {3, 4}
    assert {f for span in found.spans for f in span.followers} == followers
    units = LAYERS * (kv_heads or HEADS)
    assert len(found.ties) == int(0.3 * units)  # the count is of all units, not of those left
    for tie in found.ties:
        for layer, unit in (tie.target, tie.source):
            assert layer not in followers
            assert unit < (kv_heads or HEADS)
    # Parameters that are gone, counted by hand.
    width = {"q": HEADS * HEAD_DIM, "k": (kv_heads or HEADS) * HEAD_DIM}
    width |= {"v": width["k"], "o": width["q"]}
    gone = sum(width[p] for p in ABSENT[share]) * HIDDEN * len(followers)
    tied = len(found.ties) * sum(width.values()) // (kv_heads or HEADS) * HIDDEN
    pooled = 2 * (HEADS - (kv_heads or HEADS)) * HEAD_DIM * HIDDEN * LAYERS
    config = base_model(home).config
    savings = found.savings(config)
    assert savings.removed_parameters == gone + tied + pooled
    assert savings.effective_ratio == len(found.ties) / units


def test_a_budget_that_followers_leave_no_room_for(home: Path, tmp_path: Path) -> None:
    """Of listed spans it is known before anything is written."""
    made = recipe(
        home,
        tmp_path / "run",
        plan={"budget": {"ratio": 0.5}},
        spans=[{"leader": 0, "followers": [1, 2, 3]}],
    )
    with pytest.raises(PostshareError, match=r"asks for 12 of 24 units.*possible are 1 to 8"):
        plan(made)
    assert not made.folder.exists()


def test_a_plan_file_brings_its_own_spans(home: Path, tmp_path: Path) -> None:
    kept = SharingPlan(kv_heads=2, spans=(AttentionSpan(1, (2, 3)), AttentionSpan(4, (5,), "kv")))
    kept.save(tmp_path / "mine.json")
    section = {"strategy": "file", "path": str(tmp_path / "mine.json")}
    made = recipe(home, tmp_path / "run", plan=section, train={"steps": 0})
    run(made)
    assert SharingPlan.load(made.folder / "plan.json") == kept
    direct = read(made.folder, "evaluation.json")["models"]["direct"]["loss"]
    tokens = ids(made, 4, validation=True)
    assert direct == pytest.approx(reference_loss(base_model(home), kept, tokens), abs=1e-5)
    for extra in (
        {"spans": [{"leader": 0, "followers": [1]}]},
        {"heads": {"kv_heads": 2}},
        {"spans": {"strategy": "late", "layers": 1}},
    ):
        with pytest.raises(PostshareError, match="plan file says which spans and KV heads"):
            recipe(home, tmp_path / "other", plan=section, **extra)


# --- what is refused ------------------------------------------------------------------------------

TWO = {"leader": 1, "followers": [2, 3]}


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"heads": {"kv_heads": 3}}, "kv_heads 3 does not divide the model's 4 KV heads"),
        ({"heads": {"kv_heads": 4}}, "as many as the model has; lower it, or remove heads"),
        ({"spans": [TWO, {"leader": 3, "followers": [4]}]}, "overlaps 'span 1 -> .* in layer 3"),
        ({"spans": [{"leader": 2, "followers": [1]}]}, "follower 1 is not above its leader 2"),
        ({"spans": [{"leader": 5, "followers": [6]}]}, "layer 6 is out of range.* 0 to 5"),
        ({"spans": [{"leader": 1, "followers": [3, 2]}]}, "followers are not ascending"),
        ({"spans": [TWO | {"head_map": [[0, 1, 2, 3]]}]}, "1 rows for 2 followers"),
        ({"spans": [TWO | {"head_map": [[0, 1, 2], [0, 1, 2]]}]}, "each of the 4 heads"),
        ({"spans": [TWO | {"head_map": [[0, 1, 2, 4]] * 2}]}, "names head 4"),
        (
            {"spans": [TWO | {"share": "kv", "head_map": [[0, 1, 2, 3]] * 2}], "heads": 2},
            "each of the 2 KV heads",
        ),
        ({"spans": {"strategy": "loss", "layers": 6}}, "6 followers, 1 to 4 are possible"),
        ({"spans": {"strategy": "late", "layers": 5}}, "5 followers, 1 to 4 are possible"),
        (
            {"spans": {"strategy": "isotropy", "layers": 1, "skip_layers": [9]}},
            "skip layer 9; the model has layers 0 to 5",
        ),
        ({"spans": [TWO], "export": ["dense"]}, r"set export.formats=\[compact\]"),
        (
            {"spans": {"strategy": "loss", "layers": 1}, "export": ["dense"]},
            r"set export.formats=\[compact\]",
        ),
        ({"plan": "file", "export": ["dense"]}, r"set export.formats=\[compact\]"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    home: Path, tmp_path: Path, sections: dict[str, Any], part: str
) -> None:
    if isinstance(sections.get("heads"), int):
        sections = sections | {"heads": {"kv_heads": sections["heads"]}}
    if "export" in sections:
        sections = sections | {"export": {"formats": sections["export"]}}
    if sections.get("plan") == "file":
        SharingPlan(spans=(AttentionSpan(1, (2,)),)).save(tmp_path / "mine.json")
        section = {"strategy": "file", "path": str(tmp_path / "mine.json")}
        sections = sections | {"plan": section}
    made = recipe(home, tmp_path / "run", **sections)
    for stage in (plan, run):
        with pytest.raises(PostshareError, match=part) as caught:
            stage(made)
        assert "\n" not in str(caught.value)
    assert not made.folder.exists()


def test_attention_dropout_with_spans_is_refused(home: Path, tmp_path: Path) -> None:
    base = base_model(home)
    base.config.attention_dropout = 0.1
    base.save_pretrained(tmp_path / "base")
    shutil.copyfile(home / "text.jsonl", tmp_path / "text.jsonl")
    made = recipe(tmp_path, tmp_path / "run", spans=[TWO])
    with pytest.raises(PostshareError, match=r"attention_dropout 0\.1, with which spans do not"):
        run(made)
    assert not made.folder.exists()
