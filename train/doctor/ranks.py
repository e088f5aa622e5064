"""Checks: who is there, and whether all ranks have the same versions, recipe and folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sa_models.errors import PostshareError
from train.common.sizes import size
from train.doctor.findings import LEFT_WAITING, Finding, Situation, bad, from_error, ok, warn
from train.estimate import parameters

BUILD_SECONDS = 900.0
"""Age of a lock that belongs to no build any more, wherever it ran."""


def check_world(s: Situation) -> Iterator[Finding]:
    """Whether as many processes answered, and see one another, as were started."""
    topic = "processes"
    environment = s.facts[0].environment
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        started = int(environment.get(variable) or 1)
        if started > s.world:
            yield bad(
                topic,
                f"{variable} is {started}, but each process believes in a world of {s.world}: "
                "every one would train alone",
                "start them by `accelerate launch --config_file launch/accelerate/...`, one on "
                "each node",
            )
    if s.missing:
        yield bad(
            topic,
            f"{s.who(s.missing)} of {s.world} did not answer",
            "look at the output of its node: is the same command running there with the right "
            "--machine_rank, and can it reach the main address and port?",
        )
    for f in s.facts:
        for name in f.late:
            yield bad(
                topic,
                f"{s.who([f.rank])}: {name} did not answer in time",
                "a file system or a driver hangs on that host: try `ls` and nvidia-smi there, or "
                "leave the host out",
            )
    if s.world == 1:
        yield ok(
            topic,
            "one; for what lies between processes, start the doctor by `accelerate launch ... "
            "--no_python postshare doctor`",
        )
    elif not s.missing:
        names = {f.host for f in s.facts}
        shown = f": {', '.join(sorted(names))}" if len(names) <= 4 else ""
        yield ok(
            topic, f"{s.world} answer, on {len(s.hosts)} host{'s' * (len(s.hosts) > 1)}{shown}"
        )


def check_builds(s: Situation) -> Iterator[Finding]:
    """Locks of builds that nobody is at: DeepSpeed would wait for them without a limit."""
    for f in s.facts:
        for lock, age in f.locks:
            said = (
                f"{lock} on {f.host} is {age / 60:.0f} minutes old, and no process there holds it"
            )
            cure = f"rm {lock} (unless another host is building there now)"
            if s.stage is not None and age > BUILD_SECONDS:
                yield bad("build lock", f"{said}: DeepSpeed would wait for ever", cure)
            else:
                yield warn("build lock", f"{said}; DeepSpeed waits for it", cure)


def check_join(s: Situation) -> Iterator[Finding]:
    """Whether the process group of a training came up."""
    if s.joined is None:
        return
    silent = [f.rank for f in s.facts if f.rank not in s.joined]
    if silent:
        yield bad(
            "process group",
            f"{s.who(silent)} did not join in time ({s.backend})",
            s.network_cure,
        )
    by_problem = defaultdict(list)
    for rank, problem in s.joined.items():
        if problem is not None:
            by_problem[problem].append(rank)
    if len(by_problem) > 1:
        by_problem.pop(LEFT_WAITING, None)
    for problem, members in by_problem.items():
        finding = from_error("process group", PostshareError(problem))
        yield replace(
            finding, found=f"{s.who(members)}: {finding.found}", cure=finding.cure or s.network_cure
        )
    if not silent and not by_problem:
        yield ok("process group", f"{len(s.joined)} ranks joined ({s.backend})")


def check_versions(s: Situation, tested: dict[str, str] | None = None) -> Iterator[Finding]:
    """The same versions on all ranks; the tested ones."""
    topic = "versions"
    tested = tested_versions() if tested is None else tested
    differs = False
    for name in sorted({n for f in s.facts for n in f.versions}, key=str.lower):
        ranks = defaultdict(list)
        for f in s.facts:
            ranks[f.versions.get(name, "none")].append(f.rank)
        if len(ranks) > 1:
            differs = True
            listed = ", ".join(f"{v} on {s.who(r)}" for v, r in ranks.items())
            what = "the sources of postshare differ" if name == "postshare" else f"{name} differs"
            yield bad(
                topic,
                f"{what}: {listed}",
                "use one environment on a shared file system, one container image, or install "
                "with constraints.txt on each host",
            )
    mine = s.facts[0].versions
    other = [
        f"{name} {mine[name]} (tested: {version})"
        for name, version in tested.items()
        if name in mine and mine[name].split("+")[0] != version
    ]
    if other:
        yield warn(
            topic,
            "not the tested set: " + ", ".join(other),
            "pip install --constraint constraints.txt",
        )
    if not differs:
        same = "the same on all ranks: " if s.world > 1 else ""
        yield ok(topic, same + ", ".join(f"{k} {v}" for k, v in mine.items()))


def tested_versions() -> dict[str, str]:
    """{package: version} of constraints.txt, in the wheel or the checkout."""
    package = Path(__file__).resolve().parents[1]
    for file in (package / "_shipped" / "constraints.txt", package.parent / "constraints.txt"):
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            return dict(line.split("==", 1) for line in lines if "==" in line)
    return {}


def check_recipe(s: Situation) -> Iterator[Finding]:
    """The same recipe on all ranks."""
    ranks = defaultdict(list)
    for f in s.facts:
        if f.recipe is not None:
            ranks[f.recipe].append(f.rank)
    if len(ranks) > 1:
        groups = "; ".join(s.who(members) for members in ranks.values())
        yield bad(
            "recipe",
            f"it is not the same everywhere: {groups} read different ones",
            "put it on a shared file system, or copy the same file to each host",
        )
    elif ranks and s.recipe is not None:
        yield ok("recipe", f"{s.recipe.name}, resolved")


def check_folder(s: Situation) -> Iterator[Finding]:
    """The run folder: writable, and the same on all ranks."""
    topic, probe = "run folder", s.folder
    if probe is None:
        return
    if probe.problem is not None:
        yield bad(
            topic,
            f"{probe.folder} cannot be written: {probe.problem}",
            "choose a writable output_dir",
        )
        return
    unseen = [r for r in probe.unseen if r not in s.missing]
    if unseen:
        paths = {f.folder for f in s.facts}
        where = f" (the ranks resolve it to {', '.join(sorted(map(str, paths)))})"
        elsewhere = where if len(paths) > 1 else ""
        yield bad(
            topic,
            f"{probe.folder} is not the same folder on {s.who(unseen)}{elsewhere}: "
            "checkpoints would be scattered over the hosts",
            "set output_dir to an absolute path on a file system that all hosts mount",
        )
    for rank, reason in probe.unwritable:
        yield bad(
            topic,
            f"{s.who([rank])} cannot write to {probe.folder}: {reason}",
            "give the job's user write access on every host; is it mounted read-only there?",
        )
    if not unseen and not probe.unwritable:
        same = ", the same folder on all ranks" if s.world > 1 else ""
        yield ok(topic, f"{probe.folder}: writable{same}")


def check_disk(s: Situation) -> Iterator[Finding]:
    """Room for checkpoints, weights and exports."""
    topic, f = "disk", s.facts[0]
    if f.disk is None:
        return
    if s.recipe is None or s.shape is None:
        yield ok(topic, f"{size(f.disk)} free")
        return
    try:
        need = parameters.disk_space(s.recipe, s.shape)
    except PostshareError as error:
        yield from_error("plan", error)
        return
    said = (
        f"{size(f.disk)} free; a checkpoint takes {size(need.checkpoint)}, weights "
        f"{size(need.weights)}, exports {size(need.exports)}, all that is kept {size(need.kept)}"
    )
    cure = "free some space, set output_dir to a larger disk, or lower train.keep_checkpoints"
    if f.disk < need.least:
        yield bad(topic, said, cure)
    elif f.disk < need.kept:
        yield warn(topic, said, cure)
    else:
        yield ok(topic, said)
