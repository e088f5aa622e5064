"""The table of the exported formats, from scores and files made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.evaluation.formats import exported_models, format_cells, format_rows, format_table
from train.evaluation.models import Judged
from train.evaluation.score import Score


def speed(prefill: list[float], decode: list[float], cache: float, held: float) -> list[Score]:
    rounds = {"prefill tokens/s": prefill, "decode tokens/s": decode}
    sizes = {"cache bytes/token": cache, "resident bytes": held}
    return [Score.of_rounds("speed", name, values, {}) for name, values in rounds.items()] + [
        Score("speed", name, "size", value) for name, value in sizes.items()
    ]


def stored(folder: Path, *sizes: int, suffix: str = "safetensors") -> Path:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        (folder / f"model-{number}.{suffix}").write_bytes(bytes(size))
    (folder / "config.json").write_text("not counted")
    return folder


def test_times_are_the_inverse_of_speeds_and_what_was_not_timed_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = stored(tmp_path / "base", 1000, 500)
    compact = stored(run / "export" / "compact", 1200)
    stored(run / "export" / "gguf", 700, suffix="gguf")
    scores = {
        base: speed([100.0] * 3, [10.0] * 3, 64.0, 4000.0),
        compact: speed([125.0] * 3, [10.0, 8.0, 12.5], 48.0, 3000.0),
    }
    rows = {row["format"]: row for row in format_rows(run, scores)}
    assert list(rows) == ["stock", "compact", "gguf"]
    assert {name: row["disk"] for name, row in rows.items()} == {
        "stock": 1500, "compact": 1200, "gguf": 700,
    }  # fmt: skip
    assert rows["compact"]["prefill"]["ratio"] == pytest.approx(100 / 125)
    low, high = rows["compact"]["decode"]["quartiles"]
    assert rows["compact"]["decode"]["ratio"] == pytest.approx(1.0)
    assert 0.8 <= low < 1 < high <= 1.25
    assert rows["gguf"]["decode"] is None
    cells = format_cells(list(rows.values()))
    assert cells[1] == ("compact", "1.2 kB", "3 kB", "48 B", "0.80", "1.00")
    assert cells[2][4:] == ("not measured", "not measured")
    _, notes = format_table(list(rows.values()))
    assert [note.split()[0] for note in notes] == ["compact", "gguf"]


def test_a_compact_folder_that_lacks_its_adapter_is_no_format(tmp_path: Path) -> None:
    run, base = tmp_path / "run", stored(tmp_path / "base", 1000)
    folders = [stored(run / "export" / kind, 900) for kind in ("compact", "dense", "adapter")]
    models = [Judged("base", base, base)]
    assert [model.folder for model in exported_models(run, models)] == [folders[1]]
    rows = format_rows(run, {base: speed([1.0], [1.0], 64.0, 1.0)})
    assert [row["format"] for row in rows] == ["stock", "dense"]
