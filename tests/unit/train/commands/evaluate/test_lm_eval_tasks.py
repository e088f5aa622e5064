"""lm-eval's tasks on our models, through `postshare evaluate` and through `lm_eval` as typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_models.errors import PostshareError
from tests.support import small_models
from train.commands.evaluate.lm_eval_tasks import Harness, HarnessSettings
from train.evaluation.models import Judged
from train.evaluation.score import change

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'postshare[eval]'")

CPU = torch.device("cpu")
QUESTIONS = [
    {
        "sentence1": f"Stage {i} reads {i} files.",
        "sentence2": f"It reads {j}.",
        "label": int(i != j),
    }
    for i in range(1, 4)
    for j in range(1, 5)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE, of our own making: 3 of 12 are entailed; and GSM8K without its examples."""
    folder = tmp_path_factory.mktemp("data")
    for name, split, rows in (
        ("rte", "validation", QUESTIONS),
        ("gsm8k", "test", [{"question": "1 + 1?", "answer": "#### 2"}]),
    ):
        (folder / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def harness(data: Path) -> Harness:
    return Harness(HarnessSettings(data=data, batch_size=5))


def judged(folder: Path) -> Judged:
    return Judged(folder.name, folder, folder)


def right_by_hand(model: Any, tokenizer: Any, row: dict[str, Any]) -> float:
    """lm-eval's prompt of RTE, and which of " True" and " False" is likelier after it."""
    prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    scores = []
    for answer in (" True", " False"):
        before = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + answer)["input_ids"]
        assert whole[: len(before)] == before
        logits = model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
        places = range(len(before) - 1, len(whole) - 1)
        scores.append(float(logits[places, whole[len(before) :]].sum()))
    return float(scores.index(max(scores)) == row["label"])


def test_a_task_is_lm_evals_own(harness: Harness, run: Path) -> None:
    task = harness.prepare("rte")
    scores = {}
    for kind in ("compact", "dense"):
        model = judged(run / "export" / kind)
        loaded, tokenizer = model.load(torch.float32, CPU), model.load_tokenizer()
        (score,) = harness.run(task, loaded, tokenizer)
        assert (score.task, score.metric) == ("rte", "acc")
        by_hand = [right_by_hand(loaded, tokenizer, row) for row in QUESTIONS]
        assert list(score.sums) == by_hand
        assert score.value == sum(by_hand) / len(QUESTIONS)
        scores[kind] = score
    found = change(scores["dense"], scores["compact"])
    assert found is not None
    assert (found.paired, found.value, found.interval) == (True, 0, (0, 0))


def test_what_cannot_be_run_is_refused(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, said in {
        "helaswag": "there is no task 'helaswag'; did you mean hellaswag?",
        "perplexty": "did you mean perplexity?",
        "glue": "glue is a tag of several tasks; name them: cola",
        "gsm8k": "puts 5 examples of its train data before each question",
        "sst2": "the data of task sst2 is not on this machine and cannot be fetched",
    }.items():
        with pytest.raises(PostshareError) as caught:
            harness.prepare(name)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "put it into FOLDER/sst2 and pass --data FOLDER" in str(caught.value)


def test_real_groups_and_filters(harness: Harness, shared: Path, run: Path) -> None:
    """MMLU is one score over its 57 tasks; GSM8K has two, by how the answer is found."""
    settings = HarnessSettings(limit=1, fewshot=0, data=shared / "eval")
    local = Harness(settings)
    local.__dict__["manager"] = harness.manager  # reading all tasks takes seconds
    model = judged(run.parent / "base")
    loaded, tokenizer = model.load(torch.float32, CPU), model.load_tokenizer()
    mmlu = local.prepare("mmlu")
    assert len(mmlu.tasks) == 57
    few = type(mmlu)("mmlu", mmlu.tasks[:3], mmlu.by_size)
    (score,) = local.run(few, loaded, tokenizer)
    assert (score.metric, len(score.sums)) == ("acc", 3)
    found = local.run(local.prepare("hellaswag"), loaded, tokenizer)
    assert [one.metric for one in found] == ["acc", "acc_norm"]


@pytest.mark.timeout(1300)  # it reads thousands of task files first, which takes a core's seconds
@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_lm_eval_as_typed(kind: str, run: Path, data: Path, tmp_path: Path) -> None:
    """`lm_eval --model hf --model_args pretrained=<export>`, where postshare is not installed."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ours.yaml").write_text(
        "task: ours\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{validation: {data / 'rte' / 'validation.jsonl'}}}}}\n"
        "validation_split: validation\n"
        'doc_to_text: "{{sentence1}}\\nQuestion: {{sentence2}} True or False?\\nAnswer:"\n'
        'doc_to_target: label\ndoc_to_choice: ["True", "False"]\nmetric_list: [{metric: acc}]\n'
    )
    folder = run / "export" / kind
    arguments = f"pretrained={folder},dtype=float32"
    if kind == "compact":
        arguments += ",trust_remote_code=True"
    command = [
        *(sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args", arguments),
        *("--tasks", "ours", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"),
        *("--batch_size", "4", "--output_path", str(tmp_path / "out")),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["ours"]["acc,none"]
    model = judged(folder)
    loaded, tokenizer = model.load(torch.float32, CPU), model.load_tokenizer()
    by_hand = [right_by_hand(loaded, tokenizer, row) for row in QUESTIONS]
    assert found == pytest.approx(sum(by_hand) / len(by_hand))
