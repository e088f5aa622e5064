"""The models that `postshare evaluate` compares: what an argument names, and how it is loaded.

An argument is a run folder (its base, continued, direct and post-trained model), a folder with a
dense Llama or a compact export, quantized or not, or a hub name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sa_models.configuration import SharedLlamaConfig
from sa_models.errors import PostshareError
from sa_models.export.quantized_folder import QuantizedFolder, is_quantized, load_dequantized
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import CompactFolder
from sa_models.weights.companion_files import TOKENIZER_FILES, TOKENIZERS, companions
from sa_models.weights.config_file import GENERATION_CONFIG, read_model_type
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.whole_model import load_whole, open_stored
from train.common.files import file_hash
from train.common.run_files import MERGED, PLAN_FILE, RECIPE_FILE
from train.models.base_model import base_folder, load_model, read_through, tie_model
from train.models.tokenizer import load_tokenizer
from train.recipe.recipe import Recipe, load_recipe
from train.recipe.sections.inputs import ModelSection

KINDS = {"llama": WeightsFolder, SharedLlamaConfig.model_type: CompactFolder}


def open_folder(folder: Path) -> WeightsFolder | QuantizedFolder:
    """The weights of a folder as they are stored. Raises PostshareError as they do."""
    if is_quantized(folder):
        return QuantizedFolder(folder)
    return KINDS[str(read_model_type(folder))](folder)


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of the weights and the config of a model's folder, by the file's name."""
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {file.name: file_hash(file) for file in sorted(files)}


@dataclass(frozen=True)
class Judged:
    """One model.

    Attributes:
        name: as the table shows it.
        folder: config and weights.
        tokenizer: the folder of its tokenizer.
        run: of *direct*: the run whose plan is written into the weights; else None.
        through: weights are rounded to this dtype first, as the run's export stores them.
    """

    name: str
    folder: Path
    tokenizer: Path
    run: Path | None = None
    through: str | None = None

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model in `dtype`, for inference."""
        if self.run is not None:
            recipe = load_recipe(self.run / RECIPE_FILE)
            model: PreTrainedModel = tie_model(
                load_model(self.folder, "sdpa"),
                self._plan(),
                recipe,
                recipe.materialize.remaining_merge,
            )
        elif is_quantized(self.folder):
            model = load_dequantized(self.folder, dtype)
        else:
            through = None if self.through is None else getattr(torch, self.through)
            model = load_whole(open_stored(self.folder), "sdpa", dtype, through)
        for parameter in model.parameters():  # not model.to(dtype): it would round rotary tables
            parameter.data = parameter.data.to(dtype)
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides it
        return model.eval().requires_grad_(False)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self.tokenizer))

    def identity(self) -> dict[str, Any]:
        """What decides its outputs: the hashes of weights, configs and tokenizer files."""
        files = companions(self.tokenizer, (*TOKENIZER_FILES, GENERATION_CONFIG))
        value: dict[str, Any] = {
            "model": weight_hashes(self.folder),
            "tokenizer": {
                f.relative_to(self.tokenizer).as_posix(): file_hash(f) for f in sorted(files)
            },
            "through": self.through,
        }
        if self.run is not None:
            recipe = load_recipe(self.run / RECIPE_FILE)
            leaders = None if recipe.spans is None else recipe.spans.leaders
            value["plan"] = [self._plan().hash(), recipe.materialize.merge, leaders]
        return value

    def size(self) -> tuple[int, int]:
        """Parameters stored, and their bytes as they are stored."""
        reader = open_folder(self.folder)
        names = reader.names()
        if isinstance(reader, QuantizedFolder):
            return sum(torch.Size(reader.shape(n)).numel() for n in names), reader.bytes
        counts = {name: torch.Size(reader.shape(name)).numel() for name in names}
        parameters = sum(counts.values())
        if self.through is None and self.run is None:
            return parameters, sum(count * reader.dtype(n).itemsize for n, count in counts.items())
        width = reader.dtype(names[0]).itemsize
        if self.through is not None:
            width = getattr(torch, self.through).itemsize
        if self.run is not None:
            parameters = self._plan().savings(reader.config).stored_parameters
        return parameters, parameters * width

    def _plan(self) -> SharingPlan:
        assert self.run is not None
        return SharingPlan.load(self.run / PLAN_FILE)


def read_device(name: str | None) -> torch.device:
    """The device of an option `--device`; without one the first GPU, else the CPU.

    Raises:
        PostshareError: torch knows no such device, or this machine has none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise PostshareError(f"--device {name}: {reason}") from None


def find_models(arguments: Sequence[str]) -> list[Judged]:
    """The models that the arguments name, in their order.

    Raises:
        PostshareError: an argument names nothing, a model of another architecture, a run that has
            not finished, or a model that is there already.
    """
    found: list[Judged] = []
    for argument in arguments:
        folder = Path(argument).expanduser()
        if (folder / RECIPE_FILE).is_file():
            prefix = "" if len(arguments) == 1 else f"{argument.rstrip('/')}:"
            found += _run_models(folder, prefix)
        else:
            found.append(_single(argument, folder))
    for at, model in enumerate(found):
        _check(model)
        if model.folder not in {other.folder for other in found[:at]}:
            weights = open_folder(model.folder)
            if isinstance(weights, WeightsFolder):
                read_through(weights)
        for other in found[:at]:
            if (other.folder, other.run) == (model.folder, model.run):
                raise PostshareError(
                    f"{other.name} and {model.name} are one model; give each model once"
                )
    return found


def _single(argument: str, folder: Path) -> Judged:
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = sorted(file.parent for file in folder.glob("*/config.json"))
        cure = f"did you mean {inside[0]}?" if inside else "give a run, or a model's folder"
        raise PostshareError(
            f"{argument} is neither a run folder (no {RECIPE_FILE}) nor a model (no config.json); "
            f"{cure}"
        )
    path = base_folder(ModelSection(path=argument), "model")
    return Judged(argument, path, path)


def _run_models(run: Path, prefix: str) -> list[Judged]:
    recipe = load_recipe(run / RECIPE_FILE)
    base = None if recipe.model.config is not None else base_folder(recipe.model)
    export = export_of(run)
    found = [] if base is None else [Judged("base", base, base)]
    if export is None:
        there = _there(run, base)
        raise PostshareError(
            f"{run} has not finished: there is no export yet; go on with `postshare run "
            f"{run / RECIPE_FILE}`{there}"
        )
    # *Continued* is compared as it would be exported: see train.stages.pipeline.
    stored = str(KINDS[str(read_model_type(export))](export).dtype("model.norm.weight"))[6:]
    if (weights := run / "continued" / "weights").is_dir():
        found.append(Judged("continued", weights, base or export, through=stored))
    if base is not None and (untrained := _untrained(recipe, run, base)) is not None:
        through = None if untrained == base else stored
        found.append(Judged("direct", untrained, base, run=run, through=through))
    if _trains(recipe) or base is None:
        found.append(Judged("post", export, export))
    return [Judged(prefix + m.name, m.folder, m.tokenizer, m.run, m.through) for m in found]


def whole_exports(run: Path) -> tuple[str, ...]:
    """The folders below ``export`` that are the run's model, where they are there.

    With an adapter beside it the compact folder is not: the dense one has it merged.
    """
    return ("dense",) if (run / "export" / "adapter").is_dir() else ("compact", "dense")


def export_of(run: Path) -> Path | None:
    """The export that is a run's model; None where there is none yet.

    Raises:
        PostshareError: only a compact folder with an adapter, which alone is not the model.
    """
    export = next((f for k in whole_exports(run) if (f := run / "export" / k).is_dir()), None)
    if export is None and (run / "export" / "adapter").is_dir():
        raise PostshareError(
            f"{run}: residuals are read from the dense export alone, and there is none; "
            "export it with export.formats=[compact, dense]"
        )
    return export


def _untrained(recipe: Recipe, run: Path, base: Path) -> Path | None:
    """Folder of the weights into which the plan of *direct* is written; None: in no folder."""
    if not recipe.plans:
        return None
    if not recipe.materialize.measures and SharingPlan.load(run / PLAN_FILE).basis is None:
        return base
    written = recipe.train.steps == 0 and not recipe.changes_structure
    return run / MERGED if written else None


def _there(run: Path, base: Path | None) -> str:
    """What an unfinished run has already, as the end of a sentence."""
    there = [] if base is None else [str(base)]
    if (run / "continued" / "weights").is_dir():
        there.append(str(run / "continued" / "weights"))
    return f", or name what there is: {' '.join(there)}" if there else ""


def _trains(recipe: Recipe) -> bool:
    return recipe.train.steps != 0 or recipe.materialize.heal_steps > 0


def _check(model: Judged) -> None:
    """Refuse what cannot be compared, before anything is computed."""
    kind = read_model_type(model.folder)
    if kind not in KINDS:
        raise PostshareError(
            f"{model.name} is a {kind!r} model; evaluate compares Llamas (model_type 'llama') and "
            f"compact exports of postshare ({SharedLlamaConfig.model_type!r})"
        )
    open_folder(model.folder)
    if not any((model.tokenizer / name).is_file() for name in TOKENIZERS):
        raise PostshareError(
            f"{model.tokenizer} has no tokenizer ({', '.join(TOKENIZERS)}); copy the files of its "
            "base model's tokenizer there"
        )
