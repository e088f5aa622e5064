"""Packed blocks of tokens, a held-out split, and the order in which they are read.

**Packing of text.** The documents of a source, each `[bos] + ids + [eos]`, are laid end to end and
cut every `sequence_length` tokens; the last incomplete block is left out. By default tokens of
different documents in one block DO attend to each other. With `document_mask: true` positions
restart at every document, from which transformers builds a block-diagonal mask (only when the
forward pass gets neither an attention mask nor a cache: call the model with `use_cache=False`), and
the first token of a document is not predicted. Tokenizers without BOS: only EOS.

**Records** (`data.format` alpaca or chat): see `train.data.instruct`, and
`train.data.record_blocks` for how they are packed. All that follows holds for them too, except that
they are never streamed.

**Mixtures.** Weights are shares of training *blocks*, exactly (of text: of its tokens): an epoch
lasts until every source has been read once, and sources that are too short for their share begin
again. The default weight is 1: equal shares. Validation sources are concatenated, unweighted.

**Held-out split.** Either `validation` sources, or `validation_fraction` of the documents (never
of the blocks), chosen by the hash of their text (of records: of their prompt), or the end of a
document that is the only one of its source: see `train.data.token_table.Encoder`.

**Streaming** reads only as many documents as the run needs and packs them into an indexable, cached
table, so resuming is as exact as without. The table holds the first documents of the stream, for
the number of steps asked for: another number of steps is another table.

**Order.** The stream of samples is infinite: sample p is block
`permutation(n, seed, p // n)[p % n]` of n. The position in it is one integer, the samples consumed
so far, independent of the world size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from sa_models.calibration.token_losses import IGNORED
from sa_models.errors import PostshareError
from train.data.chat import ChatEncoder
from train.data.instruct import AlpacaEncoder, RecordEncoder, record_table
from train.data.local.files import data_files
from train.data.packed import Block, BlockSource, Packed, TextBlocks
from train.data.record_blocks import RecordBlocks
from train.data.sources import load_documents, local_files, without_text
from train.data.token_table import Encoder, is_lone, streamed_token_table, token_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from train.recipe.recipe import DataSection, DataSource, Recipe

__all__ = ["IGNORED", "Blocks", "Packed", "PositionSampler", "permutation", "prepare_data"]


ENCODERS: dict[str, type[Encoder] | type[AlpacaEncoder] | type[ChatEncoder]] = {
    "text": Encoder,
    "alpaca": AlpacaEncoder,
    "chat": ChatEncoder,
}


class Blocks(Dataset[Block]):
    """The blocks of one source or of a mixture, in a fixed order, by index.

    `blocks[i]` is `{"input_ids": int64[length], "labels": int64[length]}`; with a document mask
    also `"position_ids": int64[length]`. Labels are not shifted (the model shifts them); -100 = not
    predicted.

    `weights` gives each source its exact share of the blocks (see the module); None = each source
    once. `notes` says what a reader of the log should know about them, one line each.
    """

    def __init__(
        self,
        sources: Sequence[BlockSource],
        *,
        weights: Sequence[float] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.length = sources[0].length
        self.notes = tuple(notes)
        self._sources = list(sources)
        self._sizes = [len(source) for source in self._sources]
        counts = self._sizes if weights is None else _mix(self._sizes, weights)
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[which - 1]) if which else 0)
        return self._sources[which][within % self._sizes[which]]

    def stamp(self, source: int) -> dict[str, Any]:
        """How many tokens a source has, and their hash: whether it holds what it held."""
        held = self._sources[source]
        return {"tokens": len(held.tokens), "tokens_hash": held.digest()}


def _mix(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Blocks of each source in an epoch: shares equal to the weights, every source read through."""
    shares = [weight / sum(weights) for weight in weights]
    epoch = max(size / share for size, share in zip(sizes, shares, strict=True))
    return [max(size, round(epoch * share)) for size, share in zip(sizes, shares, strict=True)]


def blocks_hash(blocks: Iterable[Block]) -> str:
    """SHA-256 (hex) of all that a model reads of these blocks, in their order."""
    digest = hashlib.sha256()
    for block in blocks:
        for name, tensor in sorted(block.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def prepare_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    needed_blocks: int | None,
    vocab_size: int,
) -> tuple[Blocks, Blocks]:
    """Training and validation blocks of a recipe, tokenized once and cached.

    `needed_blocks` = samples that the run consumes; only streaming uses it. `vocab_size` is the
    model's. Raises PostshareError for sources that cannot be read, are empty or too small, or hold
    a token id that the model has no embedding for.
    """
    data = recipe.data
    if not data.validation and not data.validation_fraction:
        raise PostshareError(
            "there is no held-out text; set data.validation, or data.validation_fraction=0.05"
        )
    if data.streaming and (needed_blocks is None or recipe.evaluate.blocks is None):
        raise PostshareError(
            "data.streaming reads what a run needs, and a stream has no length; set train.steps "
            "(not train.epochs) and evaluate.blocks, or data.streaming=false"
        )
    _check_apart(data)
    weights = [source.weight for source in data.train]
    train: list[TextBlocks | RecordBlocks] = []
    for source in data.train:
        share = source.weight / sum(weights)
        blocks = math.ceil((needed_blocks or 0) * share)
        train.append(_pack(recipe, source, tokenizer, vocab_size, False, blocks))
        if not len(train[-1]):
            raise _nothing_to_train(source, train[-1])
    held_out = data.validation or data.train
    validation = [
        _pack(recipe, source, tokenizer, vocab_size, True, recipe.evaluate.blocks or 0)
        for source in held_out
    ]
    if not any(map(len, validation)):
        raise _nothing_held_out(data, validation)
    if data.validation:
        notes = _notes("validation", data.validation, validation)
    else:
        notes = _notes_held_out(data.train, validation)
    return (
        Blocks(train, weights=weights, notes=_notes("training", data.train, train)),
        Blocks(validation, notes=notes),
    )


def _check_apart(data: DataSection) -> None:
    """Raises PostshareError where a folder for training has a file of the validation in it."""
    for held_out in data.validation or ():
        files = {file.resolve() for file in data_files(held_out)}
        for source in data.train:
            read = {file.resolve() for file in data_files(source)}
            if files & read and files != read:
                raise PostshareError(
                    f"{source.path}, training text, has {min(files & read)} in it, which "
                    f"data.validation ({held_out.path}) holds out; move it to another folder"
                )


def _pack(
    recipe: Recipe,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    held_out: bool,
    blocks: int,
) -> TextBlocks | RecordBlocks:
    """One source, tokenized; of a stream the first `blocks` blocks (and the rest of a document)."""
    data, length = recipe.data, recipe.data.sequence_length
    encoder = ENCODERS[data.format].build(
        tokenizer,
        bos=data.bos,
        eos=data.eos,
        fraction=data.validation_fraction,
        held_out=None if data.validation else held_out,
    )
    packed: TextBlocks | RecordBlocks
    if isinstance(encoder, RecordEncoder):
        table = record_table(source, encoder, processes=data.processes)
        packed = RecordBlocks.from_table(table, length)
    else:
        said = ""
        if data.streaming:
            table = streamed_token_table(source, encoder, blocks * length)
        else:
            documents = load_documents(source)
            said = without_text(source, documents)
            if encoder.held_out is not None and is_lone(documents[source.text]):
                encoder = replace(encoder, lone=True)
                said = (
                    f"one document: the last {data.validation_fraction:.3g} of its characters is "
                    "held out"
                )
            table = token_table(source, documents, encoder, processes=data.processes)
        packed = TextBlocks(
            Packed.from_table(table), length, document_mask=data.document_mask, said=said
        )
    _check_ids(source, packed.tokens, len(tokenizer), vocab_size)
    return packed


def _nothing_to_train(source: DataSource, packed: TextBlocks | RecordBlocks) -> PostshareError:
    what = f"{source.path} ({source.split})"
    if isinstance(packed, RecordBlocks):
        return packed.nothing(
            f"{what} for training", "lower data.validation_fraction or add records"
        )
    return PostshareError(
        f"{what} has {len(packed.tokens)} tokens for training, fewer than one block of "
        f"{packed.length}; lower data.sequence_length or add text"
    )


def _nothing_held_out(
    data: DataSection, validation: Sequence[TextBlocks | RecordBlocks]
) -> PostshareError:
    cure = "add text to data.validation" if data.validation else "raise data.validation_fraction"
    records = [packed for packed in validation if isinstance(packed, RecordBlocks)]
    if records:
        longest = max(records, key=lambda packed: packed.dropped)
        return longest.nothing("the held-out text", cure)
    return PostshareError(
        f"the held-out text has {sum(len(packed.tokens) for packed in validation)} tokens, fewer "
        f"than one block of {data.sequence_length}; {cure} or lower data.sequence_length"
    )


def _notes(
    use: str, sources: Sequence[DataSource], packed: Sequence[TextBlocks | RecordBlocks]
) -> list[str]:
    """For each source a line on its files, unless it is one file, and on what was made of it."""
    notes = []
    for source, made in zip(sources, packed, strict=True):
        read = [files.said for files in (local_files(source) or {}).values() if files.notable]
        notes += [f"{source.path} ({use}): {said}" for said in (*read, made.said) if said]
    return notes


def _notes_held_out(
    sources: Sequence[DataSource], packed: Sequence[TextBlocks | RecordBlocks]
) -> list[str]:
    """What is held out of the training text comes from the same files: records alone are told."""
    pairs = zip(sources, packed, strict=True)
    return [f"{s.path} (validation): {p.said}" for s, p in pairs if isinstance(p, RecordBlocks)]


def _check_ids(source: DataSource, tokens: Packed, tokenizer_size: int, vocab_size: int) -> None:
    if tokenizer_size <= vocab_size:  # then no id can be too large: do not read every token
        return
    largest = tokens.largest_id()
    if largest >= vocab_size:
        raise PostshareError(
            f"{source.path} holds token id {largest}, but the model's vocab_size is {vocab_size}; "
            "set model.tokenizer to the tokenizer that belongs to the model"
        )


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch: the same on every machine and at every world size."""
    return np.random.default_rng([seed, epoch]).permutation(size)


class PositionSampler(Sampler[list[int]]):
    """Micro-batches of block indices for one rank, from a position on.

    Sample p of the infinite stream is block `permutation(size, seed, p // size)[p % size]`.
    Optimizer step k (from 0) of this sampler covers the positions `position + k * batch_size` and
    the following batch_size - 1; of them micro-batch m of rank r takes the `micro_batch_size` that
    begin at `(m * world + r) * micro_batch_size`: the same samples at every step for any
    factorization.

    Yields `steps * accumulation` lists (without end when `steps` is None); give it to
    `DataLoader(blocks, batch_sampler=...)`. After step k the position is `position + (k+1) *
    batch_size`: that integer, put into a new sampler, resumes exactly.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        steps: int | None = None,
    ) -> None:
        if batch_size % (micro_batch_size * world):
            nearest = max(1, round(batch_size / (micro_batch_size * world)))
            raise PostshareError(
                f"train.batch_size {batch_size} does not divide into micro-batches of "
                f"{micro_batch_size} on {world} processes; set "
                f"train.batch_size={nearest * micro_batch_size * world}"
            )
        self.size, self.seed = size, seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world = rank, world
        self.position, self.steps = position, steps

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one optimizer step."""
        return self.batch_size // (self.micro_batch_size * self.world)

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("a sampler without `steps` has no length")
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.zeros(0, dtype=np.int64)
        step = 0
        while self.steps is None or step < self.steps:
            for micro in range(self.accumulation):
                offset = (micro * self.world + self.rank) * self.micro_batch_size
                begin = self.position + step * self.batch_size + offset
                indices = []
                for sample in range(begin, begin + self.micro_batch_size):
                    if sample // self.size != epoch:
                        epoch = sample // self.size
                        order = permutation(self.size, self.seed, epoch)
                    indices.append(int(order[sample % self.size]))
                yield indices
            step += 1
