"""Records for instruction tuning: a prompt, and a response of which every token is predicted.

A record becomes one row of a cached table: its token ids, which of them are predicted, and how many
come before the first of these. `AlpacaEncoder` (here) renders instruction, input and output;
`train.data.chat.ChatEncoder` messages.
"""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import datasets

from sa_models.errors import PostshareError
from train.data import cache
from train.data.local.rows import place_of
from train.data.sources import RECORD, load_records, local_files
from train.data.token_table import Encoder, fast_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from train.recipe.recipe import DataSource

ROW = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "predicted": datasets.List(datasets.Value("int8")),
        "prompt": datasets.Value("int32"),
    }
)
Record = dict[str, Any]
Masked = tuple[list[int], list[int]]
"""Token ids, and 1 for each that is predicted."""

# Stanford Alpaca's templates (github.com/tatsu-lab/stanford_alpaca, train.py).
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)


class BadRecordError(PostshareError):
    """What is wrong with the record of an index, counted through the whole source."""

    def __init__(self, message: str, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


@contextmanager
def _at(index: int) -> Iterator[None]:
    try:
        yield
    except PostshareError as error:
        raise BadRecordError(str(error), index) from error


@dataclass(frozen=True)
class RecordEncoder(ABC):
    """Turns records into ids and their mask; its fields are all that these depend on.

    `text` holds the tokenizer and decides, by the hash of a record's prompt, on which side of the
    held-out split it falls: records with the same prompt never fall on both sides.
    """

    text: Encoder
    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Rows for `datasets.map(batched=True, with_indices=True)`.

        Raises:
            PostshareError: a record lacks a field, holds something else there, or predicts nothing;
                the message names its index.
        """
        records: dict[int, Record] = {}
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            record = dict(zip(batch, values, strict=True))
            with _at(index):
                self.check(f"record {index}", record)
            if self.text.part(self.prompt_of(record)):
                records[index] = record
        rows: dict[str, list[Any]] = {"input_ids": [], "predicted": [], "prompt": []}
        for index, (ids, predicted) in zip(records, self.encode(records), strict=True):
            predicted[:1] = [0] * len(predicted[:1])  # nothing comes before it
            if 1 not in predicted:
                raise BadRecordError(
                    f"record {index} has no token to predict; remove it, or correct its response",
                    index,
                )
            rows["input_ids"].append(ids)
            rows["predicted"].append(predicted)
            rows["prompt"].append(predicted.index(1))
        return rows

    @abstractmethod
    def check(self, name: str, record: Record) -> None:
        """Raise PostshareError, naming the record `name`, unless it can be encoded."""

    @abstractmethod
    def prompt_of(self, record: Record) -> str:
        """The same text for records that ask the same."""

    @abstractmethod
    def encode(self, records: dict[int, Record]) -> list[Masked]:
        """Ids and masks of records, by their indices."""


@dataclass(frozen=True)
class AlpacaEncoder(RecordEncoder):
    """`[bos] + template(instruction, input) + output + [eos]`; output and EOS are predicted.

    Prompt and output are tokenized apart, as when the model is used: no token straddles the border.
    """

    required = ("instruction", "output")
    optional = ("input",)

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Self:
        """`options` and errors are those of `Encoder.build`."""
        return cls(Encoder.build(tokenizer, **options))

    def check(self, name: str, record: Record) -> None:
        for field in self.required:
            require_text(name, record, field)
        if record.get("input") is not None:
            require_text(name, record, "input", empty=True)

    def prompt_of(self, record: Record) -> str:
        return json.dumps([record["instruction"], record.get("input") or ""])

    def encode(self, records: dict[int, Record]) -> list[Masked]:
        prompts = []
        for record in records.values():
            template = WITH_INPUT if record.get("input") else WITHOUT_INPUT
            prompts.append(template.format_map(record))
        outputs = [record["output"] for record in records.values()]
        backend = fast_tokenizer(self.text.tokenizer)
        head = [] if self.text.bos is None else [self.text.bos]
        tail = [] if self.text.eos is None else [self.text.eos]
        masked = []
        for prompt, output in zip(
            backend.encode_batch_fast(prompts, add_special_tokens=False),
            backend.encode_batch_fast(outputs, add_special_tokens=False),
            strict=True,
        ):
            asked, answered = head + prompt.ids, output.ids + tail
            masked.append((asked + answered, [0] * len(asked) + [1] * len(answered)))
        return masked


def require_text(name: str, record: Record, field: str, *, empty: bool = False) -> None:
    """Raise PostshareError unless `record[field]` is text, and (by default) not blank."""
    value = record.get(field)
    if value is None:
        raise missing(name, field, [key for key, other in record.items() if other is not None])
    if not isinstance(value, str):
        raise PostshareError(
            f"the '{field}' of {name} is no text but {type(value).__name__}; correct it or remove "
            "the record"
        )
    if not empty and not value.strip():
        raise PostshareError(f"the '{field}' of {name} is empty; fill it or remove the record")


def missing(name: str, field: str, found: list[str]) -> PostshareError:
    return PostshareError(
        f"{name} has no '{field}' (found: {', '.join(found) or 'nothing'}); rename or add it, "
        "remove the record, or correct data.format"
    )


def record_table(
    source: DataSource, encoder: RecordEncoder, *, processes: int = 1
) -> datasets.Dataset:
    """Every record of `source` that `encoder` keeps, encoded: rows of `ROW`, cached.

    Raises:
        PostshareError: the source cannot be read or is empty; see also `RecordEncoder`.
    """
    fields = (*encoder.required, *encoder.optional)
    records = load_records(source, fields)
    encode: Any = encoder
    if records.column_names == [RECORD]:
        encode = functools.partial(_encode_json, encoder)
    else:
        for field in encoder.required:
            if field not in records.column_names:
                error = missing("record 0", field, records.column_names)
                raise PostshareError(f"{source.path}: {error}")
        records = records.select_columns([name for name in fields if name in records.column_names])
    try:
        with cache.writing(source.path, processes=processes):
            return records.map(
                encode,
                batched=True,
                with_indices=True,
                remove_columns=records.column_names,
                features=ROW,
                num_proc=min(processes, len(records)) if processes > 1 else None,
                desc=f"tokenizing {source.path}",
            )
    except BadRecordError as error:
        raise PostshareError(f"{_place(source, fields, error.index)}: {error}") from None
    except PostshareError as error:
        raise PostshareError(f"{source.path}: {error}") from None


def _encode_json(
    encoder: RecordEncoder, batch: dict[str, list[str]], indices: list[int]
) -> dict[str, list[Any]]:
    records = [json.loads(record) for record in batch[RECORD]]
    fields = dict.fromkeys(field for record in records for field in record)
    return encoder({field: [r.get(field) for r in records] for field in fields}, indices)


def _place(source: DataSource, fields: Sequence[str], index: int) -> str:
    """The file of a record, and where it is in it."""
    found = local_files(source)
    if found is None or {*source.split} & {*"[("}:
        return source.path
    return place_of([path for files in found.values() for path in files.paths], fields, index)
