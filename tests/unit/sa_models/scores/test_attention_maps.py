"""Isotropy against plain loops over layers, heads and rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib import image
from transformers import AutoTokenizer, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.scores import attention_maps as module
from sa_models.scores.attention_maps import (
    Isotropy,
    best_head_map,
    head_similarity,
    measure_isotropy,
)
from sa_models.search.spans import late_spans
from tests.support.gauge import HEAD_DIM, HEADS, tiny, tokens
from train.planning.plan_maps import save_isotropy

LENGTH = 13


def model_of(kv_heads: int = HEADS) -> LlamaForCausalLM:
    """With dropout, which no measurement may use."""
    return tiny(kv_heads, attention_dropout=0.5).train()


def text(blocks: int = 3, length: int = LENGTH) -> torch.Tensor:
    return tokens(blocks, length)


def eager_maps(model: LlamaForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """float64 (heads, length, length) of every layer, for one sequence."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.eval()(ids[None], output_attentions=True, use_cache=False)
    return [maps[0].double() for maps in output.attentions]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def naive(documents: list[list[torch.Tensor]], sink: bool) -> torch.Tensor:
    """`documents`: maps of every layer for every document."""
    layers = len(documents[0])
    result = torch.zeros(layers, layers, dtype=torch.float64)
    first = 0 if sink else 1
    for a in range(layers):
        for b in range(layers):
            cosines = [
                cosine(maps[a][head, row, first:], maps[b][head, row, first:])
                for maps in documents
                for head in range(HEADS)
                for row in range(first + 1, maps[a].shape[1])
            ]
            result[a, b] = sum(cosines) / len(cosines)
    return result


def make_readers_of_one_state(model: LlamaForCausalLM) -> None:
    """Every layer sees the embeddings: attention and MLP add nothing."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.input_layernorm.weight.fill_(1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 14, 1 << 30])
def test_is_the_mean_over_heads_rows_and_blocks(
    kv_heads: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    model, ids = model_of(kv_heads), text()
    # Blocks of different lengths: every row counts once, so a mean of means would be wrong.
    short = text(1, 5)
    measured = measure_isotropy(model, [{"input_ids": ids}, {"input_ids": short}])
    documents = [eager_maps(model, row) for row in (*ids, *short)]
    assert measured.maps.dtype == measured.without_sink.dtype == torch.float64
    for value, sink in ((measured.maps, True), (measured.without_sink, False)):
        torch.testing.assert_close(value, naive(documents, sink), rtol=0, atol=1e-6)
        torch.testing.assert_close(value, value.T, rtol=0, atol=0)
    assert (measured.maps - measured.without_sink).abs().max() > 0.01


def test_document_masks_measure_each_document_alone() -> None:
    model = model_of()
    lengths = (1, 6, 2, 4)
    ids = text(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    measured = measure_isotropy(model, [{"input_ids": ids, "position_ids": positions}])
    documents = [eager_maps(model, part) for part in ids[0].split(lengths)]
    torch.testing.assert_close(measured.maps, naive(documents, True), rtol=0, atol=1e-6)
    torch.testing.assert_close(measured.without_sink, naive(documents, False), rtol=0, atol=1e-6)


def test_identical_layers_are_one() -> None:
    model = model_of()
    make_readers_of_one_state(model)
    model.model.layers[2].load_state_dict(model.model.layers[0].state_dict())
    measured = measure_isotropy(model, [{"input_ids": text()}])
    for value in (measured.maps, measured.without_sink):
        assert value.diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-12)
        assert float(value[0, 2]) == pytest.approx(1, abs=1e-12)
        assert float(value[0, 1]) < 0.99


def given_maps(monkeypatch: pytest.MonkeyPatch, layers: list[list[list[float]]]) -> None:
    maps = tuple(torch.tensor(layer)[None, None] for layer in layers)
    monkeypatch.setattr(module, "_maps", lambda *_: maps)


def test_the_sink_is_removed_from_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand. Rows 0 (a single key) and, without the sink, 1 must not count."""
    first = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.8, 0.2, 0, 0], [0.4, 0.3, 0.3, 0.0]]
    second = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.8, 0, 0.2, 0], [0.4, 0.0, 0.3, 0.3]]
    given_maps(monkeypatch, [first, second])
    measured = measure_isotropy(model_of(), [{"input_ids": text(1, 4)}])
    with_sink = (1 + 0.64 / 0.68 + (0.16 + 0.09) / 0.34) / 3
    assert float(measured.maps[0, 1]) == pytest.approx(with_sink, abs=1e-7)
    assert float(measured.without_sink[0, 1]) == pytest.approx((0 + 0.5) / 2, abs=1e-7)


def test_rows_without_weight_beside_the_sink_are_left_out_pair_by_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = [[1, 0, 0, 0], [0.5, 0.5, 0, 0]]
    a = [*head, [0.5, 0.5, 0, 0], [1, 0, 0, 0]]
    b = [*head, [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]
    c = [*head, [1, 0, 0, 0], [0.5, 0, 0.5, 0]]
    given_maps(monkeypatch, [a, b, c])
    measured = measure_isotropy(model_of(), [{"input_ids": text(1, 4)}])
    values = measured.without_sink
    assert float(values[0, 1]) == pytest.approx(1)  # row 2 alone
    assert float(values[1, 2]) == pytest.approx(0)  # row 3 alone
    assert values[0, 2].isnan()  # no row in which both have weight left
    assert values.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert measured.maps.isfinite().all()


@pytest.mark.parametrize("sink", [True, False])
def test_head_similarity_is_the_mean_of_every_two_heads(sink: bool) -> None:
    model, ids = model_of(2), text()
    measured = head_similarity(model, [{"input_ids": ids}], leader=0, follower=2, sink=sink)
    documents = [eager_maps(model, row) for row in ids]
    first = 0 if sink else 1
    expected = torch.zeros(HEADS, HEADS, dtype=torch.float64)
    for follower in range(HEADS):
        for leader in range(HEADS):
            cosines = [
                cosine(maps[2][follower, row, first:], maps[0][leader, row, first:])
                for maps in documents
                for row in range(first + 1, LENGTH)
            ]
            expected[follower, leader] = sum(cosines) / len(cosines)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-6)
    whole = measure_isotropy(model, [{"input_ids": ids}])
    value = (whole.maps if sink else whole.without_sink)[0, 2]
    torch.testing.assert_close(measured.diagonal().mean(), value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sink", [True, False])
def test_the_head_map_finds_a_permutation(sink: bool) -> None:
    """Layer 2 has the heads of layer 0 in another order: head h is head order[h] of layer 0."""
    model = model_of()
    make_readers_of_one_state(model)
    order = (2, 0, 3, 1)
    low, high = model.model.layers[0].self_attn, model.model.layers[2].self_attn
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            rows = getattr(low, name).weight.unflatten(0, (HEADS, HEAD_DIM))
            getattr(high, name).weight.copy_(rows[list(order)].flatten(0, 1))
    similarity = head_similarity(model, [{"input_ids": text()}], 0, 2, sink=sink)
    assert best_head_map(similarity) == order
    for head, read in enumerate(order):
        assert float(similarity[head, read]) == pytest.approx(1, abs=1e-9)


def test_of_equal_heads_the_first_is_read() -> None:
    similarity = torch.tensor([[0.2, 0.7, 0.7 + 5e-7], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]])
    assert best_head_map(similarity.double()) == (1, 0, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    implementation: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    model.set_attn_implementation(implementation)
    model.train(training)
    batch = {"input_ids": text(2)}
    reports: list[tuple[int, int]] = []
    first = measure_isotropy(model, [batch], lambda done, n: reports.append((done, n)))
    assert reports == [(1, 2), (2, 2)]
    # Dropout (0.5 here) is off while measuring.
    torch.testing.assert_close(measure_isotropy(model, [batch]).maps, first.maps, rtol=0, atol=0)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_isotropy(model, [batch], stop)
    assert model.training is training
    assert model.config._attn_implementation == implementation
    assert model.model.config._attn_implementation == implementation
    assert model(batch["input_ids"]).logits.requires_grad


def test_bf16_maps_are_compared_in_double_precision() -> None:
    model, batch = model_of(), {"input_ids": text()}
    exact = measure_isotropy(model, [batch])
    rounded = measure_isotropy(model.to(torch.bfloat16), [batch])
    assert rounded.maps.dtype == torch.float64
    assert rounded.maps.diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    torch.testing.assert_close(rounded.maps, exact.maps, rtol=0, atol=0.02)


def test_what_cannot_be_measured_is_refused() -> None:
    model = model_of()
    for batches in ([], [{"input_ids": text(2, 2)}]):
        with pytest.raises(PostshareError, match="no calibration block of at least 3 tokens"):
            measure_isotropy(model, batches)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, -1] = 0
    with pytest.raises(PostshareError, match="padding; pack the text"):
        measure_isotropy(model, [{"input_ids": text(), "attention_mask": mask}])
    with pytest.raises(PostshareError, match=r"layer 3 .* has layers 0 to 2"):
        head_similarity(model, [{"input_ids": text()}], 0, 3)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    model.train()
    with pytest.raises(PostshareError, match="map of layer 1 is not finite on calibration block 0"):
        measure_isotropy(model, [{"input_ids": text()}])
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_mixed7m_is_most_isotropic_at_layers_2_and_3(shared: Path) -> None:
    folder = shared / "models" / "mixed7M"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    with (shared / "text" / "mixed-train.jsonl").open() as lines:
        while len(ids) < 8 * 256:
            text = json.loads(next(lines))["text"]
            ids += [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    blocks = torch.tensor(ids[: 8 * 256]).view(8, 256)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    measured = measure_isotropy(model, [{"input_ids": blocks}])
    # 0.30 on these 8 blocks, 0.28 on 96. The model has hardly a sink: both ways are alike.
    for values in (measured.maps, measured.without_sink):
        adjacent = values.diagonal(1)
        assert int(adjacent.argmax()) == 2
        assert float(adjacent[2]) == pytest.approx(0.298, abs=0.003)


@pytest.mark.parametrize("layers", [8, 32])
def test_the_picture_has_both_maps_and_outlines_the_spans(layers: int, tmp_path: Path) -> None:
    distance = (torch.arange(layers)[:, None] - torch.arange(layers)).abs()
    values = torch.exp(-distance.double() / 4)
    holes = values.clone()
    holes[0, 2] = holes[2, 0] = float("nan")  # as where a pair has no row left
    measured = Isotropy(values, holes)
    spans = late_spans(layers, 4, 3)
    save_isotropy(measured, [], tmp_path / "plain.png")
    save_isotropy(measured, spans, tmp_path / "spans.png")
    plain, outlined = (image.imread(tmp_path / name) for name in ("plain.png", "spans.png"))
    orange = torch.tensor([0xD5, 0x5E, 0x00]) / 255

    def edges(picture) -> list[int]:
        """Pixels of the outline's color, in the upper and the lower half."""
        near = (torch.from_numpy(picture[..., :3]) - orange).abs().amax(-1) < 0.02
        middle = near.shape[0] // 2
        return [int(near[:middle].sum()), int(near[middle:].sum())]

    assert edges(plain) == [0, 0]
    assert min(edges(outlined)) > 500
