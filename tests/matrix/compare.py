"""How far a launch's cells lie from those of one process, and how far they may."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

from tests.matrix.cells import CELLS, exact
from tests.support.launcher import run
from tests.support.training import build, teacher_folder

WORKER = Path(__file__).with_name("worker.py")
FP32 = {"lm": 1e-4, "penalty": 1e-4, "norm": 1e-4, "weights": 1e-4, "moved": 1e-2}
# bf16 computes the language-model loss and its gradient; masters, penalty and sums stay fp32. One
# process computes in bf16 by autocast (products in bf16, the rest in fp32), ZeRO and FSDP2 in bf16
# throughout.
BF16 = {"lm": 1e-2, "penalty": 1e-2, "norm": 5e-2, "weights": 2e-2, "moved": 0.5}


@dataclass
class Outcome:
    """One launch against one process.

    Attributes:
        passed, refused: names of cells.
        failed: what was wrong, by cell.
        worst: the largest relative difference of each quantity over the fp32 cells; `weights` is
            over the norm of a tensor, `moved` over how far training has moved it.
        bf16: likewise over the bf16 cells.
    """

    passed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    bf16: dict[str, float] = field(default_factory=dict)


def launch_cells(
    config: str, processes: int, cells: Iterable[str], folder: Path, timeout: float = 300
) -> str:
    """One launch of all cells; its output."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = list(cells)
    for name in cells:
        if CELLS[name].distill:
            teacher_folder(CELLS[name].model)
    return run(config, WORKER, folder, *cells, processes=processes, timeout=timeout)


def compare(folder: Path, reference: Path, config: str) -> Outcome:
    """Judge the cells in `folder` by those of one process in `reference`."""
    outcome = Outcome()
    rows = json.loads((folder / "rows.json").read_text())
    expected = json.loads((reference / "rows.json").read_text())
    for name in rows:
        if isinstance(rows[name], str):
            # DeepSpeed and FSDP2 may refuse LoRA, ZeRO-3 compiled layers, and nothing else.
            lora = config.startswith(("zero", "fsdp2")) and CELLS[name].lora
            compiled = config.startswith("zero3") and CELLS[name].compiled
            cures = ["launch/accelerate/ddp.yaml"] * bool(lora)
            cures += ["launch/accelerate/fsdp2.yaml"] * compiled
            if any(cure in rows[name] for cure in cures):
                outcome.refused.append(name)
            else:
                outcome.failed[name] = rows[name]
            continue
        found = differences(name, folder, reference, rows[name], expected[name])
        bounds, worst = (FP32, outcome.worst) if exact(name) else (BF16, outcome.bf16)
        for quantity, value in found.items():
            worst[quantity] = max(worst.get(quantity, 0.0), value)
        # nan compares as false.
        over = {q: v for q, v in found.items() if not v <= bounds[q]}
        if over:
            outcome.failed[name] = str(over)
        else:
            outcome.passed.append(name)
    return outcome


def differences(
    name: str, folder: Path, reference: Path, rows: list[dict], expected: list[dict]
) -> dict[str, float]:
    """The largest relative difference of each quantity of one cell."""
    found = {}
    # Where only the penalty trains, the loss is bf16's and nothing depends on it.
    for quantity in ("lm", "penalty", "norm") if CELLS[name].lm_weight else ("penalty", "norm"):
        pairs = [(a[quantity], b[quantity]) for a, b in zip(rows, expected, strict=True)]
        found[quantity] = max(relative(abs(a - b), abs(b)) for a, b in pairs)
    file = f"{name}.safetensors"
    own, other = load_file(folder / file), load_file(reference / file)
    start = dict(build(CELLS[name])[0].named_parameters())
    assert own.keys() == other.keys() == start.keys(), f"{name}: other parameters"
    found["weights"] = found["moved"] = 0.0
    for key, value in other.items():
        difference = float((own[key] - value).norm())
        # Sums of fp32 differ in their last bits, however little training has moved a weight.
        moved = float((value - start[key].detach()).norm()) + 1e-5
        found["weights"] = max(found["weights"], relative(difference, float(value.norm())))
        found["moved"] = max(found["moved"], difference / moved)
    return found


def relative(difference: float, size: float) -> float:
    if math.isnan(difference):
        return math.nan
    return difference / size if size else (math.inf if difference else 0.0)


def initial_distance(name: str, folder: Path) -> float:
    """How far training has moved all weights of a cell, over their norm."""
    final = load_file(folder / f"{name}.safetensors")
    start = dict(build(CELLS[name])[0].named_parameters())
    moved = sum(float((final[k] - start[k].detach()).square().sum()) for k in final)
    return math.sqrt(moved / sum(float(v.detach().square().sum()) for v in start.values()))
