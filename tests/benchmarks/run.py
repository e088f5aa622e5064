"""All benchmarks, each in a process of its own, as ratios against a baseline of the same run."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
BENCHMARKS = (
    "match",
    "penalty",
    "compact",
    "export",
    "spans",
    "evaluate",
    "losses",
    "compile",
    "trainers",
    "distributed",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(".bench/bench.json"))
    parser.add_argument("--only", choices=BENCHMARKS, nargs="*", default=BENCHMARKS)
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    failed = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        print(f"bench {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / f"bench_{name}.py")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(name)
            continue
        results |= json.loads(done.stdout)
        report = {"date": date.today().isoformat(), "machine": machine(), "results": results}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(results)
    print(f"written to {arguments.output}")
    if failed:
        sys.exit(f"error: these benchmarks failed, see above: {', '.join(failed)}")


def machine() -> dict[str, str | int]:
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def show(results: dict[str, dict[str, float]]) -> None:
    table = Table(box=None, title="benchmarks", title_justify="left")
    table.add_column("benchmark")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for name, values in results.items():
        for key, value in values.items():
            table.add_row(name, key, f"{value:,.4g}" if value < 1e6 else f"{value:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
