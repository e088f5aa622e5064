"""`postshare analyze MODEL --text FILE`: what a Llama's attention has in common, without training.

Measured by :mod:`train.commands.analyze.measures`; here is what the command reads, prints and
writes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers.utils import logging

from sa_models.atomic_files import write_json
from sa_models.errors import PostshareError
from sa_models.scores.significance import LEVEL
from sa_models.scores.significance_text import MIN_BLOCKS
from train.commands.analyze.measures import Analysis, analyze_model, score_section
from train.commands.analyze.model import Weights, cut_blocks, find_model, load_expanded
from train.common.console import plain_console
from train.common.files import check_writable
from train.common.run_files import RECIPE_FILE
from train.data.calibration import MAP_LENGTH
from train.evaluation.models import Judged, read_device
from train.evaluation.text import EvaluationText, find_text
from train.planning.spans import as_lists

ANALYSIS_FILE = "analysis.json"
BLOCKS = 16


@dataclass(frozen=True)
class AnalyzeOptions:
    """The command's options, see its help."""

    text: Path | None = None
    output: Path | None = None
    blocks: int | None = None
    context: int | None = None
    score: str = "qk"
    sensitivity: bool = False
    device: str | None = None


def analyze(argument: str, options: AnalyzeOptions) -> None:
    """Measure one model, print a table, write analysis.json and pictures.

    Raises:
        PostshareError: the model, the text or an option is wrong; nothing has been written then.
    """
    logging.disable_progress_bar()  # transformers' own bars would tear ours
    score_section(options.score)
    judged = find_model(argument)
    weights = Weights.open(judged.folder)
    device = read_device(options.device)
    text = _text(argument, options)
    batches = _blocks(judged, weights, text, options)
    folder = options.output or Path("analysis") / _folder_name(argument)
    check_writable(folder, "--output")
    model = load_expanded(weights, judged.folder).to(device)  # type: ignore[arg-type]
    found = analyze_model(model, weights, batches, options.score, options.sensitivity)
    facts = {
        "model": argument,
        "folder": str(judged.folder),
        "text": text.name,
        "sha256": text.sha256,
        "blocks": len(batches),
        "block_tokens": batches[0]["input_ids"].shape[1],
        "score": options.score,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ANALYSIS_FILE, as_json(found, facts))
    pictures = draw(found, options.score, folder)
    console = plain_console()
    console.print(table(found))
    for line in notes(found, facts):
        console.print(line, soft_wrap=True)
    console.print(f"analysis  {folder / ANALYSIS_FILE}", soft_wrap=True)
    names = ", ".join(path.name for path in pictures)
    console.print(f"pictures  {folder}: {names}, and .svg", soft_wrap=True)


def _text(argument: str, options: AnalyzeOptions) -> EvaluationText:
    if options.text is None and not (Path(argument).expanduser() / RECIPE_FILE).is_file():
        raise PostshareError(
            f"analyze needs a text, and {argument} is no run whose held-out text could be it; "
            "pass --text FILE (.txt or .jsonl), or --text stdlib"
        )
    return find_text(options.text, [argument])


def _blocks(
    judged: Judged, weights: Weights, text: EvaluationText, options: AnalyzeOptions
) -> list[dict[str, torch.Tensor]]:
    positions = int(weights.reader.config.max_position_embeddings)
    length = options.context or min(MAP_LENGTH, positions)
    if length > positions:
        raise PostshareError(f"--context {length}: {judged.name} has {positions} positions")
    count = options.blocks or BLOCKS
    blocks = cut_blocks(text.texts, judged.load_tokenizer(), length, count)
    if options.blocks is not None and len(blocks) < count:
        raise PostshareError(
            f"--blocks {count}: the text has {len(blocks)} of {length} tokens; lower it, or give "
            "a longer text"
        )
    return blocks


def _folder_name(argument: str) -> str:
    """`runs/demo/` is runs-demo."""
    return re.sub(r"[^\w.]+", "-", argument).strip("-.") or "here"


# --- what is shown --------------------------------------------------------------------------------


def table(found: Analysis) -> Table:
    """One row a layer."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    columns = ["layer", "isotropy", "no sink", "most like", "best"]
    if found.chances is not None:
        columns.append("chance")
    if found.layers is not None:
        columns += ["without", "cheapest", "dearest"]
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for layer in range(found.layout.layers):
        shown.add_row(*_row(found, layer))
    return shown


def _row(found: Analysis, layer: int) -> list[str]:
    maps, without = found.isotropy.maps, found.isotropy.without_sink
    best = found.matches.scores[layer]
    cells = [
        str(layer),
        _number(float(maps[layer, layer - 1])) if layer else "",
        _number(float(without[layer, layer - 1])) if layer else "",
        _most_alike(maps, layer),
        _number(float(best.nanmean())),
    ]
    if found.chances is not None:
        pairs = [p.corrected for target, _, p in found.chances.pairs if target[0] == layer]
        beaten = sum(p <= LEVEL for p in pairs)
        cells.append(f"{beaten} of {len(pairs)}" if pairs else "")
    if found.layers is not None and found.units is not None:
        cells.append(f"{found.layers.rises[layer]:+.3f}")
        rises = found.units.removal.total[layer]
        own = [(float(rise), unit) for unit, rise in enumerate(rises) if not rise.isnan()]
        cells += [f"{u}: {r:+.3f}" for r, u in (min(own), max(own))] if own else ["", ""]
    return cells


def _most_alike(maps: torch.Tensor, layer: int) -> str:
    """The earlier layer with the most similar maps."""
    if layer == 0 or maps[layer, :layer].isnan().all():
        return ""
    other = int(maps[layer, :layer].nan_to_num(nan=-2.0).argmax())
    return f"{other}: {float(maps[layer, other]):.3f}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def notes(found: Analysis, facts: dict[str, Any]) -> list[str]:
    """What the numbers are, one line each."""
    lines = [
        f"text      {facts['text']}: the first {facts['blocks']} blocks of "
        f"{facts['block_tokens']} tokens",
        "isotropy  cosine of the attention maps with the layer below, and with the most like "
        "earlier layer",
        f"best      each head's highest {facts['score']} with one of an earlier layer, mean",
    ]
    if found.chances is not None:
        lines.append(f"chance    {found.chances.line.removeprefix('chance: ')}")
    else:
        lines.append(f"chance    not measured: it takes {MIN_BLOCKS} blocks")
    if found.layers is not None:
        lines.append(
            f"without   rise of the loss ({found.layers.base:.3f} nats per token) without the "
            "layer's attention (measured), and without one head of it (estimated)"
        )
    return lines


def as_json(found: Analysis, facts: dict[str, Any]) -> dict[str, Any]:
    """The value of analysis.json; null where nothing can be measured."""
    chances = {} if found.chances is None else {pair[0]: pair[2] for pair in found.chances.pairs}
    best = []
    for layer, row in enumerate(found.matches.sources.tolist()):
        for unit, source in enumerate(row):
            if source[0] >= 0:
                p = chances.get((layer, unit))
                best.append(
                    {
                        "target": [layer, unit],
                        "source": source,
                        "score": float(found.matches.scores[layer, unit]),
                        "p": None if p is None else p.corrected,
                    }
                )
    value: dict[str, Any] = {
        "version": 1,
        **facts,
        "layers": found.layout.layers,
        "units": found.layout.units,
        "heads_per_unit": found.layout.heads_per_unit,
        "isotropy": {
            "maps": as_lists(found.isotropy.maps),
            "without_sink": as_lists(found.isotropy.without_sink),
        },
        "similarity": as_lists(found.scores),
        "best": best,
    }
    if found.units is not None and found.layers is not None:
        value["sensitivity"] = {
            "loss": found.layers.base,
            "tokens": found.units.tokens,
            "without_layer": list(found.layers.rises),
            "without_unit": as_lists(found.units.removal.total),
        }
    return value


def draw(found: Analysis, score: str, folder: Path) -> list[Path]:
    """Write the pictures, PNG and SVG; returns the PNG."""
    from train.planning.plan_maps import save_isotropy, save_sensitivity, save_similarity

    similarity, isotropy = folder / "similarity.png", folder / "isotropy.png"
    save_similarity(found.scores, found.layout, score, similarity)
    save_isotropy(found.isotropy, [], isotropy)
    written = [similarity, isotropy]
    if found.units is not None and found.layers is not None:
        written.append(folder / "sensitivity.png")
        rises = found.units.removal.total
        save_sensitivity(rises, found.layers.rises, found.layout, written[-1])
    return written
