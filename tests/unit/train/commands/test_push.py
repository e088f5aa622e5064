"""`postshare push`: what is uploaded, and what never is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from sa_models.export.model_card import model_card
from tests.support import small_models
from train.cli import main

CODE = {"configuration.py", "modeling.py", "attention.py", "plan.py"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.run(tmp_path_factory.mktemp("small"))


class Hub:
    """Stands in for HfApi: notes what is asked of it, and what the patterns let through."""

    def __init__(self, private: bool = False, fails: Exception | None = None) -> None:
        self.private, self.fails = private, fails
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: dict[str, Any] = {}

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.fails is not None:
            raise self.fails
        self.created.append((repo_id, options))
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options: Any) -> None:
        from huggingface_hub.utils import filter_repo_objects

        folder = Path(options["folder_path"])
        every = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        names = filter_repo_objects(every, allow_patterns=options["allow_patterns"])
        self.uploaded = {**options, "names": set(names)}


def push(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, *arguments: str, token: str | None = "t"
) -> int:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["push", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_run_uploads_its_compact_export_with_its_modeling_files(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    assert push(monkeypatch, hub, str(run), "me/small") == 0
    assert hub.created == [("me/small", {"private": None, "exist_ok": True})]
    compact = run / "export" / "compact"
    assert Path(hub.uploaded["folder_path"]) == compact
    assert hub.uploaded["names"] == {f.name for f in compact.iterdir()}
    wanted = {"README.md", "manifest.json", "config.json", "model.safetensors", "tokenizer.json"}
    assert hub.uploaded["names"] >= wanted | CODE
    assert hub.uploaded["repo_id"] == "me/small"
    out = capsys.readouterr().out.replace("\n", " ")
    assert f"{compact} (there is also {run / 'export' / 'dense'})" in out
    assert "https://hub/me/small" in out


def test_a_dry_run_asks_the_hub_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(fails=AssertionError("the hub was asked"))
    dense = run / "export" / "dense"
    assert push(monkeypatch, hub, str(dense), "me/small", "--dry-run", token=None) == 0
    out = capsys.readouterr().out
    for file in dense.iterdir():
        assert f" {file.name} " in out
        assert f"{file.stat().st_size:,}" in out
    assert (dense / "README.md").read_text() in out
    total = sum(file.stat().st_size for file in dense.iterdir())
    assert f"{len(list(dense.iterdir()))} files, {total:,} bytes, verified" in out


def test_what_an_earlier_export_left_there_goes_and_what_others_put_there_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    hub = Hub()
    assert push(monkeypatch, hub, str(run), "me/small") == 0
    ours = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",  # transformers would put the adapter on whatever lies beside it
        "adapter_model.safetensors",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "tokenizer.model",
        "modeling.py",
    ]
    theirs = ["README.md", "LICENSE", "results.json", "sample.txt", ".gitattributes"]
    patterns = hub.uploaded["delete_patterns"]
    assert list(filter_repo_objects([*ours, *theirs], allow_patterns=patterns)) == ours


def test_names_are_names_and_no_patterns(run: Path, tmp_path: Path) -> None:
    """Else a file with brackets in its name would be left out, and nothing said."""
    from huggingface_hub.utils import filter_repo_objects

    from train.commands.push import upload_patterns

    names = ["LICENSE [en].txt", "config.json", "additional_chat_templates/a.jinja"]
    others = ["LICENSE e.txt", "b/config.json.old"]
    allowed = filter_repo_objects([*names, *others], allow_patterns=upload_patterns(names))
    assert list(allowed) == names


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is no finished export"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "modeling.py").write_text("import os"), "modeling.py is damaged"),
        (lambda f: (f / "secret.env").write_text("x"), "secret.env is not of this export"),
    ],
)
def test_what_is_not_whole_is_refused(
    run: Path,
    harm: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(run / "export" / "compact", folder)
    harm(folder)
    for options in ([], ["--dry-run"]):
        hub = Hub()
        assert push(monkeypatch, hub, str(folder), "me/small", *options) == 2
        assert message in capsys.readouterr().err
        assert (hub.created, hub.uploaded) == ([], {})


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (httpx.ConnectError("no route"), "cannot be reached (ConnectError)"),
        (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line(
    run: Path,
    fails: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert push(monkeypatch, Hub(fails=fails), str(run), "me/small") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the hub ")
    assert message in line


def test_other_refusals(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*arguments: str, **options: Any) -> str:
        hub = Hub()
        assert push(monkeypatch, hub, *arguments, **options) == 2
        assert hub.uploaded == {}
        return capsys.readouterr().err

    assert "run `hf auth login`" in refused(str(run), "me/small", token=None)
    assert "is there already, and public" in refused(str(run), "me/small", "--private")
    assert "is no repository name" in refused(str(run), "a/b/c")
    assert "there is no folder" in refused(str(tmp_path / "none"), "me/small")
    assert f"did you mean {run / 'export' / 'compact'}?" in refused(str(run / "export"), "me/x")
    lines = refused(str(run.parent / "base"), "me/small")
    assert "is no finished export" in lines
    assert "delete" not in lines  # it is somebody's model


def test_only_a_name_of_the_hub_is_a_base_of_the_card(run: Path) -> None:
    """The hub refuses a card whose base_model is a folder."""
    manifest = json.loads((run / "export" / "dense" / "manifest.json").read_text())
    for base, is_named in (("meta/llama", True), ("/data/llama", False), ("./a/b", False)):
        manifest["notes"]["base_model"] = base
        front = model_card(manifest).split("---")[1]
        assert ("base_model" in front) is is_named
