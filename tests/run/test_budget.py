"""A run with `adapter.budget` is the run that names the modules which the budget chose."""

import io
import json
import shutil

import pytest
import torch
from peft import PeftConfig
from rich.console import Console

from tests.run.test_train import config_for
from tests.run.test_train import reviews as reviews
from tests.support.models import assert_same_bits
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.models.budget import adapter_parts
from zofo.run.cost import forward_equivalents
from zofo.run.plan import make_plan
from zofo.run.prepare import prepare
from zofo.run.resume import resumed_config
from zofo.run.train import train
from zofo.saved.artifact import load

QUIET = Console(quiet=True)
# LoRA of rank 2 on 32 × 32: 128 parameters in each of q_proj and v_proj of two layers.
BUDGET = ("adapter.r=2", "adapter.budget=300", "adapter.budget_batches=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, reviews, decoder_folder):
    folder = tmp_path_factory.mktemp("budget")
    console = Console(record=True, width=100, file=io.StringIO())
    config = config_for(folder / "run", reviews, decoder_folder, *BUDGET)
    return config, train(config, console=console), console.export_text()


def test_a_run_with_a_budget_is_the_run_with_its_modules(finished, tmp_path):
    config, result, shown = finished
    saved = load_config(result.folder / "run.yaml")
    modules = saved.adapter.modules
    assert len(modules) == 2
    assert saved.adapter.budget == 300
    choice = json.loads((result.folder / "modules.json").read_text())
    assert [p["module"] for p in choice["places"] if p["is_kept"]] == modules
    assert (choice["num_parameters"], choice["forward_equivalents"]) == (256, 4)
    assert "256 parameters in 2 of 4 modules" in shown
    assert "share of importance" in shown

    named = saved.adapter.model_copy(
        update={"budget": None, "modules": None, "targets": modules, "budget_batches": 16}
    )
    again = saved.model_copy(update={"output_dir": str(tmp_path / "named"), "adapter": named})
    plain = train(again, console=QUIET)
    assert plain.after == result.after
    models = [dict(load(f).model.named_parameters()) for f in (result.folder, plain.folder)]
    assert_same_bits(*models)
    assert not (plain.folder / "modules.json").exists()
    # The cost of the choice is in the result, in the curve and in the plan.
    assert result.cost["forward_equivalents"] == plain.cost["forward_equivalents"] + 4
    lines = [json.loads(x) for x in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["forward_equivalents"] == result.cost["forward_equivalents"]
    assert result.cost["forward_equivalents"] == forward_equivalents(config, 6)
    # peft loads the artefact as ever, because its file names the modules.
    stored = PeftConfig.from_pretrained(result.folder / "artifact" / "adapter")
    assert stored.target_modules == set(modules)


def test_a_resumed_run_keeps_its_modules_and_ends_with_the_same_bits(finished, tmp_path):
    config, result, _ = finished
    folder = tmp_path / "run"
    shutil.copytree(result.folder, folder)
    for name in ("result.json", "modules.json"):
        (folder / name).unlink()
    for name in ("artifact", "checkpoint-6"):
        shutil.rmtree(folder / name)
    # The configuration of the user still asks for a choice, and the run has made it.
    (tmp_path / "mine.yaml").write_text(config.to_yaml())
    again = resumed_config(folder, tmp_path / "mine.yaml")
    assert again.adapter.modules == load_config(folder / "run.yaml").adapter.modules
    resumed = train(again, resume=folder, console=QUIET)
    assert resumed.after == result.after
    assert resumed.cost["forward_equivalents"] == result.cost["forward_equivalents"]
    assert not (folder / "modules.json").exists(), "nothing was measured again"
    models = [dict(load(f).model.named_parameters()) for f in (result.folder, folder)]
    assert_same_bits(*models)
    with pytest.raises(UserError, match=r"adapter.modules need 512 parameters .* leave"):
        prepare(load_config(folder / "run.yaml", ["adapter.r=4"]))
    with pytest.raises(UserError, match=r"adapter.budget: 300 -> 600"):
        resumed_config(folder, None, ["adapter.budget=600"])


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("base", ["decoder_folder", "encoder_folder"])
def test_the_choice_is_within_the_budget_and_repeats(request, tmp_path, reviews, kind, base):
    more = ("adapter.targets=all-linear", "adapter.budget_batches=1", f"adapter={kind}")
    folder = request.getfixturevalue(base)
    config = config_for(tmp_path / "run", reviews, folder, "adapter.budget=700", *more)
    state = torch.get_rng_state()
    one, two = prepare(config), prepare(config)
    assert torch.equal(state, torch.get_rng_state())
    parts = adapter_parts(one.model)
    assert list(parts) == one.choice.modules == two.choice.modules
    size = sum(p.numel() for part in parts.values() for p in part)
    assert 0 < size <= 700
    assert size == one.choice.num_parameters
    assert all(p.grad is None for p in one.model.parameters())


def test_a_plan_counts_no_less_than_the_run(finished):
    config, result, _ = finished
    plan = make_plan(config.model_copy(update={"output_dir": None}))
    assert plan.num_parameters["adapter"] == ("first", 256, 256)
    assert plan.forward_equivalents == result.cost["forward_equivalents"]
    (note,) = [note for note in plan.notes if "adapter.budget" in note]
    assert "at most 300 of the 512 parameters in 4 modules" in note


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ("adapter.budget=100",),
            "budget is 100, and the smallest of the 4 modules .* at least 512",
        ),
        (("adapter.budget=0",), "adapter.budget is 0"),
        (("adapter.budget=99", "adapter=prompt"), "a prompt sits in no modules .* choose .*lora"),
        (("adapter.budget=99", "adapter.config_file=a.json"), "leave budget out"),
        (("adapter.modules=[a]",), "without adapter.budget"),
        (
            ("adapter.budget=99", "method=zo-peft", "zo_objective=reward", "reward=json"),
            "reads none; leave it out",
        ),
    ],
)
def test_a_wrong_budget_is_one_error_before_any_work(
    tmp_path, reviews, decoder_folder, options, problem
):
    with pytest.raises(UserError, match=problem):
        train(config_for(tmp_path / "run", reviews, decoder_folder, *options), console=QUIET)
    assert not (tmp_path / "run").exists()
