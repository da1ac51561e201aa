"""Tests of what a report shows of runs with rewards."""

import json

import pytest

from tests.support.pages import read_page
from tests.support.run_folders import add_rewards, write_run
from zofo.report import write_report
from zofo.report.answers import MAX_ROWS
from zofo.report.data import make_report
from zofo.report.markdown import render_markdown

HOSTILE = "</script><img src=x onerror=alert(1)>{{7*7}}\n" + "long " * 100
HELD_OUT = "at weights that are not perturbed"
PROMPTS = tuple(f"ask {i}?" for i in range(30))


def page_of(folder):
    write_report([folder], folder / "report.html")
    return read_page(folder / "report.html")


def column(page, caption, key):
    return [row[key] for row in page.table(caption)]


def test_curves_and_held_out_rewards(tmp_path):
    for seed, gain in enumerate((0.25, 0.5, 0.75)):
        add_rewards(write_run(tmp_path / f"run-{seed}", seed=seed), gain=gain)
    add_rewards(write_run(tmp_path / "goes-on", method="zo-ft", result=False))
    page = page_of(tmp_path)
    (row,) = page.table("differ in nothing but the seed")
    assert row["reward"][1] == 0.5
    assert row["reward"][0].startswith("0.5 [")
    assert row["reward_before"] == ["0", 0]
    assert row["drift"] == ["0.03", 0.03]
    assert "accuracy" in row
    assert "forward_equivalents" in row
    figures = page.data["figures"]["light"]["rewards"]
    assert figures.keys() == {
        f"0 {key}|{axis}"
        for key in ("reward", "answers_differ", "answer_words", "answers_left_out", "eval_drift")
        for axis in ("step", "forward_equivalents")
    }
    found = {trace.get("name"): trace for trace in figures["0 reward|forward_equivalents"]["data"]}
    assert found["hybrid lora"]["x"] == [30, 60, 90]
    assert found["hybrid lora"]["y"] == [0.1, 0.2, 0.3]
    assert found["hybrid lora: best"]["y"] == [0.2, 0.4, 0.6]
    band = next(t for t in figures["0 reward|step"]["data"] if t.get("fill"))
    assert band["y"] == pytest.approx([0, 0.1, 0.2, 0.4, 0.3, 0.2])
    assert "goes-on (unfinished)" in found
    drift = figures["0 eval_drift|step"]["data"]
    assert [trace["y"] for trace in drift] == [[0.01, 0.02, 0.03]] * 2


def test_equal_prompts_stand_side_by_side(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        add_rewards(write_run(tmp_path / name, seed=seed), prompts=PROMPTS)
    add_rewards(write_run(tmp_path / "other", seed=2), prompts=("what?",))
    page = page_of(tmp_path)
    tables = [t for t in page.tables if HELD_OUT in t["caption"]]
    assert [t["keys"] for t in tables] == [
        ["prompt", "before", "after-0", "after-1"],
        ["prompt", "before", "after-0"],
    ]
    rows = tables[0]["rows"]
    assert len(rows) == MAX_ROWS
    assert [row[0][0] for row in rows] == list(PROMPTS[:MAX_ROWS])
    assert [cell[0] for cell in rows[0][1:]] == [
        "old answer to ask 0? reward 0",
        "one's answer to ask 0? reward 0.5",
        "two's answer to ask 0? reward 0.5",
    ]
    assert [cell[1] for cell in rows[0][1:]] == [0, 0.5, 0.5]
    text = " ".join(page.text.split())
    assert f"{MAX_ROWS} of 30 prompts of held_out_answers.jsonl in the folders one, two." in text
    assert "All 1 prompts of held_out_answers.jsonl in the folder other." in text


def test_other_answers_before_have_columns_of_their_own(tmp_path):
    for seed in (0, 1):
        add_rewards(write_run(tmp_path / f"{seed}", seed=seed), before=["x", f"y{seed}"])
    row = page_of(tmp_path).table(HELD_OUT)[1]
    assert row.keys() == {"prompt", "before-0", "after-0", "before-1", "after-1"}
    assert (row["before-0"][0], row["before-1"][0]) == ("y0 reward 0", "y1 reward 0")


def test_samples_reach_from_the_first_step_to_the_last(tmp_path):
    add_rewards(write_run(tmp_path / "run", dev=[0.5] * 40, every=5))
    page = page_of(tmp_path)
    rows = page.table("from the first to the last")
    assert len(rows) <= MAX_ROWS
    steps = [row["step"][1] for row in rows]
    assert (steps[0], steps[-1]) == (5, 200)
    assert steps == sorted(steps)
    assert rows[0]["answer"][0] == "at step 5"
    assert rows[1]["reward"] == ["none", None]


def test_long_and_hostile_texts_are_text(tmp_path):
    run = write_run(tmp_path / "run")
    add_rewards(run, prompts=[HOSTILE, "b"], after=[HOSTILE * 30, "\u202eback"], before=["", " z"])
    page = page_of(tmp_path)
    assert "img" not in {tag for tag, _ in page.tags}
    assert HOSTILE in page.text
    first, second = page.table(HELD_OUT)
    assert "… (" in first["after-0"][0]
    assert "characters in all)" in first["after-0"][0]
    assert first["before"][0] == "(no text) reward 0"
    assert second["before"][0] == "z reward 0"
    assert second["after-0"][0] == "\ufffdback reward 0.5"
    assert (tmp_path / "report.html").stat().st_size < 6_000_000


def test_many_steps_do_not_make_a_large_page(tmp_path):
    add_rewards(write_run(tmp_path / "run", dev=[0.5] * 1000, every=1))
    page = page_of(tmp_path)
    (line,) = (
        trace
        for trace in page.data["figures"]["light"]["rewards"]["0 reward|step"]["data"]
        if trace.get("name") == "hybrid lora"
    )
    assert len(line["y"]) <= 120
    assert line["y"][-1] == pytest.approx(10, rel=0.01)
    assert sum(line["y"]) / len(line["y"]) == pytest.approx(5, rel=0.02)


def test_a_page_without_rewards_says_nothing_of_them(tmp_path):
    write_run(tmp_path / "run")
    write_run(tmp_path / "peft", method="fo-peft")
    page = page_of(tmp_path)
    assert "rewards-title" not in {attributes.get("id") for _, attributes in page.tags}
    assert not any("eward" in table["caption"] for table in page.tables)
    assert "rewards" not in page.data["figures"]["light"]
    assert {"reward", "drift"}.isdisjoint(page.table("differ in nothing but the seed")[0])
    assert "Held-out" not in render_markdown(make_report([tmp_path]))


def test_markdown_has_a_few_prompts(tmp_path):
    add_rewards(write_run(tmp_path / "run"), prompts=PROMPTS, after=["a | b\nc"] * 30)
    text = render_markdown(make_report([tmp_path]))
    assert "held-out reward" in text
    part = text.split("### Held-out prompts before and after training")[1]
    assert r"4 of 30 prompts of held\_out\_answers.jsonl in the folder of run." in part
    rows = [line for line in part.splitlines() if line.startswith("| ask")]
    assert rows[0] == r"| ask 0? | old answer to ask 0? reward 0 | a \| b c reward 0.5 |"
    assert len(rows) == 4
    assert "at step" not in text


def test_a_damaged_file_of_answers_is_left_out(tmp_path):
    run = add_rewards(write_run(tmp_path / "run"))
    (run / "held_out_answers.jsonl").write_bytes(b"\xff\xfe{")
    (run / "answers.jsonl").write_text(json.dumps({"step": 1}) + "\n{")
    page = page_of(tmp_path)
    assert not any(HELD_OUT in table["caption"] for table in page.tables)
    (row,) = page.table("from the first to the last")
    assert row["step"][1] == 1
