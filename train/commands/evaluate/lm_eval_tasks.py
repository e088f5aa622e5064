"""Tasks of lm-eval, the harness the field uses, on models that are in memory.

A task is lm-eval's own: its prompts, its metrics, its number of examples; only its data may come
from a local folder (`train.commands.evaluate.lm_eval_data`). A group, such as mmlu, is one score
over the questions of all its tasks, weighted as the group says.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sa_models.errors import PostshareError
from train.commands.evaluate.lm_eval_data import LocalTask, find_local
from train.evaluation.score import Score, item_hash

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class HarnessSettings:
    """What decides lm-eval's numbers beside model and task.

    Attributes:
        limit: questions of each task, the first ones; None: all.
        fewshot: examples before each question; None: as many as the task says.
        batch_size: requests in a forward.
        data: folder of local data; None: the hub's.
    """

    limit: int | None = None
    fewshot: int | None = None
    batch_size: int = 8
    data: Path | None = None


@dataclass(frozen=True)
class TaskSet:
    """A task, or the tasks of a group, ready to run.

    Attributes:
        by_size: whether every question counts alike, or every task.
    """

    name: str
    tasks: tuple[Any, ...]
    by_size: bool


def require_harness() -> str:
    """lm-eval's version. Raises PostshareError when it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PostshareError(
            "tasks other than perplexity and speed are lm-eval's, which is not installed; run "
            "`pip install 'postshare[eval]'`"
        )
    return metadata.version("lm-eval")


class Harness:
    """lm-eval's tasks by name."""

    def __init__(self, settings: HarnessSettings) -> None:
        require_harness()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it comments on every default
        self.settings = settings

    @cached_property
    def manager(self) -> Any:
        """Reads every task file of lm-eval, which takes seconds."""
        from lm_eval.tasks import TaskManager

        return TaskManager()

    def prepare(self, name: str) -> TaskSet:
        """Build a task with its data.

        Raises:
            PostshareError: there is no such task (the nearest is named), its data cannot be had,
                or lacks the examples that the task puts before each question.
        """
        index = self.manager.task_index
        if name not in index:
            near = difflib.get_close_matches(name, ["perplexity", "speed", *index], n=1)
            hint = f"did you mean {near[0]}?" if near else "`lm_eval --tasks list` lists them"
            raise PostshareError(f"there is no task {name!r}; {hint}")
        if index[name].kind.name == "TAG":
            some = ", ".join(sorted(index[name].tags)[:4])
            raise PostshareError(f"{name} is a tag of several tasks; name them: {some}, ...")
        leaves, by_size = self._leaves(name)
        return TaskSet(name, tuple(self._build(leaf, name) for leaf in leaves), by_size)

    def _leaves(self, name: str) -> tuple[list[str], bool]:
        """The tasks of a task, group or tag, and whether they are weighted by their size."""
        entry = self.manager.task_index[name]
        kind = entry.kind.name
        if kind == "TAG":
            return sorted(entry.tags), True
        if kind != "GROUP":
            return [name], True
        found: list[str] = []
        for child in _listed(entry.cfg["task"]):
            if not isinstance(child, str) or child not in self.manager.task_index:
                raise PostshareError(
                    f"{name} is a group with tasks of its own making, which are not compared here; "
                    "name single tasks, or use `lm_eval`"
                )
            found += self._leaves(child)[0]
        rules = _listed(entry.cfg.get("aggregate_metric_list") or [])
        return found, all(rule.get("weight_by_size", True) for rule in rules)

    def _build(self, leaf: str, group: str) -> Any:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import (
            load_yaml,
        )  # private: the range in pyproject is narrow

        entry = self.manager.task_index[leaf]
        if entry.kind.name != "TASK":
            raise PostshareError(f"{leaf} is a task in Python, not compared here; use `lm_eval`")
        config = dict(load_yaml(entry.yaml_path, resolve_func=True))
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        shots = self.settings.fewshot
        if shots is not None:
            config["num_fewshot"] = shots
        local = find_local(self.settings.data, leaf, group, config.get("dataset_name"))
        where = config.get("dataset_path")
        if local is not None:
            config = _with_local_data(config, local)
        try:
            return ConfigurableTask(config=config)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise _no_data(leaf, group, str(where), local, error) from error

    def run(
        self, tasks: TaskSet, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[Score]:
        """The scores of one model: one for each metric (and filter) of the task."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(
            pretrained=model,
            backend="causal",  # lm-eval does not know the compact class
            tokenizer=tokenizer,
            batch_size=self.settings.batch_size,
        )
        results = simple_evaluate(
            model=lm,
            tasks=list(tasks.tasks),
            num_fewshot=self.settings.fewshot,
            limit=self.settings.limit,
            task_manager=self.manager,
            bootstrap_iters=0,
        )
        shots = {task.config.task: task.config.num_fewshot or 0 for task in tasks.tasks}
        stated = {
            "lm_eval": require_harness(),
            "examples": sorted(set(shots.values())),
            "limit": self.settings.limit,
            "data": "hub" if self.settings.data is None else "local where there is any",
        }
        return _scores(tasks, results, stated)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


# --- data -----------------------------------------------------------------------------------------


def _with_local_data(config: dict[str, Any], local: LocalTask) -> dict[str, Any]:
    """The task's config with local rows; splits that the folder lacks are no longer named."""
    wanted = {key: config[key] for key in SPLIT_KEYS if config.get(key)}
    rows = {split: local.rows(split) for split in set(wanted.values())}
    judged = wanted.get("test_split") or wanted.get("validation_split")
    if judged is None or not rows[judged]:
        raise PostshareError(
            f"{local.folder} has no {judged} data; put {judged}.jsonl there (docs/evaluation.md)"
        )
    examples = wanted.get("fewshot_split") or wanted.get("training_split")
    shots = config.get("num_fewshot") or 0
    if shots and examples is not None and not rows[examples]:
        raise PostshareError(
            f"{config['task']} puts {shots} examples of its {examples} data before each question, "
            f"which {local.folder} lacks; put {examples}.jsonl there, or pass --fewshot 0"
        )
    found = {split: datasets.Dataset.from_list(r) for split, r in rows.items() if r}
    made = config | {key: None for key, split in wanted.items() if split not in found}
    if config.get("fewshot_config") and made.get("fewshot_split") is None:
        made["fewshot_config"] = None

    def read(**options: Any) -> dict[str, datasets.Dataset]:
        return found

    return made | {"custom_dataset": read, "dataset_name": None, "dataset_kwargs": None}


def _no_data(
    leaf: str, group: str, where: str, local: LocalTask | None, error: BaseException
) -> PostshareError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if local is not None:
        return PostshareError(
            f"{local.folder} does not hold what {leaf} reads ({reason}); its columns are those of "
            f"the hub's {where}"
        )
    return PostshareError(
        f"the data of task {leaf} is not on this machine and cannot be fetched ({reason}); run "
        f"once where the hub can be reached (it caches {where}), or put it into FOLDER/{group} "
        "and pass --data FOLDER (docs/evaluation.md)"
    )


# --- scores ---------------------------------------------------------------------------------------


def _scores(tasks: TaskSet, results: dict[str, Any], stated: dict[str, Any]) -> list[Score]:
    names = [task.config.task for task in tasks.tasks]
    keys = [_metrics(results["results"][name]) for name in names]
    common = [key for key in keys[0] if all(key in other for other in keys)]
    aggregate = tasks.tasks[0].aggregation()
    scores = []
    for key in common:
        metric, _, kind = key.partition(",")
        shown = metric if kind == "none" else f"{metric} ({kind})"
        if _is_mean(aggregate.get(metric)):
            scores.append(_mean(tasks, names, results["samples"], metric, kind, shown, stated))
        elif len(names) == 1:
            value = results["results"][names[0]]
            error = value.get(f"{metric}_stderr,{kind}")
            known = float(error) if isinstance(error, float | int) else None
            scores.append(
                Score(tasks.name, shown, "mean", float(value[key]), stderr=known, stated=stated)
            )
    if not scores:
        raise PostshareError(f"{tasks.name} has no metric that can be compared; name single tasks")
    return scores


def _metrics(result: dict[str, Any]) -> list[str]:
    """The keys `metric,filter` of a task's results."""
    return [key for key in result if "," in key and "_stderr," not in key]


def _is_mean(aggregate: Callable | None) -> bool:
    from lm_eval.api.metrics import mean

    return aggregate is mean


def _mean(
    tasks: TaskSet,
    names: Sequence[str],
    samples: dict[str, list[dict[str, Any]]],
    metric: str,
    kind: str,
    shown: str,
    stated: dict[str, Any],
) -> Score:
    """A mean over questions, with what each of them adds."""
    sums, weights, items = [], [], []
    for name in names:
        answered = [sample for sample in samples[name] if sample["filter"] == kind]
        weight = 1.0 if tasks.by_size else 1.0 / len(answered)
        for sample in answered:
            sums.append(float(sample[metric]) * weight)
            weights.append(weight)
            items.append((name, sample["prompt_hash"], sample["target_hash"]))
    return Score.of_items(tasks.name, shown, "mean", sums, weights, item_hash(items), stated)
