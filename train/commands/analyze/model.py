"""The subject of `postshare analyze`: a model with every unit in its place, and blocks of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.modeling import SharedLlamaForCausalLM, compact_config
from sa_models.plan import SharingPlan, Unit
from sa_models.weights.compact_folder import ExpandedFolder, open_weights
from sa_models.weights.safetensors_folder import WeightsFolder
from train.common.run_files import RECIPE_FILE
from train.evaluation import sliding_perplexity
from train.evaluation.models import Judged, export_of, find_models
from train.models.base_model import load_dense


def find_model(argument: str) -> Judged:
    """The model that the argument names; of a run, the export that is its model.

    Raises:
        PostshareError: it names nothing, a run without an export, or a model of another
            architecture.
    """
    folder = Path(argument).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        return find_models([argument])[0]
    export = export_of(folder)
    if export is None:
        raise PostshareError(
            f"{folder} has no export yet; go on with `postshare run {folder / RECIPE_FILE}`, or "
            "name its base model"
        )
    return find_models([str(export)])[0]


@dataclass(frozen=True)
class Weights:
    """The dense weights of a folder, read part by part.

    Projections that followers of spans do not have are read as zeros, as removed units are.
    """

    reader: WeightsFolder | ExpandedFolder
    layout: HeadLayout
    plan: SharingPlan

    @classmethod
    def open(cls, folder: Path) -> Weights:
        reader = open_weights(folder)
        plan = reader.plan if isinstance(reader, ExpandedFolder) else SharingPlan()
        return cls(reader, HeadLayout.from_config(reader.config), plan)

    def slice(self, name: str) -> torch.Tensor:
        """See :class:`~sa_models.scores.weight_cosine.Reader`."""
        where = HeadLayout.parse_name(name)
        if where is not None and where in self.plan.absent():
            return torch.zeros(self.layout.shape(where[1]))
        if isinstance(self.reader, ExpandedFolder):  # whose slices are of whole units only
            return self.reader.read(name)
        return self.reader.slice(name)

    def absent_units(self) -> frozenset[Unit]:
        """Units without weights of their own: removed, or of a layer that follows another."""
        followers = self.plan.leader_of()
        every = {(layer, u) for layer in followers for u in range(self.layout.units)}
        return frozenset(every | set(self.plan.removed))


def load_expanded(weights: Weights, folder: Path) -> LlamaForCausalLM:
    """A folder's model in fp32 on the CPU, where every unit has the weights that it uses.

    Stock but for spans; removed units are zeros.
    """
    reader = weights.reader
    if isinstance(reader, WeightsFolder):
        return load_dense(folder, "sdpa").eval()
    structure = reader.plan.structure()
    model: LlamaForCausalLM
    if structure.spans:
        model = SharedLlamaForCausalLM(compact_config(reader.config, structure))
    else:
        model = LlamaForCausalLM(reader.config)
    model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name))
    return model.eval()


def cut_blocks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> list[dict[str, torch.Tensor]]:
    """The first blocks of a text: int64 (1, length) each, texts one after the other.

    Every text begins with BOS (EOS where the tokenizer has none). No more is read than is needed.

    Raises:
        PostshareError: there is not one whole block; or a tokenizer has no token to begin with.
    """
    tokens: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        tokens += sliding_perplexity.encode(tokenizer, [text])[0]
        if len(tokens) >= count * length:
            break
    if len(tokens) < length:
        raise PostshareError(
            f"the text is too short: {len(tokens)} tokens, and a block takes {length}; give a "
            "longer one, or lower --context"
        )
    found = min(count, len(tokens) // length)
    rows = torch.tensor(tokens[: found * length]).view(found, 1, length)
    return [{"input_ids": row} for row in rows]
