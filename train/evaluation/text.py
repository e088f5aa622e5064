"""The text that `postshare evaluate` measures perplexity on: a file, or what a run has held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sa_models.errors import PostshareError
from train.common.run_files import RECIPE_FILE
from train.data.local.files import STDLIB
from train.data.sources import load_documents, stream_documents
from train.data.token_table import Encoder, is_lone
from train.recipe.recipe import Recipe, load_recipe
from train.recipe.sections.inputs import DataSource


@dataclass(frozen=True)
class EvaluationText:
    """Texts, each of which is predicted on its own, and what they are called."""

    name: str
    texts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(f"{len(text)} ".encode())
            digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def words(self) -> int:
        """As `str.split` finds them."""
        return sum(len(text.split()) for text in self.texts)


def find_text(file: Path | None, arguments: Sequence[str]) -> EvaluationText:
    """The text of a file; without one, the held-out text of the one run among the arguments.

    The file `stdlib` is the demo's validation text.

    Raises:
        PostshareError: there is no file and not one run, or the text cannot be read.
    """
    if file is not None:
        return _file_text(file)
    runs = [Path(a).expanduser() for a in arguments]
    runs = [run for run in runs if (run / RECIPE_FILE).is_file()]
    if len(runs) == 1:
        return _held_out(load_recipe(runs[0] / RECIPE_FILE))
    what = "no run is" if not runs else f"{len(runs)} runs are"
    raise PostshareError(
        f"perplexity needs a text, and {what} given whose held-out text could be it; pass "
        "--text FILE (.txt: one text; .jsonl: one for each row)"
    )


def _file_text(file: Path) -> EvaluationText:
    if str(file) == STDLIB:
        source = DataSource(path=STDLIB, split="validation")
        name = "Python's standard library, validation modules"
        return EvaluationText(name, tuple(load_documents(source)["text"]))
    if not file.is_file():
        what = "is a folder; give a file" if file.is_dir() else "no such file; correct the path"
        raise PostshareError(f"--text {file}: {what}")
    source = DataSource(path=str(file))
    texts = tuple(text for text in stream_documents(source) if text)
    if not any(map(str.strip, texts)):
        raise PostshareError(
            f"--text {file}: holds no text; give a .txt, or a .jsonl whose rows have `text`"
        )
    return EvaluationText(file.name, texts)


def _held_out(recipe: Recipe) -> EvaluationText:
    """All documents that the run has held out of its training, or the end of a lone one."""
    data = recipe.data
    if data.format != "text" or data.streaming:
        kind = "a stream" if data.streaming else f"{data.format} records"
        raise PostshareError(
            f"the run's held-out data is {kind}, no text to slide a window over; pass --text FILE"
        )
    texts: list[str] = []
    for source in data.validation or data.train:
        documents = load_documents(source)[source.text]
        held_out = None if data.validation else True
        lone = held_out is not None and is_lone(documents)
        encoder = Encoder("", None, None, data.validation_fraction, held_out, lone)
        texts += filter(None, map(encoder.part, documents))
    return EvaluationText(f"held-out text of {recipe.name}", tuple(texts))
