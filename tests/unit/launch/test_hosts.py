"""launch/hosts.sh with stand-ins for ssh and accelerate; tests/cluster has two real hosts."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from tests.support import REPOSITORY

ACCELERATE = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$NOTES/$HOST"
[[ ${MODE:-} ]] || exit 0
if [[ $MODE == fail && $HOST == b ]]; then sleep 1; exit 1; fi
trap 'echo TERM >>"$NOTES/$HOST.end"; exit 1' TERM
for _ in $(seq 300); do sleep 0.1; done
"""


class Hosts:
    def __init__(self, folder: Path, *arguments: str, mode: str = "") -> None:
        self.notes = folder
        # A checkout of its own, so that no .venv comes before the stand-in.
        (folder / "launch").mkdir()
        (folder / "launch" / "hosts.sh").write_bytes(
            (REPOSITORY / "launch" / "hosts.sh").read_bytes()
        )
        for name, text in {
            "accelerate": ACCELERATE,
            "remote": '#!/usr/bin/env bash\nHOST=$1 exec sh -c "$2"\n',
        }.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "hosts.txt").write_text("# two\nme@a\n\n b \n")
        self.process = subprocess.Popen(
            ["bash", folder / "launch" / "hosts.sh", folder / "hosts.txt", *arguments],
            env={
                "PATH": f"{folder}:{os.environ['PATH']}", "REMOTE": str(folder / "remote"),
                "NOTES": str(folder), "MODE": mode, "PROCESSES_PER_NODE": "4",
            },
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait_for_both(self) -> None:
        end = time.monotonic() + 20
        while not all((self.notes / name).exists() for name in ("me@a", "b")):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)  # until the stand-ins listen

    def end(self) -> int:
        self.output, self.errors = self.process.communicate(timeout=25)
        return self.process.returncode

    def told(self) -> set[str]:
        return {file.stem for file in self.notes.glob("*.end")}


def test_every_host_launches_its_share(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, "recipes/demo.yaml", "data.train=a 'b' $c")
    assert hosts.end() == 0, hosts.errors
    for rank, name in enumerate(["me@a", "b"]):
        assert (tmp_path / name).read_text().splitlines() == [
            "launch", "--config_file", "launch/accelerate/zero3.yaml",
            "--num_machines", "2", "--num_processes", "8",
            "--main_process_ip", "a", "--main_process_port", "29500",
            "--machine_rank", str(rank), "-m", "train", "recipes/demo.yaml", "data.train=a 'b' $c",
        ]  # fmt: skip


def test_a_signal_stops_all_hosts(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, "recipes/demo.yaml", mode="wait")
    hosts.wait_for_both()
    hosts.process.terminate()
    assert hosts.end() == 1
    assert hosts.told() == {"me@a", "b"}


def test_when_this_end_is_killed_the_hosts_stop(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, "recipes/demo.yaml", mode="wait")
    hosts.wait_for_both()
    hosts.process.kill()
    hosts.end()
    assert hosts.told() == {"me@a", "b"}


def test_a_host_that_fails_stops_the_others(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, "recipes/demo.yaml", mode="fail")
    assert hosts.end() == 1
    assert hosts.told() == {"me@a"}


def test_without_a_recipe_it_says_its_usage(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path)
    assert hosts.end() == 2
    assert hosts.errors.startswith("usage: launch/hosts.sh")


def test_a_file_without_hosts_is_an_error(tmp_path: Path) -> None:
    Hosts(tmp_path, "recipes/demo.yaml").end()
    (tmp_path / "none.txt").write_text("# nobody\n")
    command = ["bash", tmp_path / "launch/hosts.sh", tmp_path / "none.txt", "recipes/demo.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[:6]) == (2, "error:")
