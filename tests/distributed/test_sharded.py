"""Under ZeRO-3 and FSDP2 no rank holds a whole model: its loading, what is loaded, teachers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.teacher import blocks, recipe
from tests.support.launcher import run
from tests.support.training import teacher_folder
from train.distributed.engines.start import start
from train.training.objective import Lessons

pytestmark = [pytest.mark.distributed, pytest.mark.more]

WORKER = Path(__file__).with_name("sharded_worker.py")


def save(folder: Path, dtype: torch.dtype, **sizes: int) -> int:
    """Save a Llama; its fp32 bytes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
    model.save_pretrained(folder, max_shard_size="400MB")
    return 4 * sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Launched:
    """Attributes: whole: fp32 bytes of the large model; folder: holds the run with the teacher."""

    output: str
    whole: int
    folder: Path


@pytest.fixture(scope="module", params=["zero3", "fsdp2"])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """One launch of two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    large = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 7}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096}
    whole = save(folder / "large", torch.float32, **large, **heads)  # its largest tensor has 16 MB
    # Two ranks can share out neither the embeddings nor a norm evenly.
    small = {"hidden_size": 45, "intermediate_size": 51, "num_hidden_layers": 4, "vocab_size": 49}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 9, "head_dim": 6}
    save(folder / "small", torch.bfloat16, **small, **heads)
    places = (folder / "large", folder / "small", folder / "run", teacher_folder("both"))
    output = run(request.param, WORKER, *places, processes=2, timeout=500)
    return Launched(output, whole, folder)


def test_no_rank_holds_the_whole_model_at_load(launched: Launched) -> None:
    rows = [json.loads(row) for row in re.findall(r"memory (\{.*\})", launched.output)]
    assert sorted(row["rank"] for row in rows) == [0, 1]
    for row in rows:
        added = row["loaded"] - row["base"]
        assert 0.5 * launched.whole < added < 0.75 * launched.whole, (row, launched.whole)


def test_streamed_model_is_the_one_loaded_whole(launched: Launched) -> None:
    assert launched.output.count("3 cases equal") == 2, launched.output


def test_answers_of_a_sharded_teacher(launched: Launched, tmp_path: Path) -> None:
    """It says what a whole one says, and its cached answers are those of one process."""
    assert launched.output.count("all answered") == 2
    whole = recipe(tmp_path, teacher_folder("both"))
    engine = start(whole)
    expected = Lessons(whole, engine, blocks(), 9).blocks
    answers = launched.folder / "run" / "teacher"
    there = recipe(launched.folder / "run", teacher_folder("both"))
    before = {path: path.stat().st_mtime_ns for path in answers.iterdir()}
    assert len(before) == 2 * 3 + 1
    found = Lessons(there, engine, blocks(), 9).blocks  # another launch takes them as they are
    for index in range(len(expected)):
        one, other = found[index], expected[index]
        assert one.keys() == other.keys()
        for key in ("teacher_log_probabilities", "teacher_rest"):
            assert float((one[key] - other[key]).abs().max()) <= 5e-6
    chunks = [path for path in before if path.name != "teacher.json"]
    assert all(path.stat().st_mtime_ns == before[path] for path in chunks)
