from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import hosts, slurm


@pytest.fixture(scope="session")
def two_hosts() -> Iterator[None]:
    if reason := hosts.missing("nsenter"):
        pytest.skip(reason)
    with hosts.two_hosts():
        yield


@pytest.fixture(scope="module")
def cluster(two_hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    if reason := hosts.missing(*slurm.COMMANDS):
        pytest.skip(reason)
    with slurm.slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running
