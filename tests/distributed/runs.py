"""Short runs that several backends do like one process; all of a backend are done in one launch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.support import REPOSITORY
from train.recipe.recipe import Recipe, load_recipe

SHORT = (
    "train.steps=3",
    "train.batch_size=8",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.evaluate_every=3",
    "train.checkpoint_every=0",
    "data.sequence_length=64",
    "evaluate.blocks=4",
)
ALONE = "evaluate.continued=false"

CHECKPOINTED = (
    "train.steps=24",
    "train.evaluate_every=0",
    "train.checkpoint_every=5",
    "evaluate.blocks=2",
    ALONE,
)


@dataclass(frozen=True)
class ShortRun:
    """One of `recipes/`, overrides besides `SHORT`, and the launch files that it is run with."""

    recipe: str
    overrides: tuple[str, ...]
    backends: tuple[str, ...]

    def arguments(self, folder: Path) -> list[str]:
        """Of `postshare run`."""
        recipe = str(REPOSITORY / "recipes" / self.recipe)
        return [recipe, *SHORT, *self.overrides, f"output_dir={folder}"]

    def resolved(self, folder: Path) -> Recipe:
        recipe, *overrides = self.arguments(folder)
        return load_recipe(recipe, overrides)


RUNS = {
    "post": ShortRun("demo_postshare.yaml", (), ("ddp", "zero2", "zero3", "fsdp2")),
    # Most of the search is on 64 tokens a block; a pull before healing takes every stage.
    "demo": ShortRun(
        "demo.yaml",
        (
            "recovery=[penalty, heal, distill]",
            "plan.calibration_blocks=2",
            "spans.calibration_blocks=1",
        ),
        ("zero3",),
    ),
    # Chosen by the published rule: nothing is measured but one block's maps.
    "attention-spans": ShortRun(
        "demo_sa.yaml",
        ("spans.strategy=late", "spans.calibration_blocks=1", ALONE),
        ("ddp", "zero3"),
    ),
    # Keys and values of a layer below, the leader's their mean; ties and pooled heads besides.
    "kv-spans": ShortRun(
        "demo_sa.yaml",
        (
            "spans={spans: [{leader: 2, followers: [3, 5], share: kv},"
            " {leader: 6, followers: [7]}]}",
            "heads.kv_heads=4",
            "plan={budget: {ratio: 0.2}, share: [q, k, v, o]}",
            ALONE,
        ),
        ("ddp", "zero3"),
    ),
    "healed": ShortRun("demo_postshare.yaml", ("materialize.heal_steps=2", ALONE), ("fsdp2",)),
    # Which ZeRO-3, too, reads from files.
    "residual": ShortRun(
        "demo_postshare.yaml", ("materialize.heal_steps=2", "residual.rank=4", ALONE), ("zero3",)
    ),
    # What a training that is killed must end as.
    "checkpointed": ShortRun("demo_postshare.yaml", CHECKPOINTED, ("ddp",)),
    "merged": ShortRun(
        "demo_postshare.yaml",
        (
            "materialize={merge: least_squares, calibration_blocks: 3, heal_steps: 2}",
            "train.steps=1",
            "train.batch_size=4",
            "train.warmup_steps=0",
            ALONE,
        ),
        ("zero3",),
    ),
    # Factors of several layers, whole (DDP) or split up.
    "basis": ShortRun(
        "demo_postshare.yaml",
        (
            "plan={strategy: basis, budget: {parameters: -10%}}",
            "penalty={}",
            "materialize={heal_steps: 3, calibration_blocks: 2}",
            "train.steps=0",
            "train.batch_size=4",
            "train.warmup_steps=0",
            ALONE,
        ),
        ("ddp", "zero3", "fsdp2"),
    ),
}


def names_of(config: str) -> list[str]:
    """The runs of a launch file."""
    return [name for name, run in RUNS.items() if config in run.backends]


def by_run(output: str) -> dict[str, str]:
    """What all ranks have printed of each run; every line begins with its rank."""
    found: dict[str, list[str]] = defaultdict(list)
    now: dict[str, str] = {}
    for line in output.splitlines():
        rank, _, text = line.partition(":")
        if text.startswith("run "):
            now[rank] = text.removeprefix("run ")
        found[now.get(rank, "")].append(text)
    return {name: "\n".join(lines) for name, lines in found.items()}
