"""`postshare evaluate A B C --tasks ...`: models side by side.

Everything that can be checked is checked before the first model is loaded; then one model after the
other is loaded, and asked only what the cache does not know. Speed is of this moment: it is
measured last, of all models in turn, and never cached.
"""

from __future__ import annotations

import difflib
import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from transformers.utils import logging

from sa_models.errors import PostshareError
from sa_models.export.quantized_folder import is_quantized
from train.commands.evaluate.lm_eval_data import data_hash
from train.commands.evaluate.lm_eval_tasks import Harness, HarnessSettings, TaskSet, require_harness
from train.commands.evaluate.table import save_json, table
from train.common.console import plain_console
from train.common.files import check_writable
from train.common.progress import bar, note
from train.common.run_files import RECIPE_FILE
from train.evaluation import sliding_perplexity
from train.evaluation.cache import ResultCache, default_folder
from train.evaluation.formats import exported_models, format_rows, format_table
from train.evaluation.models import Judged, find_models, open_folder, read_device
from train.evaluation.run_scores import add_scores
from train.evaluation.score import PERPLEXITY, Score, item_hash
from train.evaluation.speed import TASK as SPEED
from train.evaluation.speed import SpeedSettings, device_name, measure_speed
from train.evaluation.text import EvaluationText, find_text

LONGEST = 2048
"""Context of perplexity, where the models have as many positions: what papers report."""

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EvaluateOptions:
    """The command's options, see its help."""

    tasks: tuple[str, ...] = (PERPLEXITY,)
    text: Path | None = None
    context: int | None = None
    stride: int | None = None
    dtype: Dtype | None = None
    device: str | None = None
    output: Path | None = None
    cache: Path | None = None
    harness: HarnessSettings = field(default_factory=HarnessSettings)


def compare_models(arguments: Sequence[str], options: EvaluateOptions) -> None:
    """Evaluate the models, print one table, write the JSON.

    Raises:
        PostshareError: an argument, a task or an option is wrong, or data is missing; nothing has
            been computed then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PostshareError(
            "evaluate compares models in one process; start it with `postshare evaluate`"
        )
    logging.disable_progress_bar()  # transformers' own bars would tear ours
    Comparison(find_models(arguments), arguments, options).run()


@dataclass
class Comparison:
    """One call of the command."""

    models: list[Judged]
    arguments: Sequence[str]
    options: EvaluateOptions
    formats: list[dict[str, Any]] = field(default_factory=list)
    """Of a run alone, where speed was measured."""

    @property
    def run_folder(self) -> Path | None:
        """The run that is evaluated, where it is one and nothing else."""
        run = Path(self.arguments[0]).expanduser()
        return run if len(self.arguments) == 1 and (run / RECIPE_FILE).is_file() else None

    @cached_property
    def device(self) -> torch.device:
        return read_device(self.options.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        name = self.options.dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        return getattr(torch, name)

    @cached_property
    def context(self) -> int:
        """Tokens of a window: one number for all models."""
        readers = {m.name: open_folder(m.folder) for m in self.models}
        positions = {n: int(r.config.max_position_embeddings) for n, r in readers.items()}
        shortest = min(positions, key=lambda name: positions[name])
        chosen = self.options.context or min(LONGEST, positions[shortest])
        if chosen > positions[shortest]:
            raise PostshareError(
                f"--context {chosen}: {shortest} has {positions[shortest]} positions; lower it"
            )
        return chosen

    @cached_property
    def text(self) -> EvaluationText:
        return find_text(self.options.text, self.arguments)

    @cached_property
    def harness(self) -> Harness:
        return Harness(self.options.harness)

    @cached_property
    def speed(self) -> SpeedSettings:
        settings = SpeedSettings()
        if self.context <= settings.new_tokens:
            raise PostshareError(
                f"speed decodes {settings.new_tokens} tokens after a prompt, and a model has only "
                f"{self.context} positions; remove speed from --tasks"
            )
        return SpeedSettings(prompt=min(settings.prompt, self.context - settings.new_tokens))

    def run(self) -> None:
        check_options(self.options)
        _ = self.device, self.context
        if SPEED in self.options.tasks:
            _ = self.speed
            refuse_quantized(self.models)
        cache = self._cache()
        results: dict[tuple[str, str], list[Score]] = {}
        keys = {(m.name, t): k for m in self.models for t, k in self._keys(m).items()}
        for at, key in keys.items():
            if (known := cache.read(key)) is not None:
                results[at] = known
        cached = len(results)
        ready = {
            task: self.harness.prepare(task)
            for task in self.options.tasks
            if task not in (PERPLEXITY, SPEED)
            and any((m.name, task) not in results for m in self.models)
        }
        for model in self.models:
            missing = [t for name, t in keys if name == model.name and (name, t) not in results]
            if not missing:
                continue
            loaded = model.load(self.dtype, self.device)
            for task in missing:
                found = self._ask(model, loaded, task, ready)
                cache.write(keys[model.name, task], found)
                results[model.name, task] = found
            del loaded
            gc.collect()
        if SPEED in self.options.tasks:
            self._measure_speed(results)
        self._conclude(results, cached, len(keys))

    def _cache(self) -> ResultCache:
        """Of the option; results are not worth losing for a default folder that nobody can use."""
        if self.options.cache is not None:
            return ResultCache(self.options.cache)
        try:
            check_writable(folder := default_folder(), "the cache")
        except PostshareError as error:
            note(f"warning: {error}, or pass --cache FOLDER; results are not kept")
            return ResultCache(None)
        return ResultCache(folder)

    def _keys(self, model: Judged) -> dict[str, dict[str, Any]]:
        """Of each task but speed: all that decides this model's result."""
        common = {
            "model": model.identity(),
            "dtype": str(self.dtype),
            "device": device_name(self.device) if self.device.type != "cpu" else "cpu",
            "versions": {n: metadata.version(n) for n in ("torch", "transformers", "tokenizers")},
        }
        return {
            t: {"task": t, **common, **self._of_task(t)} for t in self.options.tasks if t != SPEED
        }

    def _of_task(self, task: str) -> dict[str, Any]:
        if task == PERPLEXITY:
            return {
                "text": self.text.sha256,
                "name": self.text.name,
                "context": self.context,
                "stride": self._stride,
            }
        settings = self.options.harness
        return {
            "lm_eval": require_harness(),
            "limit": settings.limit,
            "fewshot": settings.fewshot,
            "data": self._data_hashes[task],
        }

    @cached_property
    def _data_hashes(self) -> dict[str, dict[str, str]]:
        return {task: data_hash(self.options.harness.data, task) for task in self.options.tasks}

    @property
    def _stride(self) -> int:
        return self.options.stride or self.context

    def _ask(
        self,
        model: Judged,
        loaded: Any,
        task: str,
        ready: dict[str, TaskSet],
    ) -> list[Score]:
        tokenizer = model.load_tokenizer()
        if task != PERPLEXITY:
            note(f"{model.name}: {task}")  # lm-eval has bars of its own
            return self.harness.run(ready[task], loaded, tokenizer)
        texts = sliding_perplexity.encode(tokenizer, self.text.texts)
        with bar(f"{model.name}: {task}") as show:
            size = self.options.harness.batch_size
            losses = sliding_perplexity.window_losses(
                loaded, texts, self.context, self._stride, size, show
            )
        return perplexities(losses, texts, self.text, self.context, self._stride)

    def _measure_speed(self, results: dict[tuple[str, str], list[Score]]) -> None:
        run = self.run_folder
        others = [] if run is None else exported_models(run, self.models)
        every = [*self.models, *others]
        with bar(SPEED) as show:
            measured = measure_speed(every, self.speed, self.dtype, self.device, show)
        for model, scores in zip(self.models, measured, strict=False):
            results[model.name, SPEED] = scores
        if run is not None and self.models[0].name == "base":
            by_folder = {  # without *direct*, which has the folder of the base
                model.folder: scores
                for model, scores in zip(every, measured, strict=True)
                if model.run is None
            }
            self.formats = format_rows(run, by_folder)

    def _conclude(
        self, results: dict[tuple[str, str], list[Score]], cached: int, asked: int
    ) -> None:
        scores = {m.name: [*sizes(m)] for m in self.models}
        for task in self.options.tasks:
            for model in self.models:
                scores[model.name] += results[model.name, task]
        facts = {
            "device": device_name(self.device),
            "dtype": str(self.dtype)[6:],
            "torch": torch.__version__,
            "cached": cached,
            "computed": asked - cached,
        }
        console = plain_console()
        shown, notes = table(scores, facts)
        console.print(shown)
        for line in notes:
            console.print(line, soft_wrap=True)
        if self.formats:
            shown, notes = format_table(self.formats)
            console.print(shown)
            for line in notes:
                console.print(line, soft_wrap=True)
        if self.options.output is not None:
            save_json(self.options.output, scores, facts)
            console.print(f"{self.options.output}")
        self._keep(scores, facts, console)

    def _keep(
        self, scores: dict[str, list[Score]], facts: Mapping[str, Any], console: Console
    ) -> None:
        """Where one run is all that was asked for: its report shows the numbers from then on."""
        run = self.run_folder
        if run is None:
            return
        measured = {k: facts[k] for k in ("device", "dtype", "torch")}
        try:
            file = add_scores(run, scores, measured, self.formats)
        except OSError as error:
            console.print(f"not kept for the report of {run}: {error.strerror}", soft_wrap=True)
            return
        if file is not None:
            console.print(f"{file}: `postshare report {run}` shows it", soft_wrap=True)


def read_options(given: Mapping[str, Any]) -> EvaluateOptions:
    """Options from those of the command line, by their names there; None: not given.

    Raises:
        PostshareError: an unknown dtype.
    """
    dtype = given["--dtype"]
    if dtype is not None and dtype not in get_args(Dtype):
        raise PostshareError(f"--dtype {dtype}: unknown; use {', '.join(get_args(Dtype))}")
    tasks = given["--tasks"]
    return EvaluateOptions(
        tasks=(PERPLEXITY,) if tasks is None else tuple(t.strip() for t in tasks.split(",")),
        text=given["--text"],
        context=given["--context"],
        stride=given["--stride"],
        dtype=dtype,
        device=given["--device"],
        output=given["--output"],
        cache=given["--cache"],
        harness=HarnessSettings(
            limit=given["--limit"],
            fewshot=given["--fewshot"],
            batch_size=given["--batch-size"] or 8,
            data=given["--data"],
        ),
    )


def check_options(options: EvaluateOptions) -> None:
    """Refuse options that would have no effect. Raises PostshareError."""
    tasks = options.tasks
    for task in tasks:
        meant = difflib.get_close_matches(task, (PERPLEXITY, SPEED), n=1, cutoff=0.75)
        if not task or (meant and task not in meant):
            hint = f"did you mean {meant[0]}?" if meant else "name one, such as perplexity"
            raise PostshareError(f"--tasks: there is no task {task!r}; {hint}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise PostshareError("--tasks: name each task once, separated by commas")
    others = [task for task in tasks if task not in (PERPLEXITY, SPEED)]
    unused = {
        "--text": options.text is not None and PERPLEXITY not in tasks,
        "--stride": options.stride is not None and PERPLEXITY not in tasks,
        "--context": options.context is not None and not {PERPLEXITY, SPEED} & {*tasks},
        "--limit": options.harness.limit is not None and not others,
        "--fewshot": options.harness.fewshot is not None and not others,
        "--data": options.harness.data is not None and not others,
    }
    for name, is_unused in unused.items():
        if is_unused:
            raise PostshareError(
                f"{name} has no effect on {', '.join(tasks)}; remove it, or add a task"
            )
    data = options.harness.data
    if data is not None and not data.is_dir():
        raise PostshareError(f"--data {data}: no such folder; correct the path")
    if (file := options.output) is not None:
        if file.is_dir():
            raise PostshareError(f"--output: {file} is a folder; give a file, such as scores.json")
        if not file.parent.is_dir():
            raise PostshareError(f"--output: there is no folder {file.parent}; make it first")
        check_writable(file.parent, "--output")
    if options.cache is not None:
        check_writable(options.cache, "--cache")


def refuse_quantized(models: Sequence[Judged]) -> None:
    """Quality is that of the values that quantized weights stand for; speed is that of kernels.

    Raises:
        PostshareError: a model is quantized.
    """
    for model in models:
        if is_quantized(model.folder):
            raise PostshareError(
                f"{model.name} is quantized, and evaluate computes with the values that its "
                "weights stand for, not with quantized kernels; remove speed from --tasks"
            )


def sizes(model: Judged) -> list[Score]:
    """What the model stores."""
    parameters, size = model.size()
    return [
        Score("model", "parameters", "size", float(parameters)),
        Score("model", "bytes", "size", float(size)),
    ]


def perplexities(
    losses: sliding_perplexity.WindowLosses,
    texts: Sequence[Sequence[int]],
    text: EvaluationText,
    context: int,
    stride: int,
) -> list[Score]:
    """Token-level and word-level perplexity; a window has its tokens' share of the words."""
    tokens = sum(losses.tokens)
    stated = {
        "text": text.name,
        "sha256": text.sha256,
        "context": context,
        "stride": stride,
        "tokens": tokens,
        "words": text.words,
    }
    items = item_hash([context, stride, *texts])
    words = [count * text.words / tokens for count in losses.tokens]
    return [
        Score.of_items(
            PERPLEXITY,
            f"{level}-level",
            "perplexity",
            losses.nats,
            weights,
            items,
            {"level": level, **stated},
        )
        for level, weights in (("token", losses.tokens), ("word", words))
    ]
