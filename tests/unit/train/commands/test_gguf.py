"""`postshare gguf`, and gguf among a recipe's formats."""

from __future__ import annotations

import builtins
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from sa_models.export.manifest import read_manifest
from tests.support import small_models
from train.cli import main
from train.demo import DEMO_BASE

here = importlib.util.find_spec("gguf") is not None
needs_gguf = pytest.mark.skipif(not here, reason="pip install 'postshare[gguf]'")


def command(*arguments: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip()


@pytest.fixture
def without_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "gguf":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)


def known_cuts(folder: Path) -> Path:
    """The tokenizer of small models, with cuts that llama.cpp has a name of."""
    value = json.loads((folder / "tokenizer.json").read_text())
    value["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


@needs_gguf
def test_a_file_is_written_beside_the_folder_and_its_bytes_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = known_cuts(small_models.dense(tmp_path / "base"))
    assert command("gguf", base, "--to", "q8_0") == 0
    file = tmp_path / "base-q8_0.gguf"
    captured = capsys.readouterr()
    sizes = [f.stat().st_size for f in (file, base / "model.safetensors")]
    of = f"{sizes[0]:,} bytes ({sizes[0] / sizes[1]:.1%} of {sizes[1]:,})"
    assert f"{file}: llama, {of}" in " ".join(captured.out.split())
    assert "note: blocks of 32 do not divide the rows of" in captured.err
    assert command("gguf", base, "--to", "q8_0") == 2
    assert f"error: {file} is there already" in said(capsys)


@needs_gguf
def test_notes_of_what_the_file_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exports = small_models.run(tmp_path) / "export"
    assert command("gguf", exports / "compact", "--output", tmp_path / "a.gguf") == 2
    assert "--pre NAME" in said(capsys)
    (exports / "adapter").mkdir()
    arguments = ("--pre", "gpt-2", "--output", tmp_path / "a.gguf")
    assert command("gguf", exports / "compact", *arguments) == 0
    notes = said(capsys)
    assert "note: text is cut as llama.cpp's 'gpt-2' cuts it" in notes
    assert f"note: {exports / 'adapter'} belongs to this export and is not in the file" in notes


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_models.run(tmp_path)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for folder, message in (
        (run, "is a run folder; name one of its exports"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "absent", "is no folder here and no hub name"),
    ):
        assert command("gguf", folder) == 2
        error = said(capsys)
        assert message in error
        assert len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("*.gguf"))


def test_gguf_that_is_not_installed_is_told_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_gguf: None
) -> None:
    base = small_models.dense(tmp_path / "base")
    assert command("gguf", base) == 2
    assert said(capsys).endswith(
        "error: writing GGUF needs the package gguf; pip install 'postshare[gguf]'"
    )


# --- export.formats -------------------------------------------------------------------------------


def recipe(folder: Path, base: str | Path, **sections: Any) -> Path:
    text = folder / "text.txt"
    text.write_text(small_models.TEXT * 40, encoding="utf-8")
    file = folder / "small.yaml"
    value = {
        "name": "small",
        "output_dir": str(folder / "run"),
        "model": {"path": str(base)},
        "data": {"train": str(text), "validation": str(text), "sequence_length": 32},
        "plan": {"strategy": "magnitude", "action": "remove", "budget": {"heads": 2}},
        "train": {"steps": 0, "batch_size": 1, "micro_batch_size": 1, "learning_rate": 1e-3},
        "export": {"formats": ["compact", "gguf"]},
    }
    file.write_text(json.dumps(value | sections), encoding="utf-8")
    return file


@needs_gguf
def test_a_run_exports_it_and_says_its_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = known_cuts(small_models.dense(tmp_path / "base"))
    export = {"formats": ["compact", "dense", "gguf"], "gguf": "f16"}
    assert command("run", recipe(tmp_path, base, export=export)) == 0
    folder = tmp_path / "run" / "export" / "gguf"
    file = folder / "small-f16.gguf"
    assert read_manifest(folder)["plan"]["removed"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bytes"]["gguf"] == file.stat().st_size
    assert "perplexity of the base" in (folder / "README.md").read_text()
    assert f"gguf      {folder}" in " ".join(capsys.readouterr().out.split(" "))
    assert command("push", folder, "me/small", "--dry-run") == 0
    assert "small-f16.gguf" in capsys.readouterr().out


def test_a_start_without_gguf_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_gguf: None
) -> None:
    base = small_models.dense(tmp_path / "base")
    assert command("run", recipe(tmp_path, base)) == 2
    assert "pip install 'postshare[gguf]'" in said(capsys)
    assert not (tmp_path / "run").exists()


@needs_gguf
def test_a_tokenizer_that_cannot_be_expressed_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("run", recipe(tmp_path, DEMO_BASE)) == 2
    assert "--pre NAME" in said(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"export": {"formats": ["gguf"]}}, "a GGUF file alone cannot be evaluated here"),
        (
            {"export": {"formats": ["compact"], "gguf": "q8_0"}},
            "export.gguf: is q8_0, and export.formats names no gguf",
        ),
        (
            {
                "plan": {"strategy": "none"},
                "spans": {"spans": [{"leader": 0, "followers": [1], "share": "kv"}]},
            },
            "spans have no GGUF form",
        ),
        ({"export": {"formats": ["compact", "gguf"], "gguf": "q5"}}, "export.gguf"),
    ],
)
def test_recipes_that_cannot_be_are_refused(
    sections: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small_models.dense(tmp_path / "base")
    assert command("run", recipe(tmp_path, base, **sections)) == 2
    assert message in " ".join(said(capsys).split())
    assert not (tmp_path / "run").exists()
