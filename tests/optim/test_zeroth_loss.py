"""Tests of losses without gradient for the zeroth-order block.

The first-order block keeps its usual loss.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.support.models import assert_same_bits, bits, build
from tests.support.smooth import (
    Net,
    adapter_of,
    base_of,
    directions_of,
    moved_along,
    optimizer_for,
    rows,
)
from tests.support.trainers import history, trainer_for
from zofo.config.checks import idle_options
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.models.loading import load_model
from zofo.noise.combine import direction
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import Trajectory
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.run.plan import make_plan
from zofo.run.prepare import prepare
from zofo.run.task_trainer import TaskTrainer, build_trainer
from zofo.run.train import resumed_config, train
from zofo.scoring.generate import Writer, writer_for
from zofo.tasks.losses import candidate_scores
from zofo.trainer.mixin import HybridTrainer

QUIET = Console(quiet=True)


# Tests in a custom training loop.


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_a_loss_of_ones_own_moves_the_base_and_not_the_adapter(estimator):
    """The projected gradient equals a difference that is computed by hand on perturbed copies.

    The loss is a float without gradient, and the adapter's step is that of the usual loss.
    """
    net, x, eps = Net(), rows(6), 0.3
    twin, plain = copy.deepcopy(net), copy.deepcopy(net)

    def steps(model):
        return float(torch.floor(20 * model(x).detach()))

    optimizer = optimizer_for(net, estimator=estimator, eps=eps)
    optimizer.step(lambda: net(x), lambda: ZerothLoss(lambda: steps(net)))
    v = directions_of(twin, step=0)
    ahead, behind = (steps(moved_along(twin, v, scale)) for scale in (eps, -eps))
    by_hand = (ahead - steps(twin)) / eps if estimator == "forward" else (ahead - behind) / 2 / eps
    assert by_hand != 0
    assert optimizer.last_step.projected_grad == (pytest.approx(by_hand),)
    assert optimizer.last_step.num_forwards == 2
    moved, start = base_of(net), base_of(twin)
    assert all(not torch.equal(moved[name], start[name]) for name in start)
    optimizer_for(plain).step(lambda: plain(x))
    assert_same_bits(adapter_of(plain), adapter_of(net))


def test_what_evaluations_cost_may_be_known_only_afterwards():
    net, x, spent = Net(), rows(6), [5.0]  # Earlier steps cost these five forwards.

    def closure():
        spent[0] += 1.75
        return net(x)

    optimizer = optimizer_for(net, num_directions=3)
    optimizer.step(lambda: net(x), lambda: ZerothLoss(closure, lambda: spent[0]))
    assert optimizer.last_step.num_forwards == 4 * 1.75


# Tests in a custom trainer.


class Errors(HybridTrainer):
    """The zeroth-order loss is the share of tokens that are not the model's first choice."""

    seen = ()

    def compute_zeroth_loss(self, model, inputs, num_items_in_batch=None):
        self.seen = (*self.seen, (model.training, torch.is_grad_enabled(), len(inputs["labels"])))
        logits = model(input_ids=inputs["input_ids"]).logits
        return 1 - (logits[:, :-1].argmax(-1) == inputs["labels"][:, 1:]).double().mean()


def lively():
    model = build("llama", "lora")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


@pytest.mark.parametrize(("fraction", "num_rows", "cost"), [(1.0, 4, 2.0), (0.5, 2, 1.0)])
def test_a_trainer_of_ones_own(tmp_path, fraction, num_rows, cost):
    changes = {"per_device_train_batch_size": 4, "max_steps": 3, "eps": 0.05, "base_lr": 1e-3}
    models = [lively(), lively()]
    trainer = trainer_for(tmp_path, models[0], cls=Errors, base_batch_fraction=fraction, **changes)
    trainer.train()
    assert trainer.seen[-2:] == ((True, False, num_rows), (True, False, num_rows))
    differences = [s * 0.05 * num_rows * 6 for s in history(trainer, "projected_grad")]
    assert any(differences)
    assert differences == pytest.approx([round(d) for d in differences], abs=1e-6)
    assert history(trainer, "zo_forwards") == [cost, 2 * cost, 3 * cost]
    assert not history(trainer, "signal_to_rounding")
    # With base_lr 0 the adapter takes the same steps as in fo-peft.
    trainer_for(tmp_path, models[1], cls=Errors, **{**changes, "base_lr": 0.0}).train()
    plain = lively()
    trainer_for(tmp_path, plain, **{**changes, "method": "fo-peft"}).train()
    assert_same_bits(bits(models[1]), bits(plain))


def test_a_loss_that_draws_numbers_of_its_own_is_refused(tmp_path):
    class Unsteady(HybridTrainer):
        count = 0

        def compute_zeroth_loss(self, model, inputs, num_items_in_batch=None):
            self.count += 1
            return float(self.count)

    with pytest.raises(UserError, match="compute_zeroth_loss must have no side effects"):
        trainer_for(tmp_path, cls=Unsteady).train()


def test_micro_batches_are_averaged(tmp_path):
    class SameEveryTime(HybridTrainer):
        def compute_zeroth_loss(self, model, inputs, num_items_in_batch=None):
            return model(input_ids=torch.arange(1, 8)[None]).logits.square().mean()

    found = []
    for accumulation in (3, 1):
        changes = {"gradient_accumulation_steps": accumulation, "max_steps": 1, "base_lr": 0.0}
        trainer = trainer_for(tmp_path, build("llama", "lora"), cls=SameEveryTime, **changes)
        trainer.train()
        found += history(trainer, "projected_grad")
    assert abs(found[1]) > 1e-4
    # The mean of three equal losses differs from one of them by rounding only. Dividing by eps
    # enlarges this error.
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# Tests in whole runs.


@pytest.fixture(scope="module")
def data(tmp_path_factory, decoder_folder):
    """Write labelled texts, and prompts with the completions of the untrained model.

    These completions make sure that the F1 score is above 0.
    """
    folder = tmp_path_factory.mktemp("zeroth")
    lines = [f"film {i} is {('great', 'dull')[i % 2]},{i % 2}" for i in range(60)]
    (folder / "a.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    model, tokenizer = load_model(decoder_folder)
    prompts = [f"film {i} is a story" for i in range(60)]
    write = Writer(tokenizer, 4, one_line=True)
    written = write(model, [tokenizer(prompt)["input_ids"] for prompt in prompts])
    pairs = [
        {"prompt": prompt, "completion": f" {text or 'nothing'}"}
        for prompt, text in zip(prompts, written.texts, strict=True)
    ]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def config_for(folder, data, model, score, *more):
    own = (
        ["task=classification", f"task.train={data / 'a.csv'}"]
        if score == "accuracy"
        else [
            "task=completion",
            f"task.train={data / 'b.jsonl'}",
            "task.metric=f1",
            "task.max_new_tokens=4",
        ]
    )
    return load_config(
        overrides=[
            f"model={model}",
            *own,
            f"zo_objective={score}",
            "task.num_dev=6",
            "task.num_test=6",
            "steps=4",
            "eval_every=2",
            "log_every=1",
            "batch_size=4",
            "eps=0.05",
            "base_lr=1e-4",
            f"output_dir={folder}",
            *more,
        ]
    )


class Spied(TaskTrainer):
    """Keeps its first micro-batch and a copy of the model at that moment."""

    first = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.first is None:
            self.first = (copy.deepcopy(model), dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


def spied_step(config, monkeypatch):
    """Return a trainer after one step, its micro-batch, and a function of a scale.

    The function returns the initial model, moved by `scale` along the direction.
    """
    monkeypatch.setattr("zofo.run.task_trainer.TaskTrainer", Spied)
    prepared = prepare(config)
    trainer = build_trainer(
        config,
        prepared.model,
        prepared.rows,
        kind=prepared.splits.kind,
        collator=prepared.collator,
        writer=writer_for(prepared.tokenizer, config.task),
        original_base=dict,
        total_steps=1,
        folder=Path(config.output_dir),
        console=QUIET,
    )
    trainer.args.load_best_model_at_end = False
    trainer.train()
    model, inputs = trainer.first

    def at(scale):
        twin = copy.deepcopy(model)
        blocks = split_parameters(twin)
        with torch.no_grad():
            for name, p in blocks.base.items():
                tensor = blocks.base_index[name]
                v = direction(p.shape, seed=config.seed, step=0, tensor=tensor, index=0)
                p.add_(v, alpha=scale)
        return twin.eval()

    return trainer, inputs, at


@pytest.mark.parametrize("more", [[], ["base_batch_fraction=0.5"], ["estimator=central"]])
def test_the_difference_is_that_of_accuracy(tmp_path, data, decoder_folder, monkeypatch, more):
    config = config_for(tmp_path / "a", data, decoder_folder, "accuracy", *more)
    trainer, inputs, at = spied_step(config, monkeypatch)
    num = 2 if "base_batch_fraction=0.5" in more else 4

    @torch.no_grad()
    def errors(scale):
        right = candidate_scores(at(scale), inputs).argmax(1) == inputs["gold"]
        return 1 - float(right[:num].double().mean())

    values = {scale: errors(scale) for scale in (0.05, 0.0, -0.05)}
    low, width = (-0.05, 0.1) if "estimator=central" in more else (0.0, 0.05)
    by_hand = (values[0.05] - values[low]) / width
    assert by_hand != 0
    assert history(trainer, "projected_grad") == [pytest.approx(by_hand)]
    assert history(trainer, "zo_forwards") == [2 if "estimator=central" in more else num / 4]


def test_the_difference_is_that_of_f1(tmp_path, data, decoder_folder, monkeypatch):
    """The projected gradient is the difference of 1 − F1 between a perturbed copy and the original.

    The cost counts written tokens. The run trains with dropout, but writing text does not use it.
    """
    config = config_for(tmp_path / "a", data, decoder_folder, "f1", "adapter.dropout=0.5")
    trainer, inputs, at = spied_step(config, monkeypatch)
    values, tokens = [], 0
    for scale in (0.05, 0.0):
        written = trainer.writer(at(scale), [row.prompt for row in inputs["examples"]])
        scores = [
            row.answers.f1(text)
            for row, text in zip(inputs["examples"], written.texts, strict=True)
        ]
        values.append(1 - sum(scores) / len(scores))
        tokens += written.num_tokens
    by_hand = (values[0] - values[1]) / 0.05
    assert by_hand != 0
    assert history(trainer, "projected_grad") == [pytest.approx(by_hand)]
    cost = tokens / inputs["input_ids"].numel()
    assert cost > 1.5
    assert history(trainer, "zo_forwards") == [pytest.approx(cost, abs=1e-3)]


@pytest.mark.parametrize("score", ["accuracy", "f1"])
def test_base_lr_zero_is_fo_peft_whatever_the_zeroth_order_follows(
    tmp_path, data, decoder_folder, score
):
    weights = []
    for name, more in (("a", ["base_lr=0"]), ("b", ["method=fo-peft"])):
        config = config_for(
            tmp_path / name, data, decoder_folder, score, "adapter.dropout=0.3", "steps=2", *more
        )
        train(config, console=QUIET)
        weights.append(
            (tmp_path / name / "artifact/adapter/adapter_model.safetensors").read_bytes()
        )
    assert weights[0] == weights[1]


@pytest.mark.parametrize("score", ["accuracy", "f1"])
def test_an_interrupted_run_ends_as_the_uninterrupted(tmp_path, data, decoder_folder, score):
    config = config_for(tmp_path / "a", data, decoder_folder, score, "select_best=false")
    whole = train(config, console=QUIET)
    path = tmp_path / "a" / "artifact" / "base_trajectory.safetensors"
    uninterrupted = Trajectory.load(path)[0]
    assert any(s for row in uninterrupted.updates for s in row[0].projected_grad)
    (tmp_path / "a" / "result.json").unlink()
    shutil.rmtree(tmp_path / "a" / "artifact")
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    rest = train(resumed_config(tmp_path / "a"), resume=tmp_path / "a", console=QUIET)
    assert rest.after == whole.after
    assert rest.cost["forward_equivalents"] == whole.cost["forward_equivalents"]
    assert Trajectory.load(path)[0] == uninterrupted
    planned = make_plan(config).forward_equivalents
    if score == "accuracy":
        assert whole.cost["forward_equivalents"] == planned == 4 * 3
    else:
        assert 4 * 2 < whole.cost["forward_equivalents"] < planned


@pytest.mark.parametrize("method", ["zo-peft", "zo-ft"])
def test_methods_of_the_zeroth_order_alone(tmp_path, data, decoder_folder, method):
    more = [f"method={method}", "adapter_lr=1e-4", "steps=2"]
    config = config_for(tmp_path / "a", data, decoder_folder, "accuracy", *more)
    result = train(config, console=QUIET)
    # The forward pass of the logged loss also gives the accuracy at x.
    assert result.cost["forward_equivalents"] == 4


def test_an_encoder_follows_accuracy(tmp_path, data, encoder_folder):
    config = config_for(tmp_path / "a", data, encoder_folder, "accuracy", "steps=2", "eps=0.3")
    train(config, console=QUIET)
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["projected_grad"] for line in lines if "projected_grad" in line]
    differences = [s * 0.3 * 4 for s in found]
    assert differences == pytest.approx([round(d) for d in differences], abs=1e-6)


# Tests of options that are refused or have no effect.


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["zo_objective=f1"], "zo_objective is f1 and task rotten-tomatoes scores no answers"),
        (["zo_objective=f1", "task=completion"], r"set task\.metric=f1"),
        (["select_by=f1"], "select_by is f1"),
        (["zo_objective=accuracy", "task=squad"], "no candidates to choose from; choose f1"),
        (["zo_objective=accuracy", "task=chat"], "no candidates to choose from; choose loss"),
        (["zo_objective=reward"], "reward names none"),
        (["zo_objective=rewards"], "zo_objective is 'rewards'"),
        (["task=squad", "task.max_new_tokens=2000"], "leaves no room for a prompt"),
        (["task.metric=f1"], "does not use metric"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(overrides=overrides)


@pytest.mark.parametrize("method", ["fo-peft", "fo-ft", "hybrid", "zo-peft", "zo-ft"])
def test_where_it_has_no_effect_it_says_so(method):
    found = idle_options(load_config(overrides=["zo_objective=accuracy", f"method={method}"]))
    expected = [f"zo_objective has no effect with method {method}"]
    assert found == (expected if method.startswith("fo") else [])


def test_answers_may_select_and_move():
    config = load_config(overrides=["task=drop", "zo_objective=f1", "select_by=f1"])
    assert config.task.max_length == 1024
