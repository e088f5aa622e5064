"""A run in wandb: who writes it, what it is called, and that its failures stop no training."""

from __future__ import annotations

import netrc
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlparse

import torch

from sa_models.errors import PostshareError
from train.common.progress import note
from train.common.signals import TrainingStopped
from train.distributed.launch_env import Place
from train.tracking.dashboard_panels import X_AXIS
from train.tracking.wandb_names import wandb_name

if TYPE_CHECKING:
    from sa_models.plan import SharingPlan
    from train.recipe.recipe import Recipe
    from train.recipe.sections.wandb import WandbSection

CALL_SECONDS = 120.0
"""How long wandb may take to start (its own limit is 90 s) or to take a row."""
CLOSING_SECONDS = 60.0
"""How long it may take to send what is left, when the training has ended."""

JOB_TYPES = {"post": "post-train"}
"""What wandb calls a training; the others (continued, heal, pretrain) by their names."""
EVALUATE = "evaluate"
"""The job type of the run that holds the evaluation and the exports."""
IN_SWEEPS = ("post", EVALUATE)
"""What a sweep sees: all runs of a process that its agent starts have one and the same id."""


def wandb_mode(section: WandbSection) -> str:
    """`recipe.wandb.mode`, unless the environment asks for less or more (`WANDB_MODE`).

    A recipe that disables wandb is not overruled by a variable that happens to be set.
    """
    if section.mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    return os.environ.get("WANDB_MODE") or section.mode


def has_account() -> bool:
    """Whether somebody is logged in to the server that `WANDB_BASE_URL` names."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_wandb(section: WandbSection) -> None:
    """Raises PostshareError when runs should go online and nobody is logged in."""
    if wandb_mode(section) == "online" and not has_account():
        raise PostshareError(
            "wandb.mode is online and no account is set up; run `wandb login`, "
            "or train with wandb.mode=offline (or disabled)"
        )


def plan_group(name: str, plan: SharingPlan, config: Any) -> str:
    """The group of a recipe's runs with a plan: `demo/removed-19of64-3fa2c1`.

    Args:
        name: of the recipe.
        config: of the base model. Numbers are of its heads, or of its layers for spans.
    """
    savings = plan.savings(config)
    parts = [
        f"{what}-{count}of{savings.heads}"
        for what, count in (("tied", savings.tied_heads), ("removed", savings.removed_heads))
        if count
    ]
    if plan.spans:
        followers = sum(len(span.followers) for span in plan.spans)
        parts.append(f"spans-{followers}of{plan.layout(config).layers}")
    if plan.kv_heads is not None:
        parts.append(f"kv-{plan.kv_heads}")
    if plan.basis is not None:
        parts.append(f"basis-{plan.basis.layers}")
    return f"{name}/{'-'.join([*parts, plan.hash()[:6]])}" if parts else name


def agree_on_run(
    job: str, recipe: Recipe, run_id: str | None, place: Place
) -> tuple[str | None, bool]:
    """The run's id, if it has one, and whether a process of each node writes to it.

    They do where there are several nodes and the main process is online; this is a collective then.
    """
    if recipe.wandb.mode == "disabled" or place.nodes == 1:
        return run_id, False
    from accelerate.utils import broadcast_object_list

    mine = (run_id or new_id(job), wandb_mode(recipe.wandb) == "online")
    return cast("tuple[str, bool]", broadcast_object_list([mine])[0])


def new_id(job: str) -> str:
    """`WANDB_RUN_ID` is one id; only one of the jobs of a recipe can have it as it is."""
    given = os.environ.get("WANDB_RUN_ID")
    if given is None:
        return os.urandom(4).hex()
    return given if job == "post" or in_sweep() else f"{given}-{job}"


def in_sweep() -> bool:
    """Whether a sweep's agent has started this process."""
    return "WANDB_SWEEP_ID" in os.environ


class WandbRun:
    """A wandb run that can fail without the training noticing: one warning, then silence.

    `WANDB_*` variables win over the recipe (project, group, tags, name, folder). Offline runs
    cannot be resumed in place: a resumed training writes a new offline segment with the same id,
    and `wandb sync` appends one to the other.

    Args:
        job: post, continued, heal, pretrain or evaluate.
        group: see :func:`plan_group`; `wandb.group` of the recipe is taken instead.
        run_id: of an earlier segment.
        node: in a run that several nodes write to, which one this process speaks for.
        main: whether this process logs rows; one that does not sends its node's system metrics.
    """

    def __init__(
        self,
        job: str,
        recipe: Recipe,
        folder: Path,
        group: str,
        run_id: str | None = None,
        node: int | None = None,
        main: bool = True,
    ) -> None:
        self.run_id = run_id
        self.job, self.recipe, self.folder, self.group = job, recipe, folder, group
        self.node, self.main = node, main
        self.name = f"{group}-{JOB_TYPES.get(job, job)}"
        self.mode = wandb_mode(recipe.wandb) if main else "online"
        self._run: Any = None
        self._off = False
        if self.mode != "disabled" and (not in_sweep() or job in IN_SWEEPS):
            self.guard(self._start)

    def _start(self) -> None:
        import wandb

        self.run_id = self.run_id or new_id(self.job)
        section = self.recipe.wandb
        folder = self.folder if self.main else self.folder / "wandb" / f"node-{self.node}"
        folder.mkdir(parents=True, exist_ok=True)
        asked: Mapping[str, Any] = {
            "project": section.project,
            "run_group": section.group or self.group,
            "tags": section.tags,
            "name": self.name,
            "dir": str(folder),
        }
        # An argument beats the environment in wandb: pass only what the environment leaves open.
        options = {key: v for key, v in asked.items() if f"WANDB_{key.upper()}" not in os.environ}
        if "run_group" in options:
            options["group"] = options.pop("run_group")
        if in_sweep():  # it decides, and warns of what it is told
            options.pop("project", None)
        run = wandb.init(
            id=None if in_sweep() else self.run_id,
            job_type=JOB_TYPES.get(self.job, self.job),
            config=self.recipe.model_dump() if self.main else None,
            **options,
            **self._writing(),
        )
        if self.main:
            run.define_metric(X_AXIS)
            run.define_metric("*", step_metric=X_AXIS)
        if not self._off:  # it answered in time
            self._run = run

    def _writing(self) -> dict[str, Any]:
        """How this process writes: alone, or (`shared`) with one of each other node."""
        if self.node is None:
            # Offline it is for `wandb sync`: without it a segment replaces the rows of the others.
            return {"mode": self.mode, "resume": "allow"}
        label = {"x_label": f"node-{self.node}", "x_primary": self.main}
        if not self.main:
            label |= {"x_update_finish_state": False, "console": "off"}
        return {"mode": "shared", "settings": label}

    def log(self, row: dict[str, Any], distances: torch.Tensor | None) -> None:
        if self._run is not None:
            self.guard(lambda: self._log(row, distances))

    def _log(self, row: dict[str, Any], distances: torch.Tensor | None) -> None:
        import wandb

        values = {wandb_name(key): value for key, value in row.items() if value is not None}
        if distances is not None:
            values[wandb_name("pair_distances")] = wandb.Histogram(
                distances[~distances.isnan()].tolist()
            )
        # wandb's own step is ours: what a resumed training repeats, an online run has already and
        # drops. With several writers the server counts, and takes none.
        self._run.log(values, **({"step": row["step"]} if self.node is None else {}))

    def act(self, call: Callable[[Any], None], seconds: float) -> None:
        """Do something with wandb's run itself, if there is one."""
        if self._run is not None:
            self.guard(lambda: call(self._run), seconds)

    @property
    def alive(self) -> bool:
        """Whether it has started and not failed since."""
        return self._run is not None

    def alert(self, error: Exception) -> None:
        """Tell the run's owner (mail or Slack, as the account says) why the training ends."""
        stopped = isinstance(error, TrainingStopped)
        title = f"{self.name}: {'stopped' if stopped else 'failed'}"
        text, level = str(error)[:1000], "WARN" if stopped else "ERROR"
        if self._run is not None:
            self.guard(lambda: self._run.alert(title=title, text=text, level=level))

    def close(self, failed: bool, seconds: float | None = None) -> None:
        if self._run is not None:
            self.guard(
                lambda: self._run.finish(exit_code=int(failed)),
                CLOSING_SECONDS if seconds is None else seconds,
            )

    def guard(self, call: Callable[[], None], seconds: float | None = None) -> None:
        """Call it. Whatever wandb raises, and if it never comes back, training goes on."""
        failed: list[Exception] = []

        def guarded() -> None:
            try:
                call()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=guarded, name="wandb", daemon=True)
        thread.start()
        seconds = CALL_SECONDS if seconds is None else seconds
        thread.join(seconds)
        if not failed and not thread.is_alive():
            return
        folder = getattr(self._run, "dir", None)
        self._run, self._off = None, True
        reason = " ".join(str(failed[0]).split())[:200] if failed else f"silent for {seconds:.0f} s"
        later = f"; later: wandb sync {Path(folder).parent}" if folder else ""
        note(f"warning: wandb failed and is off from here on ({reason}){later}")
