"""The rule of the verdict: which chip, and for which reason."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from tests.support.report_run import ABOVE, MIXED, make_run
from tests.unit.train.report.test_report import make_comparison
from train.report.data import read_run
from train.report.decision import Cost, decide
from train.report.rivals import find_rivals
from train.report.verdict import Verdict, judge

WORTH, NOT, OPEN = "worth it", "not worth it", "cannot be told"
SAVED = {"weights": 0.1, "KV cache": 0.02}


def cost(low: float, high: float) -> Cost:
    return Cost((low + high) / 2, low, high, "said")


@pytest.mark.parametrize(
    ("bounds", "chip"),
    [
        ((-0.02, 0.0099), WORTH),
        ((0.002, 0.0099), WORTH),
        ((0.002, 0.011), OPEN),
        ((0.0099, 0.03), OPEN),
        ((0.011, 0.012), NOT),
    ],
)
def test_a_tenth_of_the_larger_saving_may_be_paid(bounds: tuple[float, float], chip: str) -> None:
    found = decide(SAVED, None, cost(*bounds))
    assert found.chip == chip
    assert found.reason.startswith(
        "It saves 10.0% of the weights, for which perplexity may rise by 1.00%. It changes by "
        f"{bounds[0]:+.2%} to {bounds[1]:+.2%} (said)."
    )
    assert ("postshare compare" in found.reason) == (chip == OPEN)
    assert found.tone == {WORTH: "good", NOT: "bad", OPEN: ""}[chip]


def test_what_is_saved_of_nothing_is_worth_nothing() -> None:
    free = cost(-0.01, -0.005)
    assert decide({"weights": 0.009, "KV cache": 0.0}, None, free).chip == NOT
    assert decide({"weights": 0.011, "KV cache": 0.0}, None, free).chip == WORTH
    # Time counts with the end of its spread that saves least.
    assert decide({"weights": 0.0}, (0.8, 0.995), free).chip == NOT
    assert decide({"weights": 0.0}, (0.8, 0.95), free).chip == WORTH
    assert "5.0% of the decode time" in decide({"weights": 0.0}, (0.8, 0.95), free).reason


def test_time_that_is_lost_counts_beyond_its_spread() -> None:
    free = cost(0.0, 0.001)
    assert decide(SAVED, (1.05, 1.3), free).chip == WORTH
    found = decide(SAVED, (1.11, 1.3), free)
    assert (found.chip, found.reason) == (
        NOT,
        "It saves 10.0% of the weights, and decoding takes at least 11.0% longer.",
    )


def test_a_control_that_is_as_small_and_better_decides() -> None:
    found = decide(SAVED, None, cost(0.0, 0.001), "pruned-random")
    assert found.chip == NOT
    assert "but pruned-random, a control that is as small, is better" in found.reason


def test_without_a_control_it_cannot_be_told() -> None:
    found = decide(SAVED, None, None)
    assert (found.chip, "evaluate.continued" in found.reason) == (OPEN, True)


def test_the_uncertainty_of_a_cost() -> None:
    bounds = (math.log(1.01), math.log(1.03))
    one = Cost.measured(0.02, bounds, 1, trained=True)
    assert (one.low, one.high) == (pytest.approx(0.008), pytest.approx(0.032))
    three = Cost.measured(0.02, bounds, 3, trained=True)
    assert (three.low, three.high) == (pytest.approx(0.01), pytest.approx(0.03))
    untrained = Cost.measured(0.02, bounds, 1, trained=False)
    assert (untrained.low, untrained.high) == (pytest.approx(0.01), pytest.approx(0.03))
    unknown = Cost.measured(0.02, None, 1, trained=True)
    assert (unknown.low, unknown.high) == (pytest.approx(0.0), pytest.approx(0.04))


# --- of a run -------------------------------------------------------------------------------------


def verdict(folder: Path) -> Verdict:
    data = read_run(folder)
    found = judge(data, find_rivals(folder, data.recipe)[0])
    assert found is not None
    return found


def test_a_run_with_spans_says_which_saving_counts(tmp_path: Path) -> None:
    """A follower of 3 layers keeps no keys: a sixth of the cache."""
    folder = make_run(tmp_path / "run", MIXED, above={**ABOVE, "post": -0.095})
    found = verdict(folder)
    assert found.decision.chip == WORTH
    assert found.decision.reason.startswith(
        "It saves 16.7% of the KV cache, for which perplexity may rise by 1.67%. "
        "It changes by +0.30% to +0.70% (95 % over the held-out text, and 0.2% for another seed)."
    )
    assert "16.7% less KV cache, decode time not measured; 0.5% higher perplexity" in found.headline


def test_without_intervals_only_what_is_far_is_told(tmp_path: Path) -> None:
    chips = {}
    for post in (-0.095, 0.0):
        folder = make_run(tmp_path / f"run{post}", MIXED, above={**ABOVE, "post": post})
        (folder / "evaluation-blocks.json").unlink()
        chips[post] = verdict(folder).decision.chip
    assert chips == {-0.095: OPEN, 0.0: NOT}, "0.5 % and 10.5 % above continued"


def test_a_run_without_a_control(tmp_path: Path) -> None:
    above = {name: value for name, value in ABOVE.items() if name != "continued"}
    assert verdict(make_run(tmp_path / "run", MIXED, above=above)).decision.chip == OPEN
    # Where nothing was trained, the base is the control.
    for direct, chip in ((0.01, WORTH), (0.05, NOT)):
        above = {"base": 0.0, "direct": direct}
        found = verdict(make_run(tmp_path / f"run{direct}", MIXED, above=above))
        assert (found.decision.chip, "another seed" in found.decision.reason) == (chip, False)


@pytest.mark.parametrize(("control", "chip"), [(-0.05, WORTH), (-0.1, NOT)])
def test_seeds_and_controls_of_a_comparison_count(
    control: float, chip: str, tmp_path: Path
) -> None:
    """Of the recipe's own size, 0.005 worse than continued, and a control that may be better."""
    folder = make_run(tmp_path / "run", MIXED, above={**ABOVE, "post": -0.095})
    make_comparison(tmp_path / "run-compare", shared=MIXED)
    for name, post in (("recipe", -0.095), ("random-pairs", control)):
        for seed in (0, 1, 2):
            place = tmp_path / "run-compare" / name / f"seed-{seed}"
            if place.exists():
                shutil.rmtree(place)
            make_run(place, MIXED, above={**ABOVE, "post": post}, seed=seed)
    found = verdict(folder).decision
    assert found.chip == chip
    if chip == WORTH:
        assert "+0.50% to +0.50% (95 % over the held-out text and 3 seeds)" in found.reason
    else:
        assert "random-pairs, a control that is as small, is better" in found.reason
