"""Documents in, token ids out: any source of text becomes a cached table of tokenized documents.

One row of a table is one document, `[bos] + ids + [eos]`, int32. Tables live in the cache of the
`datasets` library under a fingerprint of the text and of everything that turns it into ids, so a
second start reads them and tokenizes nothing. Files appear there by rename: several processes may
start at once, and at worst do the same work twice.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import datasets
from tokenizers import Tokenizer

from sa_models.errors import PostshareError
from train.data import cache
from train.data.local.files import data_files
from train.data.sources import stamp, stream_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from train.recipe.recipe import DataSource

ROW = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
STREAM_BATCH = 32  # documents tokenized at a time: at most this many are read in vain


@dataclass(frozen=True)
class Encoder:
    """Turns texts into token ids; its fields are all that the ids depend on.

    `tokenizer` is the JSON of the fast tokenizer: unlike the object, whose state changes when it is
    first called, it hashes the same in every process, and that is what the cache needs.

    `held_out` None keeps every document. Otherwise a document belongs to the held-out side when the
    hash of its text, read as a number in [0, 1), is below `fraction`: equal texts always fall on
    the same side, whatever the seed, the order and the number of processes. Of a `lone` document
    the last `fraction` of its characters, from the next white space on, is held out. Empty texts
    are dropped.
    """

    tokenizer: str
    bos: int | None
    eos: int | None
    fraction: float = 0.0
    held_out: bool | None = None
    lone: bool = False

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bos: bool,
        eos: bool,
        fraction: float = 0.0,
        held_out: bool | None = None,
    ) -> Encoder:
        """Raises PostshareError for a tokenizer without a fast form, or without the EOS asked for.

        A tokenizer without BOS is used without one (Qwen's, for example, has none).
        """
        name = tokenizer.name_or_path or "the tokenizer"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise PostshareError(
                f"{name} has no fast tokenizer (tokenizer.json); save one with transformers' "
                "AutoTokenizer.save_pretrained and set model.tokenizer to that folder"
            )
        if eos and tokenizer.eos_token_id is None:
            raise PostshareError(
                f"{name} has no EOS token to end documents with; set data.eos=false, or choose "
                "another model.tokenizer"
            )
        return cls(
            tokenizer=backend.to_str(),
            bos=tokenizer.bos_token_id if bos else None,
            eos=tokenizer.eos_token_id if eos else None,
            fraction=fraction,
            held_out=held_out,
        )

    def part(self, text: str | None) -> str:
        """What of a document is on this side; nothing: the empty text."""
        if not text or self.held_out is None:
            return text or ""
        if self.lone:
            cut = end_begins(text, self.fraction)
            return text[cut:] if self.held_out else text[:cut]
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        below = int.from_bytes(digest, "big") < self.fraction * 2**64
        return text if below is self.held_out else ""

    def __call__(self, texts: list[str | None]) -> dict[str, list[list[int]]]:
        kept = [part for part in map(self.part, texts) if part]
        encodings = fast_tokenizer(self.tokenizer).encode_batch_fast(kept, add_special_tokens=False)
        head = [] if self.bos is None else [self.bos]
        tail = [] if self.eos is None else [self.eos]
        return {"input_ids": [head + encoding.ids + tail for encoding in encodings]}


def is_lone(texts: Iterable[str | None]) -> bool:
    """Whether there is a single document, of which whole documents cannot be held out."""
    return len([*itertools.islice(filter(None, texts), 2)]) == 1


def end_begins(text: str, fraction: float) -> int:
    """Where the end of a text begins that is held out: at white space, but for a single word."""
    at = round((1 - fraction) * len(text))
    space = re.compile(r"\s").search(text, at)
    return at if space is None else space.start()


@functools.lru_cache(maxsize=4)
def fast_tokenizer(serialized: str) -> Tokenizer:
    """The fast tokenizer of its JSON."""
    backend = Tokenizer.from_str(serialized)
    backend.no_truncation()  # a tokenizer.json may carry both; a document is never cut or padded
    backend.no_padding()
    return backend


def token_table(
    source: DataSource, documents: datasets.Dataset, encoder: Encoder, *, processes: int = 1
) -> datasets.Dataset:
    """The documents of `source`, tokenized: rows {"input_ids": int32[]}."""
    with cache.writing(source.path, processes=processes):
        return documents.map(
            encoder,
            batched=True,
            input_columns=[source.text],
            remove_columns=documents.column_names,
            features=ROW,
            num_proc=min(processes, len(documents)) if processes > 1 else None,
            desc=f"tokenizing {source.path}",
        )


def streamed_token_table(source: DataSource, encoder: Encoder, needed: int) -> datasets.Dataset:
    """The first documents of `source` that hold `needed` tokens, tokenized while they are read.

    What was read is kept as an ordinary cached table, so that the position in it is an integer and
    a resumed run meets the same tokens, without touching the source again. Fewer tokens come back
    when the source ends first.
    """
    arguments = {
        "source": source.model_dump(exclude={"weight"}),
        "encoder": asdict(encoder),
        "needed": needed,
        "stamp": stamp(data_files(source)),
    }
    with cache.writing(source.path):
        return datasets.Dataset.from_generator(
            _read_stream, features=ROW, gen_kwargs=arguments, split=datasets.Split("stream")
        )


def _read_stream(
    source: dict[str, Any], encoder: dict[str, Any], needed: int, stamp: Any
) -> Iterator[dict[str, list[int]]]:
    from train.recipe.recipe import DataSource

    encode, tokens, texts = Encoder(**encoder), 0, []
    for text in stream_documents(DataSource(**source)):
        texts.append(text)
        if len(texts) == STREAM_BATCH:
            for ids in encode(texts)["input_ids"]:
                yield {"input_ids": ids}
                tokens += len(ids)
                if tokens >= needed:
                    return
            texts = []
    for ids in encode(texts)["input_ids"]:
        yield {"input_ids": ids}
        tokens += len(ids)
    if tokens == 0:
        yield {"input_ids": []}  # the library refuses a table without rows; the caller says why
