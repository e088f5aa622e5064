"""What `postshare evaluate RUN` leaves for the report, and what the report makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support import small_models
from tests.support.report_run import make_run, write
from train.cli import main
from train.common.run_files import SCORES_FILE, SEARCH_FILE
from train.evaluation.figures import DecodeRatio
from train.evaluation.run_scores import add_scores, measured_decode
from train.evaluation.score import Score
from train.report.page import write_report

FACTS = {"device": "a CPU", "dtype": "float32", "torch": "2"}


def speed(decode: list[float], cache: float) -> list[Score]:
    stated = {"device": "a CPU", "dtype": "float32", "prompt": 256, "rounds": 3}
    rounds = {
        "prefill tokens/s": [25000.0, 25000.0, 25000.0],
        "first token, ms": [51.2, 51.2, 51.2],
        "decode tokens/s": decode,
    }
    sizes = {"cache bytes/token": cache, "resident bytes": 2e9}
    return [Score.of_rounds("speed", n, v, stated) for n, v in rounds.items()] + [
        Score("speed", n, "size", v, stated=stated) for n, v in sizes.items()
    ]


def answers(right: int) -> list[Score]:
    sums = [1.0] * right + [0.0] * (4 - right)
    return [Score.of_items("sst2", "acc", "mean", sums, [1.0] * 4, "same", {})]


def finished(folder: Path) -> Path:
    run = make_run(folder)
    files = {"model.safetensors": {"sha256": "one", "bytes": 1}}
    write(run / "export" / "compact" / "manifest.json", {"version": 1, "files": files})
    return run


def words(page: str) -> str:
    """The text of a page, one space between words."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_a_later_call_replaces_its_tasks_and_the_report_shows_all(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert (
        f"decode time against stock not measured postshare evaluate {run} --tasks speed"
        in words(write_report([run]).read_text())
    )
    add_scores(run, {"base": answers(1), "post": answers(1)}, FACTS)
    add_scores(
        run,
        {"base": speed([100, 200, 400], 8192.0), "post": speed([110, 180, 600], 6144.0)},
        FACTS,
    )
    add_scores(run, {"base": answers(2), "post": answers(3)}, FACTS)
    assert set(json.loads((run / SCORES_FILE).read_text())["tasks"]) == {"sst2", "speed"}
    page = words(write_report([run]).read_text())
    # Medians; the change is the median of 1.1, 0.9 and 1.5: of the same rounds.
    assert "decode time against stock -9.1% quartiles -23.1% to +0.0%; float32, batch 1" in page
    assert "9.1% less time to decode; " in page
    assert "task base post last vs first 95 %" in page
    assert "speed: decode tokens/s 200 180 +10.0% +0.0% to +30.0%" in page
    assert "sst2: acc 0.5 0.75 +0.2500 -0.2400 to +0.7400" in page  # sd of (0, 0, 1, 0) is 0.5


def test_numbers_of_another_export_are_left_out_and_said(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    add_scores(run, {"base": answers(1), "post": answers(4)}, FACTS)
    files = {"model.safetensors": {"sha256": "another", "bytes": 1}}
    write(run / "export" / "compact" / "manifest.json", {"version": 1, "files": files})
    page = words(write_report([run]).read_text())
    assert f"{SCORES_FILE} is of another export, and is left out" in page
    assert "sst2" not in page
    add_scores(run, {"base": speed([1.0], 8.0), "post": speed([1.0], 8.0)}, FACTS)
    assert set(json.loads((run / SCORES_FILE).read_text())["tasks"]) == {"speed"}


def test_the_time_of_decoding_is_the_exports_else_the_searchs(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert measured_decode(run) is None
    others = [
        {"over_dense": 1.4, "chosen": False},
        {"over_dense": 0.9, "spread": 0.05, "chosen": True},
    ]
    write(run / SEARCH_FILE, {"decoding": others, "decoding_noisy": True})
    assert measured_decode(run) is None
    write(run / SEARCH_FILE, {"decoding": others, "decoding_noisy": False})
    untrained = DecodeRatio(0.9, "float32, batch 1, untrained", (0.9 - 0.05, 0.9 + 0.05))
    assert measured_decode(run) == untrained
    one, other = speed([100, 200, 400], 8192.0), speed([125, 250, 500], 6144.0)
    add_scores(run, {"base": one, "direct": one, "post": other}, FACTS)
    found = measured_decode(run)
    assert found is not None
    assert (pytest.approx(found.ratio), found.how) == (0.8, "float32, batch 1")
    files = {"model.safetensors": {"sha256": "another", "bytes": 1}}
    write(run / "export" / "compact" / "manifest.json", {"version": 1, "files": files})
    assert measured_decode(run) == untrained


def evaluate(*arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *arguments])
    assert caught.value.code == 0


def test_evaluate_of_a_run_alone_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_models.run(tmp_path)
    options = ["--text", str(tmp_path / "text.txt"), "--context", "64"]
    options += ["--cache", str(tmp_path / "cache")]
    evaluate(str(run), str(run / "export" / "dense"), *options)
    assert not (run / SCORES_FILE).exists()
    evaluate(str(run), *options)
    assert f"{run / SCORES_FILE}" in capsys.readouterr().out
    (task,) = (t for t in json.loads((run / SCORES_FILE).read_text())["tasks"] if t != "model")
    assert task == "perplexity"


@pytest.mark.more  # seven models, each timed in a process of its own
def test_the_speed_of_a_run_has_a_row_for_each_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_models.run(tmp_path)
    options = ["--context", "64", "--cache", str(tmp_path / "cache")]
    evaluate(str(run), "--tasks", "speed", "--dtype", "float32", *options)
    said = capsys.readouterr().out
    entry = json.loads((run / SCORES_FILE).read_text())["tasks"]["speed"]
    assert [model["name"] for model in entry["models"]] == ["base", "continued", "direct", "post"]
    rows = {row["format"]: row for row in entry["formats"]}
    assert list(rows) == ["stock", "compact", "dense"]
    for kind in ("compact", "dense"):
        weights = (run / "export" / kind).glob("*.safetensors")
        assert rows[kind]["disk"] == sum(file.stat().st_size for file in weights)
        assert rows[kind]["decode"]["ratio"] > 0
    table = said[said.index("format") :].splitlines()
    assert max(map(len, table[:6])) <= 80
    assert "dense loads in transformers, vLLM, TGI, SGLang; llama.cpp after postshare gguf" in table
    assert "vLLM, TGI, SGLang" in words(write_report([run]).read_text())
