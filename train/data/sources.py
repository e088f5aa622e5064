"""Sources of text: local files and folders, hub names, the standard library.

Local files are read by `train.data.local`, what is on the hub by the `datasets` library, whose many
exceptions become one line with the cure. Both become tables in its cache, under a name that changes
with every file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.utils import httpx  # whichever one this version uses

from sa_models.errors import PostshareError
from train.data import cache
from train.data.local import rows
from train.data.local.files import STDLIB, Files, data_files, find_files, split_names

if TYPE_CHECKING:
    from train.recipe.recipe import DataSource

T = TypeVar("T")
Stamps = tuple[tuple[str, int, int, int, int], ...]
RECORD = "record"
"""The column of local records: a row as JSON."""
_READER = 1  # part of the name of a table: to be raised when files are read in another way
_OF_LIBRARY = (
    DatasetsError,
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    KeyError,
    TypeError,
    NotImplementedError,
    pa.ArrowException,
    httpx.HTTPError,
)
_SUBSETS = re.compile(r"(?:available configs|not found\. Available): (\[[^\]]*\])")
_CACHED = re.compile(r"Available configs in the cache: (\[[^\]]*\])")


def load_documents(source: DataSource) -> datasets.Dataset:
    """The rows of a source, with `source.text` checked to be a column of text.

    A .txt file is one document; a folder may hold any number of files of one kind, or what
    `Dataset.save_to_disk` writes. Raises PostshareError, in one line, for whatever keeps them from
    being read.
    """
    documents = _load(source, [source.text], _documents, source.text)
    if len(documents) == 0:
        raise _empty(source.path, source.split)
    _check_text(source, documents)
    return documents


def load_records(source: DataSource, fields: Sequence[str]) -> datasets.Dataset:
    """The rows of a source for instruction tuning: the column RECORD, or of the hub its columns.

    Raises PostshareError, in one line, for whatever keeps them from being read.
    """
    records = _load(source, fields, _records, RECORD)
    if len(records) == 0:
        raise _empty(source.path, source.split)
    return records


def stream_documents(source: DataSource) -> Iterator[str | None]:
    """The texts of a source one by one, read as they are asked for.

    Raises PostshareError, in one line, for whatever keeps them from being read.
    """
    found = local_files(source)
    if found is None and source.path == STDLIB:
        yield from _load(source, [source.text], _documents, source.text)[source.text]
    elif found is None:
        with _library(source):
            documents = _from_library(source, streaming=True)
            _check_text(source, documents)
            for number, row in enumerate(documents):
                text = row.get(source.text)
                if not isinstance(text, str | None):
                    raise PostshareError(
                        f"{source.path}, row {number}: the '{source.text}' is no text but "
                        f"{type(text).__name__}; set data.streaming=false, or choose another column"
                    )
                yield text
    else:
        if {*source.split} & {*"[("}:
            raise PostshareError(
                f"{source.path}: split {source.split} is a part, and a stream is read from its "
                "beginning; set data.streaming=false"
            )
        paths = [path for files in found.values() for path in files.paths]
        yield from _not_empty(source.path, source.split, rows.texts(paths, source.text))


def without_text(source: DataSource, documents: datasets.Dataset) -> str:
    """How many of the rows have no text, for the log; nothing where all have some."""
    lengths = pc.binary_length(documents.data.column(source.text))
    without = pc.sum(pc.equal(pc.fill_null(lengths, 0), 0)).as_py()
    if not without:
        return ""
    return f"{without:,} of {len(documents):,} rows have no '{source.text}' and are left out"


def local_files(source: DataSource) -> dict[str, Files] | None:
    """The files of each split of a source that is read here; None: by the library, or stdlib.

    Raises:
        PostshareError: there are none, or it is in doubt which.
    """
    found = {}
    for split in split_names(source.split):
        files = find_files(source, split)
        if files is None or files.by_library:
            return None
        found[split] = files
    return found


def stamp(paths: Sequence[Path]) -> Stamps:
    """Changes when files do: for each its path, size, inode, and when it was changed.

    Of the two times the second cannot be set back, as copying and unpacking do with the first.
    """
    return tuple(
        (str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
        for path in paths
        for stat in [path.stat()]
    )


def _empty(path: str, split: str) -> PostshareError:
    return PostshareError(f"{path} ({split}) is empty; choose another source")


def _not_empty(path: str, split: str, read: Iterator[T]) -> Iterator[T]:
    """Raises PostshareError where nothing is read."""
    nothing = True
    for item in read:
        nothing = False
        yield item
    if nothing:
        raise _empty(path, split)


def _load(source: DataSource, fields: Sequence[str], reader: Any, column: str) -> datasets.Dataset:
    if source.path == STDLIB:
        return _stdlib(source)
    found = local_files(source)
    if found is None:
        with _library(source):
            return _from_library(source)
    with cache.writing(source.path):
        parts = {
            split: datasets.Dataset.from_generator(
                reader,
                features=datasets.Features({column: datasets.Value("string")}),
                gen_kwargs={
                    "name": (source.path, split),
                    "stamps": stamp(files.paths),
                    "fields": tuple(fields),
                    "version": _READER,
                },
            )
            for split, files in found.items()
        }
    if len(parts) == 1 and source.split in parts:
        return parts[source.split]
    return _part(source, parts)


def _part(source: DataSource, parts: dict[str, datasets.Dataset]) -> datasets.Dataset:
    """What a split such as `train[:10%]+validation` asks for."""
    sizes = {split: len(part) for split, part in parts.items()}
    try:
        ranges = datasets.ReadInstruction.from_spec(source.split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise PostshareError(
            f"{source.path}: split {source.split} cannot be read ({error}); write it as train, or "
            "train[:10%]"
        ) from error
    chosen = [parts[one.splitname].select(range(one.from_, one.to)) for one in ranges]
    return datasets.concatenate_datasets(chosen)


def _documents(
    name: tuple[str, str], stamps: Stamps, fields: tuple[str, ...], version: int
) -> Iterator[dict[str, str | None]]:
    (column,) = fields
    for text in _whole(name, stamps, rows.texts(_paths(stamps), column)):
        yield {column: text}


def _records(
    name: tuple[str, str], stamps: Stamps, fields: tuple[str, ...], version: int
) -> Iterator[dict[str, str | None]]:
    for text in _whole(name, stamps, rows.records(_paths(stamps), fields)):
        yield {RECORD: text}


def _whole(
    name: tuple[str, str], stamps: Stamps, read: Iterator[str | None]
) -> Iterator[str | None]:
    """All that is read, of files that stay the same meanwhile."""
    yield from _not_empty(*name, read)
    for path, before, now in zip(_paths(stamps), stamps, stamp(_paths(stamps)), strict=True):
        if before != now:
            raise PostshareError(f"{path} has changed while it was read; start again")


def _paths(stamps: Stamps) -> list[Path]:
    return [Path(path) for path, *_ in stamps]


def _from_library(
    source: DataSource, *, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    path, cache_dir = Path(source.path).expanduser(), None
    if path.is_dir():  # whose tables the library would take for those of its files of any time
        now = repr(stamp([*data_files(source), path / "README.md"])).encode()
        name = f"card-{hashlib.blake2b(now, digest_size=8).hexdigest()}"
        cache_dir = str(Path(datasets.config.HF_DATASETS_CACHE) / name)
    return datasets.load_dataset(
        str(path) if path.is_dir() else source.path,
        name=source.subset,
        split=source.split,
        streaming=streaming,
        cache_dir=cache_dir,
    )


def _stdlib(source: DataSource) -> datasets.Dataset:
    from train.demo.corpus import SPLITS, stdlib_stamp

    if source.split not in SPLITS:
        raise PostshareError(
            f"stdlib has no split '{source.split}'; set split to one of {', '.join(SPLITS)}"
        )
    with cache.writing(STDLIB):
        return datasets.Dataset.from_generator(
            _stdlib_rows, gen_kwargs={"split": source.split, "stamp": stdlib_stamp()}
        )


def _stdlib_rows(split: str, stamp: str) -> Iterator[dict[str, str]]:
    from train.demo.corpus import stdlib_documents

    for document in stdlib_documents(split):
        yield {"name": document["name"], "text": document["text"]}


def _check_text(source: DataSource, documents: datasets.Dataset | datasets.IterableDataset) -> None:
    features = documents.features
    if features is None:  # a stream without a declared schema: look at its first row
        row = next(iter(documents), None)
        if row is None:
            raise _empty(source.path, source.split)
        kinds = {n: "text" if isinstance(v, str) else type(v).__name__ for n, v in row.items()}
        if row.get(source.text) is None and source.text in row:
            return
    else:
        strings = ("string", "large_string")
        dtypes = {name: str(getattr(kind, "dtype", kind)) for name, kind in features.items()}
        kinds = {name: "text" if kind in strings else kind for name, kind in dtypes.items()}
    of_text = [name for name, kind in kinds.items() if kind == "text"]
    if source.text not in kinds:
        raise rows.no_column(source.path, source.text, [*kinds], of_text)
    if kinds[source.text] != "text":
        raise rows.other_than_text(source.path, source.text, kinds[source.text], of_text)


@contextmanager
def _library(source: DataSource) -> Iterator[None]:
    try:
        yield
    except _OF_LIBRARY as error:
        raise explain(source, error) from error


def explain(source: DataSource, error: BaseException) -> PostshareError:
    """One line with the cure for what `datasets` raises."""
    links = cache.chain(error)
    if found := cache.said(links):
        return found
    said = " ".join(f"{type(link).__name__}: {link}" for link in links)
    reason = " ".join(str(links[-1]).split())[:200] or type(links[-1]).__name__
    name = source.path
    if Path(name).expanduser().exists():
        return PostshareError(
            f"{name} cannot be read as its README.md asks ({reason}); correct that, or set path to "
            "the files themselves"
        )
    if "gated" in said.lower():
        return PostshareError(
            f"dataset {name} is gated; accept its terms at https://huggingface.co/datasets/{name}, "
            "run `hf auth login`, then `postshare prepare RECIPE`"
        )
    if subsets := _SUBSETS.search(said):
        listed = ", ".join(re.findall(r"'([^']+)'", subsets[1]))
        return PostshareError(
            f"dataset {name} has no subset {source.subset}; set subset to one of {listed}"
            if source.subset
            else f"dataset {name} has several subsets; set subset to one of {listed}"
        )
    if subsets := _CACHED.search(said):
        listed = ", ".join(re.findall(r"'([^']+)'", subsets[1]))
        return PostshareError(
            f"of dataset {name} the cache has other subsets; set subset to one of {listed}, or run "
            "`postshare prepare RECIPE` on a machine with network, with the same HF_HOME"
        )
    if "split" in str(error).lower() or "config name" in str(error).lower():
        return PostshareError(f"dataset {name}: {reason}; set split or subset to one that exists")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or any(
        word in said for word in ("OfflineMode", "ConnectionError", "Couldn't reach", "Max retries")
    )
    if offline or any(isinstance(link, httpx.TransportError) for link in links):
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
