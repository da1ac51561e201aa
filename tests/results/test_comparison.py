"""Tests of the comparison of methods and of the verdict."""

import math

import pytest

from tests.support.run_folders import write_run
from zofo.results.comparison import compare
from zofo.results.table import read_runs
from zofo.results.verdict import judge


def compared(folder):
    return compare(read_runs([folder]))


def write_pair(folder, gains, *, task="rte", base=0.6, **options):
    """Write a fo-peft run and a hybrid run per seed, whose accuracies differ by the given gain."""
    for seed, gain in enumerate(gains):
        for method, accuracy in (("fo-peft", base), ("hybrid", base + gain)):
            name = f"{task}-{method}-{seed}"
            write_run(
                folder / name, task=task, method=method, seed=seed, accuracy=accuracy, **options
            )


def test_seeds_are_grouped_and_searches_failures_and_repeats_are_not(tmp_path):
    for seed in (2, 0, 1):
        write_run(tmp_path / f"s{seed}", seed=seed, accuracy=0.6 + seed / 100)
    write_run(tmp_path / "search", seed=7, study={"stage": "search"})
    write_run(tmp_path / "broken", seed=8, study={"status": "failed"}, result=False)
    write_run(tmp_path / "t-again", seed=1, accuracy=0.9)
    write_run(tmp_path / "u-scoreless", seed=9, accuracy=None)
    found = compared(tmp_path)
    (group,) = found.groups
    assert group.seeds == (0, 1, 2)
    assert group.runs == ("s0", "s1", "s2")
    assert group.accuracy.value == pytest.approx(0.61)
    assert found.left_out == {
        "t-again": "same configuration and seed as s1",
        "u-scoreless": "its result has no test score",
    }


def test_the_rate_that_stands_for_a_cell_is_chosen_on_dev_not_on_test(tmp_path):
    write_run(tmp_path / "a", base_lr=1e-5, dev=(0.5,), accuracy=0.6)
    write_run(tmp_path / "b", base_lr=1e-4, dev=(0.6,), accuracy=0.9)
    chosen = {g.runs: g.is_chosen for g in compared(tmp_path).groups}
    assert chosen == {("a",): True, ("b",): False}


def test_the_studys_choice_goes_before_the_dev_loss(tmp_path):
    write_run(tmp_path / "a", base_lr=1e-5, dev=(0.5,), study={})
    write_run(tmp_path / "b", base_lr=1e-4, dev=(0.6,), study={"chosen": True})
    chosen = {g.runs: g.is_chosen for g in compared(tmp_path).groups}
    assert chosen == {("a",): False, ("b",): True}


def test_pairs_share_model_task_adapter_optimizer_and_seeds(tmp_path):
    write_run(tmp_path / "h0", seed=0, accuracy=0.7)
    write_run(tmp_path / "h1", seed=1, accuracy=0.8)
    write_run(tmp_path / "p1", method="fo-peft", seed=1, accuracy=0.75)
    write_run(tmp_path / "p2", method="fo-peft", seed=2, accuracy=0.1)
    for i, other in enumerate(
        ({"model": "big"}, {"task": "cb"}, {"adapter": "prompt"}, {"optimizer": "sgd"})
    ):
        write_run(tmp_path / f"o{i}", method="fo-peft", seed=0, accuracy=0.0, **other)
    (pair,) = compared(tmp_path).pairs
    assert pair.difference.seeds == (1,)
    assert pair.values[1] == pytest.approx(0.05)
    assert (pair.hybrid_mean, pair.fo_peft_mean) == (0.8, 0.75)
    assert pair.cost_ratios["forward_equivalents"] == 1.5
    assert pair.unlike == {}


def test_a_pair_says_what_else_differs(tmp_path):
    write_run(tmp_path / "h", accuracy=0.7, eps=1e-2, batch_size=16)
    write_run(tmp_path / "p", method="fo-peft", accuracy=0.7)
    (pair,) = compared(tmp_path).pairs
    assert pair.unlike == {"batch_size": (16, 8)}


def test_what_it_took_to_reach_fo_pefts_best(tmp_path):
    curves = {
        ("hybrid", 0): (0.7, 0.5, 0.4),
        ("hybrid", 1): (0.7, 0.6, 0.55),
        ("hybrid", 2): (0.4, 0.3, 0.3),
        ("fo-peft", 0): (0.7, 0.6, 0.5),
        ("fo-peft", 1): (0.7, 0.5, 0.6),
        ("fo-peft", 2): (0.7, 0.6, 0.4),
    }
    for (method, seed), dev in curves.items():
        write_run(tmp_path / f"{method}{seed}", method=method, seed=seed, dev=dev)
    (pair,) = compared(tmp_path).pairs
    # The hybrid runs reach that loss at step 20, never, and at step 10. The fo-peft runs reach it
    # at steps 30, 20 and 30.
    assert pair.num_reached == 2
    assert pair.reach["step"] == (20, 30)
    assert pair.reach["forward_equivalents"] == (60, 60)
    assert pair.reach["elapsed_s"] == (10, 15)


def test_half_of_the_seeds_never_there_is_never(tmp_path):
    for seed, dev in enumerate(((0.4,), (0.9,))):
        write_run(tmp_path / f"h{seed}", seed=seed, dev=dev)
        write_run(tmp_path / f"p{seed}", method="fo-peft", seed=seed, dev=(0.5,))
    (pair,) = compared(tmp_path).pairs
    assert pair.reach["step"] == (math.inf, 10)


def test_ranks_want_three_methods_on_two_tasks(tmp_path):
    write_pair(tmp_path, [0.1])
    assert "three methods" in compared(tmp_path).no_ranks
    write_run(tmp_path / "full", method="fo-ft", accuracy=0.9)
    assert "two tasks" in compared(tmp_path).no_ranks
    write_pair(tmp_path, [-0.1], task="cb")
    write_run(tmp_path / "full-cb", method="fo-ft", task="cb", accuracy=0.9)
    write_run(tmp_path / "only-here", method="zo-ft", task="cb", accuracy=1.0)
    ranks = compared(tmp_path).ranks
    assert ranks.mean_ranks == {"fo-ft": 1.0, "fo-peft lora": 2.5, "hybrid lora": 2.5}


def test_rates_tried_are_those_of_the_search_with_what_failed(tmp_path):
    # A search run that is chosen becomes a final run.
    for base_lr, loss, study in (
        (1e-5, 0.5, {"stage": "search"}),
        (1e-4, 0.4, {"stage": "final", "chosen": True}),
        (1e-3, None, {"stage": "search", "status": "failed"}),
    ):
        write_run(
            tmp_path / f"seed0-{base_lr}",
            base_lr=base_lr,
            dev=() if loss is None else (loss,),
            result=loss is not None,
            steps=10,
            study=study,
        )
    write_run(
        tmp_path / "seed1", seed=1, base_lr=1e-4, dev=(0.1,), steps=10, study={"chosen": True}
    )
    (grid,) = compared(tmp_path).grids
    assert sorted(grid.points, key=lambda point: point[0]) == [
        (1e-5, 1e-3, 0.5, 1, False),
        (1e-4, 1e-3, 0.4, 1, True),
        (1e-3, 1e-3, None, 1, False),
    ]


@pytest.mark.parametrize(
    ("gains", "outcome", "words"),
    [
        ([0.05, 0.06, 0.055], "higher", "Hybrid scored higher than fo-peft: +5.50 points"),
        ([-0.05, -0.06, -0.055], "lower", "Hybrid scored lower than fo-peft: -5.50 points"),
        ([0.05, -0.04, 0.05], "undecided", "The interval holds 0."),
        ([0.05, 0.06], "undecided", "Too few seeds for an interval."),
        ([0.3], "undecided", "over 1 seed. Too few seeds"),
        ([0.0, 0.0, 0.0], "undecided", "The interval holds 0."),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(tmp_path, gains, outcome, words):
    write_pair(tmp_path, gains)
    verdict = judge(compared(tmp_path).pairs)
    assert verdict.outcome == outcome
    assert words in verdict.sentence
    assert verdict.sentence.startswith("Undecided") == (outcome == "undecided")
    assert f"over {len(gains)} seed" in verdict.sentence
    assert "1.50× the forward-equivalents" in verdict.notes[0]


def test_the_verdict_over_pairs_counts_them(tmp_path):
    write_pair(tmp_path, [0.05, 0.06, 0.055])
    write_pair(tmp_path, [-0.01, 0.02, 0.0], task="cb")
    write_pair(tmp_path, [0.1, 0.1], task="wic")
    verdict = judge(compared(tmp_path).pairs)
    assert verdict.counts == {"win": 1, "tie": 1, "loss": 0, "undecided": 1}
    assert "on average over 3 pairs with 2 to 3 seeds each" in verdict.sentence
    assert "1 won, 0 lost, 1 tied" in " ".join(verdict.notes)


def test_adapters_of_one_task_do_not_make_its_seeds_more(tmp_path):
    gains = [-0.01, -0.05, -0.02]
    for adapter in ("lora", "prompt", "prefix"):
        write_pair(tmp_path / adapter, gains, adapter=adapter)
    pairs = compare(read_runs([tmp_path / a for a in ("lora", "prompt", "prefix")])).pairs
    together, alone = judge(pairs), judge(compared(tmp_path / "lora").pairs)
    assert together.estimate is not None
    assert alone.estimate is not None
    assert len(pairs) == 3
    assert together.estimate.value == pytest.approx(alone.estimate.value)
    assert together.estimate.low == pytest.approx(alone.estimate.low)
    assert together.outcome == alone.outcome == "undecided"


def test_a_difference_between_guesses_is_called_that(tmp_path):
    write_pair(tmp_path, [0.05, 0.06, 0.055], base=0.4)
    assert "neither method reaches more than the majority" in " ".join(
        judge(compared(tmp_path).pairs).notes
    )


def test_nothing_to_compare_is_said(tmp_path):
    write_run(tmp_path / "run")
    verdict = judge(compared(tmp_path).pairs)
    assert (verdict.outcome, verdict.estimate) == ("none", None)
    assert verdict.sentence.startswith("Nothing to compare")
