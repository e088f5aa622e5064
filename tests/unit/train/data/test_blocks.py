from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sa_models.errors import PostshareError
from tests.support import REPOSITORY
from tests.support.in_memory import text_blocks
from tests.support.words import BOS, EOS, WORDS, flat, recipe, tiny_tokenizer
from train.data import sources, token_table
from train.data.blocks import Blocks, PositionSampler, permutation, prepare_data
from train.recipe.recipe import DataSource

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(bos_token="<s>", eos_token="</s>")


def texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    draw = np.random.default_rng(seed)
    return [
        " ".join(f"w{w}" for w in draw.integers(0, WORDS, draw.integers(1, longest)))
        for _ in range(count)
    ]


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> str:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents))
    return str(path)


def expected(documents: list[str], *, bos: bool = True, eos: bool = True) -> list[int]:
    ids: list[int] = []
    for text in documents:
        ids += [BOS] * bos + [int(word[1:]) + 2 for word in text.split()] + [EOS] * eos
    return ids


@pytest.fixture
def prepare(tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Blocks, Blocks]]:
    def call(needed: int | None = 10, **data: Any) -> tuple[Blocks, Blocks]:
        return prepare_data(
            recipe(**data), tokenizer, needed_blocks=needed, vocab_size=len(tokenizer)
        )

    return call


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
def test_documents_are_laid_end_to_end(
    tmp_path: Path, prepare: Callable[..., Any], bos: bool, eos: bool
) -> None:
    documents = texts(50)
    train = write_jsonl(tmp_path / "t.jsonl", documents)
    held = write_jsonl(tmp_path / "v.jsonl", texts(9, seed=1))
    blocks, validation = prepare(train=train, validation=held, bos=bos, eos=eos)
    ids = expected(documents, bos=bos, eos=eos)
    assert flat(blocks) == ids[: len(ids) // 4 * 4]
    assert len(blocks) * 4 == len(ids) // 4 * 4
    assert flat(validation) == expected(texts(9, seed=1), bos=bos, eos=eos)[: len(validation) * 4]
    block = blocks[3]
    assert set(block) == {"input_ids", "labels"}
    assert block["input_ids"].dtype == block["labels"].dtype == torch.int64
    assert torch.equal(block["input_ids"], block["labels"])


def test_tokenizer_without_bos_ends_documents_only(tmp_path: Path) -> None:
    documents = texts(20)
    path = write_jsonl(tmp_path / "t.jsonl", documents)
    blocks, _ = prepare_data(
        recipe(train=path, validation=path),
        tiny_tokenizer(eos_token="</s>"),
        needed_blocks=1,
        vocab_size=WORDS + 2,
    )
    assert flat(blocks) == expected(documents, bos=False)[: len(blocks) * 4]


def test_missing_eos_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", texts(20))
    with pytest.raises(PostshareError, match=r"no EOS token.*data\.eos=false"):
        prepare_data(
            recipe(train=path, validation=path),
            tiny_tokenizer(),
            needed_blocks=1,
            vocab_size=WORDS + 2,
        )


def test_document_mask_restarts_positions_and_masks_first_labels() -> None:
    documents = [[0, 5, 1], [0, 6, 7, 8, 1], [0, 1], [0, 9, 10, 1]]
    blocks = text_blocks(documents, 6, document_mask=True)
    assert len(blocks) == 2
    assert blocks[0]["input_ids"].tolist() == [0, 5, 1, 0, 6, 7]
    assert blocks[0]["labels"].tolist() == [-100, 5, 1, -100, 6, 7]
    assert blocks[0]["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    # The second block begins inside a document: its positions begin at 0, its token stays a label.
    assert blocks[1]["input_ids"].tolist() == [8, 1, 0, 1, 0, 9]
    assert blocks[1]["labels"].tolist() == [8, 1, -100, 1, -100, 9]
    assert blocks[1]["position_ids"].tolist() == [0, 1, 0, 1, 0, 1]


def test_blocks_reach_across_arrow_chunks() -> None:
    table = datasets.concatenate_datasets(
        [
            datasets.Dataset.from_dict({"input_ids": rows}, features=token_table.ROW)
            for rows in ([[1, 2, 3], [4]], [[5, 6, 7, 8, 9, 10, 11]], [[12]], [[13, 14]])
        ]
    )
    from train.data.packed import Packed, TextBlocks

    packed = Packed.from_table(table)
    blocks = Blocks([TextBlocks(packed, 7, document_mask=True)])
    assert flat(blocks) == list(range(1, 15))
    assert blocks[1]["position_ids"].tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert packed.largest_id() == 14
    with pytest.raises(IndexError):
        blocks[2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_documents_do_not_see_each_other(attention: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation=attention,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, WORDS, length).tolist() for length in (5, 1, 7, 3, 9, 7)]
    masked = text_blocks(documents, 16, document_mask=True)
    batch = torch.utils.data.default_collate([masked[0], masked[1]])
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits.flatten(0, 1)
        alone = torch.cat(
            [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in documents]
        )
        unmasked = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)
    assert torch.allclose(packed, alone, atol=1e-5)
    assert (unmasked - alone).abs().max() > 0.1  # the default: documents in a block see each other


# --- mixtures and the held-out split ----------------------------------------------------------


def test_weights_are_exact_shares_of_tokens(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    """Words below w30 come from one source, the others from another, ten times smaller."""
    low = [" ".join(f"w{i % 30}" for i in range(n, n + 8)) for n in range(100)]
    high = [" ".join(f"w{30 + i % 30}" for i in range(n, n + 8)) for n in range(10)]
    sources = [
        {"path": write_jsonl(tmp_path / "low.jsonl", low), "weight": 2.0},
        {"path": write_jsonl(tmp_path / "high.jsonl", high), "weight": 3.0},
    ]
    blocks, _ = prepare(
        train=sources, validation=sources[0]["path"], bos=False, eos=False, sequence_length=8
    )
    rows = torch.stack([blocks[i]["input_ids"] for i in range(len(blocks))])
    from_low = rows[:, 0] < 32
    assert int(from_low.sum()) == 100  # every block of the larger source, once
    assert len(blocks) == 250  # so that 100 blocks are 2/5
    assert {tuple(row) for row in rows[~from_low].tolist()} == {
        tuple(expected([text], bos=False, eos=False)) for text in high
    }


def test_held_out_documents_are_whole_disjoint_and_stable(
    tmp_path: Path, prepare: Callable[..., Any]
) -> None:
    documents = [f"w{i % 60} w{i // 60} w3 w4 w5" for i in range(600)]
    copies = documents + documents[:200]  # exact duplicates must fall on the same side

    def split(order: list[str]) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        path = write_jsonl(tmp_path / f"{hash(tuple(order))}.jsonl", order)
        sides = prepare(train=path, validation_fraction=0.2, sequence_length=7)
        rows = [[tuple(side[i]["input_ids"].tolist()) for i in range(len(side))] for side in sides]
        assert len(rows[0]) + len(rows[1]) == len(order)  # a document fills a block: none is cut
        return set(rows[0]), set(rows[1])

    train, held = split(copies)
    assert not train & held
    assert len(train) + len(held) == 600
    assert 0.15 < len(held) / 600 < 0.25
    assert split(copies[::-1]) == (train, held)


def test_the_end_of_a_lone_document_is_held_out(
    tmp_path: Path, prepare: Callable[..., Any]
) -> None:
    words = [f"w{number}" for number in range(40)]
    path = tmp_path / "book.txt"
    path.write_text(" ".join(words))
    train, held_out = prepare(train=str(path), validation_fraction=0.2, sequence_length=4)
    whole = len(" ".join(words))
    kept = " ".join(words)[: round(0.8 * whole)]
    count = len(kept.split())  # the word that is cut belongs to the training text
    alone = []
    for part in (words[:count], words[count:]):
        table = write_jsonl(tmp_path / f"{len(alone)}.jsonl", [" ".join(part)])
        alone.append(prepare(train=table, validation=str(path), sequence_length=4)[0])
    assert [flat(train), flat(held_out)] == [flat(side) for side in alone]
    said = "one document: the last 0.2 of its characters is held out"
    assert train.notes == (f"{path} (training): {said}",)


# --- the cache ----------------------------------------------------------------------------------


def test_second_start_does_not_tokenize(
    tmp_path: Path, prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", texts(80))
    data = {"train": path, "validation_fraction": 0.3}
    first = [flat(side) for side in prepare(**data)]

    def refuse(self: object, batch: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(token_table.Encoder, "__call__", refuse)
    assert [flat(side) for side in prepare(**data)] == first
    for changed in ({"bos": False}, {"validation_fraction": 0.4}):
        with pytest.raises(AssertionError, match="tokenized again"):
            prepare(**data | changed)


SCRIPT = """
import datasets, json, pathlib, sys
sys.path.insert(0, {tests!r})
datasets.config.HF_DATASETS_CACHE = pathlib.Path({cache!r})
from tests.support.words import flat, recipe, tiny_tokenizer
from train.data.blocks import prepare_data
sides = prepare_data(
    recipe(train={path!r}, validation_fraction=0.3),
    tiny_tokenizer(bos_token="<s>", eos_token="</s>"),
    needed_blocks=1,
    vocab_size=62,
)
print(json.dumps([flat(side) for side in sides]))
"""


def test_processes_share_one_cache(
    tmp_path: Path, prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that start at once agree, and a third, this one, finds everything tokenized."""
    path = write_jsonl(tmp_path / "t.jsonl", texts(2500))
    cache = str(datasets.config.HF_DATASETS_CACHE)
    script = SCRIPT.format(tests=str(REPOSITORY), cache=cache, path=path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = []
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        outputs.append(json.loads(out.splitlines()[-1]))
    assert outputs[0] == outputs[1]

    def refuse(self: object, batch: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(token_table.Encoder, "__call__", refuse)
    assert [flat(side) for side in prepare(train=path, validation_fraction=0.3)] == outputs[0]


def test_several_processes_tokenize_the_same(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    documents = texts(300)
    path = write_jsonl(tmp_path / "t.jsonl", documents)
    blocks, _ = prepare(train=path, validation=path, processes=2)
    assert flat(blocks) == expected(documents)[: len(blocks) * 4]


# --- sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "parquet", "arrow", "txt", "folder", "texts", "saved", "saved_dict"]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_source_gives_the_same_tokens(
    tmp_path: Path, prepare: Callable[..., Any], kind: str, streaming: bool
) -> None:
    documents = texts(30)
    table = datasets.Dataset.from_dict({"body": documents})
    path = tmp_path / f"source.{kind}"
    column = "body"
    if kind == "jsonl":
        write_jsonl(path, documents, column)
    elif kind == "json":
        path.write_text(json.dumps([{column: text, "id": i} for i, text in enumerate(documents)]))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "arrow":
        table.save_to_disk(str(tmp_path / "on_the_way"))
        next((tmp_path / "on_the_way").glob("*.arrow")).rename(path)
    elif kind == "txt":
        documents, column = ["\n\n".join(documents)], "text"  # one file is one document
        path.write_text(documents[0])
    elif kind == "folder":
        path.mkdir()
        table.select(range(20)).to_parquet(path / "train-00000-of-00002.parquet")
        table.select(range(20, 30)).to_parquet(path / "train-00001-of-00002.parquet")
    elif kind == "texts":
        path.mkdir()
        column = "text"
        for index, text in enumerate(documents):
            (path / f"{index:03}.txt").write_text(text.replace(" ", "\n"))
    elif kind == "saved":
        table.save_to_disk(str(path))
    else:
        datasets.DatasetDict({"train": table}).save_to_disk(str(path))
    source = {"path": str(path), "text": column}
    ids = expected(documents)
    before = sorted(path.rglob("*"))
    blocks, _ = prepare(
        needed=len(ids) // 4,
        train=source,
        validation=source,
        streaming=streaming,
        evaluate={"blocks": 2} if streaming else {},
    )
    assert flat(blocks) == ids[: len(ids) // 4 * 4]
    assert sorted(path.rglob("*")) == before  # nothing is written among the data


def test_streaming_reads_only_what_the_run_needs(
    tmp_path: Path, prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts(5000)
    path = write_jsonl(tmp_path / "t.jsonl", documents)
    data = {"train": path, "validation": path, "streaming": True, "evaluate": {"blocks": 3}}
    encode, seen = token_table.Encoder.__call__, []

    def count(self: token_table.Encoder, batch: list[str | None]) -> dict[str, list[list[int]]]:
        seen.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(token_table.Encoder, "__call__", count)
    blocks, validation = prepare(needed=40, **data)
    assert len(validation) >= 3
    assert 40 <= len(blocks) <= 45
    assert flat(blocks) == expected(documents)[: len(blocks) * 4]
    assert sum(seen) <= 4 * token_table.STREAM_BATCH
    seen.clear()
    again, _ = prepare(needed=40, **data)
    assert flat(again) == flat(blocks)
    assert not seen
    write_jsonl(tmp_path / "t.jsonl", documents[1:])  # changed text is read again
    changed, _ = prepare(needed=40, **data)
    assert flat(changed) == expected(documents[1:])[: len(changed) * 4]


def test_streamed_split_holds_out_documents(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    documents = [f"w{i % 60} w{i // 60}" for i in range(2000)]
    path = write_jsonl(tmp_path / "t.jsonl", documents)
    data = {"train": path, "validation_fraction": 0.25, "sequence_length": 4}
    sides = prepare(needed=50, streaming=True, evaluate={"blocks": 20}, **data)
    train, held = (
        {tuple(side[i]["input_ids"].tolist()) for i in range(len(side))} for side in sides
    )
    assert len(sides[1]) >= 20
    assert not train & held


def test_streaming_needs_a_length(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", texts(50))
    with pytest.raises(PostshareError, match=r"set train\.steps.*evaluate\.blocks"):
        prepare(train=path, validation=path, streaming=True)


def test_what_was_read_of_a_folder_is_said(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    """Once for each use, and of rows without text how many there are."""
    folder = tmp_path / "[texts]"
    folder.mkdir()
    write_jsonl(folder / "alice.jsonl", [])
    write_jsonl(folder / "the-train-journey.jsonl", texts(20))
    write_jsonl(folder / "taking-a-test.jsonl", [*texts(20, seed=1), "", ""])
    write_jsonl(folder / "zebra.jsonl", [""])
    held = write_jsonl(tmp_path / "held.jsonl", texts(9))
    blocks, validation = prepare(train=str(folder), validation=held)
    assert blocks.notes == (
        f"{folder} (training): 3 .jsonl files read; left out, empty: alice.jsonl; names mean "
        "nothing, taking-a-test.jsonl is read like the others",
        f"{folder} (training): 3 of 43 rows have no 'text' and are left out",
    )
    assert validation.notes == ()
    again, held_out = prepare(train=str(folder), validation_fraction=0.3)
    assert again.notes == blocks.notes
    assert held_out.notes == ()
    both = expected(texts(20, seed=1)) + expected(texts(20))
    assert flat(blocks) == both[: len(blocks) * 4]


def test_a_folder_with_the_held_out_file_in_it(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "a.jsonl", texts(20))
    held = write_jsonl(tmp_path / "texts" / "b.jsonl", texts(20, seed=1))
    (tmp_path / "link.jsonl").symlink_to(held)
    for validation in (held, str(tmp_path / "link.jsonl")):
        with pytest.raises(
            PostshareError, match=r"texts, training text, has .*b\.jsonl in it, whic"
        ):
            prepare(train=str(tmp_path / "texts"), validation=validation)
    prepare(train=[str(tmp_path / "texts" / "a.jsonl"), held], validation=held)  # by their names


# --- bad input ------------------------------------------------------------------------------------


def broken(folder: Path, case: str) -> dict[str, Any]:
    good = write_jsonl(folder / "good.jsonl", texts(50))
    (folder / "empty.jsonl").write_text("")
    (folder / "rubbish.jsonl").write_text("not json\n")
    (folder / "table.csv").write_text("text\nw1\n")
    (folder / "none").mkdir()
    small = write_jsonl(folder / "small.jsonl", ["w1"])
    numbers = folder / "numbers.jsonl"
    numbers.write_text('{"text": 3, "label": "w1"}\n')
    blank = write_jsonl(folder / "blank.jsonl", ["", ""])
    titled = write_jsonl(folder / "titled.jsonl", ["w1"], "title")
    return {
        "missing": {"train": str(folder / "absent.jsonl"), "validation": good},
        "relative": {"train": "data/absent/here", "validation": good},
        "empty": {"train": str(folder / "empty.jsonl"), "validation": good},
        "blank": {"train": blank, "validation": good},
        "rubbish": {"train": str(folder / "rubbish.jsonl"), "validation": good},
        "kind": {"train": str(folder / "table.csv"), "validation": good},
        "no file": {"train": str(folder / "none"), "validation": good},
        "column": {"train": titled, "validation": good},
        "number": {"train": str(numbers), "validation": good},
        "small": {"train": small, "validation": good},
        "validation": {"train": good, "validation": small},
        "fraction": {"train": good, "validation_fraction": 1e-9},
        "stdlib": {"train": {"path": "stdlib", "split": "test"}, "validation": good},
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"absent\.jsonl does not exist.*correct the path"),
        ("relative", r"data/absent/here does not exist.*correct the path"),
        ("empty", r"empty\.jsonl \(train\) is empty; choose another source"),
        ("blank", r"blank\.jsonl \(train\) has 0 tokens.*add text"),
        (
            "rubbish",
            r"rubbish\.jsonl, line 1: no whole JSON \(Expecting value at column 1\); correct",
        ),
        ("kind", r"'\.csv' are not read; convert it to one of \.jsonl"),
        ("no file", r"holds no \.jsonl.*correct the path"),
        ("column", r"no column 'text'; set text to one of: title"),
        (
            "number",
            r"line 1: column 'text' does not hold text but a number; set text to one of: label",
        ),
        ("small", r"small\.jsonl \(train\) has 3 tokens.*one block of 4; lower"),
        ("validation", r"held-out text has 3 tokens.*add text to data\.validation"),
        ("fraction", r"held-out text has 0 tokens.*raise data\.validation_fraction"),
        ("stdlib", r"no split 'test'; set split to one of train, validation"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_data_names_cause_and_cure(
    tmp_path: Path, prepare: Callable[..., Any], case: str, message: str, streaming: bool
) -> None:
    options = {"streaming": True, "evaluate": {"blocks": 1}} if streaming else {}
    with pytest.raises(PostshareError, match=message) as raised:
        prepare(**broken(tmp_path, case), **options)
    assert "\n" not in str(raised.value)


def test_token_beyond_the_vocabulary(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ["w1 w2 w3 w40 w5", "w6"])
    setup = recipe(train=path, validation=path)
    with pytest.raises(
        PostshareError, match=r"token id 42.*vocab_size is 42; set model\.tokenizer"
    ):
        prepare_data(setup, tokenizer, needed_blocks=1, vocab_size=42)
    assert len(prepare_data(setup, tokenizer, needed_blocks=1, vocab_size=43)[0]) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub"),
            r"not in the cache.*postshare prepare",
        ),
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'a/b' is a gated dataset on the Hub."
            ),
            r"is gated; accept its terms at https://huggingface\.co/datasets/a/b.*hf auth login",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"),
            r"neither a local path nor a dataset on the hub; correct the name",
        ),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), r"one of \['train'\]"),
        (
            ValueError("Config name is missing.\nPick: ['x', 'y']"),
            r"Pick: \['x', 'y'\]; set split or",
        ),
    ],
)
def test_hub_errors_have_cures(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(PostshareError, match=message) as raised:
        sources.load_documents(DataSource(path="a/b"))
    assert "\n" not in str(raised.value)


# --- order ----------------------------------------------------------------------------------------


def samples(size: int, steps: int, **options: Any) -> list[list[int]]:
    """Per step, the samples of all ranks in stream order."""
    world, micro = options["world"], options["micro_batch_size"]
    batch = options["batch_size"]
    ranks = [
        list(PositionSampler(size, rank=rank, steps=steps, **options)) for rank in range(world)
    ]
    accumulation = batch // (world * micro)
    return [
        [
            index
            for m in range(accumulation)
            for rank in range(world)
            for index in ranks[rank][step * accumulation + m]
        ]
        for step in range(steps)
    ]


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (2, 1)])
def test_any_factorization_reads_the_same_samples(world: int, micro: int) -> None:
    options = {"batch_size": 12, "seed": 3}
    reference = samples(31, 7, world=1, micro_batch_size=12, **options)
    assert samples(31, 7, world=world, micro_batch_size=micro, **options) == reference
    stream = [index for step in reference for index in step]
    assert sorted(stream[:31]) == sorted(stream[31:62]) == list(range(31))
    assert stream[:31] != stream[31:62]
    assert stream[:31] == permutation(31, 3, 0).tolist()


def test_position_resumes_exactly_at_another_world_size() -> None:
    whole = samples(10, 8, world=1, micro_batch_size=6, batch_size=6, seed=1)
    rest = samples(10, 5, world=3, micro_batch_size=1, batch_size=6, seed=1, position=18)
    assert rest == whole[3:]


def test_sampler_drives_a_data_loader() -> None:
    blocks = text_blocks([list(range(40))], 4)
    sampler = PositionSampler(len(blocks), batch_size=4, micro_batch_size=2, steps=3)
    batches = list(DataLoader(blocks, batch_sampler=sampler))
    assert len(batches) == len(sampler) == 6
    assert batches[0]["input_ids"].shape == (2, 4)
    order = permutation(10, 0, 0)
    assert batches[1]["input_ids"][:, 0].tolist() == [4 * order[2], 4 * order[3]]


def test_indivisible_batch_names_the_nearest() -> None:
    with pytest.raises(PostshareError, match=r"train\.batch_size=12"):
        PositionSampler(10, batch_size=10, micro_batch_size=2, world=3)
