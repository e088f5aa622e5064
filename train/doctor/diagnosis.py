"""`postshare doctor`: would this job start, run and save here? Findings with cures, go or no-go.

Each rank reads its own facts (`facts`, `inputs`), the ranks probe what lies between them
(`probes`), and the main rank judges (`ranks`, `devices`, `network`, `cost`) and prints. Everything
has a time limit.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sa_models.errors import PostshareError
from train.common.console import plain_console
from train.distributed.engines import start as engine
from train.distributed.launch_env import launched_fsdp, launched_offload
from train.doctor import cost, devices, network, ranks
from train.doctor.builds import release_own
from train.doctor.facts import Facts, TooLate, collect, limited
from train.doctor.findings import LEFT_WAITING, Finding, Level, Situation, from_error
from train.doctor.inputs import (
    check_inputs,
    check_start,
    check_warnings,
    check_working_folder,
    resolve,
)
from train.doctor.probes import (
    Channel,
    Reduction,
    probe_bandwidth,
    probe_clocks,
    probe_folder,
    probe_links,
)
from train.estimate.llama_shapes import LlamaShape, find_shape
from train.estimate.throughput import Assumed
from train.recipe.precision import precisions, with_precision
from train.recipe.recipe import Recipe

PATIENCE = 60.0
"""Seconds that a rank may be late, unless the command line says otherwise."""
READING_EXTRA = 60.0
"""More seconds for the facts: each reading that hangs takes its time."""
JOIN_EXTRA = 60.0
"""More seconds for joining: imports, and NCCL on many hosts."""
BUILD_EXTRA = 400.0
"""The same for DeepSpeed on a CPU, which compiles its communication at its first start."""
GRACE = 10.0
"""Seconds for the others to fail too, once a rank has failed to join."""
ACCELERATE_PORT = 29500

CHECKS: tuple[Callable[[Situation], Iterator[Finding]], ...] = (
    ranks.check_world,
    ranks.check_builds,
    ranks.check_join,
    ranks.check_versions,
    devices.check_devices,
    ranks.check_recipe,
    devices.check_precision,
    devices.check_compiler,
    devices.check_gpu_memory,
    devices.check_whole_models,
    devices.check_ram,
    network.check_address,
    network.check_links,
    network.check_settings,
    network.check_bandwidth,
    network.check_clocks,
    ranks.check_folder,
    ranks.check_disk,
    cost.check_cost,
)


def examine(situation: Situation) -> list[Finding]:
    """All findings of the main rank. Needs at least its own facts."""
    return list(dict.fromkeys(finding for check in CHECKS for finding in check(situation)))


def diagnose(
    name: str | None,
    overrides: Sequence[str] = (),
    patience: float = PATIENCE,
    console: Console | None = None,
    *,
    assumed: Assumed = Assumed(),  # noqa: B008 - it cannot be changed
) -> bool:
    """Examine this launch, and the recipe when there is one; print the findings on the main rank.

    Args:
        name: recipe, as for `load_recipe`; None looks at the machines alone.
        patience: seconds that a rank may be late.
        assumed: for the time of the job; the chip is that of the GPUs that are here.

    Returns:
        whether the job may start, the same on every rank that answers.

    Raises:
        PostshareError: on a rank that the main one does not hear, or does not hear from.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        channel = Channel(rank, world, patience)
    except TooLate as error:
        address = f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')}"
        raise _unheard(
            rank,
            f"rank {rank} cannot reach {address} ({error}); is that the main host's address, does "
            "a firewall lie between, does another job hold the port?",
        ) from None
    try:
        return _Visit(channel, name, overrides, console, assumed).go()
    except TooLate as error:
        raise _unheard(
            rank,
            f"rank {rank}: the main process did not answer within {patience:.0f} s ({error}); look "
            "at its output, or allow more with --patience",
        ) from None


def _unheard(rank: int, message: str) -> PostshareError:
    """The error of a rank whose words reach nobody but its own terminal."""
    if rank != 0:  # the command line lets only the main process speak
        print(f"error: {message}", file=sys.stderr, flush=True)
    return PostshareError(message)


@dataclass
class _Visit:
    channel: Channel
    name: str | None
    overrides: Sequence[str]
    console: Console | None
    assumed: Assumed = Assumed()  # noqa: RUF009 - it cannot be changed
    recipe: Recipe | None = None
    stuck: bool = False
    findings: dict[int, list[Finding]] = field(default_factory=dict)

    def go(self) -> bool:
        situation = self._probe(self._meet())
        verdict = True
        if self.channel.is_main:
            findings = examine(situation) + merged(self.findings, situation)
            if situation.recipe is not None:
                findings += check_warnings(situation.recipe, situation.shape)
            if situation.world == 1:
                port = int(os.environ.get("MASTER_PORT") or ACCELERATE_PORT)
                findings.append(network.free_port(port))
                findings += check_working_folder(Path.cwd())
            verdict = all(finding.level < Level.BAD for finding in findings)
            show(findings, self.console)
        missing = situation.missing if self.channel.is_main else []
        verdict = self.channel.decide("verdict", lambda: verdict, 2 * self.channel.patience + 60)
        # Where the main process serves the store, it must not go before the others have read.
        answered = [r for r in range(situation.world) if r not in missing]
        self.channel.gather("bye", True, seconds=5.0, ranks=answered)
        if self.stuck:
            # A thread waits in a collective that nobody will end, and Python would wait for it.
            release_own()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0 if verdict else 2)
        engine.shutdown()
        return verdict

    def _meet(self) -> Situation:
        """Read this rank's facts, give them to the main one."""
        channel = self.channel
        own: list[Finding] = []
        if self.name is not None:
            self.recipe, own = resolve(self.name, self.overrides)
        folder, fingerprint = None, None
        if self.recipe is not None:
            folder = self.recipe.folder
            text = self.recipe.to_yaml().encode()
            fingerprint = hashlib.blake2b(text, digest_size=8).hexdigest()
            if channel.is_main:
                own += check_start(self.recipe, channel.world)
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                own += check_inputs(self.recipe)
        in_bf16 = self.recipe is not None and "bf16" in precisions(self.recipe).values()
        facts = collect(folder, fingerprint, in_bf16)
        answers = channel.gather(
            "facts",
            {"facts": facts.to_json(), "findings": [f.to_json() for f in own]},
            seconds=channel.patience + READING_EXTRA,
        )
        self.findings = {
            rank: [Finding.from_json(f) for f in answer["findings"]]
            for rank, answer in answers.items()
        }
        shape: LlamaShape | None = None
        if channel.is_main and self.recipe is not None:
            try:
                shape, _ = find_shape(self.recipe.model)
            except PostshareError as error:
                self.findings[0].append(from_error("model", error))
        known = [Facts.from_json(answer["facts"]) for answer in answers.values()] or [facts]
        found = "bf16" if all(f.bf16 for f in known) else "fp32"
        return Situation(
            known,
            channel.world,
            None if self.recipe is None else with_precision(self.recipe, found),
            shape,
            engine.launched_stage(),
            launched_fsdp(),
            launched_offload(),
            backend=_backend(facts),
            assumed=self.assumed,
        )

    def _probe(self, s: Situation) -> Situation:
        """What needs all ranks; left out when one of them does not answer."""
        channel = self.channel
        goes_on = channel.decide(
            "probe",
            lambda: {
                "all": not s.missing,
                "folder": len({f.folder is None for f in s.facts}) == 1,
                "hosts": [r[0].rank for r in s.hosts.values()],
            },
            seconds=channel.patience + READING_EXTRA + 30,
        )
        if not goes_on["all"]:
            return s
        values = dict(vars(s))
        if self.recipe is not None and goes_on["folder"]:
            values["folder"] = probe_folder(channel, self.recipe.folder)
        hosts = goes_on["hosts"]
        if len(hosts) > 1:
            values["clocks"] = probe_clocks(channel, hosts[1:])
            values["links"] = probe_links(channel, hosts)
        if channel.world > 1:
            values["joined"], values["reductions"] = self._join()
        return Situation(**values)

    def _join(self) -> tuple[dict[int, str | None], list[Reduction] | None]:
        """Join the process group as a training does, and time it."""
        channel = self.channel
        builds = engine.launched_stage() is not None and not torch.accelerator.is_available()
        limit = channel.patience + (BUILD_EXTRA if builds else JOIN_EXTRA)
        device, problem = torch.device("cpu"), None
        failed: list[float] = []  # when it was seen that some rank has failed

        def vain() -> bool:
            if channel.has("failed"):
                failed.append(time.monotonic())
            return bool(failed) and failed[-1] - failed[0] >= GRACE

        try:
            # The group's own patience is longer: NCCL ends the process when it is exceeded.
            patience = timedelta(seconds=4 * limit)
            device = limited(lambda: engine.join(patience), limit, vain).device
        except TooLate:
            self.stuck = True
            problem = LEFT_WAITING if vain() else "joining did not end in time"
        except PostshareError as error:
            problem = str(error)
        except Exception as error:  # whatever NCCL, gloo or DeepSpeed say
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if problem is not None:
            channel.put("failed", True)
        joined = channel.gather("joined", problem, seconds=limit + 10)
        whole = channel.decide(
            "whole",
            lambda: len(joined) == channel.world and not any(joined.values()),
            seconds=limit + 30,
        )
        if not whole:
            self.stuck = self.stuck or dist.is_initialized()
            return joined, None
        reductions: list[Reduction] = []
        problem = None
        try:
            reductions = limited(lambda: probe_bandwidth(device), channel.patience)
        except TooLate:
            self.stuck, problem = True, "the all-reduce did not end in time"
        except RuntimeError as error:
            self.stuck = True  # the others may still be in it
            problem = f"the all-reduce failed: {' '.join(str(error).split())[:300]}"
        ended = channel.gather("reduced", problem, seconds=channel.patience + 10)
        silent = dict.fromkeys(joined, "no word since the all-reduce")
        joined = {**silent, **ended}
        return joined, None if any(joined.values()) else reductions


def _backend(facts: Facts) -> str:
    return "gloo" if facts.gpu is None else "nccl"


def merged(findings: dict[int, list[Finding]], s: Situation) -> list[Finding]:
    """What ranks found alone: once, with the ranks that found it where not all looked alike."""
    found = defaultdict(list)
    for rank, own in findings.items():
        for finding in own:
            found[finding].append(rank)
    if len(s.hosts) == 1:
        return list(found)
    return [
        replace(f, found=f"{s.who(who)}: {f.found}") if f.level else f for f, who in found.items()
    ]


def show(findings: list[Finding], console: Console | None = None) -> None:
    """One table, then one line: go or no-go."""
    if console is None:
        console = plain_console(width=None if sys.stdout.isatty() else 120)
    words = {
        Level.OK: Text("ok", "green"),
        Level.WARN: Text("warn", "yellow"),
        Level.BAD: Text("NO-GO", "red"),
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    for f in sorted(findings, key=lambda f: f.level):  # the worst last, where it is read
        found = Text(f.found)
        if f.cure and f.level:
            found.append("\ncure:", "bold").append(f" {f.cure}")
        table.add_row(words[f.level], f.topic, found)
    console.print(table)
    counts = {level: sum(f.level == level for f in findings) for level in Level}
    problems, warnings = counts[Level.BAD], counts[Level.WARN]
    told = f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    console.print(f"{'no-go' if problems else 'go'}: {told}")
