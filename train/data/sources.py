"""Sources of text: hub names, local files and folders, the standard library.

Everything goes through the `datasets` library, whose many exceptions become one line with the cure.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from sa_models.errors import PostshareError

if TYPE_CHECKING:
    from train.recipe.recipe import DataSource

STDLIB = "stdlib"
BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_OTHER_FILES = {".csv", ".tsv", ".gz", ".zst", ".zip", ".bin", ".md", ".yaml", ".html", ".xml"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_documents(
    source: DataSource, *, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a source, with `source.text` checked to be a column of text.

    Raises PostshareError, in one line, for whatever keeps them from being read.
    """
    documents = load_rows(source, streaming=streaming)
    _check_text(source, documents)
    return documents


def load_rows(
    source: DataSource, *, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a source, whatever their columns.

    A .txt file is one document; a folder may hold any number of files of one kind, what
    `Dataset.save_to_disk` writes, or whatever else `datasets.load_dataset` understands. Raises
    PostshareError, in one line, for whatever keeps the rows from being read.
    """
    if source.path == STDLIB:
        return _stdlib(source)
    try:
        return _load(source, streaming)
    except PostshareError:
        raise
    except (DatasetsError, OSError, ValueError, StopIteration) as error:
        raise explain(source, error) from error


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
    if not on_hub(source.path):
        raise PostshareError(
            f"{source.path} does not exist (looked in {Path.cwd()}); correct the path of this "
            "data source"
        )
    return datasets.load_dataset(source.path, name=source.subset, **options)


def on_hub(path: str) -> bool:
    """Whether a path that does not exist here names a dataset of the hub, and no missing file."""
    return Path(path).suffix not in {*BUILDERS, *_OTHER_FILES} and bool(_HUB_NAME.fullmatch(path))


def _load_folder(
    path: Path, source: DataSource, options: dict[str, Any]
) -> datasets.Dataset | datasets.IterableDataset:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        if source.split not in splits:
            raise PostshareError(
                f"{path} has no split '{source.split}'; set split to one of {', '.join(splits)}"
            )
        path = path / source.split
    if (path / "state.json").is_file():
        # Not load_from_disk, whose tables would be cached inside the user's folder.
        files = sorted(map(str, path.glob("*.arrow")))
        return datasets.load_dataset("arrow", data_files={source.split: files}, **options)
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

    for document in stdlib_documents(split):
        yield {"name": document["name"], "text": document["text"]}


def stamp(path: str) -> str:
    """Changes when local files do, so that a cached stream is read again. Empty for hub names."""
    root = Path(path).expanduser()
    files = [root] if root.is_file() else sorted(root.rglob("*")) if root.is_dir() else []
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest() if stats else ""


def _check_text(source: DataSource, documents: datasets.Dataset | datasets.IterableDataset) -> None:
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


def explain(source: DataSource, error: BaseException) -> PostshareError:
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
