"""P-values: uniform where nothing is alike, tiny where something was planted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.scores.registry import weight_scores, weight_terms
from sa_models.scores.significance import Terms, chance, upper_tail
from sa_models.scores.weight_cosine import best_matches
from tests.support.in_memory import InMemory

ALIGNED = ("qk_aligned", "vo", "qkvo_aligned")

LAYOUT = HeadLayout(layers=9, hidden_size=40, heads=8, kv_heads=4, head_dim=8)
WIDE = replace(LAYOUT, hidden_size=256)


def random_weights(seed: int, layout: HeadLayout = LAYOUT) -> dict[str, torch.Tensor]:
    """Gaussian, with input features of very different sizes, which are the same in all units."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(layout.hidden_size, generator=generator) * 2 + 0.1
    weights = {}
    for layer, p in itertools.product(range(layout.layers), PROJECTIONS):
        weight = torch.randn(layout.shape(p), generator=generator)
        weights[layout.parameter_name(layer, p)] = weight * (1 if p == "o" else sizes)
    return weights


def distances_from_uniform(values: list[float]) -> tuple[float, float]:
    """Kolmogorov-Smirnov distances times sqrt(n), of p-values that are too small and too large.

    The larger is above 1.63 with probability 1 %, the first above 1.52.
    """
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    small, large = (steps[1:] - ordered).max(), (ordered - steps[:-1]).max()
    return float(small) * math.sqrt(n), float(large) * math.sqrt(n)


@pytest.mark.parametrize("score", ["qk", "v", "softmax", *ALIGNED])
def test_p_values_of_unrelated_pairs_are_uniform(score: str) -> None:
    # Disjoint pairs, so that they are independent: layer 0 with 1, 2 with 3, and so on.
    found = []
    for seed in range(15):
        terms = weight_terms(InMemory(random_weights(seed)), LAYOUT, score)
        for layer, unit in itertools.product(range(1, 9, 2), range(4)):
            found.append(chance(terms((layer, unit), (layer - 1, unit)), 1, seed).p)
    assert len(found) == 240
    assert max(distances_from_uniform(found)) < 1.63


@pytest.mark.parametrize("layout", [WIDE, LAYOUT])
@pytest.mark.parametrize("score", ["qk", "qk_aligned", "vo"])
def test_the_best_of_many_is_no_discovery(score: str, layout: HeadLayout) -> None:
    """Without the correction nearly every best match of noise would look like one.

    With few features of unequal sizes the correction is conservative: large scores are more often
    those of wide nulls, and sums of few signs have shorter tails.
    """
    compare = weight_scores
    raw, corrected = [], []
    for seed in range(8):
        reader = InMemory(random_weights(seed, layout))
        matches = best_matches(compare(reader, layout, score), layout)
        terms = weight_terms(reader, layout, score)
        for layer, unit in itertools.product(range(5, 9), range(4)):
            source = tuple(matches.sources[layer, unit].tolist())
            found = chance(terms((layer, unit), source), layer * layout.units, seed)
            assert found.score == pytest.approx(float(matches.scores[layer, unit]), abs=2e-6)
            raw.append(found.p)
            corrected.append(found.corrected)
    too_small, too_large = distances_from_uniform(corrected)
    assert sum(p < 0.05 for p in raw) > len(raw) * 0.6
    assert too_small < 1.52
    if layout is WIDE:
        assert too_large < 1.63


@pytest.mark.parametrize("score", ["qk", "qk_aligned", "vo", "qkvo_aligned"])
def test_planted_copies_are_found(score: str) -> None:
    """A third of a target's square is its source's, in another layer."""
    weights = random_weights(0, WIDE)
    for p in PROJECTIONS:
        rows = slice(0, WIDE.width(p))
        target, source = (weights[LAYOUT.parameter_name(layer, p)] for layer in (7, 2))
        if p == "o":
            target[:, rows] += 0.7 * source[:, rows]
        else:
            target[rows] += 0.7 * source[rows]
    terms = weight_terms(InMemory(weights), WIDE, score)
    planted, other = terms((7, 0), (2, 0)), terms((7, 1), (2, 0))
    assert chance(planted, 28).corrected < 1e-5
    assert chance(other, 28).corrected > 0.5


def test_the_null_is_what_scrambled_weights_score() -> None:
    """Mean and spread of the null against scores of weights whose inputs really changed sign."""
    weights = random_weights(3)
    target, source = (4, 1), (1, 2)
    pair = weight_terms(InMemory(weights), LAYOUT, "qkvo_aligned")(target, source)
    generator = torch.Generator().manual_seed(9)
    scrambled = []
    for _ in range(300):
        signs = torch.randint(2, (LAYOUT.hidden_size,), generator=generator) * 2.0 - 1
        changed = dict(weights)
        for p in "qkv":
            name = LAYOUT.parameter_name(target[0], p)
            changed[name] = weights[name] * signs
        scores = weight_terms(InMemory(changed), LAYOUT, "qkvo_aligned")
        scrambled.append(scores(target, source).score)
    sample, null = torch.tensor(scrambled, dtype=torch.float64), pair.null(seed=0)
    error = float(sample.std()) / math.sqrt(300)
    assert float(null.mean()) == pytest.approx(float(sample.mean()), abs=3 * error)
    assert float(null.std()) == pytest.approx(float(sample.std()), rel=0.15)
    assert float(sample.mean()) > 20 * error  # noise alone scores well above 0


def test_the_same_seed_gives_the_same_p() -> None:
    terms = weight_terms(InMemory(random_weights(1)), LAYOUT, "qk_aligned")
    first, again, other = (chance(terms((3, 0), (0, 1)), 12, seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert first.corrected == pytest.approx(1 - (1 - first.p) ** 12, rel=1e-9)


@pytest.mark.parametrize(("shape", "sign"), [(0.8, 1), (3, 1), (3, -1), (40, 1), (40, -1)])
def test_the_tail_is_that_of_a_gamma_distribution(shape: float, sign: int) -> None:
    torch.manual_seed(0)
    draws = torch.distributions.Gamma(float(shape), 1.0).sample((400_000,)).double() * sign
    for quantile in (0.5, 0.05, 1e-3):
        value = float(draws.quantile(1 - quantile))
        assert upper_tail(draws[:100_000], value) == pytest.approx(quantile, rel=0.12)


def test_a_null_that_does_not_vary() -> None:
    none = Terms(torch.zeros(0, 3, dtype=torch.complex128), torch.zeros(3, dtype=torch.float64))
    assert chance(none, 5).corrected == 1.0
    one = torch.zeros(2, 4, dtype=torch.complex128)
    one[:, 1] = 1 + 1j  # all weight on one feature: no sign makes it smaller
    assert chance(Terms(one, torch.zeros(4, dtype=torch.float64)), 1).p == 1.0
