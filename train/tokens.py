"""Documents in, token ids out: any source of text becomes a cached table of tokenized documents.

One row of a table is one document, `[bos] + ids + [eos]`, int32. Tables live in the cache of the
`datasets` library under a fingerprint of the text and of everything that turns it into ids, so a
second start reads them and tokenizes nothing. Files appear there by rename: several processes may
start at once, and at worst do the same work twice.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from tokenizers import Tokenizer

from sa_models.errors import PostshareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from train.recipe import DataSource

STDLIB = "stdlib"
BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
ROW = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
STREAM_BATCH = 32  # documents tokenized at a time while streaming: at most this many are read in vain


@dataclass(frozen=True)
class Encoder:
    """Turns texts into token ids; its fields are all that the ids depend on.

    `tokenizer` is the JSON of the fast tokenizer: unlike the object, whose state changes when it is
    first called, it hashes the same in every process, and that is what the cache needs.

    `held_out` None keeps every document. Otherwise a document belongs to the held-out side when the
    hash of its text, read as a number in [0, 1), is below `fraction`: equal texts always fall on the
    same side, whatever the seed, the order and the number of processes. Empty texts are dropped.
    """

    tokenizer: str
    bos: int | None
    eos: int | None
    fraction: float = 0.0
    held_out: bool | None = None

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

    def keeps(self, text: str | None) -> bool:
        if not text:
            return False
        if self.held_out is None:
            return True
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return (int.from_bytes(digest, "big") < self.fraction * 2**64) is self.held_out

    def __call__(self, texts: list[str | None]) -> dict[str, list[list[int]]]:
        kept = [text for text in texts if text and self.keeps(text)]
        encodings = _backend(self.tokenizer).encode_batch_fast(kept, add_special_tokens=False)
        head = [] if self.bos is None else [self.bos]
        tail = [] if self.eos is None else [self.eos]
        return {"input_ids": [head + encoding.ids + tail for encoding in encodings]}


@functools.lru_cache(maxsize=4)
def _backend(serialized: str) -> Tokenizer:
    backend = Tokenizer.from_str(serialized)
    backend.no_truncation()  # a tokenizer.json may carry both; a document is never cut or padded
    backend.no_padding()
    return backend


def token_table(source: DataSource, encoder: Encoder, *, processes: int = 1) -> datasets.Dataset:
    """Every document of `source`, tokenized by `processes` processes: rows {"input_ids": int32[]}."""
    documents = load_documents(source)
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
        "stamp": _stamp(source.path),
    }
    try:
        return datasets.Dataset.from_generator(
            _read_stream, features=ROW, gen_kwargs=arguments, split=datasets.Split("stream")
        )
    except DatasetsError as error:
        if isinstance(error.__cause__, PostshareError):
            raise error.__cause__ from None
        raise _explain(source, error) from error


def _read_stream(
    source: dict[str, Any], encoder: dict[str, Any], needed: int, stamp: str
) -> Iterator[dict[str, list[int]]]:
    from train.recipe import DataSource

    encode, tokens, texts = Encoder(**encoder), 0, []
    origin = DataSource(**source)
    for row in load_documents(origin, streaming=True):
        texts.append(row[origin.text])
        if len(texts) == STREAM_BATCH:
            for ids in encode(texts)["input_ids"]:
                yield {"input_ids": ids}
                tokens += len(ids)
                if tokens >= needed:
                    return
            texts = []
    yield from ({"input_ids": ids} for ids in encode(texts)["input_ids"])


def load_documents(
    source: DataSource, *, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a source, with `source.text` checked to be a column of text.

    A .txt file is one document; a folder may hold any number of files of one kind, what
    `Dataset.save_to_disk` writes, or whatever else `datasets.load_dataset` understands. Raises
    PostshareError, in one line, for whatever keeps the rows from being read.
    """
    if source.path == STDLIB:
        documents = _stdlib(source)
    else:
        try:
            documents = _load(source, streaming)
        except PostshareError:
            raise
        except (DatasetsError, OSError, ValueError, StopIteration) as error:
            raise _explain(source, error) from error
    _check_text(source, documents)
    return documents


def _load(source: DataSource, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    path = Path(source.path).expanduser()
    options: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise PostshareError(
                f"{path}: files of kind '{path.suffix}' are not read; convert it to one of "
                f"{', '.join(BUILDERS)}"
            )
        builder = BUILDERS[path.suffix]
        options["data_files"] = {source.split: [str(path)]}
        if builder == "text":
            options["sample_by"] = "document"
        return datasets.load_dataset(builder, **options)
    if path.is_dir():
        return _load_folder(path, source, options)
    if path.suffix in BUILDERS or path.is_absolute() or source.path.startswith((".", "~")):
        raise PostshareError(
            f"{source.path} does not exist (looked in {Path.cwd()}); correct the path of this data source"
        )
    return datasets.load_dataset(source.path, name=source.subset, **options)


def _load_folder(
    path: Path, source: DataSource, options: dict[str, Any]
) -> datasets.Dataset | datasets.IterableDataset:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if source.split not in saved:
                raise PostshareError(
                    f"{path} has no split '{source.split}'; set split to one of {', '.join(saved)}"
                )
            saved = saved[source.split]
        return saved.to_iterable_dataset() if options["streaming"] else saved
    kinds = {file.suffix for file in path.rglob("*") if file.suffix in BUILDERS}
    if not kinds:
        raise PostshareError(f"{path} holds no {', '.join(BUILDERS)} file; correct the path")
    if kinds == {".txt"}:  # here too a file is a document, where the library would take a line
        return datasets.load_dataset("text", data_dir=str(path), sample_by="document", **options)
    return datasets.load_dataset(str(path), name=source.subset, **options)


def _stdlib(source: DataSource) -> datasets.Dataset:
    from train.demo.corpus import SPLITS, stdlib_stamp

    if source.split not in SPLITS:
        raise PostshareError(
            f"stdlib has no split '{source.split}'; set split to one of {', '.join(SPLITS)}"
        )
    return datasets.Dataset.from_generator(
        _stdlib_rows, gen_kwargs={"split": source.split, "stamp": stdlib_stamp()}
    )


def _stdlib_rows(split: str, stamp: str) -> Iterator[dict[str, str]]:
    from train.demo.corpus import stdlib_documents

    yield from stdlib_documents(split)


def _stamp(path: str) -> str:
    """Changes when local files do, so that a cached stream is read again. Empty for hub names."""
    root = Path(path).expanduser()
    files = [root] if root.is_file() else sorted(root.rglob("*")) if root.is_dir() else []
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest() if stats else ""


def _check_text(
    source: DataSource, documents: datasets.Dataset | datasets.IterableDataset
) -> None:
    features = documents.features
    if features is None:  # a stream without a declared schema: look at its first row
        row = next(iter(documents), None)
        if row is None:
            raise PostshareError(f"{source.path} ({source.split}) is empty; choose another source")
        columns, is_text = list(row), isinstance(row.get(source.text), str | None)
    else:
        columns = list(features)
        kind = getattr(features.get(source.text), "dtype", "")
        is_text = kind in ("string", "large_string")
    if isinstance(documents, datasets.Dataset) and len(documents) == 0:
        raise PostshareError(f"{source.path} ({source.split}) is empty; choose another source")
    if source.text not in columns:
        raise PostshareError(
            f"{source.path} has no column '{source.text}'; set text to one of: {', '.join(columns)}"
        )
    if not is_text:
        raise PostshareError(
            f"{source.path}: column '{source.text}' does not hold text; set text to another of: "
            f"{', '.join(columns)}"
        )


def _explain(source: DataSource, error: BaseException) -> PostshareError:
    """One line with the cure for what `datasets` raises."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    said = " ".join(f"{type(link).__name__}: {link}" for link in chain)
    reason = " ".join(str(chain[-1]).split())[:200] or type(chain[-1]).__name__
    name = source.path
    if Path(name).expanduser().exists():
        return PostshareError(f"{name} cannot be read ({reason}); repair or replace the file")
    if "gated" in said.lower():
        return PostshareError(
            f"dataset {name} is gated; accept its terms at https://huggingface.co/datasets/{name}, "
            "run `hf auth login`, then `postshare prepare RECIPE`"
        )
    if "split" in str(error).lower() or "config name" in str(error).lower():
        return PostshareError(f"dataset {name}: {reason}; set split or subset to one that exists")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or any(
        word in said for word in ("OfflineMode", "ConnectionError", "Couldn't reach", "Max retries")
    )
    if offline:
        return PostshareError(
            f"dataset {name} is not in the cache and the hub cannot be reached; run `postshare "
            "prepare RECIPE` on a machine with network, with the same HF_HOME"
        )
    if isinstance(error, DatasetNotFoundError):
        return PostshareError(
            f"{name} is neither a local path nor a dataset on the hub; correct the name, or run "
            "`hf auth login` if it is private"
        )
    return PostshareError(f"dataset {name} cannot be loaded ({reason}); correct this data source")
