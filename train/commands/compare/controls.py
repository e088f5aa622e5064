"""The controls of `postshare compare`: what else the same tokens and bytes could have bought.

Each control is the recipe with other sections, so that model, data, optimizer, schedule and
evaluation are the same, and trains on as many tokens as the recipe does, healing included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import SharingPlan
from sa_models.savings import llama_parameters
from sa_models.search.budget import Counted, amount_of_share, parse_share, share_of
from train.common.run_files import COMPARED_RECIPE
from train.planning.basis import saving_plan
from train.recipe.recipe import Recipe, validate


@dataclass(frozen=True)
class Target:
    """What the recipe's own plan comes to, which the controls are given as well.

    Attributes:
        config: of the base model.
        steps: optimizer steps, healing included.
        residual: parameters of the recipe's residuals, which its plan saves less.
    """

    plan: SharingPlan
    config: Any
    steps: int
    residual: int = 0

    @property
    def layout(self) -> HeadLayout:
        return HeadLayout.from_config(self.config)

    @property
    def saved_parameters(self) -> int:
        saved = self.plan.savings(self.config).removed_parameters - self.residual
        if saved <= 0:
            raise PostshareError(
                f"compare: residuals of {self.residual:,} parameters take all that the ties save; "
                "lower residual.rank"
            )
        return saved

    def heads_of_equal_bytes(self) -> int:
        """Heads whose removal saves no fewer parameters than the plan: whole units, rounded up.

        Rounded against the plan: a control of rounded-down size would keep more than it may.
        """
        unit = sum(self.layout.unit_parameters(p) for p in PROJECTIONS)
        return -(-self.saved_parameters // unit) * self.layout.heads_per_unit

    @property
    def saved_cache(self) -> int:
        """Elements of the KV cache of a token."""
        savings = self.plan.savings(self.config)
        return savings.base_cache - savings.stored_cache

    def tied_heads(self) -> int:
        return self.plan.savings(self.config).tied_heads


@dataclass(frozen=True)
class Control:
    """One row of the comparison.

    Attributes:
        what: a few words for the table.
        changes: sections of the recipe that replace its own (None: the section's default), for a
            seed; None where the control does not exist for this recipe, see `why_not`.
    """

    name: str
    what: str
    changes: Callable[[Recipe, Target, int], dict[str, Any] | None]
    why_not: str = ""


def _healed(recipe: Recipe, target: Target) -> dict[str, Any]:
    """All steps after the change, none before it: no penalty leads to a removed unit."""
    rate = recipe.train.learning_rate
    kept = recipe.materialize.model_dump(include={"reconstruct", "calibration_blocks"})
    healing = {"heal_steps": target.steps, "heal_learning_rate": rate}
    return {
        "train": {"steps": 0, "epochs": None},
        "materialize": (kept if recipe.materialize.reconstruct else {}) | healing,
        "penalty": None,
        "residual": None,
        "spans": None,
        "heads": None,
    }


def _basis(recipe: Recipe, target: Target, seed: int) -> dict[str, Any] | None:
    """All that the plan leaves of q, k and v for the factors; the other weights stay."""
    saved = target.saved_parameters
    if target.plan.basis is not None or saving_plan(target.config, saved) is None:
        return None
    changes = _healed(recipe, target)
    # As many blocks as the recipe's own reconstruction reads.
    text = {"calibration_blocks": recipe.materialize.calibration_blocks}
    share = share_of(saved, llama_parameters(target.config))
    return {
        **changes,
        "materialize": {**text, **changes["materialize"], "reconstruct": False},
        "plan": {"strategy": "basis", "budget": {"parameters": share}},
    }


def _heads(recipe: Recipe, target: Target, seed: int) -> dict[str, Any] | None:
    """The best that strategy auto finds where cache and time count as well as bytes."""
    if target.plan.basis is None or recipe.plan.strategy != "auto":
        return None
    plan = recipe.plan.model_dump(mode="json", exclude_unset=True)
    return {"plan": plan | {"objective": "all"}}


def _random_pairs(recipe: Recipe, target: Target, seed: int) -> dict[str, Any] | None:
    if not target.tied_heads() or recipe.plan.strategy == "random":
        return None
    budget = {"heads": target.tied_heads()}
    return {"plan": {**_share(recipe), "strategy": "random", "seed": seed, "budget": budget}}


def _share(recipe: Recipe) -> dict[str, Any]:
    return {"share": list(recipe.plan.share), "skip_layers": list(recipe.plan.skip_layers)}


def _pruned(strategy: str) -> Callable[[Recipe, Target, int], dict[str, Any]]:
    def changes(recipe: Recipe, target: Target, seed: int) -> dict[str, Any]:
        plan: dict[str, Any] = {
            "strategy": strategy,
            "action": "remove",
            "budget": {"heads": target.heads_of_equal_bytes()},
            "skip_layers": [],
        }
        if strategy == "random":
            plan["seed"] = seed
        return {**_healed(recipe, target), "plan": plan}

    return changes


def _dropped(counted: Counted) -> Callable[[Recipe, Target, int], dict[str, Any] | None]:
    """As many whole layers of attention as save no less than the plan, of all but the first."""

    def changes(recipe: Recipe, target: Target, seed: int) -> dict[str, Any] | None:
        config = target.config
        base = SharingPlan().savings(config)
        in_cache = counted == "cache"
        saved = target.saved_cache if in_cache else target.saved_parameters
        if saved <= 0:
            return None
        share = share_of(saved, base.base_cache if in_cache else base.base_parameters)
        amount = amount_of_share(counted, parse_share(share), base, target.layout, PROJECTIONS)
        if amount.actions("drop") >= target.layout.layers:
            return None
        plan: dict[str, Any] = {
            "strategy": "loss",
            "action": "drop",
            "budget": {counted: share},
            "skip_layers": [],
        }
        if recipe.plan.measures:
            plan["calibration_blocks"] = recipe.plan.calibration_blocks
        return {**_healed(recipe, target), "plan": plan}

    return changes


def _pooled(recipe: Recipe, target: Target, seed: int) -> dict[str, Any] | None:
    """KV heads of the number whose pooling saves most nearly what the plan saves."""
    layout = target.layout
    fitting = [n for n in range(1, layout.kv_heads) if layout.kv_heads % n == 0]
    if not fitting:
        return None
    saved = {n: SharingPlan(kv_heads=n).savings(target.config).removed_parameters for n in fitting}
    nearest = min(fitting, key=lambda n: abs(saved[n] - target.saved_parameters))
    return {
        **_healed(recipe, target),
        "train": {"steps": target.steps, "epochs": None},
        "materialize": None,
        "plan": {"strategy": "none"},
        "heads": {"kv_heads": nearest},
        "export": {"formats": ["dense"]},
    }


CONTROLS = {
    control.name: control
    for control in (
        Control(COMPARED_RECIPE, "as given", lambda recipe, target, seed: {}),
        Control(
            "random-pairs",
            "as given, but random pairs",
            _random_pairs,
            "the recipe ties nothing, or ties random pairs itself",
        ),
        Control(
            "heads",
            "as given, but plan.objective is all: heads and layers that need not be computed",
            _heads,
            "strategy auto has not chosen Basis Sharing",
        ),
        Control("pruned-random", "random units removed, healed", _pruned("random")),
        Control("pruned-magnitude", "units of smallest norm removed, healed", _pruned("magnitude")),
        Control(
            "pruned-gradient",
            "units of smallest |w . dL/dw| removed (LLM-Pruner, attention only), healed",
            _pruned("gradient"),
        ),
        Control(
            "drop-attention",
            "whole layers of attention dropped where the loss rises least (LLM-Drop), healed",
            _dropped("parameters"),
            "the plan saves more than all layers of attention but the first",
        ),
        Control(
            "drop-attention-cache",
            "the same at the recipe's cache",
            _dropped("cache"),
            "the plan saves no cache, or more than all layers of attention but the first",
        ),
        Control("pooled", "KV heads mean-pooled (GQA), trained", _pooled, "one KV head a layer"),
        Control(
            "basis",
            "q, k, v of 2 layers on one basis (Basis Sharing, attention only), trained",
            _basis,
            "the plan is Basis Sharing itself, or saves more than factors of q, k and v can",
        ),
    )
}


def variant(
    control: Control, recipe: Recipe, target: Target, seed: int, folder: str
) -> Recipe | None:
    """The recipe of one control and seed; None where the control does not exist.

    Args:
        seed: added to the recipe's own: data order and random choices.

    Raises:
        PostshareError: the changed recipe is not a valid one.
    """
    changes = control.changes(recipe, target, seed)
    return None if changes is None else changed(recipe, control.name, changes, seed, folder)


def changed(recipe: Recipe, name: str, changes: dict[str, Any], seed: int, folder: str) -> Recipe:
    """The recipe with other sections, as the run of a control; see :attr:`Control.changes`.

    A control has no GGUF file, of which nothing is compared.
    """
    value = recipe.model_dump(mode="json", exclude_unset=True)
    for section, change in changes.items():
        if change is None:
            value.pop(section, None)
        elif section in ("train", "export"):
            value[section] = value.get(section, {}) | change
        else:
            value[section] = change
    export = value.get("export", {})
    if name != COMPARED_RECIPE and "formats" in export:
        export.pop("gguf", None)
        export["formats"] = [kind for kind in export["formats"] if kind != "gguf"]
    value |= {"name": f"{recipe.name}-{name}", "seed": recipe.seed + seed, "output_dir": folder}
    value.setdefault("evaluate", {})["continued"] = name == COMPARED_RECIPE
    return validate(value, origin=f"compare: {name}")


def check(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be compared.

    Raises:
        PostshareError: it shares nothing, has no fixed number of steps, or trains none.
    """
    if not recipe.plans:
        raise PostshareError("compare: the recipe shares nothing; set plan, spans or heads")
    if recipe.steps is None:
        raise PostshareError(
            "compare: all controls take the same steps, and train.epochs does not say how many; "
            "set train.steps (and train.epochs=null)"
        )
    if recipe.steps == 0:
        raise PostshareError(
            "compare: nothing is trained, there are no equal tokens to compare at; set train.steps "
            "or materialize.heal_steps"
        )
