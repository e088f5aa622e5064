"""Text that every machine with Python has: the source of its standard library.

A document is a module, its docstrings and comments included; its name is the dotted module name.
Left out are tests, what may not be installed everywhere (tkinter and what needs it), what is data
rather than text (codec tables, generated files), and whatever has stopped being maintained in place
(lib2to3). Modules that an interpreter lacks are simply not there.

**Split.** By the hash of the *family* of a module: its top-level name without leading `_` or `_py`.
So a package is never divided, `_pydecimal` stays with `decimal`, and the side of a module is the
same in every Python version: a model trained under one version has not seen the validation text of
another.

**Near-duplicates.** A shingle is a run of 12 words and symbols. A training document is dropped
when, for any validation document, the shingles that the two have in common are more than 5 % of the
shingles of the smaller one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import sysconfig
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.07
SHINGLE_WORDS = 12
MAX_OVERLAP = 0.05

_SALT = "stdlib-1913"  # chosen for many families of even size on the validation side
_LEFT_OUT_TOP = {
    "antigravity",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "this",
    "tkinter",
    "turtle",
    "turtledemo",
}
_LEFT_OUT_FOLDERS = {"__pycache__", "site-packages", "test", "tests", "idle_test"}
_LEFT_OUT_MODULES = {  # tables and generated code
    "html.entities",
    "stringprep",
    "keyword",
    "locale",
    "token",
    "opcode",
    "_opcode_metadata",
    "re._casefix",
}
_WORD = re.compile(r"\w+|[^\w\s]")


class Document(TypedDict):
    name: str
    text: str


def stdlib_documents(split: str) -> list[Document]:
    """The documents of one split ("train" or "validation"), sorted by name."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    return _documents()[split]


def stdlib_stamp() -> str:
    """Changes with the corpus: with the interpreter, the files, and the rules of this module."""
    rules = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    files = [
        (name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in _modules(_stdlib())
    ]
    return hashlib.sha256(repr((sys.version, rules, files)).encode()).hexdigest()


def in_validation(name: str) -> bool:
    """Whether a module belongs to the validation side, from its name alone."""
    family = re.sub(r"^_+(py)?", "", name.split(".")[0])
    digest = hashlib.sha256(f"{_SALT}:{family}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def without_near_duplicates(train: list[Document], validation: list[Document]) -> list[Document]:
    """The training documents that overlap with no validation document: see the module."""
    sizes, owners = [], defaultdict(list)
    for index, document in enumerate(validation):
        shingles = _shingles(document["text"])
        sizes.append(len(shingles))
        for shingle in shingles:
            owners[shingle].append(index)
    kept = []
    for document in train:
        shingles = _shingles(document["text"])
        common = Counter(index for shingle in shingles for index in owners.get(shingle, ()))
        if all(
            count <= MAX_OVERLAP * min(len(shingles), sizes[index])
            for index, count in common.items()
        ):
            kept.append(document)
    return kept


def _shingles(text: str) -> set[int]:
    words = _WORD.findall(text)
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {hash(tuple(words[start : start + SHINGLE_WORDS])) for start in range(last)}


@functools.cache
def _documents() -> dict[str, list[Document]]:
    sides: dict[str, list[Document]] = {"train": [], "validation": []}
    for name, text in _texts(_modules(_stdlib())):
        sides["validation" if in_validation(name) else "train"].append({"name": name, "text": text})
    sides["train"] = without_near_duplicates(sides["train"], sides["validation"])
    return sides


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules(root: Path) -> list[tuple[str, Path]]:
    """Names and files of the modules that take part, sorted by name."""
    found = []
    for path in _python_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT_FOLDERS.intersection(parts) or parts[0] in _LEFT_OUT_TOP:
            continue
        if parts[0] not in sys.stdlib_module_names or parts[0].startswith("_sysconfigdata"):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in _LEFT_OUT_MODULES:
            found.append((name, path))
    return sorted(found)


def _python_files(root: Path) -> Iterator[Path]:
    """Below a folder, but for what is left out: site-packages may hold many times as many."""
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - _LEFT_OUT_FOLDERS
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def _texts(modules: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    for name, path in modules:
        try:
            with tokenize.open(path) as file:  # honours the encoding that the file declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # not source in any encoding that Python itself would accept
        if text.strip():
            yield name, text
