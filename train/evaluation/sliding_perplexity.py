"""Perplexity of whole texts by windows that slide, as papers report it.

**Windows.** A text is its tokens, without special ones, after one prefix token: BOS, or EOS where
the tokenizer has no BOS. Every token of the text is predicted exactly once, and nothing else is.
The first window predicts the first `context` tokens, each further one the next `stride`, from the
`context` tokens that end just before the last one predicted. With stride = context windows are
disjoint: what GPTQ and its successors report on WikiText-2 (they leave out one token a window), and
what lm-eval calls rolling log-likelihood. With a smaller stride each token but the first `context`
has at least `context - stride` tokens before it: the strided perplexity of transformers' manual.
Windows never span two texts.

**Levels.** exp(nats / tokens) compares models of one tokenizer; exp(nats / words), words being what
`str.split` finds, compares any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sa_models.calibration.progress import Progress
from sa_models.calibration.token_losses import IGNORED, row_losses
from sa_models.errors import PostshareError


@dataclass(frozen=True)
class Window:
    """Inputs `begin` to `stop` of one text; input j predicts token j. Scored: `first` to `stop`.

    Inputs are the prefix and all tokens but the last.
    """

    text: int
    begin: int
    first: int
    stop: int

    @property
    def scored(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class WindowLosses:
    """Sums of the losses of each window's scored tokens in nats, and how many there are."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]


def windows(length: int, context: int, stride: int, text: int = 0) -> list[Window]:
    """The windows of a text of `length` tokens, see the module.

    Raises:
        PostshareError: `stride` is not in 1 ... `context`.
    """
    if not 1 <= stride <= context:
        raise PostshareError(
            f"stride {stride} with a context of {context}: a stride is at least 1 and at most the "
            "context, or tokens would be left out"
        )
    made, done = [], 0
    while done < length:
        stop = min(length, done + (stride if done else context))
        made.append(Window(text, max(0, stop - context), done, stop))
        done = stop
    return made


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, after the prefix. Texts without a token are left out.

    Raises:
        PostshareError: the tokenizer has neither BOS nor EOS, or nothing is left.
    """
    prefix = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if prefix is None else prefix
    if prefix is None:
        raise PostshareError(
            f"the tokenizer of {tokenizer.name_or_path} has neither BOS nor EOS to begin a text "
            "with; set one in its tokenizer_config.json"
        )
    # verbose: a text longer than the context is what windows are for, and no reason to warn.
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    encoded = [[prefix, *ids] for ids in found if ids]
    if not encoded:
        raise PostshareError("the text is empty; give one with words in it")
    return encoded


@torch.inference_mode()
def window_losses(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    context: int,
    stride: int,
    batch_size: int,
    progress: Progress = lambda done, total: None,
) -> WindowLosses:
    """Losses of all windows of all texts, in their order.

    Losses are those of :func:`~sa_models.calibration.token_losses.row_losses`: fp32, summed in
    float64.

    Args:
        model: in evaluation mode.
        texts: token ids, each with its prefix (:func:`encode`).
        batch_size: windows in a forward.
        progress: called with (done, total) windows after each forward.

    Raises:
        PostshareError: a token has no embedding, or `stride` does not fit.
    """
    largest, vocabulary = max(map(max, texts)), model.config.vocab_size
    if largest >= vocabulary:
        raise PostshareError(
            f"the text has token id {largest}, the model's vocab_size is {vocabulary}; use the "
            "tokenizer that belongs to the model"
        )
    ids = [torch.tensor(text) for text in texts]
    made = [w for at, text in enumerate(texts) for w in windows(len(text) - 1, context, stride, at)]
    # Windows of one shape share a forward; shorter ones are padded on the right, where a causal
    # model does not look.
    order = sorted(range(len(made)), key=lambda i: (made[i].begin - made[i].stop, made[i].scored))
    nats = [0.0] * len(made)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for at, loss in zip(chosen, _losses(model, ids, [made[i] for i in chosen]), strict=True):
            nats[at] = loss
        progress(start + len(chosen), len(order))
    return WindowLosses(tuple(nats), tuple(w.scored for w in made))


def _losses(
    model: PreTrainedModel, ids: Sequence[torch.Tensor], batch: Sequence[Window]
) -> list[float]:
    """Nats of each window of a batch. Only logits that are scored are computed."""
    length = max(w.stop - w.begin for w in batch)
    inputs = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), length), IGNORED)
    for row, w in enumerate(batch):
        inputs[row, : w.stop - w.begin] = ids[w.text][w.begin : w.stop]
        targets[row, w.first - w.begin : w.stop - w.begin] = ids[w.text][w.first + 1 : w.stop + 1]
    keep = length - min(w.first - w.begin for w in batch)
    targets = targets[:, -keep:].to(model.device)
    return row_losses(model, targets, input_ids=inputs.to(model.device), logits_to_keep=keep)
