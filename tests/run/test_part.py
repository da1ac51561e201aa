"""Tests of the loss difference on a part of the batch in a task run.

They cover the options, the shares of the loss, the cost, and resuming.
"""

from __future__ import annotations

import shutil
from itertools import combinations

import pytest
import torch
from rich.console import Console

from tests.support.models import build
from zofo.config.checks import idle_options
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.optim.trajectory import Trajectory
from zofo.run.cost import forward_equivalents
from zofo.run.plan import make_plan
from zofo.run.train import resumed_config, train
from zofo.tasks.encode import Collator, Encoded
from zofo.tasks.losses import first_examples, objective_losses

QUIET = Console(quiet=True)


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


def encoded(kind, num=5):
    """Return examples of several lengths."""
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
    """The mean of the shares is the loss.

    A part of the batch that is evaluated alone has the same shares.
    """
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
        # The backward pass of an adapter in the last of two layers passes half of them.
        ("decoder_folder", ["adapter.layers=last 1"], 2.0),
        ("decoder_folder", ["num_directions=3", "base_batch_fraction=0.25"], 2.75),
        ("encoder_folder", [], 3.0),  # This encoder has dropout of its own.
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
        (["base_batch_fraction=0.3"], False, 23.75),  # The part has 3 of 8 rows.
        (["base_batch_fraction=0.5", "base_every=4"], False, 21.5),
        (["base_batch_fraction=1"], True, 30),
    ],
)
def test_forward_equivalents(overrides, again, cost):
    assert forward_equivalents(load_config(overrides=overrides), 10, part_again=again) == cost
