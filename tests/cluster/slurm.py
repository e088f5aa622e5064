"""A real Slurm of two nodes on one machine, started and stopped here.

Debian's packages slurm-wlm and munge; slurmctld runs on the first host, a slurmd on each. A node
pretends to have one GPU (a character device), so that the files are submitted as shipped; torch
finds none and trains on the CPU with gloo.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.hosts import NAMES, on
from tests.support import REPOSITORY
from tests.support.launcher import environment

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIGURATION = """
ClusterName=postshare
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
GresTypes=gpu
NodeName={nodes} CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=gpu Nodes={nodes} Default=YES State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={nodes} State=UP PriorityTier=2
"""
# cred_expire is also what a queued-again job waits before it may start (120 s by default).


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        around = {k: v for k, v in environment().items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment = around | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path = REPOSITORY) -> str:
        """The output of a command on the first node."""
        done = subprocess.run(
            on(0, *command), cwd=cwd, env=self.environment, text=True, timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}\n{self.logs()}"
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """`sbatch arguments`, from the root of the repository; the job's id."""
        return self.run("sbatch", "--parsable", *arguments).strip()

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED, TIMEOUT."""
        fields = dict(
            field.split("=", 1) for field in self.run("scontrol", "show", "job", job).split()
            if "=" in field
        )  # fmt: skip
        return fields["JobState"]

    def wait(self, job: str, until: Callable[[str], bool], seconds: float, output: Path) -> str:
        """The first state that `until` accepts."""
        end = time.monotonic() + seconds
        while not until(state := self.state(job)):
            if time.monotonic() > end:
                text = output.read_text() if output.is_file() else "no output"
                raise AssertionError(f"job {job} is {state}\n{text}\n{self.logs()}")
            time.sleep(0.5)
        return state

    def logs(self) -> str:
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}"
            for file in sorted(self.folder.glob("*.log"))
        )


ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A running Slurm below `folder`, within `two_hosts`; everything it started ends with it."""
    cluster = Slurm(folder)
    text = CONFIGURATION.format(folder=folder, first=NAMES[0], nodes=",".join(NAMES))
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/zero\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", *(f"spool-{name}" for name in NAMES)):
        (folder / name).mkdir()
    daemons: list[subprocess.Popen[bytes]] = []

    def start(host: int, *command: str) -> None:
        with (folder / f"{command[0]}-{host}.out.log").open("wb") as output:
            daemons.append(
                subprocess.Popen(
                    on(host, *command), env=cluster.environment, stdout=output, stderr=output
                )
            )

    try:
        files = {name: f"{folder}/munge{end}" for name, end in
                 [("key-file", ".key"), ("socket", ".socket"), ("pid-file", "d.pid"),
                  ("log-file", "d.log"), ("seed-file", "d.seed")]}  # fmt: skip
        options = [f"--{name}={path}" for name, path in files.items()]
        start(0, "munged", "--foreground", "--force", *options)
        start(0, "slurmctld", "-D")
        for host in (0, 1):
            start(host, "slurmd", "-D")
        _wait_for_nodes(cluster)
        yield cluster
    finally:
        subprocess.run(  # a step outlives its slurmd
            on(0, "scancel", "--full", "--signal=KILL", "--user=root"),
            env=cluster.environment, check=False, timeout=60,
        )  # fmt: skip
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _wait_for_nodes(cluster: Slurm) -> None:
    nodes = ""
    for _ in range(60):
        done = subprocess.run(
            on(0, "sinfo", "--noheader", "--partition=gpu", "--format=%T %D"),
            env=cluster.environment, text=True, capture_output=True, check=False,
        )  # fmt: skip
        nodes = done.stdout.strip()
        if nodes == "idle 2":
            return
        time.sleep(0.5)
    raise AssertionError(f"the nodes did not come up ({nodes})\n{cluster.logs()}")
