"""Rises of the loss when a unit is removed or tied: estimates for all of them at once.

One backward pass over calibration text, a block at a time. Let c_u(t) be what unit u adds to the
output of its attention at token t, g(t) the gradient of the summed loss there, and c'(t) what the
unit would add after the change (nothing, when it is removed; when it is tied, what its source's
weights compute from the input of *its* layer). With a(t) = <g(t), c'(t) - c_u(t)> the rise is

    (sum over t of a(t)  +  1/2 sum over t of a(t)^2) / predicted tokens:

the first order, and the diagonal of the empirical Fisher information, where a token has a gate of
its own. This is in the space of outputs, after the softmax, whose bend no gradient of weights sees:
on mixed7M it ranks the measured rises of all 64 removals at a Spearman correlation of 0.97 and
those of ties at 0.95, against 0.35 for gradients of the weights (docs/planning.md). Squares of
whole blocks rank less well: a block sums over its tokens before it squares, and what cancels in the
sum is still a change.

What is held at a time: the activations of one block; the inputs of all attentions of it; one
layer's sources. Layers are independent of one another here: what a change of a leader does to the
followers of its span is not seen. Where the attention of a whole layer goes, a(t) is minus the
product of g(t) and the sum of all its c_u(t): what its units add is summed before it is squared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sa_models.attention import attention_weights
from sa_models.calibration.partial_forward import Batch, Entered, enter, rows_of, run_layers
from sa_models.calibration.progress import Progress
from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout, unit_view

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


CIRCUITS = (("q", "k"), ("v", "o"))
"""Ties of them leave the values, or the maps, of the target as they are: all pairs at once."""


@dataclass(frozen=True)
class Rise:
    """Estimated rise of the loss, nats per predicted token: float64 tensors of one shape, CPU.

    Attributes:
        first: the first order alone.
        second: half the mean square, to be added.
    """

    first: torch.Tensor
    second: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.first + self.second


@dataclass(frozen=True)
class Sensitivity:
    """Estimates for every unit.

    Attributes:
        removal: (layers, units); nan where a layer is left out.
        ties: {projections: (layers, units, layers, units)}, target first; nan where the source is
            not in an earlier layer, or out of reach, or a layer is left out.
        gradient: |sum of weight * gradient| over q, k, v and o of every unit, (layers, units): the
            first-order importance of LLM-Pruner (2305.11627, equation 5), attention only.
        tokens: predicted tokens.
        drop: of all units of a layer together, (layers,); nan where a layer is left out.
    """

    removal: Rise
    ties: dict[tuple[str, ...], Rise]
    gradient: torch.Tensor
    tokens: int
    drop: Rise


def estimate_sensitivity(
    model: LlamaForCausalLM,
    batches: Iterable[Batch],
    shares: Sequence[Sequence[str]] = (),
    without: Iterable[int] = (),
    progress: Progress | None = None,
    reach: int | None = None,
) -> Sensitivity:
    """First and second order of all removals and ties, from one backward pass over the text.

    Args:
        model: a Llama, stock or with spans; its weights, modes and gradients are as before after
            it.
        batches: calibration text, see :data:`~sa_models.calibration.partial_forward.Batch`; taken a
        row at a time.
        shares: the sets of projections that a tie shares.
        without: layers whose units are neither changed nor sources (followers of spans).
        progress: called with (done, total) rows.
        reach: layers below a target's, at most, in which its sources are; None: all of them.

    Raises:
        PostshareError: no token to predict, or padding.
    """
    rows = rows_of(batches)
    with _evaluation(model):
        sums = _Sums(model, [tuple(share) for share in shares], frozenset(without), reach)
        for done, row in enumerate(rows, start=1):
            sums.add(row)
            if progress is not None:
                progress(done, len(rows))
    return sums.result()


def gradient_importance(
    model: LlamaForCausalLM,
    batches: Iterable[Batch],
    without: Iterable[int] = (),
    progress: Progress | None = None,
) -> torch.Tensor:
    """|sum of weight * gradient| of every unit, see :class:`Sensitivity`: float64 (layers, units).

    Args: see :func:`estimate_sensitivity`.
    """
    return estimate_sensitivity(model, batches, (), without, progress).gradient


@contextmanager
def _evaluation(model: LlamaForCausalLM) -> Iterator[None]:
    """SDPA, no dropout, and no parameter's gradient but those of attention, for a while."""
    implementation, training = model.config._attn_implementation, model.training
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.set_attn_implementation("sdpa")
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(HeadLayout.parse_name(name) is not None)
            parameter.grad = None
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


def combined(first: Sensitivity, second: Sensitivity) -> Sensitivity:
    """The estimates of two parts of a text as those of the whole (gradient: the mean of both)."""
    tokens = first.tokens + second.tokens

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * first.tokens + b * second.tokens) / tokens

    def rise(a: Rise, b: Rise) -> Rise:
        return Rise(mean(a.first, b.first), mean(a.second, b.second))

    return Sensitivity(
        rise(first.removal, second.removal),
        {share: rise(first.ties[share], second.ties[share]) for share in first.ties},
        mean(first.gradient, second.gradient),
        tokens,
        rise(first.drop, second.drop),
    )


@dataclass
class _Seen:
    """What one attention has taken and given for one row."""

    input: torch.Tensor | None = None
    mixed: torch.Tensor | None = None
    """Values mixed by the attention maps: the input of o."""
    entered: Entered | None = field(default=None, repr=False)


class _Sums:
    """Sums over rows of the directional derivatives, and of their squares."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        shares: list[tuple[str, ...]],
        without: frozenset[int],
        reach: int | None,
    ) -> None:
        self.model, self.shares, self.without, self.reach = model, shares, without, reach
        self.layout = layout = HeadLayout.from_config(model.config)
        self.parameters = dict(model.named_parameters())
        shape = (layout.layers, layout.units)
        self.tokens = 0
        self.removal = self._empty(shape)
        self.drop = self._empty(shape[:1])
        self.ties = {share: self._empty((*shape, *shape)) for share in shares}
        self.importance = torch.zeros(shape, dtype=torch.float64, device=model.device)

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """First and second order, (2, ...)."""
        nan = float("nan")
        return torch.full((2, *shape), nan, dtype=torch.float64, device=self.model.device)

    def add(self, row: Batch) -> None:
        """One row: forward, backward, and every layer's sums as the backward pass reaches it."""
        seen = [_Seen() for _ in range(self.layout.layers)]
        handles = [
            handle for layer in range(self.layout.layers) for handle in self._hooks(layer, seen)
        ]
        try:
            with torch.enable_grad():
                hidden, entered = enter(self.model, row)
                for at in seen:
                    at.entered = entered
                *_, hidden = run_layers(self.model, hidden, entered)
                logits = self.model.lm_head(self.model.model.norm(hidden))[0, :-1]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                targets = entered.targets[0]
                F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").backward()
        finally:
            for handle in handles:
                handle.remove()
        self.tokens += int((targets != IGNORED).sum())

    def _hooks(self, at: int, seen: list[_Seen]) -> list[Any]:
        attention = self.model.model.layers[at].self_attn

        def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[at].input = (args[0] if args else kwargs["hidden_states"]).detach()

        def mixes(module: nn.Module, args: tuple) -> None:
            seen[at].mixed = args[0].detach()

        def gives(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.register_hook(partial(self._add_layer, at, seen[at]))

        handles = [
            attention.register_forward_pre_hook(enters, with_kwargs=True),
            attention.o_proj.register_forward_pre_hook(mixes),
            attention.o_proj.register_forward_hook(gives),
        ]
        for p in PROJECTIONS:
            name = self.layout.parameter_name(at, p)
            if name in self.parameters:
                hook: Callable[[torch.Tensor], None] = partial(self._add_importance, at, p)
                handles.append(self.parameters[name].register_post_accumulate_grad_hook(hook))
        return handles

    @torch.no_grad()
    def _add_importance(self, layer: int, projection: str, weight: torch.Tensor) -> None:
        """Weight times gradient of every unit; the gradient is dropped at once."""
        assert weight.grad is not None
        product = unit_view(weight * weight.grad, self.layout, projection)
        self.importance[layer] += product.double().sum((1, 2))
        weight.grad = None

    @torch.no_grad()
    def _add_layer(self, layer: int, seen: _Seen, gradient: torch.Tensor) -> None:
        """Sums of one layer's units; ``gradient``: of the attention's output, (1, rows, hidden)."""
        if layer in self.without:
            return
        gradient, mixed = gradient[0], seen.mixed[0]  # type: ignore[index]
        own = self._through_o(layer, gradient)
        now = (own * self._by_unit(mixed)).sum(-1)
        _add(self.removal[:, layer], -now)
        _add(self.drop[:, layer], -now.sum(0))
        if not self.ties:
            return
        target = self._projected(layer, seen)
        maps = self._maps(target) if CIRCUITS[1] in self.ties else None
        for other in range(max(0, layer - (self.reach or layer)), layer):
            if other in self.without:
                continue
            source = self._projected(other, seen)
            theirs = self._through_o(other, gradient)
            whole: torch.Tensor | None = None  # of the source's q, k and v, with or without its o
            for share, sums in self.ties.items():
                if share in CIRCUITS:
                    if share == CIRCUITS[0]:
                        after = _mixed_along(self._maps(source), own, target["v"][0])
                    else:
                        assert maps is not None
                        after = _mixed_along(maps, theirs, source["v"][0]).transpose(0, 1)
                    _add(sums[:, layer, :, other], after.transpose(0, 1) - now[:, None])
                    continue
                if same := {"q", "k", "v"} <= set(share):
                    whole = self._tied(share, 0, target, source) if whole is None else whole
                changes = []
                for unit in range(self.layout.units):
                    then = whole if same else self._tied(share, unit, target, source)
                    assert then is not None
                    outer = theirs if "o" in share else own[unit]
                    changes.append((outer * then).sum(-1) - now[unit])
                _add(sums[:, layer, :, other], torch.stack(changes))
        seen.input = seen.mixed = None

    def _by_unit(self, mixed: torch.Tensor) -> torch.Tensor:
        """(rows, units * width) -> (units, rows, width)."""
        return mixed.unflatten(-1, (self.layout.units, -1)).transpose(0, 1)

    def _through_o(self, layer: int, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of what enters a layer's o, (units, rows, width)."""
        return self._by_unit(gradient @ self.parameters[self.layout.parameter_name(layer, "o")])

    def _projected(self, layer: int, seen: _Seen) -> dict[str, torch.Tensor]:
        """Rotated q and k, and v, of a layer's weights on the input that was seen."""
        found = {}
        for p in "qkv":
            weight = self.parameters[self.layout.parameter_name(layer, p)]
            heads = F.linear(seen.input[0], weight).unflatten(-1, (-1, self.layout.head_dim))  # type: ignore[index]
            found[p] = heads.transpose(0, 1)[None]
        cos, sin = seen.entered.rotation  # type: ignore[union-attr]
        found["q"], found["k"] = apply_rotary_pos_emb(found["q"], found["k"], cos, sin)
        found["mask"] = seen.entered.mask  # type: ignore[union-attr]
        return found

    def _maps(self, projected: dict[str, torch.Tensor]) -> torch.Tensor:
        """The attention maps of a layer's weights, (units, heads of a unit, rows, keys)."""
        q, k, mask = (projected[name] for name in ("q", "k", "mask"))
        maps = attention_weights(q, k, mask, self.layout.head_dim**-0.5)
        return maps[0].unflatten(0, (self.layout.units, -1))

    def _tied(
        self,
        share: tuple[str, ...],
        unit: int,
        target: dict[str, torch.Tensor],
        source: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """What one unit's attention gives with each of another layer's units as its source.

        (sources, rows, width).
        """
        units, group = self.layout.units, self.layout.heads_per_unit
        q, k, v = (
            source[p].unflatten(1, (units, -1))[0]
            if p in share
            else target[p].unflatten(1, (units, -1))[0, unit].expand(units, -1, -1, -1)
            for p in "qkv"
        )
        shape = (units, group, *k.shape[2:])
        mask = target["mask"]
        mixed = F.scaled_dot_product_attention(
            q, k.expand(shape), v.expand(shape), attn_mask=mask, is_causal=mask is None
        )
        return mixed.transpose(1, 2).flatten(2)

    def result(self) -> Sensitivity:
        """Raises PostshareError when nothing was predicted."""
        if not self.tokens:
            raise PostshareError(
                "there is no token to predict in the calibration text; add text to data.train"
            )
        return Sensitivity(
            _rise(self.removal, self.tokens),
            {share: _rise(sums, self.tokens) for share, sums in self.ties.items()},
            self.importance.cpu().abs() / self.tokens,
            self.tokens,
            _rise(self.drop, self.tokens),
        )


def _mixed_along(maps: torch.Tensor, outer: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """<outer, what maps mix of v> by token, of every pair of maps and of values.

    The product of outer and v is taken first, so that a pair costs no more than to read its map.

    Args:
        maps: (M, heads, rows, keys).
        outer: (N, rows, heads * head_dim), gradients of what is mixed.
        v: (N, keys, head_dim).

    Returns:
        (M, N, rows).
    """
    heads = outer.unflatten(-1, (maps.shape[1], -1))
    along = torch.einsum("nthd,nkd->nhtk", heads, v)
    return torch.einsum("mhtk,nhtk->mnt", maps, along)


def _add(at: torch.Tensor, change: torch.Tensor) -> None:
    """Add directional derivatives by token, (..., rows), to sums (first and second order), on their
    device: waiting for a GPU once for every pair of layers would take longer than the sums."""
    change = change.double()
    orders = torch.stack([change.sum(-1), change.square().sum(-1) / 2])
    at.copy_(torch.where(at.isnan(), orders, at + orders))


def _rise(sums: torch.Tensor, tokens: int) -> Rise:
    first, second = sums.cpu()
    return Rise(first / tokens, second / tokens)
