"""Launch two ranks again and again, and count the launches that fail.

    python tests/distributed/launch_soak.py --launches 100 --stage 3

It is a script, not a test: docs/zero-on-cpu.md says what it is for. `--bare --in-flight` shows the
abort that the engine's teardown prevents; `--in-flight` alone shows that it does.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.launcher import launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=100)
    parser.add_argument("--stage", choices=["1", "2", "3", "ddp"], default="3")
    parser.add_argument("--bare", action="store_true", help="without the engine's teardown")
    parser.add_argument("--in-flight", action="store_true", help="exit with pending collectives")
    options = parser.parse_args()
    config = "ddp" if options.stage == "ddp" else f"zero{options.stage}"
    worker = Path(__file__).with_name("soak_worker.py")
    flags = [f for f in ("--bare", "--in-flight") if getattr(options, f[2:].replace("-", "_"))]
    failures, begun = 0, time.monotonic()
    for number in range(1, options.launches + 1):
        result = launch(config, worker, *flags, timeout=180)
        left = result.output.count("gloo threads at exit: 0") != 2 and not options.bare
        if result.failed or left:
            failures += 1
            print(f"--- launch {number} failed\n{result.report()}", flush=True)
        if number % 10 == 0:
            print(f"{number} launches, {failures} failures", flush=True)
    seconds = (time.monotonic() - begun) / options.launches
    print(
        f"{config} {' '.join(flags)}: {failures} failures in {options.launches} launches, "
        f"{seconds:.1f} s each"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
