"""The dashboard: the same panels as a file and as wandb's workspace; and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sa_models.errors import PostshareError
from train.cli import app
from train.commands import dashboard
from train.tracking.dashboard_panels import SECTIONS, keys


def test_file_and_workspace_have_the_same_panels(tmp_path: Path) -> None:
    file = tmp_path / "panels.json"
    done = CliRunner().invoke(app, ["dashboard", "--json", str(file)])
    assert (done.exit_code, done.output) == (0, f"panels    {file}\n")
    written = json.loads(file.read_text())
    sent = json.loads(
        dashboard.workspace("me", "p")._to_model().spec.model_dump_json(by_alias=True)
    )
    assert sent["section"]["settings"]["xAxis"] == "train/num_tokens"
    sections = sent["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [s["name"] for s in written["sections"]]
    names = ["loss", "penalty", "pairs", "systems", "evaluation"]
    assert [s["name"] for s in sections] == names
    for ours, theirs in zip(written["sections"], sections, strict=True):
        assert ours["panels"] == [plain(panel) for panel in theirs["panels"]]
    shown = {m for s in written["sections"] for p in s["panels"] for m in p["metrics"]}
    assert shown == keys(*SECTIONS)


def plain(panel: dict[str, Any]) -> dict[str, Any]:
    """A panel of the JSON that wandb is sent, as our file has it."""
    kinds = {"Run History Line Plot": "lines", "Bar Chart": "bars", "Scatter Plot": "points"}
    config, kind = panel["config"], kinds[panel["viewType"]]
    metrics = config.get("metrics")
    if kind == "points":
        metrics = [config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis")]
    return {"title": config["chartTitle"], "kind": kind, "metrics": metrics}


def test_refusals_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb_workspaces.workspaces as ws

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(PostshareError, match=r"no --entity.*--json FILE"):
        dashboard.dashboard(None, "p", None)
    with pytest.raises(PostshareError, match="no wandb account"):
        dashboard.dashboard("me", "p", None)
    with pytest.raises(PostshareError, match="drop --entity"):
        dashboard.dashboard("me", None, tmp_path / "panels.json")
    with pytest.raises(PostshareError, match="cannot be written"):
        dashboard.dashboard(None, None, tmp_path / "nowhere" / "panels.json")

    def refuse(self: Any) -> None:
        raise ValueError("permission\ndenied")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(ws.Workspace, "save", refuse)
    with pytest.raises(PostshareError, match=re.escape("me/p (permission denied)")):
        dashboard.dashboard("me", "p", None)
