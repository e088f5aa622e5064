"""Residuals of a run: fitted, healed alone or with the rest, exported, counted, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.export.peft_adapter import insert_, load_adapter, plain_name
from sa_models.materialize.low_rank_residual import Pair, low_rank
from sa_models.materialize.residual_shapes import residual_parameters, residual_shapes
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from sa_models.weights.config_file import read_config
from tests.support import REPOSITORY, demo_runs, tiny
from tests.support.interruption import KilledError, at_step
from train.commands.compare.controls import Target
from train.estimate import parameters as estimate
from train.estimate.llama_shapes import find_shape
from train.evaluation.perplexity import block_losses, perplexity
from train.models.base_model import base_folder
from train.planning.problem import PlanProblem
from train.recipe.recipe import Recipe
from train.stages.pipeline import run
from train.stages.residual import residual_of, trainable
from train.stages.run import Run
from train.stages.start import begin
from train.training.loop import train
from train.training.optimizer import parameter_groups, select_trainable

pytestmark = pytest.mark.usefixtures("sketched")

torch.set_num_threads(1)
DOCS = REPOSITORY / "docs" / "residuals.md"


def recipe(folder: Path, **sections: Any) -> Recipe:
    modules = sorted((REPOSITORY / "sa_models").glob("*.py"))[:6]  # what the demo base has learnt
    own: dict[str, Any] = {
        "plan": {"strategy": "random", "budget": {"ratio": 0.3}, "share": ["q", "v", "o"]},
        "residual": {"rank": 3},
        "train": {"steps": 0, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
        "export": {"dtype": "float32"},
    }
    text = "".join(module.read_text() for module in modules)
    return demo_runs.recipe(folder, text, **(own | sections))


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = recipe(
        tmp_path_factory.mktemp("healed") / "run",
        materialize={"heal_steps": 2, "merge": "mean"},
        train={"steps": 1, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
    )
    run(made)
    return made


def test_healed_exported_and_loaded(healed: Recipe) -> None:
    folder = healed.folder
    first, last = (load_adapter(folder / f) for f in ("residual", "heal/weights/adapter"))
    plan, config = SharingPlan.load(folder / "plan.json"), read_config(base_folder(healed.model))
    assert list(first) == list(last) == list(residual_shapes(plan, config))
    for where, pair in first.items():
        assert not torch.equal(pair.a, last[where].a), where
        assert not torch.equal(pair.b, last[where].b), where
    exported = load_adapter(folder / "export/adapter")
    assert all(torch.equal(x, y) for w in last for x, y in zip(last[w], exported[w], strict=True))
    compact = AutoModelForCausalLM.from_pretrained(folder / "export/compact").eval()
    model = PeftModel.from_pretrained(compact, str(folder / "export/adapter")).eval()
    dense, info = LlamaForCausalLM.from_pretrained(
        folder / "export/dense", output_loading_info=True
    )
    assert not info["missing_keys"]
    ids = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids).logits
        assert float((dense.eval()(ids).logits - found).abs().max()) <= 1e-4
        with model.disable_adapter():
            assert float((model(input_ids=ids).logits - found).abs().max()) > 1e-2
    summary = json.loads((folder / "summary.json").read_text())
    blocks = Run(healed, begin(healed).ranks).blocks[1]
    measured = perplexity(model, blocks, 8, limit=4).perplexity
    assert summary["perplexity"]["post"] == pytest.approx(measured, rel=1e-5)


def test_what_is_stored_is_counted(healed: Recipe) -> None:
    summary = json.loads((healed.folder / "summary.json").read_text())
    compact, adapter = (
        load_file(healed.folder / "export" / kind) for kind in
        ("compact/model.safetensors", "adapter/adapter_model.safetensors")
    )  # fmt: skip
    count = sum(t.numel() for t in adapter.values())
    # 8 heads of 16: 19 units in 7 layers, each of q, v and o 128 x 128 in the dense form.
    assert count == 3 * 256 * 3 * len({name.split(".")[4] for name in adapter})
    parameters = summary["parameters"]
    assert parameters["adapter"] == count
    assert parameters["stored"] == count + sum(t.numel() for t in compact.values())
    saved = 19 * 3 * 16 * 128 - count
    assert parameters["base"] - parameters["stored"] == saved
    assert parameters["stored_ratio"] == pytest.approx(saved / (8 * 4 * 128 * 128))
    file = healed.folder / "export/adapter/adapter_model.safetensors"
    assert summary["bytes"]["adapter"] == file.stat().st_size
    card = (healed.folder / "export/adapter/README.md").read_text()
    assert f"| parameters in this folder | {count:,} |" in card
    plan, config = (
        SharingPlan.load(healed.folder / "plan.json"),
        read_config(base_folder(healed.model)),
    )
    assert residual_parameters(plan, config, 3) == count
    assert Target(plan, config, 1, count).saved_parameters == saved
    assert Target(plan, config, 1, count).heads_of_equal_bytes() == -(-saved // (4 * 16 * 128))
    with pytest.raises(PostshareError, match="take all that the ties save"):
        Target(plan, config, 1, 10**6).heads_of_equal_bytes()
    shape, _ = find_shape(healed.model)
    expected = estimate.residual_parameters(healed.residual, PlanProblem(healed.plan, shape))
    assert count <= expected == 3 * 256 * 3 * 7


def test_without_any_training_it_brings_back_what_ties_lose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, measured = {}, {}
    for rank in (2, 8):
        made = recipe(tmp_path / f"rank-{rank}", residual={"rank": rank})
        run(made)
        summary = json.loads((made.folder / "summary.json").read_text())
        found[rank] = summary["perplexity"]
        fit = json.loads((made.folder / "residual/fit.json").read_text())
        assert all(0 < left < 1 for left in fit["left"].values())
        measured[rank] = fit["perplexity"]
    base, direct = found[2]["base"], found[2]["direct"]
    large, small = (abs(found[rank]["post"] / base - 1) for rank in (8, 2))
    assert large < 0.5 * small < 0.25 * (direct / base - 1)
    # The same models on the calibration text, as they are loaded from the export.
    model = AutoModelForCausalLM.from_pretrained(made.folder / "export/compact")
    blocks = begin(made).blocks[0]
    text = [blocks[len(blocks) * i // 8] for i in range(8)]
    tied = block_losses(model, text, 4).perplexity.perplexity
    assert measured[8]["tied"] == measured[2]["tied"] == pytest.approx(tied, rel=1e-6)
    insert_(model, load_adapter(made.folder / "residual"))
    corrected = block_losses(model, text, 4).perplexity.perplexity
    assert measured[8]["corrected"] == pytest.approx(corrected, rel=1e-6)
    said = capsys.readouterr().out
    for one in measured.values():
        assert f"{one['tied']:.2f} tied, {one['corrected']:.2f} with residuals, untrained\n" in said


def test_residuals_that_do_harm_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Corrections of the wrong sign; on SmolLM2 the right ones do (docs/residuals.md)."""

    def harmful(*arguments: Any) -> Pair:
        pair = low_rank(*arguments)
        return pair._replace(b=-4 * pair.b)

    monkeypatch.setattr("train.stages.residual.low_rank", harmful)
    run(recipe(tmp_path / "run"))
    fit = json.loads((tmp_path / "run/residual/fit.json").read_text())["perplexity"]
    assert fit["corrected"] > fit["tied"]
    assert "they do harm here; compare with a run without `residual`" in capsys.readouterr().out


def test_trained_alone_nothing_else_moves(tmp_path: Path) -> None:
    made = recipe(
        tmp_path / "run",
        residual={"rank": 2, "init": "zero", "train": "residual"},
        materialize={"heal_steps": 2},
    )
    run(made)
    weights = load_file(made.folder / "heal/weights/model.safetensors")
    compact = load_file(made.folder / "export/compact/model.safetensors")
    base = load_file(base_folder(made.model) / "model.safetensors")
    plan = SharingPlan.load(made.folder / "plan.json")
    own = plan.own_units(plan.layout(read_config(base_folder(made.model))))
    for name, value in weights.items():
        assert torch.equal(compact[name], value)
        if ".self_attn." not in name:
            assert torch.equal(value, base[name].float()), name
    layer = max(tie.target[0] for tie in plan.ties)
    rows = torch.cat([torch.arange(16) + 16 * unit for unit in own[layer]["q"]])
    name = f"model.layers.{layer}.self_attn.q_proj.weight"
    assert torch.equal(weights[name], base[name].float()[rows])
    start, end = (load_adapter(made.folder / f) for f in ("residual", "heal/weights/adapter"))
    assert not any(pair.b.any() for pair in start.values())
    assert all(bool(pair.b.any()) for pair in end.values())


def test_a_second_start_does_nothing(healed: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f: f.stat().st_mtime_ns for f in healed.folder.rglob("*.safetensors")}
    monkeypatch.setattr("train.stages.residual.low_rank", lambda *_: pytest.fail("fitted again"))
    monkeypatch.setattr(
        "train.stages.residual.input_moments", lambda *_: pytest.fail("measured again")
    )
    run(healed)
    assert before == {f: f.stat().st_mtime_ns for f in healed.folder.rglob("*.safetensors")}


# --- training -------------------------------------------------------------------------------------


def adapted() -> SharedLlamaForCausalLM:
    dense, plan = tiny.model(), tiny.PLAN
    before = {n: p.detach().double().clone() for n, p in dense.named_parameters()}
    layout = plan.layout(dense.config)
    materialize_(dict(dense.named_parameters()), layout, plan)
    after = {n: p.detach().double() for n, p in dense.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for where in residual_shapes(plan, dense.config):
        name = layout.parameter_name(*where)
        pairs[where] = low_rank(before[name] - after[name], 2, None, generator)
    compact = SharedLlamaForCausalLM.from_materialized(dense, plan)
    insert_(compact, pairs)
    return compact


def test_a_killed_training_resumes_exactly(tmp_path: Path) -> None:
    fields = {"plan": None, "name": "heal", "trainable": ("*",)}
    whole, killed = (tiny.recipe(tmp_path / n, checkpoint_every=2) for n in ("whole", "killed"))
    train(tiny.job(whole, model=adapted(), **fields), whole)

    with at_step(6), pytest.raises(KilledError):
        train(tiny.job(killed, model=adapted(), **fields), killed)
    other = adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)  # all that counts is in the checkpoint
    train(tiny.job(killed, model=other, **fields), killed)
    for file in ("weights/model.safetensors", "weights/adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / n / file) for n in ("whole", "killed"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert tiny.curve(whole.folder) == tiny.curve(killed.folder)


def test_patterns_name_parameters_as_if_there_were_no_residual(tmp_path: Path) -> None:
    model = adapted()
    chosen = select_trainable(model, ("*.q_proj.weight",))
    assert [plain_name(name) for name in chosen] == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    ]
    select_trainable(model, ("*",))
    decayed, kept = parameter_groups(model, 0.1, ["*.q_proj.weight"])
    assert len(kept["params"]) == 2
    assert len(decayed["params"]) == len(list(model.parameters())) - 2
    made = recipe(
        tmp_path / "run",
        residual={"rank": 2, "train": "residual"},
        materialize={"heal_steps": 1},
    )
    chosen = select_trainable(model, trainable(made))
    assert len(chosen) == 2 * len(residual_shapes(tiny.PLAN, model.config))
    assert all(".lora_" in name for name in chosen)


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"plan": {"strategy": "none"}}, "nothing is tied"),
        (
            {"plan": {"strategy": "magnitude", "action": "remove", "budget": {"ratio": 0.2}}},
            "nothing is tied",
        ),
        ({"plan": {"budget": {"parameters": "-5%"}}}, "plan.budget"),
        ({"materialize": {"merge": "absorb"}}, "another gauge"),
        ({"residual": {"rank": 2, "init": "zero"}}, "adds nothing until it is trained"),
        ({"residual": {"rank": 2, "train": "residual"}}, "set materialize.heal_steps"),
        ({"residual": {"rank": 2, "init": "zero", "whiten": False}}, "init zero ignores whiten"),
        (
            {"residual": {"rank": 2, "whiten": False, "calibration_blocks": 9}},
            "remove residual.calibration_blocks",
        ),
        ({"residual": {"rank": 0}}, "residual.rank"),
    ],
)
def test_a_section_without_effect_is_refused(
    sections: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(PostshareError, match=re.escape(says)):
        recipe(tmp_path / "run", **sections)


def test_a_rank_larger_than_the_head_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", residual={"rank": 17})
    with pytest.raises(PostshareError, match="larger than the head of 16 dimensions"):
        run(made)
    assert not made.folder.exists()


def test_an_export_without_fitted_residuals_says_what_to_do(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", residual={"rank": 2})
    begin(made)
    with pytest.raises(PostshareError, match="fit the residuals with `postshare run`"):
        residual_of(Run(made, begin(made).ranks))


def test_the_snippet_of_the_docs_loads_an_export(
    healed: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    run_folder = healed.folder.parent / "runs" / "mine"
    run_folder.parent.mkdir(exist_ok=True)
    run_folder.symlink_to(healed.folder)
    monkeypatch.chdir(healed.folder.parent)
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    ids = torch.randint(3, 500, (1, 8), generator=torch.Generator().manual_seed(0))
    dense = LlamaForCausalLM.from_pretrained(run_folder / "export/dense").eval()
    with torch.no_grad():
        found = scope["model"].eval()(input_ids=ids).logits
        assert float((dense(ids).logits - found).abs().max()) <= 1e-4
