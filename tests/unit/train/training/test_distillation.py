"""Trainings under a teacher: what a step computes, resuming, the cache, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train.training.teacher_cache as teacher_cache
from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError
from tests.support import tiny
from tests.support.interruption import KilledError, at_step, stop
from train.data.blocks import permutation
from train.distributed.engines.start import start
from train.estimate.gpu_memory import memory_per_gpu
from train.estimate.llama_shapes import KNOWN
from train.estimate.parameters import cached_bytes
from train.recipe.recipe import Recipe, validate
from train.recipe.sections.distill import DistillSection
from train.training.distill_loss import Projection, TopK
from train.training.loop import TrainingStopped, train
from train.training.objective import Lessons
from train.training.teacher import Teacher, check_teacher

FEATURES = {"hidden_weight": 0.3, "attention_weight": 0.2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with other weights than the student's."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.model(seed=7, initializer_range=0.3).save_pretrained(folder)
    return folder


def taught(folder: Path, teacher: Path, distill: dict[str, Any], **train: Any) -> Recipe:
    recipe = tiny.recipe(folder, **train)
    section = DistillSection(teacher=str(teacher), **distill)
    return recipe.model_copy(update={"distill": section})


def features(model: Any, batch: dict[str, torch.Tensor]) -> tuple[Any, list[Any], list[Any]]:
    """Logits, hidden states after each layer and attention outputs, by a forward of its own."""
    hidden: list[Any] = []
    attention: list[Any] = []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(lambda m, i, o: hidden.append(o)))
        hooks.append(
            layer.self_attn.o_proj.register_forward_hook(lambda m, i, o: attention.append(o))
        )
    logits = model(**batch, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, hidden, attention


def test_a_step_is_the_documented_update(tmp_path: Path, teacher: Path) -> None:
    """Two steps against autograd on the whole loss, under a document mask."""
    distill = {"weight": 0.6, "temperature": 2.0, "top_k": 5, **FEATURES}
    recipe = taught(
        tmp_path,
        teacher,
        distill,
        steps=2,
        warmup_steps=0,
        schedule="constant",
        clip_norm=None,
        micro_batch_size=2,
        weight_decay=0.0,
    )
    blocks = tiny.blocks(document_mask=True)
    train(tiny.job(recipe, train_blocks=blocks), recipe)

    model, expected = tiny.model(), tiny.model(seed=7, initializer_range=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.0)
    order = permutation(len(blocks), recipe.seed, 0)
    rows = tiny.curve(tmp_path)
    for step, row in enumerate(rows):
        chosen = [blocks[int(i)] for i in order[8 * step : 8 * step + 8]]
        batch = {k: torch.stack([block[k] for block in chosen]) for k in chosen[0]}
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        predicted = labels != IGNORED
        assert int(predicted.sum()) < 8 * 15
        ours = features(model, batch)
        with torch.no_grad():
            theirs = features(expected, batch)
        z, t = ours[0][predicted] / 2, theirs[0][predicted] / 2
        p, q = t.softmax(-1), z.softmax(-1)
        index = p.topk(5).indices
        pk, qk = p.gather(1, index), q.gather(1, index)
        pr, qr = 1 - pk.sum(1), 1 - qk.sum(1)
        divergence = 4 * ((pk * (pk / qk).log()).sum(1) + pr * (pr / qr).log()).mean()
        lm = F.cross_entropy(2 * z, labels[predicted])
        errors = [
            torch.stack(
                [
                    (
                        (a - b).square().mean(-1)[predicted]
                        / (b.square().mean(-1)[predicted] + 1e-6)
                    ).mean()
                    for a, b in zip(ours[which], theirs[which], strict=True)
                ]
            ).mean()
            for which in (1, 2)
        ]
        language = 0.4 * lm + 0.6 * divergence + 0.3 * errors[0] + 0.2 * errors[1]
        penalty = 0.0
        for tie in tiny.PLAN.ties:
            for name in "qkv":
                one, other = (
                    model.get_parameter(f"model.layers.{layer}.self_attn.{name}_proj.weight")[
                        8 * unit : 8 * unit + 8
                    ]
                    for layer, unit in (tie.target, tie.source)
                )
                penalty = penalty + torch.linalg.norm(one - other) / 2
        total = 0.5 * language + 0.5 * penalty
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        for key, value in (
            ("lm_loss", lm),
            ("distill_loss", divergence),
            ("hidden_loss", errors[0]),
            ("attention_loss", errors[1]),
            ("total_loss", total),
            ("gradient_norm", norm),
        ):
            assert row[key] == pytest.approx(float(value.detach()), rel=2e-4), key
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            tiny.weights(tmp_path)[name], parameter.detach(), rtol=0, atol=5e-5
        )


@pytest.mark.parametrize("distill", [{"top_k": 4, **FEATURES}, {"temperature": 3.0}])
def test_factorization_invariance(tmp_path: Path, teacher: Path, distill: dict[str, Any]) -> None:
    results = {}
    for micro in (8, 2):
        recipe = taught(
            tmp_path / str(micro), teacher, distill, steps=3, micro_batch_size=micro, eps=1e-3
        )
        train(tiny.job(recipe, train_blocks=tiny.blocks(document_mask=True)), recipe)
        results[micro] = tiny.curve(recipe.folder), tiny.weights(recipe.folder)
    for one, other in zip(results[8][0], results[2][0], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-5), key
    for name, value in results[8][1].items():
        torch.testing.assert_close(value, results[2][1][name], rtol=1e-5, atol=1e-6)


def test_the_teacher_itself_learns_nothing(tmp_path: Path, teacher: Path) -> None:
    """Weight 1 and the same weights: the divergence and every gradient are 0, to the bit."""
    recipe = taught(tmp_path, teacher, {"weight": 1.0, **FEATURES}, steps=2, weight_decay=0.0)
    student = tiny.model(seed=7, initializer_range=0.3)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    train(tiny.job(recipe, plan=None, model=student), recipe)
    for row in tiny.curve(tmp_path):
        losses = [row[f"{name}_loss"] for name in ("distill", "hidden", "attention", "total")]
        assert losses == [0.0] * 4
        assert row["gradient_norm"] == 0.0
        assert row["lm_loss"] > 1
    assert all(torch.equal(value, before[name]) for name, value in tiny.weights(tmp_path).items())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, teacher: Path) -> None:
    for on in (False, True):
        recipe = taught(tmp_path / str(on), teacher, FEATURES, steps=3, gradient_checkpointing=on)
        train(tiny.job(recipe), recipe)
    tiny.assert_same_run(tmp_path / "False", tmp_path / "True")


def test_a_teacher_in_bf16(tmp_path: Path, teacher: Path) -> None:
    """Its weights are rounded, its rotary table is not, and it says nearly the same."""
    recipe = taught(tmp_path, teacher, {"precision": "bf16"})
    engine = start(recipe)
    rounded = Teacher(recipe, engine)
    exact = tiny.model(seed=7, initializer_range=0.3)
    for name, parameter in rounded.model.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16())
        assert not parameter.requires_grad
    assert rounded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.stack([tiny.blocks()[i]["input_ids"] for i in range(4)])
    with rounded({"input_ids": ids}) as lesson:
        whole = lesson.distribution
    assert isinstance(whole, Projection)
    assert whole.hidden.dtype == whole.weight.dtype == torch.bfloat16
    logits = whole.logits()
    expected = exact(ids).logits.detach()
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16()  # the table stays in fp32
    assert torch.equal(logits, exact(ids).logits.float())
    # Of random weights this large half of the difference is their own rounding.
    assert float((logits - expected).norm()) < 0.05 * float(expected.norm())


# --- resuming, and the cache ----------------------------------------------------------------------

CACHED = {"top_k": 6, "temperature": 1.5, "cache": True}


@pytest.mark.parametrize("distill", [{"top_k": 6, **FEATURES}, CACHED])
def test_killed_and_stopped_it_resumes_exactly(
    tmp_path: Path, teacher: Path, distill: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"steps": 7, "evaluate_every": 3, "micro_batch_size": 2}
    undisturbed = taught(tmp_path / "undisturbed", teacher, distill, **options)
    train(tiny.job(undisturbed), undisturbed)
    recipe = taught(tmp_path / "killed", teacher, distill, **options, checkpoint_every=2)
    with at_step(4), pytest.raises(KilledError):
        train(tiny.job(recipe), recipe)
    with at_step(5, stop), pytest.raises(TrainingStopped):
        train(tiny.job(recipe), recipe)
    train(tiny.job(recipe, model=tiny.model(seed=9)), recipe)
    tiny.assert_same_run(recipe.folder, undisturbed.folder)


def test_cached_answers_are_those_of_the_teacher(tmp_path: Path, teacher: Path) -> None:
    """To the bit where it is asked for the same blocks together, else to the rounding of fp32."""
    recipe = taught(tmp_path / "cached", teacher, CACHED, micro_batch_size=4)
    blocks = tiny.blocks(70, document_mask=True)  # three chunks, the last of 6
    engine = start(recipe)
    cached = Lessons(recipe, engine, blocks, steps=100).blocks
    live = Lessons(taught(tmp_path, teacher, {**CACHED, "cache": False}), engine, blocks, 100)
    order = permutation(len(blocks), recipe.seed, 0)
    for together, bound in ((range(8, 12), 0.0), (range(66, 70), 2e-6), (range(30, 40), 2e-6)):
        batch = torch.utils.data.default_collate([cached[int(order[i])] for i in together])
        found = teacher_cache.taught(batch)
        assert batch.keys() == {"input_ids", "labels", "position_ids"}
        del batch["labels"]
        with live(batch) as lesson:
            asked = lesson.distribution
        assert isinstance(asked, TopK)
        # Tokens of nearly equal probability may change places.
        for one, other in ((found.log_probabilities, asked.log_probabilities),):
            assert float((one - other).abs().max()) <= bound
        assert float((found.rest - asked.rest).abs().max()) <= bound
        if bound == 0:
            assert torch.equal(found.ids, asked.ids)
    for name in ("cached", "live"):
        there = taught(tmp_path / name, teacher, {**CACHED, "cache": name == "cached"}, steps=4)
        train(tiny.job(there, train_blocks=blocks), there)
    for one, other in zip(
        tiny.curve(tmp_path / "cached"), tiny.curve(tmp_path / "live"), strict=True
    ):
        for key in ("lm_loss", "distill_loss", "total_loss", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)


def test_the_cache_is_written_once_and_mended(
    tmp_path: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[int] = []
    ask = teacher_cache.TeacherCache._ask

    def counted(self: Any, model: Any, chunk: int, watch: Any) -> Any:
        asked.append(chunk)
        return ask(self, model, chunk, watch)

    monkeypatch.setattr(teacher_cache.TeacherCache, "_ask", counted)
    blocks = tiny.blocks(100)
    last = len(blocks) - 3 * 32
    recipe = taught(tmp_path, teacher, CACHED, steps=3, micro_batch_size=8)

    engine = start(recipe)

    def go(steps: int) -> list[int]:
        asked.clear()
        Lessons(recipe, engine, blocks, steps)
        return asked[:]

    for name in ("continued", "post"):  # 24 samples
        asked.clear()
        job = tiny.job(recipe, None, name=name, folder=tmp_path / name, train_blocks=blocks)
        train(job, recipe)
        assert asked == ([0] if name == "continued" else [])
    assert go(5) == [1]  # 40 samples: a longer training adds to it
    assert go(20) == [2, 3]  # 160 samples, but one epoch is enough
    folder = tmp_path / "teacher"
    assert sorted(path.suffix for path in folder.glob("chunk-*")) == 4 * [".json"] + 4 * [
        ".safetensors"
    ]
    assert load_file(folder / "chunk-000003.safetensors")["teacher_rest"].shape == (last, 16)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    # Half a file, a changed bit, an entry that was never written, an entry for another text.
    file = folder / "chunk-000000.safetensors"
    file.write_bytes(before[file][:-4])
    file = folder / "chunk-000001.safetensors"
    file.write_bytes(before[file][:-1] + b"?")
    (folder / "chunk-000002.json").unlink()
    entry = json.loads(before[folder / "chunk-000003.json"])
    (folder / "chunk-000003.json").write_text(json.dumps(entry | {"tokens": "other"}))
    capsys.readouterr()
    assert go(20) == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("chunk-000000.safetensors is damaged") == 1
    assert "chunk-000003.safetensors is about another text: it is computed again" in said
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    other = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"top_k": 7})})
    with pytest.raises(PostshareError, match=r"teacher holds another run \(top_k was 6, now 7\)"):
        train(tiny.job(other, None, folder=tmp_path / "other", train_blocks=blocks), other)


def test_the_section_belongs_to_the_run(tmp_path: Path, teacher: Path) -> None:
    recipe = taught(tmp_path, teacher, {}, steps=2)
    train(tiny.job(recipe), recipe)
    other = recipe.model_copy(
        update={"distill": recipe.distill.model_copy(update={"temperature": 2.0})}
    )
    with pytest.raises(PostshareError, match=r"distill\.temperature was 1\.0, now 2\.0"):
        train(tiny.job(other), other)


# --- refusals -------------------------------------------------------------------------------------


def section(distill: dict[str, Any], **others: Any) -> Recipe:
    value: dict[str, Any] = {
        "name": "x",
        "model": {"path": "x"},
        "data": {"train": "x", "validation": "x", "sequence_length": 16},
        "plan": {"budget": {"ratio": 0.3}},
        "train": {"steps": 2, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-3},
        "distill": distill,
    }
    for name, part in others.items():
        value[name] = value.get(name, {}) | part
    return validate(value)


@pytest.mark.parametrize(
    ("distill", "others", "message"),
    [
        ({}, {"train": {"steps": 0}}, "distill: nothing is trained"),
        ({"cache": True}, {}, "distill: cache keeps the likeliest tokens only; set distill.top_k"),
        ({"cache": True, "top_k": 4, "hidden_weight": 1.0}, {}, "cache holds no hidden states"),
        ({"weight": 0}, {}, "distill.weight is 0; allowed: a number > 0 and <= 1"),
        ({"temperature": 0.0}, {}, "distill.temperature is 0.0"),
        ({"tempeature": 2.0}, {}, "did you mean distill.temperature"),
        ({}, {"model": {"config": {}}}, "the base is random weights, which teach nothing"),
        ({}, {"model": {"attention": "flash_attention_2"}}, "set distill.precision=bf16"),
    ],
)
def test_sections_without_sense(
    distill: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(PostshareError, match=message):
        section(distill, **others)


def test_healing_alone_may_be_taught() -> None:
    made = section({}, train={"steps": 0}, materialize={"heal_steps": 2})
    assert made.distill == DistillSection()


class Words:
    """A tokenizer, as far as it is looked at."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


def test_a_teacher_that_cannot_teach(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.training.teacher as module

    def check(config: Any = None, tokenizer: Any = None, **distill: Any) -> None:
        recipe = taught(tmp_path, teacher, distill)
        config = tiny.model().config if config is None else config
        check_teacher(recipe, teacher, config, tokenizer, start(recipe))

    check(**FEATURES, top_k=tiny.VOCABULARY - 1)
    with pytest.raises(PostshareError, match=r"vocabulary of 48, the student one of 50; choose"):
        check(tiny.model(vocab_size=50).config)
    deeper = tiny.model(num_hidden_layers=3).config
    check(deeper)
    with pytest.raises(PostshareError, match=r"num_hidden_layers 2, the student 3.*hidden_weight"):
        check(deeper, attention_weight=1.0)
    with pytest.raises(PostshareError, match=r"top_k is 48, and there are 48 tokens"):
        check(top_k=48)
    with pytest.raises(PostshareError, match=r"int8 needs an NVIDIA GPU and bitsandbytes"):
        check(precision="int8")
    monkeypatch.setattr(module, "load_tokenizer", lambda name: Words("a", "b", "c"))
    check(tokenizer=Words("a", "b", "c"))
    with pytest.raises(PostshareError, match=r"the tokenizer of .* is another.*'b' is number 1"):
        check(tokenizer=Words("a", "c", "b"))


# --- estimates ------------------------------------------------------------------------------------


def test_the_estimate_counts_the_teacher() -> None:
    """Whole without ZeRO-3, a share and what a forward gathers with it; nothing once cached."""
    shape = KNOWN["meta-llama/Llama-2-7b-hf"]
    parameters, embeddings = 6_738_415_616, 32000 * 4096
    layer = (parameters - 2 * embeddings) // 32
    made = section({}).train

    def teacher(stage: int, distill: DistillSection | None) -> int:
        memory = memory_per_gpu(
            shape,
            made,
            stage=stage,
            gpus=8,
            sequence_length=1024,
            checkpointing=True,
            distill=distill,
        )
        without = memory_per_gpu(
            shape, made, stage=stage, gpus=8, sequence_length=1024, checkpointing=True
        )
        assert memory.total - memory.logits == without.total - without.logits + memory.teacher
        # By chunks, though all of them fit: with the teacher's beside them.
        chunk, weight = 1024 * 32000, 4 * 32000 * 4096
        assert memory.logits == (12 * chunk if distill is None else 20 * chunk + weight)
        return memory.teacher

    states = 1024 * 4096
    half = DistillSection(precision="bf16")
    assert teacher(2, DistillSection()) == 4 * (parameters + states)
    assert teacher(0, half) == 2 * (parameters + states)
    gathered = 2 * embeddings + 2 * layer
    assert teacher(3, half) == 2 * (parameters // 8 + gathered + states)
    features = half.model_copy(update={"hidden_weight": 1.0})
    assert teacher(2, features) == 2 * (parameters + 33 * states)
    assert teacher(2, None) == teacher(2, DistillSection(top_k=8, cache=True)) == 0
    # 2 steps of 2 sequences of 16 tokens, 8 x 8 + 4 bytes each.
    assert cached_bytes(section({"top_k": 8, "cache": True})) == 64 * 68
    # The control takes the steps of healing as well: 5.
    healed = section({"top_k": 8, "cache": True}, materialize={"heal_steps": 3})
    assert cached_bytes(healed) == 5 * 32 * 68
