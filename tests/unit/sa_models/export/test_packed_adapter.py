"""Adapters in few bits: what is stored is what is read, within the bytes, and worth them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from sa_models.calibration.input_moments import Where
from sa_models.errors import PostshareError
from sa_models.export.packed_adapter import LOST, PACKED_FILE, allocate, pack, principal, unpack
from sa_models.export.peft_adapter import load_adapter, save_adapter
from sa_models.materialize.low_rank_residual import Pair
from tests.support import tiny
from train.cli import app

torch.set_num_threads(1)


def pairs(rank: int = 8, out: int = 48, features: int = 64) -> dict[Where, Pair]:
    """Singular values that fall by a thousand, another scale in each layer, as no basis shows."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer, p in itertools.product(range(2), "qv"):
        a, b = (
            torch.randn(shape, generator=generator) for shape in ((rank, features), (out, rank))
        )
        found[layer, p] = Pair(a * torch.logspace(0, -3, rank)[:, None] * 10.0**-layer, b)
    return found


def lost(before: dict[Where, Pair], after: dict[Where, Pair]) -> float:
    both = [(pair.product(), after[w].product() if w in after else 0) for w, pair in before.items()]
    return sum(float((x - y).square().sum()) for x, y in both) / sum(
        float(x.square().sum()) for x, _ in both
    )


def truncated(before: dict[Where, Pair], rank: int) -> dict[Where, Pair]:
    """The best adapter of a rank, by the SVD of the products."""
    found = {}
    for where, pair in before.items():
        u, s, v = torch.linalg.svd(pair.product(), full_matrices=False)
        found[where] = Pair(v[:rank], u[:, :rank] * s[:rank])
    return found


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_at_the_bytes_of_bf16_it_loses_a_fraction(rank: int, tmp_path: Path) -> None:
    before = pairs()
    budget = 4 * rank * (48 + 64) * 2 + 600  # numbers of four adapters in bf16, and a header
    taken = pack(before, tmp_path, budget)
    assert budget - 250 < taken == (tmp_path / PACKED_FILE).stat().st_size <= budget
    assert lost(before, unpack(tmp_path)) < 0.4 * lost(before, truncated(before, rank))


def test_with_room_for_all_nothing_is_lost_but_rounding(tmp_path: Path) -> None:
    before = pairs()
    pack(before, tmp_path, 10**6)
    assert lost(before, unpack(tmp_path)) < 2 * LOST[8]


def test_no_other_choice_of_bits_loses_less(tmp_path: Path) -> None:
    """Of all choices that take as many bits, by brute force over two small adapters."""
    before = {(0, "q"): pairs(2)[0, "q"], (0, "v"): pairs(2)[1, "v"]}
    directions = {where: principal(pair) for where, pair in before.items()}
    norms = torch.cat([pair.a.norm(dim=1) ** 4 for pair in directions.values()]).tolist()

    def cost(widths: tuple[int, ...]) -> int:
        return sum(112 * width + 40 * (width > 0) for width in widths)

    def loss(widths: tuple[int, ...]) -> float:
        return sum(norm * LOST[width] for norm, width in zip(norms, widths, strict=True))

    for used in (300, 800, 1500, 2500):
        chosen = allocate(directions, used)
        widths = tuple(w for one in chosen.values() for w in (*one, 0, 0)[:2])
        assert cost(widths) <= used
        same = [w for w in itertools.product(LOST, repeat=4) if cost(w) <= cost(widths)]
        assert loss(widths) == pytest.approx(min(map(loss, same)), rel=1e-9)


def test_the_commands_make_a_peft_adapter_again(tmp_path: Path) -> None:
    model, generator = tiny.model(), torch.Generator().manual_seed(1)
    before = {
        (layer, p): Pair(
            torch.randn(3, 32, generator=generator), torch.randn(32, 3, generator=generator)
        )
        for layer, p in ((0, "k"), (1, "o"))
    }
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", before)
    (tmp_path / "adapter" / "LICENSE").write_text("terms")
    whole = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    adapter, small, large = (str(tmp_path / name) for name in ("adapter", "small", "large"))
    said = call("pack", adapter, small, "--bytes", "30%")
    taken = (tmp_path / "small" / PACKED_FILE).stat().st_size
    assert taken <= 0.3 * whole
    after = unpack(tmp_path / "small")
    assert f"{taken:,} bytes" in said
    assert f"{lost(before, after):.2%} of its squared norm" in said
    call("unpack", small, large)
    assert all((tmp_path / name / "LICENSE").read_text() == "terms" for name in ("small", "large"))
    assert load_adapter(tmp_path / "large").keys() == before.keys()
    peft = PeftModel.from_pretrained(model, large).eval()
    merged = tiny.model()
    with torch.no_grad():
        for (layer, p), pair in after.items():
            weight = merged.get_parameter(f"model.layers.{layer}.self_attn.{p}_proj.weight")
            weight += pair.product()
        ids = torch.arange(16)[None]
        difference = peft(ids).logits - merged.eval()(ids).logits
    assert float(difference.abs().max()) < 1e-4
    for arguments, message in (
        ((adapter, small, "--bytes", "30%"), "is there already"),
        ((adapter, large + "2", "--bytes", "much"), "is no size"),
        ((adapter, large + "2", "--bytes", "90"), "hold no direction"),
    ):
        with pytest.raises(PostshareError, match=message):
            call("pack", *arguments)
    (tmp_path / "small" / PACKED_FILE).write_bytes(b"x")
    with pytest.raises(PostshareError, match="no readable packed adapter"):
        unpack(tmp_path / "small")
    assert not (tmp_path / "large2").exists()
