"""wandb: what it is told, who writes, and that its failures stop no training."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from transformers import LlamaConfig

import train.tracking.wandb_run as wandb_run
from sa_models.basis import SharedBasis
from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from tests.support import tiny
from tests.support.tiny import row
from train.recipe.recipe import Recipe, validate
from train.tracking.metrics_log import Tracker, read_rows
from train.tracking.wandb_evaluation import log_outcome
from train.tracking.wandb_run import WandbRun, check_wandb, plan_group
from train.training.loop import TrainingStopped, train


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("API_KEY", "MODE", "DISABLED", "PROJECT", "RUN_ID", "IDENTITY_TOKEN_FILE", "SWEEP_ID")
    for name in names:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def recipe(folder: Path, mode: str = "disabled", **fields: Any) -> Recipe:
    made = tiny.recipe(folder, steps=4)
    wandb = made.wandb.model_copy(update={"mode": mode, **fields})
    return made.model_copy(update={"wandb": wandb})


def test_online_without_an_account_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tmp_path / "run", "online")
    with pytest.raises(PostshareError, match=r"no account.*wandb.mode=offline"):
        train(tiny.job(asked), asked)
    assert not (tmp_path / "run").exists()
    check_wandb(recipe(tmp_path, "offline").wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(asked.wandb)


def test_an_account_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = recipe(tmp_path, "online").wandb
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    with pytest.raises(PostshareError):
        check_wandb(section)
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    check_wandb(section)
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_wandb(section)


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.steps: list[int | None] = []
        self.metrics: list[Any] = []
        self.used: list[Any] = []
        self.uploaded: list[Any] = []
        self.summary: dict[str, float] = {}
        self.exit_code: int | None = None
        self.alerts: list[dict[str, str]] = []

    def alert(self, **options: str) -> None:
        self.alerts.append(options)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append(values)
        self.steps.append(step)

    def use_artifact(self, artifact: Any) -> None:
        self.used.append(artifact)

    def log_artifact(self, artifact: Any) -> None:
        self.uploaded.append(artifact)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    run = FakeRun()

    def init(**options: Any) -> FakeRun:
        run.options = options  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr(wandb, "init", init)
    return run


def test_what_wandb_is_told(tmp_path: Path, fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    asked = recipe(tmp_path, "offline", tags=("a", "b"))
    with Tracker("post", asked, tmp_path, 4, wandb_run_id="abcd1234") as tracker:
        tracker.log(row(1), torch.tensor([1.0, float("nan"), 3.0]))
        assert tracker.wandb_run_id == "abcd1234"
    options = fake.options  # type: ignore[attr-defined]
    assert "project" not in options  # the variable decides
    assert (options["id"], options["mode"], options["name"]) == (
        "abcd1234",
        "offline",
        "tiny-post-train",
    )
    assert (options["group"], options["tags"]) == ("tiny", ("a", "b"))
    assert options["config"]["train"]["batch_size"] == 8
    assert fake.metrics == [("train/num_tokens", None), ("*", "train/num_tokens")]
    assert fake.logged[0]["train/loss"] == 2.0
    assert fake.logged[0]["train/num_tokens"] == row(1)["tokens"]
    assert not {key for key in fake.logged[0] if "/" not in key}
    assert fake.steps == [1]
    assert (options["job_type"], options["resume"]) == ("post-train", "allow")
    assert sum(fake.logged[0]["postshare/pair_distances"].histogram) == 2
    assert fake.exit_code == 0


def test_a_wandb_failure_never_stops_training(
    tmp_path: Path,
    fake: FakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(values: dict[str, Any], step: int) -> None:
        raise ConnectionError("the network\nis gone")

    monkeypatch.setattr(fake, "log", fail)
    asked = recipe(tmp_path, "offline")
    train(tiny.job(asked), asked)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["warning: wandb failed and is off from here on (the network is gone)"]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_nan_is_an_alert(tmp_path: Path, fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.training.objective as objective

    losses = objective.token_losses
    monkeypatch.setattr(objective, "token_losses", lambda *given: losses(*given) * float("nan"))
    asked = recipe(tmp_path, "offline")
    with pytest.raises(PostshareError, match="lm loss is nan"):
        train(tiny.job(asked), asked)
    (alert,) = fake.alerts
    assert (alert["title"], alert["level"]) == ("tiny-post-train: failed", "ERROR")
    assert "step 1: the lm loss is nan" in alert["text"]
    assert fake.exit_code == 1


@pytest.mark.parametrize("call", ["log", "finish", "alert"])
def test_a_wandb_that_never_answers_holds_nothing_up(
    call: str,
    tmp_path: Path,
    fake: FakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import train.training.objective as objective

    monkeypatch.setattr(fake, call, lambda *arguments, **options: threading.Event().wait(60))
    monkeypatch.setattr(wandb_run, "CALL_SECONDS", 0.3)
    monkeypatch.setattr(wandb_run, "CLOSING_SECONDS", 0.3)
    asked = recipe(tmp_path, "offline")
    began = time.monotonic()
    if call == "alert":
        losses = objective.token_losses
        monkeypatch.setattr(objective, "token_losses", lambda *given: losses(*given) * float("nan"))
        with pytest.raises(PostshareError, match="lm loss is nan"):
            train(tiny.job(asked), asked)
    else:
        train(tiny.job(asked), asked)
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err.count("warning: wandb failed and is off from here on") == 1


def test_the_run_id_lives_in_the_checkpoint(
    tmp_path: Path, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.training.loop as loop

    class Stopped:
        received = True

        def __enter__(self) -> Stopped:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

    asked = recipe(tmp_path, "offline")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopSignal", Stopped)
        with pytest.raises(TrainingStopped) as stopped:
            train(tiny.job(asked), asked)
    (alert,) = fake.alerts
    assert (alert["title"], alert["level"]) == ("tiny-post-train: stopped", "WARN")
    assert "stopped after step 1 of 4" in alert["text"]
    first = fake.options["id"]  # type: ignore[attr-defined]
    assert (
        json.loads((stopped.value.checkpoint / "state.json").read_text())["wandb_run_id"] == first
    )
    train(tiny.job(asked), asked)
    assert fake.options["id"] == first  # type: ignore[attr-defined]


# --- names, ids, writers --------------------------------------------------------------------------


def test_a_group_says_which_plan(tmp_path: Path) -> None:
    config = tiny.model().config  # 2 layers of 4 heads
    grouped = LlamaConfig(**{**config.to_dict(), "num_key_value_heads": 2})
    removed = SharingPlan(removed=((0, 1),))
    plans = {
        "tied-2of8": (tiny.PLAN, config),
        "removed-2of8": (removed, grouped),  # a unit is a KV head and its two query heads
        "spans-1of2-kv-2": (SharingPlan(kv_heads=2, spans=(AttentionSpan(0, (1,), "kv"),)), config),
        "basis-2": (SharingPlan(basis=SharedBasis(2, (3,), (2,), (2,))), config),
    }
    for said, (plan, shape) in plans.items():
        assert plan_group("demo", plan, shape) == f"demo/{said}-{plan.hash()[:6]}"
    assert plan_group("demo", SharingPlan(), config) == "demo"


def test_one_id_of_the_environment_is_one_run(
    tmp_path: Path, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    asked = recipe(tmp_path, "offline")
    jobs = ("post", "continued", "heal", "evaluate")
    ids = {job: WandbRun(job, asked, tmp_path, "g").run_id for job in jobs}
    assert ids == {j: "abc" if j == "post" else f"abc-{j}" for j in jobs}
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    runs = {job: WandbRun(job, asked, tmp_path, "g") for job in jobs}
    assert {j for j, run in runs.items() if run.alive} == {"post", "evaluate"}
    assert runs["post"].run_id == runs["evaluate"].run_id == "abc"
    options = fake.options  # type: ignore[attr-defined]
    assert (options["id"], "project" in options) == (None, False)  # the agent has set both


@pytest.mark.parametrize(("main", "node"), [(True, 0), (False, 3)])
def test_a_writer_on_each_node(
    main: bool, node: int, tmp_path: Path, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of wandb where several nodes write to one run: shared mode needs a server."""
    import accelerate.utils

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("GROUP_RANK", str(node))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    of_main = ("cafe0000", True)  # what the main process has decided
    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda mine: [of_main])
    with Tracker("post", recipe(tmp_path, "online"), tmp_path, 4, main=main) as tracker:
        tracker.log(row(1))
    options = fake.options  # type: ignore[attr-defined]
    assert (options["id"], options["mode"], "resume" in options) == ("cafe0000", "shared", False)
    label = {"x_label": f"node-{node}", "x_primary": main}
    quiet = {"x_update_finish_state": False, "console": "off"}
    assert options["settings"] == (label if main else label | quiet)
    wandb.Settings(**options["settings"])  # wandb knows them
    assert [r["train/global_step"] for r in fake.logged] == ([1] if main else [])
    assert fake.steps == ([None] if main else [])  # shared mode takes none
    assert (tmp_path / "metrics.jsonl").exists() == main
    assert fake.exit_code == 0


def test_only_the_first_process_of_a_node_writes(
    tmp_path: Path, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.utils

    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    for local, online in (("1", True), ("0", False)):
        monkeypatch.setenv("LOCAL_RANK", local)
        answer = ("cafe0000", online)
        monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda mine, a=answer: [a])
        with Tracker("post", recipe(tmp_path, "offline"), tmp_path, 4, main=False) as tracker:
            tracker.log(row(1))
    assert not hasattr(fake, "options")


# --- the outcome ----------------------------------------------------------------------------------


def test_nothing_is_uploaded_unless_asked(
    tmp_path: Path, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    data = tmp_path / "text.jsonl"
    data.write_text("{}\n")
    tiny.PLAN.save(tmp_path / "plan.json")
    export = tmp_path / "export"
    export.mkdir()
    (export / "weights").write_text("x")
    summary = {"perplexity": {"post": 2.5, "continued": None}, "structure": {"spans": []}}
    for mode, upload, used, logged in (
        ("online", False, 0, 0),
        ("offline", True, 0, 1),  # offline wandb refuses inputs
        ("online", True, 3, 1),
    ):
        fake.used, fake.uploaded, fake.summary = [], [], {}
        asked = recipe(tmp_path, mode, upload=upload)
        source = asked.data.train[0].model_copy(update={"path": str(data)})
        section = asked.data.model_copy(update={"train": (source,)})
        asked = asked.model_copy(update={"data": section})
        log_outcome(
            asked, "tiny/g", tiny.PLAN, summary, {"compact": export, "dense": tmp_path / "no"}
        )
        assert fake.summary == {"postshare/perplexity/post": 2.5}
        assert (len(fake.used), len(fake.uploaded)) == (used, logged)
    base, text, plan = fake.used
    assert [a.type for a in fake.used] == ["model", "dataset", "plan"]
    assert [e.ref for e in base.manifest.entries.values()] == ["https://huggingface.co/tiny"]
    assert [e.ref for e in text.manifest.entries.values()] == [data.as_uri()]
    assert plan.metadata == {"sha256": tiny.PLAN.hash()}
    fake.summary = {}
    log_outcome(asked, "tiny/g", tiny.PLAN, summary, {"compact": export})
    assert fake.summary == {}  # it has been told
    first = fake.options["id"]  # type: ignore[attr-defined]
    log_outcome(asked, "tiny/g", tiny.PLAN, {"perplexity": {"post": 2.0}}, {"compact": export})
    assert (fake.summary, fake.options["id"]) == ({"postshare/perplexity/post": 2.0}, first)  # type: ignore[attr-defined]
    (tmp_path / "wandb.json").write_text("{")
    log_outcome(asked, "tiny/g", tiny.PLAN, summary, {"compact": export})
    assert fake.options["id"] != first  # type: ignore[attr-defined]


def test_an_upload_to_nowhere_is_refused(tmp_path: Path) -> None:
    value = tiny.recipe(tmp_path).model_dump(mode="json")
    with pytest.raises(PostshareError, match=r"wandb\.upload.*set wandb\.mode=online"):
        validate({**value, "wandb": {"upload": True}})
