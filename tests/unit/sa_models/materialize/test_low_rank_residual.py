"""The arithmetic of residuals, against the SVD of the whitened loss and against plain loops."""

from __future__ import annotations

import pytest
import torch

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.low_rank_residual import Pair, low_rank, share_left
from sa_models.materialize.residual_shapes import check_rank, residual_parameters, residual_shapes

torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(out: int, features: int, tied: list[int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A loss in the rows `tied`, and inputs whose directions differ a hundredfold in size."""
    generator = seeded(seed)
    lost = torch.zeros(out, features, dtype=torch.float64)
    lost[tied] = torch.randn(len(tied), features, dtype=torch.float64, generator=generator)
    mixing = torch.randn(features, features, dtype=torch.float64, generator=generator)
    sizes = torch.logspace(-1, 1, features, dtype=torch.float64)
    inputs = torch.randn(500, features, dtype=torch.float64, generator=generator) * sizes @ mixing
    return lost, inputs


def output_error(lost: torch.Tensor, pair: Pair, inputs: torch.Tensor) -> float:
    """The squared output error over all inputs, one after the other."""
    rest = lost - pair.b.double() @ pair.a.double()
    return float(sum((rest @ x).square().sum() for x in inputs))


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize(
    ("out", "features", "tied"), [(12, 9, [2, 3, 4, 7, 8, 9, 11]), (9, 14, list(range(9)))]
)
def test_the_error_is_the_tail_of_the_whitened_singular_values(
    rank: int, out: int, features: int, tied: list[int]
) -> None:
    lost, inputs = problem(out, features, tied)
    moments = inputs.T @ inputs
    pair = low_rank(lost, rank, moments, seeded())
    # SVD-LLM's way: the Cholesky factor of the moments, and the SVD of what it weighs.
    tail = torch.linalg.svdvals(lost @ torch.linalg.cholesky(moments))[rank:].square().sum()
    error = output_error(lost, pair, inputs)
    whole = output_error(lost, Pair(pair.a * 0, pair.b), inputs)
    assert error == pytest.approx(float(tail), rel=1e-4, abs=1e-9 * whole)
    assert share_left(lost, pair, moments) == pytest.approx(error / whole, rel=1e-6, abs=1e-9)
    plain = low_rank(lost, rank, None, seeded())
    assert error <= output_error(lost, plain, inputs) * (1 + 1e-9) + 1e-9 * whole
    if 0 < rank < 7:
        assert error < 0.9 * output_error(lost, plain, inputs)


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("start", range(4))
def test_no_other_residual_of_the_rank_is_better(whitened: bool, start: int) -> None:
    """Descent on A and B from other starts ends no lower."""
    lost, inputs = problem(6, 5, [0, 1, 2, 4])
    moments = inputs.T @ inputs / 500 if whitened else torch.eye(5, dtype=torch.float64)
    root, generator = torch.linalg.cholesky(moments), seeded(start)
    a = torch.randn(2, 5, dtype=torch.float64, generator=generator).requires_grad_()
    b = torch.randn(6, 2, dtype=torch.float64, generator=generator).requires_grad_()
    descent = torch.optim.LBFGS(
        [a, b], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14
    )

    def loss() -> torch.Tensor:
        descent.zero_grad()
        left = ((lost - b @ a) @ root).square().sum() / (lost @ root).square().sum()
        left.backward()
        return left

    descent.step(loss)
    best = share_left(lost, low_rank(lost, 2, moments, seeded()), moments)
    assert float(loss().detach()) >= best * (1 - 1e-6)
    assert best > 1e-3  # else nothing was compared


def test_unwhitened_it_is_the_truncated_svd() -> None:
    lost, _ = problem(8, 6, [1, 2, 5, 6, 7])
    u, s, v = torch.linalg.svd(lost)
    pair = low_rank(lost, 3, None, seeded())
    expected = (u[:, :3] * s[:3]) @ v[:3]
    torch.testing.assert_close(pair.product().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pair.a.norm(dim=1), pair.b.norm(dim=0))


def test_the_sign_of_a_direction_is_a_convention() -> None:
    lost, inputs = problem(9, 14, list(range(9)))
    pair = low_rank(lost, 4, inputs.T @ inputs, seeded())
    largest = pair.b.gather(0, pair.b.abs().argmax(0)[None])
    assert bool((largest > 0).all())


def test_features_that_lost_nothing_get_nothing() -> None:
    lost, inputs = problem(10, 6, [3, 4, 8])
    rows = low_rank(lost, 2, inputs.T @ inputs, seeded())
    assert set(rows.b.any(1).nonzero().flatten().tolist()) == {3, 4, 8}
    inputs = inputs @ torch.randn(6, 10, dtype=torch.float64, generator=seeded(3))
    columns = low_rank(lost.T.contiguous(), 2, inputs.T @ inputs, seeded())  # an o
    assert set(columns.a.any(0).nonzero().flatten().tolist()) == {3, 4, 8}


def test_one_residual_is_no_worse_than_one_for_each_unit() -> None:
    """Of the same number of parameters in PEFT's form: rank 4 against 2 units of rank 2."""
    lost, inputs = problem(12, 9, list(range(4, 12)))
    moments = inputs.T @ inputs
    together = low_rank(lost, 4, moments, seeded())
    a, b = torch.zeros(4, 9), torch.zeros(12, 4)
    for at, rows in enumerate((slice(4, 8), slice(8, 12))):
        one = low_rank(lost[rows], 2, moments, seeded())
        a[2 * at : 2 * at + 2], b[rows, 2 * at : 2 * at + 2] = one.a, one.b
    assert share_left(lost, together, moments) < 0.99 * share_left(lost, Pair(a, b), moments)


def test_directions_in_which_nothing_was_lost_can_be_trained() -> None:
    lost, inputs = problem(8, 7, [2, 5])
    pair = low_rank(lost, 4, inputs.T @ inputs, seeded(9))
    torch.testing.assert_close(pair.product().double(), lost, rtol=1e-5, atol=1e-5)
    assert not pair.b[:, 2:].any()
    assert bool(pair.a[2:].all())
    assert float(pair.a[2:].abs().max()) <= 7**-0.5
    nothing = low_rank(torch.zeros(8, 7, dtype=torch.float64), 4, None, seeded(9))
    assert not nothing.b.any()
    assert bool(nothing.a.all())


def test_shapes_leave_removed_units_out() -> None:
    from sa_models.plan import HeadTie, SharingPlan
    from tests.support.reference import dense

    config = dense("odd").config  # 6 layers, 6 heads of 6 in 3 KV groups, 30 features
    plan = SharingPlan(
        (HeadTie((3, 0), (1, 1), ("o", "k")), HeadTie((3, 2), (1, 1), ("k",))),
        removed=((3, 1),),
    )
    assert residual_shapes(plan, config) == {(3, "k"): (12, 30), (3, "o"): (30, 24)}
    assert residual_parameters(plan, config, 5) == 5 * (42 + 54)


def test_a_rank_larger_than_the_head_is_refused() -> None:
    layout = HeadLayout(layers=2, hidden_size=32, heads=8, kv_heads=2, head_dim=4)
    check_rank(4, layout)
    with pytest.raises(PostshareError, match="larger than the head of 4 dimensions"):
        check_rank(5, layout)
