"""Tests of the gate: fo-ft against fo-peft, and what the report says about room for the base."""

import pytest

from tests.support.run_folders import write_run
from zofo.report.data import make_report, summary_of
from zofo.report.markdown import render_markdown
from zofo.report.page import render

SEEDS = (0, 1, 2)
GAINS = {
    "open": (0.05, 0.06, 0.055),
    "closed": (-0.05, -0.06, -0.055),
    "undecided": (0.05, -0.04, 0.05),
}


def write_runs(folder, gains, *, task="rte", **options):
    """Write fo-peft and hybrid of one accuracy, and fo-ft that differs by the gains."""
    for seed, gain in enumerate(gains):
        for method, more in (("fo-peft", 0), ("hybrid", 0.001 * seed), ("fo-ft", gain)):
            own = {"adapter": "none"} if method == "fo-ft" else {}
            name = folder / f"{task}-{method}-{seed}"
            given = {"task": task, "method": method, "seed": seed, "accuracy": 0.6 + more}
            write_run(name, **given, **own, **options)


@pytest.mark.parametrize(("state", "gains"), GAINS.items())
def test_the_state_follows_the_interval(tmp_path, state, gains):
    write_runs(tmp_path, gains)
    report = make_report([tmp_path])
    (gate,) = report.gates
    assert gate.state == state
    assert gate.difference.seeds == SEEDS
    assert gate.difference.estimate.value == pytest.approx(sum(gains) / 3)
    (note,) = (note for note in report.verdict.notes if "gate" in note)
    assert note.startswith(f"The gate is {state} on rte (")
    assert f"{100 * sum(gains) / 3:+.2f} points [" in note
    assert ("no room for the base" in report.verdict.sentence.lower()) == (state == "closed")
    for text in (render(report, tmp_path), render_markdown(report)):
        assert "room for the base" in text
    (written,) = summary_of(report)["gates"]
    assert written["state"] == state
    assert written["difference"]["estimate"]["mean"] == pytest.approx(sum(gains) / 3)


def test_two_seeds_leave_it_undecided(tmp_path):
    write_runs(tmp_path, GAINS["open"][:2])
    (gate,) = make_report([tmp_path]).gates
    assert gate.state == "undecided"


def test_each_task_and_adapter_has_its_gate(tmp_path):
    write_runs(tmp_path, GAINS["open"])
    write_runs(tmp_path, GAINS["closed"], task="cb")
    for seed in SEEDS:
        given = {"method": "fo-peft", "adapter": "prompt", "seed": seed, "accuracy": 0.9}
        write_run(tmp_path / f"prompt-{seed}", **given)
    report = make_report([tmp_path])
    found = {(g.fo_peft.task, g.fo_peft.adapter): g.state for g in report.gates}
    assert found == {("rte", "lora"): "open", ("rte", "prompt"): "closed", ("cb", "lora"): "closed"}
    # One of the two pairs has an open gate, so the sentence of all pairs is about hybrid alone.
    assert "no room" not in report.verdict.sentence


def test_without_fo_ft_with_adamw_there_is_no_gate(tmp_path):
    for seed in SEEDS:
        write_run(tmp_path / f"p{seed}", method="fo-peft", seed=seed)
        write_run(tmp_path / f"f{seed}", method="fo-ft", seed=seed, optimizer="sgd")
    report = make_report([tmp_path])
    assert report.gates == ()
    assert not any("gate" in note for note in report.verdict.notes)


def test_a_gate_needs_no_hybrid_runs(tmp_path):
    for seed, gain in enumerate(GAINS["closed"]):
        write_run(tmp_path / f"p{seed}", method="fo-peft", seed=seed, accuracy=0.6)
        write_run(tmp_path / f"f{seed}", method="fo-ft", seed=seed, accuracy=0.6 + gain)
    verdict = make_report([tmp_path]).verdict
    assert verdict.outcome == "none"
    assert verdict.notes[0].startswith("The gate is closed on rte")
