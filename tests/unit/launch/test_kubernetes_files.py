"""launch/kubernetes against the schemas that are published as Python packages. No cluster has run
them: what is checked is that every key exists where it stands, and that what they name is there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from tests.support import REPOSITORY

FOLDER = REPOSITORY / "launch" / "kubernetes"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def known(document: dict[str, Any]) -> dict[str, Any]:
    """What the Trainer's own model understands of a document; it drops unknown keys."""
    return TrainerV1alpha1TrainJob.from_dict(document).to_dict()


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("kind", [0, 1], ids=["Service", "Job"])
def test_job(version: str, kind: int) -> None:
    kubernetes_validate.validate(documents("job.yaml")[kind], version, strict=True)


def test_the_schema_refuses_a_wrong_job() -> None:
    job = documents("job.yaml")[1]
    job["spec"]["completionModes"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_trainjob() -> None:
    (job,) = documents("trainjob.yaml")
    assert known(job) == job


def test_the_models_refuse_or_drop_what_is_wrong_in_a_trainjob() -> None:
    (job,) = documents("trainjob.yaml")
    job["spec"]["trainer"]["numNode"] = 2
    assert known(job) != job
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        known(job)


def test_the_job_counts_its_nodes_and_processes_once() -> None:
    service, job = documents("job.yaml")
    spec, name = job["spec"], job["metadata"]["name"]
    (container,) = spec["template"]["spec"]["containers"]
    command = container["command"][2]
    options = dict(re.findall(r"--(\S+) (\S+)", command))
    assert spec["completions"] == spec["parallelism"] == int(options["num_machines"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(options["num_processes"]) == spec["completions"] * gpus
    subdomain = spec["template"]["spec"]["subdomain"]
    assert options["main_process_ip"] == f"{name}-0.{subdomain}"
    assert subdomain == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_the_files_they_name_are_there_and_time_allows_a_checkpoint(file: Path) -> None:
    text = file.read_text()
    named = re.findall(r"(?:recipes|launch)/\S+\.yaml", text)
    assert {name.split("/")[0] for name in named} == {"recipes", "launch"}
    for name in named:
        assert (REPOSITORY / name).is_file(), name
    assert "NOT run on a cluster" in text
    grace = int(re.findall(r"terminationGracePeriodSeconds: (\d+)", text)[0])
    launcher = int(re.findall(r'TIMEOUT.*\n\s+value: "(\d+)"', text)[0])
    assert 30 < launcher < grace
