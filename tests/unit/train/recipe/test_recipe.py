from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from sa_models.errors import PostshareError
from tests.support import REPOSITORY
from train.recipe import yaml12
from train.recipe.faults import faults
from train.recipe.identity import run_identity
from train.recipe.load import text_of
from train.recipe.recipe import Recipe, load_recipe, validate
from train.recipe.schema import schema_text
from train.recipe.warnings import recipe_warnings

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "model": {"path": "demo-base"},
    "data": {"train": "stdlib", "validation_fraction": 0.1, "sequence_length": 64},
    "plan": {"budget": {"ratio": 0.3}},
    "train": {"steps": 10, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
}


def recipe_file(folder: Path, text: str) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return recipe_file(tmp_path, yaml12.dump(MINIMAL))


def message(path: Path, *overrides: str) -> str:
    """The one line that says what is wrong."""
    with pytest.raises(PostshareError) as caught:
        load_recipe(path, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def messages(path: Path, *overrides: str) -> list[str]:
    """The lines for several faults, below one with their number."""
    with pytest.raises(PostshareError) as caught:
        load_recipe(path, list(overrides))
    first, *lines = str(caught.value).split("\n")
    assert first == f"{path}: {len(lines)} faults"
    assert all(line.startswith("  ") for line in lines)
    return [line[2:] for line in lines]


def test_defaults_are_the_published_penalty_and_optimizer(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.folder == Path("runs/tiny")
    assert recipe.plan.share == ("q", "k", "v")
    assert recipe.plan.score == "qk"
    assert recipe.plan.skip_layers == (0,)
    assert recipe.penalty.kind == "l2"
    assert recipe.penalty.loss_weights == (0.5, 0.5)
    assert recipe.penalty.projections is None
    assert (recipe.train.betas, recipe.train.eps) == ((0.9, 0.95), 1e-8)
    assert (recipe.train.weight_decay, recipe.train.clip_norm) == (0.1, 1.0)
    assert recipe.data.train[0].path == "stdlib"
    assert recipe.data.train[0].weight == 1.0


def test_saved_recipe_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        minimal,
        ["train.eps=1e-9", "wandb.tags=['1e-4', 'no', '010']", "model.config={rope_theta: 1e6}"],
    )
    recipe.save(tmp_path / "resolved.yaml")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again == recipe
    assert again.wandb.tags == ("1e-4", "no", "010")
    assert again.model.config == {"rope_theta": 1e6}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resolved.yaml", "tiny.yaml"]


def test_recipe_cannot_be_changed(minimal: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(minimal).train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E+3", 5e3),
        ("-2.5e-1", -0.25),
        ("3", 3),
        ("1_000", 1000),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("20231101.en", "20231101.en"),
        ("true", True),
        ("~", None),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_are_what_people_mean(text: str, value: object) -> None:
    parsed = yaml12.parse(f"a: {text}", "test")["a"]
    assert parsed == value
    assert type(parsed) is type(value)
    assert yaml12.parse(yaml12.dump({"a": value}), "test")["a"] == value


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\nb: 2\na: 3\n", "duplicate key 'a' at line 3, column 1"),
        ("a: {b: 1, b: 2}\n", "duplicate key 'b' at line 1, column 11"),
        ("a: &x {b: 1}\nc: *x\n", "aliases (*name) are not supported at line 2"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: [1, 2\n", "at line 2"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
    ],
)
def test_bad_yaml_names_the_place(text: str, part: str, tmp_path: Path) -> None:
    assert part in message(recipe_file(tmp_path, text))


def test_a_recipe_is_a_mapping(tmp_path: Path) -> None:
    assert "a recipe is a mapping" in message(recipe_file(tmp_path, "- a\n- b\n"))


def test_overrides_reach_every_level(minimal: Path) -> None:
    recipe = load_recipe(
        minimal,
        [
            "train.learning_rate=1e-4",
            "plan.share=[o, q]",
            "penalty.kind=mse",
            "data.train.0.weight=2",
            "data.train.1.path=more.txt",
            "data.validation.0.path=held_out.txt",
            "data.validation_fraction=0",
            "model.config.hidden_size=64",
            "train.clip_norm=null",
            "output_dir=runs/a=b",
        ],
    )
    assert recipe.train.learning_rate == 1e-4
    assert recipe.plan.share == ("q", "o")
    assert recipe.penalty.kind == "mse"
    assert [(s.path, s.weight) for s in recipe.data.train] == [("stdlib", 2.0), ("more.txt", 1.0)]
    assert recipe.data.validation is not None
    assert recipe.data.validation[0].path == "held_out.txt"
    assert recipe.model.config == {"hidden_size": 64}
    assert recipe.train.clip_norm is None
    assert recipe.folder == Path("runs/a=b")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # Unknown keys: their path, and the nearest valid one, wherever it is.
        ("train.lerning_rate=1", ["train.lerning_rate", "train.learning_rate?"]),
        ("learning_rate=1", ["unknown key learning_rate", "train.learning_rate?"]),
        ("penality.kind=l2", ["unknown key penality", "penalty?"]),
        ("data.train.0.wieght=2", ["data.train.0.wieght", "data.train.0.weight?"]),
        ("plan.budget.ration=0.1", ["plan.budget.ration", "plan.budget.ratio?"]),
        ("model.zzz=1", ["unknown key model.zzz", "valid in model: path, revision"]),
        # Values: path, value, what is allowed.
        ("train.batch_size=0", ["train.batch_size is 0", "a whole number >= 1"]),
        ("train.batch_size=2.5", ["train.batch_size is 2.5", "a whole number >= 1"]),
        ("train.learning_rate=fast", ["train.learning_rate is 'fast'", "> 0 and <= 10"]),
        ("train.learning_rate=.nan", ["train.learning_rate is nan", "> 0 and <= 10"]),
        ("train.betas=[0.9, 1.0]", ["train.betas.1 is 1.0", ">= 0 and < 1"]),
        ("train.betas=[0.9]", ["train.betas.1 is missing"]),
        ("train.precision=fp16", ["train.precision is 'fp16'", "one of fp32, bf16, auto"]),
        (
            "train.gradient_checkpointing=yes",
            ["is 'yes'", "true or false or selective or a whole number >= 2"],
        ),
        ("train.gradient_checkpointing=1", ["is 1", "a whole number >= 2"]),
        ("plan.budget.ratio=1", ["plan.budget.ratio is 1", "> 0 and < 1 or null"]),
        ("plan.share=[q, x]", ["plan.share.1 is 'x'", "one of q, k, v, o"]),
        ("plan.share=[]", ["plan.share is []", "one or more"]),
        ("plan.share=[q, q]", ["plan.share", "twice"]),
        ("plan.skip_layers=[-1]", ["plan.skip_layers.0 is -1", ">= 0"]),
        ("data.sequence_length=1", ["data.sequence_length is 1", ">= 2"]),
        ("data.validation_fraction=1", ["data.validation_fraction is 1", ">= 0 and < 1"]),
        ("data.train.0.weight=0", ["data.train.0.weight is 0", "> 0"]),
        ("seed=true", ["seed is True", "a whole number"]),
        ("name=a/b", ["name is 'a/b'"]),
        ("model=3", ["model is 3", "a mapping with path"]),
        ("export.shard_size=2TB", ["export.shard_size", "'2TB' is not a size", "500MB"]),
        ("export.shard_size=0GB", ["'0GB' is not a size"]),
        # Contradictions, and options that would have no effect.
        ("train.epochs=1", ["train:", "exactly one of steps and epochs"]),
        ("train.steps=null", ["exactly one of steps and epochs"]),
        ("train.batch_size=9", ["no multiple of micro_batch_size 4", "train.batch_size=8"]),
        ("train.decay_steps=2", ["schedule cosine ignores decay_steps"]),
        ("data.validation=held_out.txt", ["exclude each other"]),
        ("data.validation_fraction=0", ["no held-out text"]),
        ("plan.budget.heads=3", ["plan.budget:", "exactly one of ratio, heads"]),
        ("plan.budget={}", ["plan.budget:", "exactly one of ratio, heads"]),
        ("plan.budget=null", ["strategy cosine needs a budget"]),
        ("plan.strategy=none", ["strategy none ignores budget"]),
        ("plan.path=plan.json", ["strategy cosine ignores path"]),
        ("penalty.loss_weights=[0, 0]", ["loss_weights are both 0"]),
        ("penalty.loss_weights=[1, -1]", ["penalty.loss_weights.1 is -1"]),
        ("penalty.ramp_steps=5", ["schedule (linear or cosine) and ramp_steps"]),
        ("penalty.schedule=linear", ["schedule (linear or cosine) and ramp_steps"]),
        ("materialize.heal_learning_rate=1e-4", ["set materialize.heal_steps"]),
        ("plan.seed=4294967296", ["plan.seed is 4294967296", "<= 4294967295"]),
        ("data.train.0.subset=en", ["stdlib has no subsets; remove subset: en"]),
        ("model.attention=flash_attention_2", ["flash_attention_2 computes in bf16 only"]),
        # Overrides that are none.
        ("data.train.\N{SUPERSCRIPT TWO}.path=x", ["is no index into 1 entries"]),
        ("train.steps", ["'train.steps' is no override"]),
        ("=3", ["'=3' is no override"]),
        ("train..steps=3", ["is no override"]),
        ("data.train.2.path=x", ["'2' is no index into 1 entries"]),
        ("train.steps.deep=3", ["'deep' lies below a plain value"]),
        ("train.steps=[1", ["override train.steps", "column"]),
    ],
)
def test_error_names_path_value_and_cure(minimal: Path, override: str, parts: list[str]) -> None:
    text = message(minimal, override)
    for part in parts:
        assert part in text


def test_streams_have_no_epochs(minimal: Path) -> None:
    overrides = ["data.streaming=true", "train.steps=null", "train.epochs=1"]
    assert "a stream has no known length" in message(minimal, *overrides)


def test_nothing_is_pulled_or_tied_without_a_plan(minimal: Path) -> None:
    bare = ["plan.strategy=none", "plan.budget=null"]
    assert load_recipe(minimal, bare).penalized is False
    assert "nothing to pull" in message(minimal, *bare, "penalty.kind=mse")
    assert "nothing is tied" in message(minimal, *bare, "materialize.heal_steps=5")


def test_an_unknown_key_is_named_before_what_it_left_missing() -> None:
    data = copy.deepcopy(MINIMAL)
    data["train"]["batchsize"] = data["train"].pop("batch_size")
    with pytest.raises(PostshareError, match=r"train\.batchsize; did you mean train\.batch_size\?"):
        validate(data)


# --- all faults at once ---------------------------------------------------------------------------


def test_all_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    assert messages(recipe_file(tmp_path, "name: mine\n")) == [
        "model is missing; set it to a mapping with path",
        "data is missing; set it to a mapping with train, sequence_length",
        "train is missing; set it to a mapping with batch_size, micro_batch_size, learning_rate",
        "nothing is shared; set plan, spans or heads (to train without sharing: "
        "plan.strategy=none)",
    ]
    data = copy.deepcopy(MINIMAL)
    data["train"] = {"steps": 10}
    del data["model"]["path"], data["data"]["sequence_length"], data["name"]
    assert messages(recipe_file(tmp_path, yaml12.dump(data | {"lora": {}}))) == [
        "name is missing; set it to text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$",
        "model.path is missing; set it to non-empty text",
        "data.sequence_length is missing; set it to a whole number >= 2",
        "train.batch_size is missing; set it to a whole number >= 1",
        "train.micro_batch_size is missing; set it to a whole number >= 1",
        "train.learning_rate is missing; set it to a number > 0 and <= 10",
        "lora.rank is missing; set it to a whole number >= 1",
    ]


def required(schema: dict[str, Any]) -> list[tuple[str, ...]]:
    """The paths of required keys: at the top, and in its sections."""
    found: list[tuple[str, ...]] = [(key,) for key in schema["required"]]
    for name, value in schema["properties"].items():
        for ref in re.findall(r"#/\$defs/(\w+)", str(value)):
            found += [(name, key) for key in schema["$defs"][ref].get("required", [])]
    return [path for path in found if path[0] != "spans"]


def test_every_required_key_has_a_stand_in_of_the_right_type() -> None:
    paths = required(Recipe.model_json_schema())
    assert {("train", "batch_size"), ("residual", "rank"), ("name",)} < set(paths)
    for path in paths:
        data = copy.deepcopy(MINIMAL) | {"lora": {"rank": 1}, "residual": {"rank": 1}}
        section = data
        for key in path[:-1]:
            section = section[key]
        del section[path[-1]]
        (line, *rest) = faults(data)
        assert line.startswith(f"{'.'.join(path)} is missing; set it to ")
        assert rest == [], path


def test_all_kinds_of_faults_are_named_at_once(minimal: Path) -> None:
    lines = messages(
        minimal,
        "train.batchsize=8",  # unknown, beside the right one
        "train.precision=fp16",
        "train.decay_steps=3",
        "data.validation=held_out.txt",
        "distill={cache: true, temperature: 0}",
        "wandb={upload: true, tags: 3}",
        "data.streaming=true",
        "train.steps=null",
        "train.epochs=1",
        "train.steps",
        "data.train.7.path=x",
    )
    assert lines == [
        "'train.steps' is no override; write key=value, such as train.steps=10",
        "override data.train.7.path: '7' is no index into 1 entries; use 0 to 1 (1 adds one)",
        "unknown key train.batchsize; did you mean train.batch_size?",
        "train.precision is 'fp16'; allowed: one of fp32, bf16, auto",
        "distill.temperature is 0; allowed: a number > 0 and <= 100",
        "wandb.tags is 3; allowed: a list of non-empty text",
        "data: validation and validation_fraction exclude each other; keep one of them",
        "train: schedule cosine ignores decay_steps; set schedule wsd",
        "distill: cache keeps the likeliest tokens only; set distill.top_k, say to 64",
        "wandb: wandb.upload: wandb.mode is disabled, nothing is uploaded; set wandb.mode=online "
        "(or offline), or remove upload",
    ]


def test_sections_are_compared_although_a_key_is_missing(tmp_path: Path) -> None:
    data = copy.deepcopy(MINIMAL)
    del data["train"]["batch_size"]
    data |= {"lora": {"rank": 2}, "materialize": {"heal_steps": 3}, "plan": {"strategy": "none"}}
    data["spans"] = [{"leader": 0, "followers": [1]}]
    first, *rest = messages(recipe_file(tmp_path, yaml12.dump(data)), "penalty.kind=mse")
    assert first == "train.batch_size is missing; set it to a whole number >= 1"
    assert [line.partition(":")[0] for line in rest] == ["penalty", "lora"]


def test_what_cannot_be_compiled_is_refused(minimal: Path) -> None:
    lora = ("train.precision=bf16", "lora={rank: 2, base: nf4}")
    for overrides, named in (
        (["train.kernels=liger"], r"compiled layers fuse what train\.kernels liger has fused"),
        (lora, r"layers in 4 bits cannot be compiled; set train\.compile=false, or lora\.base"),
        (("distill={attention_weight: 0.1}",), "compares what lies inside of a layer"),
    ):
        line = message(minimal, *overrides, "train.compile=true")
        assert re.search(rf": train\.compile: .*{named}", line)
    load_recipe(minimal, ["train.compile=true", "distill={hidden_weight: 0.1}"])


def test_a_key_of_another_section_is_meant_only_where_it_is_nearly_the_same(minimal: Path) -> None:
    assert message(minimal, "learning_rat=3").endswith("did you mean train.learning_rate?")
    assert "valid in plan.budget: ratio, heads," in message(minimal, "plan.budget={units: 3}")


def test_a_rule_that_reads_what_is_not_known_says_nothing(minimal: Path) -> None:
    """Each of these would be refused if the key had its default."""
    for override in ("plan.budgt={ratio: 0.3}", "plan.budget={ratio: x}", "plan.budget=3"):
        assert message(minimal, "plan.budget=null", override).count(";") == 1
    structure = "spans=[{leader: 0, followers: [1]}]"
    assert "did you mean plan?" in message(
        minimal,
        "plann.strategy=cosine",
        "plan.path=p.json",
        "plan.strategy=file",
        "plan.budget=null",
    )
    assert "plan.strategy is 'nne'" in message(minimal, "plan.strategy=nne", structure)
    assert "train.steps is -1" in message(minimal, "train.steps=-1", "distill={}")
    assert "did you mean train.steps?" in message(
        minimal,
        "train.stesp=5",
        "train.steps=null",
        "penalty={mode: progressive, ramp_steps: 7, schedule: linear}",
    )


def test_nothing_shared_is_one_fault_whatever_else_there_is_to_share(tmp_path: Path) -> None:
    data = structured(penalty={"coefficient": 2.0}, export={"formats": ["compact"]})
    assert "nothing is shared" in message(recipe_file(tmp_path, yaml12.dump(data)))


def test_within_a_section_all_rules_are_checked(minimal: Path) -> None:
    assert messages(
        minimal,
        "plan.strategy=file",
        "plan.seed=3",
        "plan.score=output",
        "plan.fold_norm=true",
        "plan.objective=cache",
    ) == [
        "plan: strategy file ignores budget; set plan.budget=null",
        "plan: strategy file needs the plan; set plan.path",
        "plan: strategy file ignores objective; remove plan.objective",
        "plan: strategy file ignores fold_norm; remove plan.fold_norm",
    ]
    assert messages(minimal, "penalty={mode: progressive, kind: mse, coefficient: 2.0}") == [
        "penalty: mode progressive takes the steps in which a target reaches its source, and how; "
        "set ramp_steps >= 1 and schedule linear or cosine",
        "penalty: mode progressive moves units along their difference, by its length: kind mse has "
        "no such step; remove kind, or set mode coupled",
        "penalty: mode progressive has no loss to weigh, so coefficient has no effect; remove "
        "coefficient",
    ]


def test_a_key_of_an_earlier_version_names_the_one_that_took_its_place(minimal: Path) -> None:
    auto = "plan={strategy: auto, budget: {bytes: -5%}, basis: false}"
    assert message(minimal, auto) == (
        f"{minimal}: unknown key plan.basis; set plan.objective=bytes where strategy auto may "
        "share bases, or leave it out"
    )


def test_a_value_of_several_forms_is_one_fault(minimal: Path) -> None:
    lines = messages(minimal, "train=3", "recovery=heal")
    assert lines == [
        "recovery is 'heal'; allowed: one of default, paper or a list of one or more of: one of "
        "penalty, decoupled, progressive, residual, reconstruct, heal, distill or null",
        "train is 3; allowed: a mapping with batch_size, micro_batch_size, learning_rate",
    ]


def test_keys_that_are_no_words_are_unknown_keys(tmp_path: Path) -> None:
    text = yaml12.dump(MINIMAL) + "4: 5\n"
    assert "unknown key 4; did you mean" in message(recipe_file(tmp_path, text))


def test_a_faulty_recipe_leaves_the_defaults_as_they_are(minimal: Path) -> None:
    with pytest.raises(PostshareError):
        load_recipe(minimal, ["kind=mse", "merge=mean"])  # of sections that the recipe leaves out
    assert load_recipe(minimal).penalty.kind == "l2"
    assert load_recipe(minimal).materialize.merge == "copy"


# --- where nothing trains -------------------------------------------------------------------------


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    return recipe_file(tmp_path, yaml12.dump(MINIMAL | {"train": {"steps": 0}}))


def test_what_training_needs_is_not_required_where_nothing_trains(untrained: Path) -> None:
    recipe = load_recipe(untrained)
    assert recipe.accumulation(3) == 1
    assert recipe.steps == 0
    assert load_recipe(untrained, ["train.micro_batch_size=4"]).train.batch_size == 4
    missing = ["train.batch_size", "train.micro_batch_size", "train.learning_rate"]
    for training in ("train.steps=1", "materialize.heal_steps=3"):
        assert [line.split()[0] for line in messages(untrained, training)] == missing
    given = "train={epochs: 1}"
    assert [line.split()[0] for line in messages(untrained, given)] == missing


def test_without_training_the_batch_and_the_rate_decide_nothing(untrained: Path) -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        return run_identity(load_recipe(untrained, overrides))

    stated = ["train.batch_size=8", "train.micro_batch_size=2", "train.learning_rate=1e-3"]
    assert identity(*stated) == identity()  # a run folder of an older recipe goes on
    assert identity(*stated, "train.steps=3")["train"]["batch_size"] == 8
    healed = [*stated, "materialize.heal_steps=3"]
    assert identity(*healed) != identity(*healed, "train.batch_size=4")


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"train": {"steps": 0}}, True),
        ({"train": {"steps": 0}, "materialize": {"heal_steps": 0}}, True),
        ({"train": {"steps": 0}, "materialize": {"heal_steps": 3}}, False),
        ({"train": {"steps": 3}}, False),
        ({"train": {"epochs": 1.0}}, False),
        ({"train": {}}, False),
        ({}, True),
        ({"train": MINIMAL["train"] | {"learning_rate": "fast"}}, False),
    ],
)
def test_editors_ask_for_the_same(change: dict[str, Any], valid: bool) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
    assert validator.is_valid(MINIMAL | change) == valid
    if valid:
        validate(MINIMAL | change)


def test_accumulation_divides_or_names_the_nearest_batch() -> None:
    section = validate(MINIMAL).train
    assert [section.accumulation(world) for world in (1, 2)] == [2, 1]
    with pytest.raises(
        PostshareError, match=r"4 x 3 processes; the nearest is train.batch_size=12"
    ):
        section.accumulation(3)


@pytest.mark.parametrize(
    ("size", "expected"), [("2GB", 2_000_000_000), ("1.5 GiB", 1_610_612_736), ("200MB", 2 * 10**8)]
)
def test_shard_sizes(minimal: Path, size: str, expected: int) -> None:
    assert load_recipe(minimal, [f"export.shard_size={size}"]).export.shard_bytes == expected


def test_sharing_what_is_not_pulled_is_warned_about(minimal: Path) -> None:
    assert recipe_warnings(load_recipe(minimal)) == []
    assert (
        recipe_warnings(load_recipe(minimal, ["plan.share=[q, k, v, o]"])) == []
    )  # pulled by default
    overrides = ["plan.share=[q, k, v, o]", "penalty.projections=[q, k, v]"]
    (line,) = recipe_warnings(load_recipe(minimal, overrides))
    assert line.startswith("o will be shared without having been pulled")
    assert line.endswith("what the plan shares, which costs quality; remove penalty.projections")
    assert "mixed7M" not in line  # a model of ours, which no user knows
    (line,) = recipe_warnings(load_recipe(minimal, ["penalty.projections=[q, k, v, o]"]))
    assert line.startswith("o will be pulled and not shared")


def test_a_plan_file_is_warned_about_once_its_projections_are_known(minimal: Path) -> None:
    overrides = ["plan.strategy=file", "plan.path=p.json", "plan.budget=null"]
    recipe = load_recipe(minimal, [*overrides, "penalty.projections=[q, k]"])
    assert recipe_warnings(recipe) == []
    (line,) = recipe_warnings(recipe, shared=["q", "k", "v"])
    assert line.startswith("v will be shared without")


def test_directshare_is_no_mistake_but_training_without_penalty_is(minimal: Path) -> None:
    assert recipe_warnings(load_recipe(minimal, ["train.steps=0", "plan.share=[q, k, v, o]"])) == []
    (line,) = recipe_warnings(load_recipe(minimal, ["train.steps=0", "penalty.kind=mse"]))
    assert "the penalty has no effect" in line
    (line,) = recipe_warnings(load_recipe(minimal, ["penalty.loss_weights=[1, 0]"]))
    assert "shared without having been pulled" in line
    (line,) = recipe_warnings(load_recipe(minimal, ["plan.strategy=released"]))
    assert "chains" in line


def test_a_sequence_longer_than_the_model_is_warned_about(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    length = recipe.data.sequence_length
    before = recipe_warnings(recipe)
    assert recipe_warnings(recipe, positions=length) == before
    (line,) = set(recipe_warnings(recipe, positions=length - 1)) - set(before)
    assert f"data.sequence_length {length} exceeds the {length - 1} positions" in line


def test_held_out_text_that_is_trained_on_is_warned_about(minimal: Path) -> None:
    same = ["data.validation_fraction=0", "data.validation.0.path=stdlib"]
    other = [*same, "data.validation.0.split=validation"]
    assert recipe_warnings(load_recipe(minimal, other)) == []
    (line,) = recipe_warnings(load_recipe(minimal, same))
    assert line.startswith("data.validation: stdlib is training text too")


def test_ramps_longer_than_the_training_are_warned_about(minimal: Path) -> None:
    assert recipe_warnings(load_recipe(minimal, ["train.warmup_steps=10"])) == []
    (line,) = recipe_warnings(load_recipe(minimal, ["train.warmup_steps=11"]))
    assert "take 11 of 10 steps" in line
    (line,) = recipe_warnings(load_recipe(minimal, ["penalty={schedule: linear, ramp_steps: 12}"]))
    assert "takes 12 of 10 steps" in line


def test_every_field_is_described() -> None:
    def undescribed(node: Any, path: str) -> list[str]:
        found = []
        for key, child in node.get("properties", {}).items():
            if "description" not in child and "$ref" not in child:
                found.append(f"{path}.{key}")
        return found

    schema = Recipe.model_json_schema()
    nodes = {"Recipe": schema, **schema["$defs"]}
    assert [line for name, node in nodes.items() for line in undescribed(node, name)] == []


def test_stored_schema_is_up_to_date() -> None:
    stored = REPOSITORY / "docs" / "recipe.schema.json"
    assert stored.read_text(encoding="utf-8") == schema_text(), "run `make -B schema`"


# --- spans and KV heads ---------------------------------------------------------------------------

NO_TIES = ("plan.strategy=none", "plan.budget=null")


def structured(**sections: Any) -> dict[str, Any]:
    data = copy.deepcopy(MINIMAL) | sections
    del data["plan"]
    return data


@pytest.mark.parametrize(
    "spans",
    [
        [{"leader": 22, "followers": [23, 24, 25, 26], "share": "attention"}],
        [{"leader": 2, "followers": [3]}, {"leader": 0, "followers": [1], "share": "kv"}],
        [{"leader": 0, "followers": [1], "head_map": [[1, 0, 0, 3]]}],
        {"spans": [{"leader": 0, "followers": [1]}]},
        {"spans": [{"leader": 0, "followers": [1]}], "match_heads": True, "sink": False},
        {"spans": [{"leader": 0, "followers": [1], "share": "kv"}], "leaders": "copy"},
        {"strategy": "isotropy", "layers": 8, "share": "attention"},
        {"strategy": "isotropy", "layers": 8, "sink": False, "match_heads": True},
        {"strategy": "loss", "layers": 3, "share": "kv", "leaders": "copy", "max_followers": 1},
        {"strategy": "late", "layers": 4, "skip_layers": [3, 0], "calibration_blocks": 2},
    ],
)
@pytest.mark.parametrize("heads", [{}, {"kv_heads": 2}])
def test_every_form_of_spans_reads_back_equal(
    tmp_path: Path, spans: Any, heads: dict[str, int]
) -> None:
    recipe = validate(structured(spans=spans, heads=heads))
    assert recipe.plans
    assert recipe.changes_structure
    assert (recipe.plan.strategy, recipe.penalized) == ("none", False)
    assert recipe.heads.kv_heads == heads.get("kv_heads")
    assert recipe.spans is not None
    stated = {"spans": spans} if isinstance(spans, list) else spans
    for key, value in stated.items():
        held = recipe.model_dump(mode="json")["spans"][key]
        if key == "spans":
            defaults = {"share": "attention", "head_map": None}
            assert held == [defaults | span for span in value]
        else:
            assert held == (sorted(value) if key == "skip_layers" else value)
    recipe.save(tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert validate(recipe.model_dump(mode="json")) == recipe
    assert recipe_warnings(recipe) == []


def test_heads_alone_are_a_recipe(tmp_path: Path) -> None:
    recipe = validate(structured(heads={"kv_heads": 1}))
    assert recipe.plans
    assert recipe.spans is None
    recipe.save(tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    for nothing in ({}, {"heads": {}}, {"heads": {"kv_heads": None}}, {"spans": None}):
        with pytest.raises(PostshareError, match="nothing is shared; set plan, spans or heads"):
            validate(structured(**nothing))


def test_spans_from_the_command_line(minimal: Path, tmp_path: Path) -> None:
    found = load_recipe(minimal, ["spans.strategy=loss", "spans.layers=3", "heads.kv_heads=2"])
    assert found.spans is not None
    assert (found.spans.strategy, found.spans.layers, found.heads.kv_heads) == ("loss", 3, 2)
    assert found.plan.budget is not None  # ties, spans and KV heads in one recipe
    listed = load_recipe(minimal, [*NO_TIES, "spans=[{leader: 1, followers: [2, 3]}]"])
    assert listed.spans is not None
    assert [(s.leader, s.followers, s.share) for s in listed.spans.spans or ()] == [
        (1, (2, 3), "attention")
    ]
    # A list in the file is the section that it abbreviates: overrides reach into it.
    text = yaml12.dump(structured(spans=[{"leader": 1, "followers": [2]}]))
    file = recipe_file(tmp_path, text)
    changed = load_recipe(
        file,
        [
            "spans.spans.0.share=kv",
            "spans.spans.1={leader: 4, followers: [5]}",
            "spans.leaders=copy",
        ],
    )
    assert changed.spans is not None
    assert [(s.leader, s.share) for s in changed.spans.spans or ()] == [(1, "kv"), (4, "attention")]
    assert changed.spans.leaders == "copy"
    late = load_recipe(file, ["spans.strategy=late", "spans.layers=3", "spans.spans=null"])
    assert late.spans is not None
    assert late.spans.measures
    assert load_recipe(file, ["spans=null", "heads.kv_heads=2"]).spans is None


LISTED = "spans=[{leader: 1, followers: [2]}]"
KV = "spans={strategy: late, layers: 2, share: kv}"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["spans=3"], ["spans is 3", "a mapping with strategy"]),
        (["spans=[]"], ["spans.spans is []", "one or more of: a mapping with leader, followers"]),
        (["spans=[3]"], ["spans.spans.0 is 3", "a mapping with leader, followers"]),
        (["spans=[{leader: 1}]"], ["spans.spans.0.followers is missing", "a list of one or more"]),
        (["spans=[{leader: 1, followers: 2}]"], ["spans.0.followers is 2", "a list"]),
        (["spans=[{leader: 1, followers: []}]"], ["spans.spans.0.followers is []", "one or more"]),
        (["spans=[{leader: -1, followers: [2]}]"], ["spans.spans.0.leader is -1", ">= 0"]),
        (["spans=[{leder: 1, followers: [2]}]"], ["spans.spans.0.leder", "spans.0.leader?"]),
        ([LISTED, "spans.0.share=attenton"], ["spans.0.share is 'attenton'", "attention, kv"]),
        ([LISTED, "spans.0.head_map=[[0.5]]"], ["head_map.0.0 is 0.5", "a whole number >= 0"]),
        (["spans={strategy: lost, layers: 2}"], ["is 'lost'", "listed, isotropy, loss, late"]),
        (["spans.strategi=loss"], ["spans.strategi", "spans.strategy?"]),
        (["spans={strategy: loss, layers: 0}"], ["spans.layers is 0", ">= 1"]),
        (["spans={strategy: late, layers: 2, max_followers: 0}"], ["max_followers is 0", ">= 1"]),
        (["spans={strategy: late, layers: 2, skip_layers: [1, 1]}"], ["skip_layers", "twice"]),
        (["heads.kv_heads=0"], ["heads.kv_heads is 0", "a whole number >= 1 or null"]),
        (["heads.kvheads=2"], ["heads.kvheads", "heads.kv_heads?"]),
        # Contradictions, and options that would have no effect.
        (["spans={}"], ["strategy listed needs the spans", "set spans.spans"]),
        (["spans.layers=3"], ["strategy listed needs the spans", "another spans.strategy"]),
        (
            [LISTED, "spans={spans: [{leader: 1, followers: [2]}], layers: 3}"],
            ["remove spans.layers"],
        ),
        (["spans.strategy=loss"], ["needs the number of followers", "set spans.layers"]),
        (
            ["spans={strategy: loss, layers: 1, spans: [{leader: 1, followers: [2]}]}"],
            ["strategy loss finds the spans itself", "remove spans.spans"],
        ),
        *(
            (
                [f"spans={{spans: [{{leader: 1, followers: [2]}}], {option}}}"],
                [f"strategy listed ignores {option.partition(':')[0]}", "remove spans."],
            )
            for option in (
                "share: kv",
                "max_followers: 2",
                "skip_layers: [7]",
                "sink: false",
                "calibration_blocks: 2",
            )
        ),
        (
            ["spans={strategy: late, layers: 2, leaders: copy}"],
            ["kv spans", "remove spans.leaders"],
        ),
        ([KV, "spans.match_heads=true"], ["kv spans do not share", "spans.match_heads=false"]),
        (
            [
                "spans={spans: [{leader: 1, followers: [2], share: kv},"
                " {leader: 3, followers: [4]}], match_heads: true}"
            ],
            ["kv spans do not share", "spans.match_heads=false"],
        ),
        (
            ["spans={match_heads: true, spans: [{leader: 1, followers: [2], head_map: [[0]]}]}"],
            ["match_heads and a head_map exclude each other"],
        ),
        (["heads.kv_heads=2", "export.formats=[compact]"], ["export:", "export.formats=[dense]"]),
        (["export.formats=[compact]"], ["export:", "export.formats=[dense]"]),
    ],
)
def test_wrong_spans_name_path_value_and_cure(
    minimal: Path, overrides: list[str], parts: list[str]
) -> None:
    text = message(minimal, *NO_TIES, *overrides)
    for part in parts:
        assert part in text


def test_a_plan_file_and_spans_exclude_each_other(minimal: Path) -> None:
    file = ["plan.strategy=file", "plan.path=p.json", "plan.budget=null"]
    for extra in (LISTED, KV, "heads.kv_heads=2"):
        assert "remove spans and heads, or write them into the file" in message(
            minimal, *file, extra
        )


def test_editors_accept_both_forms_of_spans() -> None:
    schema = Recipe.model_json_schema()
    (ref, listed, null) = schema["properties"]["spans"]["anyOf"]
    assert (ref, null) == ({"$ref": "#/$defs/SpansSection"}, {"type": "null"})
    assert (listed["type"], listed["items"]) == ("array", {"$ref": "#/$defs/Span"})


@pytest.mark.parametrize(
    ("plan", "objective"),
    [
        ({"strategy": "cosine", "basis": True}, "all"),
        ({"strategy": "auto", "basis": True}, "bytes"),
        ({"strategy": "auto", "basis": False}, "all"),
    ],
    ids=["cosine", "bases", "no-bases"],
)
def test_a_run_of_an_earlier_version_can_be_read(
    tmp_path: Path, plan: dict[str, Any], objective: str
) -> None:
    """Its recipe.yaml has plan.basis, which plan.objective has replaced."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml12.dump(MINIMAL | {"plan": MINIMAL["plan"] | plan}))
    assert load_recipe(file).plan.objective == objective


def test_a_recipe_keeps_what_was_written(tmp_path: Path) -> None:
    """Comments and what was typed beside the file; and it is no part of what recipes are."""
    file = tmp_path / "mine.yaml"
    text = "# Mine.\n" + text_of("demo_sa").replace("name: demo_sa", "name: mine # short")
    file.write_text(text)
    found = load_recipe(file, ["train.steps=7", "seed=3"])
    assert found.written == f"{text}# Typed with it:\n#   train.steps=7\n#   seed=3\n"
    assert load_recipe(file).written == text
    same = validate(found.model_dump(mode="json", exclude_unset=True))
    assert same == found
    assert yaml12.parse(same.written, "written")["train"]["steps"] == 7
    assert "written" not in found.model_dump()
