"""One short training that exits right after its last collective: what launch_soak.py launches."""

from __future__ import annotations

import atexit
import sys
from pathlib import Path


def gloo_threads() -> list[str]:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


@atexit.register  # before the engine's own handler is registered, so it runs after it
def _report() -> None:
    print(f"gloo threads at exit: {len(gloo_threads())}", flush=True)


def main() -> None:
    import torch
    import torch.distributed as dist

    from tests.support.training import Setting, build, train
    from train.distributed.engines import start as engine_module

    if "--bare" in sys.argv:  # leave as a script does that never heard of the problem
        engine_module._leave = lambda: None  # type: ignore[assignment]
    setting = Setting(steps=2)
    engine = engine_module.start(setting.recipe())
    engine.prepare(*build(setting))
    train(engine, setting)
    engine.check_replicas()
    if "--bare" not in sys.argv:
        engine.close()
    if "--in-flight" in sys.argv:  # the race, made likely: collectives that nobody waits for
        for _ in range(50):
            whole = torch.empty(100_000 * engine.world)
            dist.all_gather_into_tensor(whole, torch.ones(100_000), async_op=True)


if __name__ == "__main__":
    main()
