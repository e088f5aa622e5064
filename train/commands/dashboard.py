"""A wandb workspace (`postshare dashboard`): panels of :mod:`~train.tracking.dashboard_panels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sa_models.atomic_files import write_json
from sa_models.errors import PostshareError
from train.recipe.sections.wandb import WandbSection
from train.tracking.dashboard_panels import SECTIONS, X_AXIS, Panel
from train.tracking.wandb_run import has_account

TITLE = "postshare"
PROJECT = str(WandbSection.model_fields["project"].default)
COLUMNS = ("run:displayName", "run:group", "run:jobType", "summary:postshare/perplexity/post")
"""Of the list of runs."""


def dashboard(entity: str | None, project: str | None, file: Path | None) -> str:
    """Save the workspace, or with `file` write its panels as JSON; the line to print.

    Raises:
        PostshareError: there is no entity or no account, wandb refuses, or the file cannot be
            written; entity or project beside a file.
    """
    if file is not None:
        if entity or project:
            raise PostshareError(
                "--json writes the same panels for every project; drop --entity and --project"
            )
        try:
            write_json(file, spec())
        except OSError as error:
            raise PostshareError(
                f"{file} cannot be written ({error.strerror}); give --json another file"
            ) from None
        return f"panels    {file}"
    if entity is None:
        raise PostshareError("no --entity (a user or a team of wandb); give it, or --json FILE")
    if not has_account():
        raise PostshareError(
            "no wandb account is set up; run `wandb login`, or write the panels with --json FILE"
        )
    return f"dashboard {save(entity, project or PROJECT)}"


def spec() -> dict[str, Any]:
    """What the workspace shows, JSON-ready."""
    return {
        "name": TITLE,
        "x_axis": X_AXIS,
        "sections": [
            {"name": name, "panels": [_plain(panel) for panel in panels]}
            for name, panels in SECTIONS.items()
        ],
    }


def _plain(panel: Panel) -> dict[str, Any]:
    return {"title": panel.title, "kind": panel.kind, "metrics": list(panel.keys)}


def workspace(entity: str, project: str) -> Any:
    """The same as wandb's own type; nothing is sent."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            ws.Section(name=name, panels=[_drawn(panel) for panel in panels], is_open=True)
            for name, panels in SECTIONS.items()
        ],
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
        runset_settings=ws.RunsetSettings(pinned_columns=list(COLUMNS)),
    )


def _drawn(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "lines":
        return wr.LinePlot(title=panel.title, x=X_AXIS, y=list(panel.keys))
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=list(panel.keys))
    across, up = (wr.SummaryMetric(key) for key in panel.keys)
    return wr.ScatterPlot(title=panel.title, x=across, y=up)


def save(entity: str, project: str) -> str:
    """Send it as a new saved view; its address.

    Raises:
        PostshareError: whatever wandb says, on one line.
    """
    made = workspace(entity, project)
    try:
        return str(made.save().url)
    except Exception as error:  # of wandb, of its transport, of the server's answer
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PostshareError(
            f"wandb did not save the dashboard of {entity}/{project} ({reason}); check the network "
            "and that the project is there (its first run makes it), or write the panels with "
            "--json FILE"
        ) from error
