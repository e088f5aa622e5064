from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console

import train.tracking as tracking
from sa_models.errors import PostshareError
from train.loop import TrainingStopped, train
from train.recipe import Recipe
from train.tracking import Tracker, check_wandb, clock, read_rows, truncate_rows


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("API_KEY", "MODE", "DISABLED", "PROJECT", "RUN_ID", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def recipe(folder: Path, mode: str = "disabled", **fields: Any) -> Recipe:
    made = tiny.recipe(folder, steps=4)
    wandb = made.wandb.model_copy(update={"mode": mode, **fields})
    return made.model_copy(update={"wandb": wandb})


def row(step: int, **fields: Any) -> dict[str, Any]:
    values = {
        "step": step,
        "tokens": 100 * step,
        "lm_loss": 2.0,
        "penalty": 0.5,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.1,
        "tokens_per_second": 1234.0,
        "memory_bytes": 2**30,
    }
    return {**values, **fields}


# --- metrics.jsonl --------------------------------------------------------------------------------


def test_rows_are_appended_and_truncated(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    with Tracker("post", asked, tmp_path, 4) as tracker:
        for step in (1, 2, 3):
            tracker.log(row(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lm_lo')
    with Tracker("post", asked, tmp_path, 4, resumed_step=2) as tracker:
        tracker.log(row(3, lm_loss=1.0))
    assert [(r["step"], r["lm_loss"]) for r in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 2.0),
        (2, 2.0),
        (3, 1.0),
    ]


def test_a_damaged_file_is_not_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(PostshareError, match=r"line 2 is not JSON"):
        truncate_rows(path, 1)
    assert len(path.read_text().splitlines()) == 3


def test_only_the_main_process_tracks(tmp_path: Path) -> None:
    with Tracker("post", recipe(tmp_path), tmp_path / "run", 4, main=False) as tracker:
        tracker.log(row(1))
        tracker.say("nothing")
        assert tracker.wandb_run_id is None
    assert not (tmp_path / "run").exists()


def test_what_a_row_holds(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    train(tiny.job(asked), asked)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert set(rows[0]) == {
        "step", "tokens", "lm_loss", "penalty", "total_loss", "gradient_norm", "learning_rate",
        "pair_distance_mean", "pair_distance_worst", "pair_cosine_mean", "pair_cosine_worst",
        "pairs_merged", "penalty_bytes",
        "seconds", "step_seconds", "tokens_per_second", "data_wait_seconds", "memory_bytes",
    }  # fmt: skip
    assert [r["tokens"] for r in rows] == [120, 240, 360, 480]
    assert 2**20 < rows[0]["memory_bytes"] < 2**40
    assert rows[0]["data_wait_seconds"] <= rows[0]["step_seconds"]
    rate = rows[1]["tokens_per_second"] * rows[1]["step_seconds"]
    assert rate == pytest.approx(120)


# --- the line -------------------------------------------------------------------------------------


def test_without_a_terminal_a_line_every_few_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker("post", recipe(tmp_path), tmp_path, 100) as tracker:
        for step in range(1, 101):
            tracker.log(row(step))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith(
        "post 1/100 loss 2.0000  penalty 0.5  1,234 tokens/s  data 20%  1.00 GiB ETA "
    )
    assert lines[-1].endswith("ETA 0:00")


def test_on_a_terminal_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(tracking, "Console", lambda **options: console)
    with Tracker("post", recipe(tmp_path), tmp_path, 10) as tracker:
        tracker.log(row(7))
        tracker.say("saved [bold]")
    text = screen.getvalue()
    assert "7/10 loss 2.0000" in text
    assert "saved [bold]" in text


def test_clock() -> None:
    assert (clock(7), clock(187.4), clock(7387)) == ("0:07", "3:07", "2:03:07")


# --- wandb ----------------------------------------------------------------------------------------


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
        self.metrics: list[Any] = []
        self.exit_code: int | None = None
        self.alerts: list[dict[str, str]] = []

    def alert(self, **options: str) -> None:
        self.alerts.append(options)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    import wandb

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
    assert (options["id"], options["mode"], options["name"]) == ("abcd1234", "offline", "tiny-post")
    assert (options["group"], options["tags"]) == ("tiny", ("a", "b"))
    assert options["config"]["train"]["batch_size"] == 8
    assert fake.metrics == [("tokens", None), ("*", "tokens")]
    assert fake.logged[0]["lm_loss"] == 2.0
    assert sum(fake.logged[0]["pair_distances"].histogram) == 2
    assert fake.exit_code == 0


def test_a_wandb_failure_never_stops_training(
    tmp_path: Path,
    fake: FakeRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(values: dict[str, Any]) -> None:
        raise ConnectionError("the network\nis gone")

    monkeypatch.setattr(fake, "log", fail)
    asked = recipe(tmp_path, "offline")
    train(tiny.job(asked), asked)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["warning: wandb failed and is off from here on (the network is gone)"]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_nan_is_an_alert(tmp_path: Path, fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.objective as objective

    losses = objective.token_losses
    monkeypatch.setattr(objective, "token_losses", lambda *given: losses(*given) * float("nan"))
    asked = recipe(tmp_path, "offline")
    with pytest.raises(PostshareError, match="lm loss is nan"):
        train(tiny.job(asked), asked)
    (alert,) = fake.alerts
    assert (alert["title"], alert["level"]) == ("tiny-post: failed", "ERROR")
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
    import train.objective as objective

    monkeypatch.setattr(fake, call, lambda *arguments, **options: threading.Event().wait(60))
    monkeypatch.setattr(tracking, "CALL_SECONDS", 0.3)
    monkeypatch.setattr(tracking, "CLOSING_SECONDS", 0.3)
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
    import train.loop as loop

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
    assert (alert["title"], alert["level"]) == ("tiny-post: stopped", "WARN")
    assert "stopped after step 1 of 4" in alert["text"]
    first = fake.options["id"]  # type: ignore[attr-defined]
    assert (
        json.loads((stopped.value.checkpoint / "state.json").read_text())["wandb_run_id"] == first
    )
    train(tiny.job(asked), asked)
    assert fake.options["id"] == first  # type: ignore[attr-defined]


class Api(http.server.BaseHTTPRequestHandler):
    """As much of wandb's server as a run needs to start."""

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers["Content-Length"])).decode(errors="replace")
        project = {"name": "postshare", "entity": {"name": "someone"}}
        run = {
            "id": "1", "name": "abcd1234", "displayName": "x", "project": project,
            "historyLineCount": 0, "sweepName": None, "description": "", "config": None,
        }  # fmt: skip
        answer: dict[str, Any] = {"serverInfo": {}, "viewer": {"id": "1", "entity": "someone"}}
        if "upsertBucket" in query:
            answer = {"upsertBucket": {"bucket": run, "inserted": True}}
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.mark.parametrize("network", ["never there", "gone in mid-run"])
def test_online_without_the_network_training_goes_on(network: str, tmp_path: Path) -> None:
    """The real wandb, in a process of its own; its server is here, and goes away."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import time
from pathlib import Path
import tiny
from train import loop, tracking
from train.loop import train
tracking.CALL_SECONDS, tracking.CLOSING_SECONDS = 30, 5
started, seed = Path({str(tmp_path / "started")!r}), loop.seed_step
def wait(base, step, rank):
    if step == 2:
        started.touch()
        while started.exists(): time.sleep(0.01)
    seed(base, step, rank)
loop.seed_step = wait
asked = tiny.recipe(Path({str(tmp_path / "run")!r}), steps=4)
asked = asked.model_copy(update={{"wandb": asked.wandb.model_copy(update={{"mode": "online"}})}})
train(tiny.job(asked), asked)
"""
    if network == "never there":
        server.shutdown()
        server.server_close()
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={
            **os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40,
            "WANDB_INIT_TIMEOUT": "10",
        },
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() - began < 90
        time.sleep(0.05)
    if network == "gone in mid-run":
        server.shutdown()
        server.server_close()
    (tmp_path / "started").unlink()
    gone = time.monotonic()
    _, said = child.communicate(timeout=90)
    assert child.returncode == 0, said
    assert time.monotonic() - gone < 60
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 4
    warnings = [line for line in said.splitlines() if "warning: wandb failed" in line]
    assert len(warnings) == 1, said
    if network == "gone in mid-run":
        assert "later: wandb sync" in warnings[0], said


def test_a_real_offline_run(tmp_path: Path) -> None:
    """In a process of its own, as wandb starts a service."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import tiny
from train.loop import train
asked = tiny.recipe(Path({str(tmp_path / "run")!r}), steps=2)
asked = asked.model_copy(update={{"wandb": asked.wandb.model_copy(update={{"mode": "offline"}})}})
train(tiny.job(asked), asked)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "warning: wandb failed" not in done.stderr
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
