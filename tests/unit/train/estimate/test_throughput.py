"""Operations of a token, utilization and tokens per second, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sa_models.errors import PostshareError
from train.estimate.llama_shapes import KNOWN, LlamaShape
from train.estimate.throughput import (
    CHIPS,
    MEASURED,
    Assumed,
    Speed,
    Unknown,
    find_chip,
    forward_flops,
    speed_of,
    step_flops,
    training_flops,
)
from train.recipe.recipe import Recipe, validate

ONE_B = KNOWN["meta-llama/Llama-3.2-1B"]
SMALL = LlamaShape(1000, 64, 128, 2, 4, 2, 16)
"""A layer: 4,096 q + 2 x 2,048 k, v + 4,096 o + 24,576 MLP + 128 norms = 36,992; two of them, a
norm of 64 and lm_head 64,000 are multiplied: 138,048. Attention: 2 x 4 x 16 x 32 tokens = 4,096."""


def recipe(length: int = 2048, **sections: Any) -> Recipe:
    train = {
        "steps": 10, "batch_size": 8, "micro_batch_size": 1, "learning_rate": 1e-4,
        "precision": "bf16", **sections.pop("train", {}),
    }  # fmt: skip
    return validate(
        {
            "name": "test",
            "model": {"path": "meta-llama/Llama-3.2-1B"},
            "data": {"train": "a", "validation": "b", "sequence_length": length},
            "plan": {"budget": {"ratio": 0.3}},
            "train": train,
            **sections,
        }
    )


def test_operations_of_a_token_by_hand() -> None:
    assert training_flops(SMALL, 32) == 6 * 138_048 + 12 * 4096
    assert forward_flops(SMALL, 32) * 3 == training_flops(SMALL, 32)
    tied = replace(SMALL, tie_word_embeddings=True)  # the table is lm_head, and is multiplied
    assert training_flops(tied, 32) == training_flops(SMALL, 32)
    # Llama-3.2-1B: 1,235,814,400 tied parameters, 16 layers of 32 heads of 64.
    assert training_flops(ONE_B, 2048) == 6 * 1_235_814_400 + 12 * 16 * 32 * 64 * 2048


def test_a_step_counts_what_trains_and_the_teacher() -> None:
    n, attention = 1_235_814_400, 12 * 16 * 32 * 64 * 2048
    assert step_flops(recipe(), ONE_B) == 6 * n + attention
    taught = recipe(distill={"precision": "bf16"})
    assert step_flops(taught, ONE_B) == 8 * n + attention * 4 // 3
    # Only the o of each layer trains: 2,048 x 2,048 each.
    o = recipe(train={"trainable": ["*.o_proj.*"]})
    assert step_flops(o, ONE_B) == 4 * n + 2 * 16 * 2048**2 + attention
    # Adapters of rank 4 on q: 4 x (2,048 + 2,048) in each layer.
    lora = recipe(lora={"rank": 4, "targets": ["q"]}, penalty={"projections": ["q"]})
    assert step_flops(lora, ONE_B) == 4 * n + 6 * 16 * 4 * 4096 + attention


def test_the_measured_utilization() -> None:
    # 33,504 x 8.2202 GFLOP = 275.4 TFLOP/s of 989; 40,523: 333.1.
    assert [round(found.mfu, 4) for found in MEASURED] == [0.2785, 0.3368]


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("h100", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_chip_is_found_by_the_words_of_its_name(name: str, chip: str) -> None:
    found = find_chip(name)
    assert found is not None
    assert found.name == chip


@pytest.mark.parametrize("name", ["", "NVIDIA GeForce RTX 4070", "NVIDIA L40", "Tesla V100"])
def test_another_chip_is_not_taken_for_one_that_is_known(name: str) -> None:
    assert find_chip(name) is None


def test_names_of_more_words_come_first() -> None:
    names = [chip.name for chip in CHIPS]
    for at, name in enumerate(names):
        assert find_chip(name) is CHIPS[at]


def test_the_speed_of_the_measured_shape_is_the_measured_one() -> None:
    for checkpointing, expected in ((True, 33_504), (False, 40_523), ("selective", 33_504)):
        of = recipe(train={"gradient_checkpointing": checkpointing})
        found = speed_of(of, ONE_B, 8, Assumed(chip="h100"))
        assert isinstance(found, Speed)
        assert found.tokens_per_second == pytest.approx(8 * expected)
        assert found.slower == pytest.approx(989 / 67)
    assert found.origin == (
        "MFU 27.8% on H100",
        "of 989 TFLOP/s (dense bf16), 8.22 GFLOP a token",
        "measured on one H100 at Llama-3.2-1B's shape, with checkpointing",
        "(docs/results.md); GPUs taken as fast together as alone",
    )


def test_a_given_utilization_of_a_chip() -> None:
    found = speed_of(recipe(), ONE_B, 2, Assumed(chip="A100", mfu=0.5))
    assert isinstance(found, Speed)
    assert found.tokens_per_second == pytest.approx(2 * 0.5 * 312e12 / 8_220_192_768)
    assert found.origin[0] == "MFU 50.0% on A100"


def test_what_is_given_comes_before_what_was_measured() -> None:
    earlier = (2.0, "runs/x/metrics.jsonl")
    found = speed_of(recipe(), ONE_B, 1, Assumed(), earlier, "NVIDIA H100 80GB HBM3")
    assert isinstance(found, Speed)
    assert found.tokens_per_second == 8 * 2048 / 2
    assert found.origin == ("2 s a step, as in runs/x/metrics.jsonl",)
    found = speed_of(recipe(), ONE_B, 1, Assumed(100.0), earlier)
    assert found == Speed(100.0, ("as given",), None)
    found = speed_of(recipe(train={"precision": "fp32"}), ONE_B, 1, Assumed(100.0))
    assert found == Speed(100.0, ("as given",), 1.0)


@pytest.mark.parametrize(
    ("given", "device", "why"),
    [
        (Assumed(), "", "no chip is named; give --chip H100, or --speed TOKENS"),
        (
            Assumed(),
            "Tesla V100",
            "Tesla V100 is not in the table of chips; give --speed TOKENS",
        ),
        (
            Assumed(chip="A100"),
            "",
            "none was measured on A100; give --mfu 0.3, or --speed TOKENS",
        ),
    ],
)
def test_what_is_not_known_says_what_to_give(given: Assumed, device: str, why: str) -> None:
    assert speed_of(recipe(), ONE_B, 1, given, None, device) == Unknown(why)


def test_a_small_model_or_fp32_is_not_foretold_from_the_measurement() -> None:
    why = "none measured below 308,953,600 (309 M) parameters; give --speed TOKENS"
    assert speed_of(recipe(), SMALL, 1, Assumed(chip="H100")) == Unknown(why)
    why = "utilization is that of bf16, this trains in fp32; give --speed TOKENS"
    in_fp32 = recipe(train={"precision": "fp32"})
    assert speed_of(in_fp32, ONE_B, 1, Assumed(chip="H100")) == Unknown(why)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Assumed(chip="H1000"), r"--chip H1000 is not known \(GB200, .*\); give --speed"),
        (Assumed(mfu=0.3), "--mfu is a share of a chip's peak; give --chip too, or --speed"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: Assumed, message: str) -> None:
    with pytest.raises(PostshareError, match=message):
        speed_of(recipe(), ONE_B, 1, given)
