"""The difference on a part of the batch: unbiased, counted, refused where it means nothing."""

from __future__ import annotations

import copy
import shutil
from itertools import combinations

import pytest
import torch
from rich.console import Console
from trl import DPOConfig, DPOTrainer

from tests.support.models import assert_same_bits, batch_for, bits, build
from tests.support.smooth import Net, base_of, optimizer_for, rows
from tests.support.trainers import Rows, history, plain_options, trainer_for
from tests.trainer.test_trl import preferences, sft, tokenizer
from zofo.config.checks import idle_options
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.optim.batch_part import num_rows_of, split_rows
from zofo.optim.blocks import split_parameters
from zofo.optim.generators import GeneratorState
from zofo.optim.trajectory import Trajectory
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.run.cost import forward_equivalents
from zofo.run.plan import make_plan
from zofo.run.train import resumed_config, train
from zofo.tasks.encode import Collator, Encoded
from zofo.tasks.losses import first_examples, objective_losses
from zofo.trainer.mixin import HybridMixin, HybridOptions, HybridTrainer

QUIET = Console(quiet=True)


def scalar_of(x, chosen=None, *, knows=True, **options):
    """s of one step from a fixed start, on the chosen rows; and the forwards it counted."""
    net = Net()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for p in net.parameters():
            p.data.copy_(torch.randn_like(p))
    part = None
    if chosen is not None:
        taken = x[list(chosen)]
        known = net(taken).detach() if knows else None

        def part():
            return ZerothLoss(lambda: net(taken), len(taken) / len(x), known)

    optimizer = optimizer_for(net, **options)
    optimizer.step(lambda: net(x), part)
    return optimizer.last_step


# The estimate.


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize(
    ("estimator", "eps"), [("forward", 1e-3), ("forward", 0.5), ("central", 1e-3)]
)
def test_the_mean_over_all_parts_is_the_whole(estimator, eps, knows):
    """Exact, whatever eps: the difference of a mean is the mean of the differences."""
    x, options = rows(6), {"estimator": estimator, "eps": eps, "knows": knows}
    whole = scalar_of(x, estimator=estimator, eps=eps)
    for size in (1, 2, 5):
        parts = [scalar_of(x, chosen, **options) for chosen in combinations(range(6), size)]
        scalars = [part.projected_grad[0] for part in parts]
        assert max(scalars) - min(scalars) > 1e-2
        mean = sum(scalars) / len(scalars)
        assert mean == pytest.approx(whole.projected_grad[0], rel=1e-8)
        assert {part.loss for part in parts} == {whole.loss}


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_a_part_that_is_the_whole_gives_the_same_bits(estimator, knows):
    x = rows(6)
    whole = scalar_of(x, estimator=estimator, num_directions=2)
    part = scalar_of(x, range(6), estimator=estimator, num_directions=2, knows=knows)
    assert part.projected_grad == whole.projected_grad


@pytest.mark.parametrize(
    ("estimator", "knows", "cost"),
    [
        ("forward", True, 0.75),
        ("forward", False, 1.0),
        ("central", True, 1.5),
        ("central", False, 1.5),
    ],
)
def test_cost(estimator, knows, cost):
    """Three directions on a quarter of the batch; again unperturbed where that is not known."""
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(len(args[0])) if isinstance(module, Net) else None
    )
    try:
        step = scalar_of(
            rows(8), (0, 1), estimator=estimator, knows=knows, num_directions=3, self_check=False
        )
    finally:
        hook.remove()
    outside = 8 + (2 if knows else 0)  # the pass over the batch; the test's own evaluation
    assert (sum(seen) - outside) / 8 == step.num_forwards == cost


def test_micro_batches_with_parts_add_up():
    x = rows(12)
    net = Net()
    model = copy.deepcopy(net)
    one, many = optimizer_for(net), optimizer_for(model)
    many.zero_grad()
    for micro in x.split(4):
        taken = micro[:2]
        part = ZerothLoss(lambda t=taken: model(t) / 3, 0.5)
        many.accumulate(lambda m=micro: model(m) / 3, lambda part=part: part)
    many.step()
    taken = torch.cat([micro[:2] for micro in x.split(4)])
    one.step(lambda: net(x), lambda: ZerothLoss(lambda: net(taken), 0.5))
    assert many.last_step.projected_grad == pytest.approx(one.last_step.projected_grad)
    assert many.last_step.num_forwards == 3 * one.last_step.num_forwards == 3
    torch.testing.assert_close(base_of(model), base_of(net), rtol=1e-9, atol=1e-12)


def test_with_dropout_both_sides_of_the_difference_have_the_same_masks():
    """Against the difference taken by hand; masks of another pass would be off by hundreds."""
    model = build("llama", "lora", lora_dropout=0.5).train()
    twin = copy.deepcopy(model)
    batch = batch_for("llama", rows=4)
    taken = {key: value[:2] for key, value in batch.items()}
    optimizer = optimizer_for(model, base_lr=0.0)
    torch.manual_seed(11)
    optimizer.step(
        lambda: model(**batch).loss, lambda: ZerothLoss(lambda: model(**taken).loss, 0.5)
    )
    by_hand = optimizer_for(twin, base_lr=0.0).perturbation
    with torch.no_grad():
        torch.manual_seed(11)
        plain = twin(**taken).loss.double()
        torch.manual_seed(11)
        with by_hand.at(1e-3, step=0):
            ahead = twin(**taken).loss.double()
    assert optimizer.last_step.projected_grad == (float((ahead - plain) / 1e-3),)
    assert abs(optimizer.last_step.projected_grad[0]) < 50


def test_generators_know_whether_something_was_drawn():
    state = GeneratorState.capture()
    assert state.is_current()
    torch.nn.functional.dropout(torch.ones(3), 0.5)
    assert not state.is_current()
    state.restore()
    assert state.is_current()
    import random

    import numpy as np

    for draw in (random.random, np.random.rand):
        state = GeneratorState.capture()
        draw()
        assert not state.is_current()
        state.restore()


@pytest.mark.parametrize(
    ("fraction", "num_rows", "expected"),
    [(0.5, 8, 4), (0.5, 7, 4), (0.25, 3, 1), (0.7, 10, 7), (0.01, 5, 1), (1.0, 5, 5), (0.3, 10, 3)],
)
def test_rows_of_a_fraction(fraction, num_rows, expected):
    assert num_rows_of(fraction, num_rows) == expected


# Cutting a batch.


def test_a_batch_is_cut_along_its_rows_and_keeps_its_padding():
    batch = {"input_ids": torch.arange(12).view(3, 4), "use_cache": False, "names": ["a", "b", "c"]}
    first, rest = split_rows({**batch, "labels": None}, 2)
    assert torch.equal(first["input_ids"], batch["input_ids"][:2])
    assert torch.equal(rest["input_ids"], batch["input_ids"][2:])
    assert (first["names"], rest["names"]) == (["a", "b"], ["c"])
    assert first["use_cache"] is False
    assert first["labels"] is None


@pytest.mark.parametrize(
    "value", [torch.zeros(6, 4), torch.zeros(()), {"a": torch.zeros(3)}, [1, 2], torch.zeros(1, 3)]
)
def test_what_has_no_entry_for_each_row_is_refused(value):
    with pytest.raises(UserError, match=r"'odd'.*one entry a row"):
        split_rows({"input_ids": torch.zeros(3, 4), "odd": value}, 2)


# In Trainer.


class Turned(HybridTrainer):
    """Evaluates what batch_part gives for every turn of the batch's rows."""

    gaps = ()

    def batch_part(self, model, inputs, num_items_in_batch, num_first):
        if not self.gaps:
            num_rows = len(inputs["input_ids"])
            with torch.no_grad():
                whole = self._loss_of(model, inputs, num_items_in_batch)
                parts = []
                for turn in range(num_rows):
                    turned = {key: value.roll(turn, 0) for key, value in inputs.items()}
                    part, _ = super().batch_part(model, turned, num_items_in_batch, num_first)
                    parts.append(float(part.closure()))
            self.gaps = (
                sum(parts) / num_rows - float(whole),
                max(parts) - min(parts),
                float(whole),
            )
        return super().batch_part(model, inputs, num_items_in_batch, num_first)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_part_of_a_loss_over_counted_tokens_is_unbiased(tmp_path, accumulation):
    """The rows of `Rows` have different numbers of targets, and so have the micro-batches."""
    trainer = trainer_for(
        tmp_path,
        cls=Turned,
        base_batch_fraction=0.5,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4,
        max_steps=1,
    )
    trainer.train()
    gap, spread, whole = trainer.gaps
    assert whole > 0.5
    assert spread > 1e-2
    assert abs(gap) < 1e-5 * whole


def without_loss_arguments(trainer):
    trainer.model_accepts_loss_kwargs = False
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("change", [lambda t: t, without_loss_arguments])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_trainer_takes_the_difference_on_a_part(tmp_path, accumulation, change, dropout):
    """Sides scaled differently, or with other masks, would give |s| of hundreds and more."""
    changes = {
        "base_batch_fraction": 0.5,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4,
    }
    model = build("llama", "lora", lora_dropout=dropout)
    trainer = change(trainer_for(tmp_path, model, max_steps=3, rows=Rows(24), **changes))
    trainer.train()
    assert all(0 < abs(scalar) < 10 for scalar in history(trainer, "projected_grad"))
    spent = [accumulation * step for step in (1.0, 2.0, 3.0)]  # twice half a forward
    assert history(trainer, "zo_forwards") == spent
    assert history(trainer, "forward_equivalents") == [3 * n for n in spent]


def test_a_batch_of_one_row_is_taken_whole(tmp_path):
    models = [build("llama", "lora") for _ in range(2)]
    for model, fraction in zip(models, (1.0, 0.5), strict=True):
        changes = {"base_batch_fraction": fraction, "per_device_train_batch_size": 1}
        trainer_for(tmp_path, model, **changes).train()
    assert_same_bits(bits(models[0]), bits(models[1]))


def test_base_lr_zero_is_fo_peft_with_a_part_too(tmp_path):
    models = [build("llama", "lora", lora_dropout=0.3) for _ in range(2)]
    for model, changes in zip(
        models, ({"base_lr": 0.0, "base_batch_fraction": 0.5}, {"method": "fo-peft"}), strict=True
    ):
        trainer = trainer_for(tmp_path, model, max_steps=3, **changes)
        torch.manual_seed(5)
        trainer.train()
    adapters = [dict(split_parameters(model).adapter) for model in models]
    assert_same_bits(*adapters)


def test_sft_takes_a_part(tmp_path):
    trainer = sft(
        tmp_path,
        build("llama", "lora"),
        hybrid=HybridOptions(base_lr=1e-3, base_batch_fraction=0.5),
    )
    trainer.train()
    assert all(0 < abs(scalar) < 10 for scalar in history(trainer, "projected_grad"))
    assert history(trainer, "zo_forwards") == [1.0, 2.0, 3.0, 4.0]


# What is refused.


class Contrastive(HybridTrainer):
    """A row's loss depends on the other rows of its batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        first, last = hidden[:, 0], hidden[:, -1]
        scores = torch.nn.functional.normalize(first) @ torch.nn.functional.normalize(last).T
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(first)))


def test_a_loss_that_is_no_mean_over_rows_is_refused(tmp_path):
    changes = {"base_batch_fraction": 0.5, "per_device_train_batch_size": 4}
    with pytest.raises(UserError, match="no mean over rows"):
        trainer_for(tmp_path, cls=Contrastive, **changes).train()


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    class Crossed(HybridTrainer):
        def get_batch_samples(self, *args, **kwargs):
            batches, count = super().get_batch_samples(*args, **kwargs)
            for batch in batches:
                batch["odd"] = torch.zeros(7)
            return batches, count

        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs.pop("odd", None)
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(UserError, match="'odd'"):
        trainer_for(tmp_path, cls=Crossed, base_batch_fraction=0.5).train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_batch_fraction": 0.0}, r"base_batch_fraction is 0\.0"),
        ({"base_batch_fraction": 1.5}, r"base_batch_fraction is 1\.5"),
        ({"base_batch_fraction": float("nan")}, "base_batch_fraction is nan"),
        ({"base_batch_fraction": 0.5, "method": "zo-peft"}, "lower the batch size"),
        ({"base_batch_fraction": 0.5, "sampling": "shuffle-once"}, "'reshuffle'"),
        ({"base_batch_fraction": 0.5, "train_sampling_strategy": "sequential"}, "'random'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        trainer_for(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_samples_that_share_a_row_are_refused(tmp_path, changes):
    options = HybridOptions(base_lr=1e-3, base_batch_fraction=0.5)
    with pytest.raises(UserError, match="packing or padding_free"):
        sft(tmp_path, build("llama", "lora"), hybrid=options, **changes)


def test_dpo_whose_rows_are_pairs_is_refused(tmp_path):
    class HybridDPOTrainer(HybridMixin, DPOTrainer):
        pass

    settings = {"bf16": False, "gradient_checkpointing": False, "precompute_ref_log_probs": True}
    with pytest.raises(UserError, match=r"DPOTrainer.*one sample a row"):
        HybridDPOTrainer(
            model=build("llama", "lora"),
            args=DPOConfig(**plain_options(tmp_path, **settings)),
            train_dataset=preferences(),
            processing_class=tokenizer(),
            hybrid=HybridOptions(base_lr=1e-3, base_batch_fraction=0.5),
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["base_batch_fraction=0"], "base_batch_fraction is 0"),
        (["base_batch_fraction=1.1"], r"base_batch_fraction is 1\.1"),
        (["base_batch_fraction=0.5", "method=zo-ft"], "lower batch_size"),
        (["base_batch_fraction=0.5", "sampling=shuffle-once"], "choose sampling reshuffle"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["method=fo-peft"], "with method fo-peft"),
        (["method=fo-ft"], "with method fo-ft"),
        (["batch_size=1"], "with batch_size 1"),
        ([], None),
    ],
)
def test_where_it_has_no_effect_it_says_so(overrides, warned):
    found = idle_options(load_config(overrides=["base_batch_fraction=0.5", *overrides]))
    assert found == ([f"base_batch_fraction has no effect {warned}"] if warned else [])


# On a task.


def encoded(kind, num=5):
    """Examples of several lengths."""
    generator = torch.Generator().manual_seed(9)

    def tokens(count):
        return tuple(torch.randint(1, 60, (count,), generator=generator).tolist())

    found = []
    for i in range(num):
        length, gold = 3 + i, i % 2
        if kind == "encoder":
            found.append(Encoded((tokens(length),), (), gold))
        elif kind == "one token":
            ends = tuple(((0, length - 1, token),) for token in (7, 9))
            found.append(Encoded((tokens(length),), ends, gold))
        elif kind == "several tokens":
            sizes = (2, 3)
            pairs = tuple(tokens(length + size) for size in sizes)
            ends = tuple(
                tuple((row, length + k, 5 + k) for k in range(size))
                for row, size in enumerate(sizes)
            )
            found.append(Encoded(pairs, ends, gold))
        else:
            ends = tuple((0, length - 1 - k, 5 + k) for k in range(1 + i % 3))
            found.append(Encoded((tokens(length),), (ends,), 0))
    return found


KINDS = ("encoder", "one token", "several tokens", "completion")


@pytest.mark.parametrize("objective", ["candidates", "gold"])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_the_loss(kind, objective):
    """Their mean is the loss; a part of the batch, evaluated alone, has the same."""
    model = build("bert" if kind == "encoder" else "llama", None).eval()
    batch = Collator(0)(encoded(kind))
    with torch.no_grad():
        loss, shares = objective_losses(model, batch, objective)
        assert shares.shape == (5,)
        torch.testing.assert_close(shares.mean(), loss)
        assert float(shares.std()) > 1e-4
        for num in (1, 2, 4, 5):
            part, share = first_examples(batch, num)
            again = objective_losses(model, part, objective)[1]
            torch.testing.assert_close(again, shares[:num], rtol=1e-5, atol=1e-6)
            assert share == num / 5
            assert part["input_ids"].shape[1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_are_unbiased_for_the_loss(kind):
    model = build("bert" if kind == "encoder" else "llama", None).eval()
    examples, collate = encoded(kind), Collator(0)
    with torch.no_grad():
        loss, _ = objective_losses(model, collate(examples))
        parts = []
        for chosen in combinations(range(5), 2):
            order = [*chosen, *(i for i in range(5) if i not in chosen)]
            part, _ = first_examples(collate([examples[i] for i in order]), 2)
            parts.append(objective_losses(model, part)[1].mean())
    torch.testing.assert_close(torch.stack(parts).mean(), loss, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("part") / "a.csv"
    lines = [f"film {i} is {('great', 'dull')[i % 2]},{i % 2}" for i in range(60)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def config_for(folder, reviews, model, *more):
    return load_config(
        overrides=[
            f"model={model}",
            "task=classification",
            f"task.train={reviews}",
            "task.num_dev=10",
            "task.num_test=10",
            "steps=6",
            "eval_every=2",
            "log_every=1",
            "batch_size=4",
            "base_batch_fraction=0.5",
            "base_lr=1e-3",
            f"output_dir={folder}",
            *more,
        ]
    )


@pytest.mark.parametrize(
    ("model", "more", "a_step"),
    [
        ("decoder_folder", [], 2.5),
        ("decoder_folder", ["accumulation=2"], 5.0),
        ("decoder_folder", ["estimator=central"], 3.0),
        ("decoder_folder", ["adapter.dropout=0.3"], 3.0),
        ("decoder_folder", ["num_directions=3", "base_batch_fraction=0.25"], 2.75),
        ("encoder_folder", [], 3.0),  # has dropout of its own
        ("encoder_folder", ["base_every=4"], 14 / 6),
    ],
)
def test_what_a_run_cost_is_what_was_planned(tmp_path, reviews, request, model, more, a_step):
    config = config_for(tmp_path / "run", reviews, request.getfixturevalue(model), *more)
    assert make_plan(config).forward_equivalents == pytest.approx(6 * a_step)
    result = train(config, console=QUIET)
    assert result.cost["forward_equivalents"] == pytest.approx(6 * a_step)
    path, _ = Trajectory.load(tmp_path / "run" / "artifact" / "base_trajectory.safetensors")
    assert all(0 < abs(s) < 50 for row in path.updates for s in row[0].projected_grad)


def test_an_interrupted_run_ends_as_the_uninterrupted(tmp_path, reviews, decoder_folder):
    folder = decoder_folder
    more = ["base_every=2", "adapter.dropout=0.1"]
    whole = train(config_for(tmp_path / "a", reviews, folder, *more), console=QUIET)
    config = config_for(tmp_path / "b", reviews, folder, *more)
    train(config, console=QUIET)
    (tmp_path / "b" / "result.json").unlink()
    shutil.rmtree(tmp_path / "b" / "artifact")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    left = [path.name for path in (tmp_path / "b").glob("checkpoint-*")]
    assert left
    rest = train(resumed_config(tmp_path / "b"), resume=tmp_path / "b", console=QUIET)
    assert rest.after == whole.after
    assert rest.cost["forward_equivalents"] == whole.cost["forward_equivalents"]
    ends = [
        Trajectory.load(tmp_path / name / "artifact" / "base_trajectory.safetensors")[0]
        for name in "ab"
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("overrides", "again", "cost"),
    [
        (["base_batch_fraction=0.5"], False, 25),
        (["base_batch_fraction=0.5"], True, 30),
        (["base_batch_fraction=0.3"], False, 23.75),  # 3 of 8 rows
        (["base_batch_fraction=0.5", "base_every=4"], False, 21.5),
        (["base_batch_fraction=1"], True, 30),
    ],
)
def test_forward_equivalents(overrides, again, cost):
    assert forward_equivalents(load_config(overrides=overrides), 10, part_again=again) == cost
