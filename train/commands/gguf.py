"""`postshare gguf MODEL --to q8_0`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sa_models.errors import PostshareError
from sa_models.export.gguf.file import GgufForm
from sa_models.export.gguf.form import convert_folder
from sa_models.export.manifest import MANIFEST, read_manifest
from sa_models.weights.config_file import read_model_type
from train.common.console import plain_console
from train.common.progress import bar, note
from train.common.run_files import RECIPE_FILE
from train.evaluation.summary import weight_bytes
from train.models.base_model import base_folder
from train.models.tokenizer import load_tokenizer
from train.recipe.sections.inputs import ModelSection


def write_gguf(model: str, output: Path | None, to: str, pre: str | None) -> None:
    """Write the file, and print its bytes beside those of the model.

    Raises:
        PostshareError: see :func:`~sa_models.export.gguf.form.convert_folder`; or MODEL is a run,
            or has no tokenizer that can be loaded.
    """
    source = base_folder(ModelSection(path=model), "model")
    if (source / RECIPE_FILE).is_file():
        raise PostshareError(
            f"{model} is a run folder; name one of its exports, such as {model.rstrip('/')}"
            "/export/compact"
        )
    read_model_type(source)  # a folder without a config has no tokenizer either
    given = Path(model).expanduser()
    beside = given if given.is_dir() else Path(given.name)
    file = output or beside.with_name(f"{beside.name}-{to}.gguf")
    tokenizer = load_tokenizer(str(source))
    with bar("write", of_bytes=True) as write, bar("verify", of_bytes=True) as verify:
        shows = {"write": write, "verify": verify}
        form = convert_folder(
            source, file, to, tokenizer, pre, lambda stage, *done: shows[stage](*done)
        )
    for line in _notes(source, form, pre):
        note(f"note: {line}")
    before, after = weight_bytes(source), file.stat().st_size
    plain_console().print(
        f"gguf      {file}: {form.layout.architecture}, {after:,} bytes "
        f"({after / before:.1%} of {before:,})",
        soft_wrap=True,
    )


def _notes(source: Path, form: GgufForm, pre: str | None) -> Iterator[str]:
    """What the file has not, or has otherwise than one may think."""
    if pre is not None:
        yield f"text is cut as llama.cpp's {pre!r} cuts it, whatever the tokenizer's own cuts are"
    if names := form.layout.unblocked():
        yield (
            f"blocks of 32 do not divide the rows of {len(names)} matrices (the first is "
            f"{names[0]}): these are f16"
        )
    if not (source / MANIFEST).is_file():
        return
    manifest = read_manifest(source)
    kind, config = manifest["format"], form.layout.config
    heads = config.num_attention_heads * config.num_hidden_layers
    if kind == "dense" and manifest["plan"]["removed"] and heads == manifest["heads"]["total"]:
        yield "removed heads are zeros in a dense export; of the compact one none of them is stored"
    if kind == "compact" and source.with_name("adapter").is_dir():
        yield (
            f"{source.with_name('adapter')} belongs to this export and is not in the file; the "
            "dense export has it merged"
        )
