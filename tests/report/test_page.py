"""These tests compute every number of the page again, directly from the run folders."""

import html
import json
import re
from importlib import resources
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from tests.support.pages import read_page
from tests.support.run_folders import write_run, write_study
from zofo.errors import UserError
from zofo.pages.themes import THEMES
from zofo.report import write_report

HOSTILE = "</script><img src=x onerror=alert(1)>\"'{{7*7}}<b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("report") / "a study")


@pytest.fixture(scope="module")
def page(folder):
    write_report([folder], folder / "report.html")
    return read_page(folder / "report.html")


@pytest.fixture(scope="module")
def raw(folder):
    """Return the finished final runs, read directly from their files."""
    rows = []
    for run in sorted((folder / "runs").iterdir()):
        study = (
            json.loads((run / "study.json").read_text()) if (run / "study.json").exists() else {}
        )
        if study.get("stage") != "final" or not (run / "result.json").exists():
            continue
        result = json.loads((run / "result.json").read_text())
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows.append(
            {
                **study["cell"],
                **result["cost"],
                **result["test"]["after"],
                "before": result["test"]["before"]["accuracy"],
                "seed": study["seed"],
                "seconds": log[-1]["elapsed_s"],
                "curve": [entry for entry in log if "eval_loss" in entry],
            }
        )
    return pd.DataFrame(rows)


def interval(values):
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def name_of(row):
    return row["method"] + (f" {row['adapter']}" if row["adapter"] != "none" else "")


def test_the_main_table(page, raw):
    rows = page.table("differ in nothing but the seed")
    groups = raw.groupby(["task", "method"])
    assert len(rows) == len(groups) == 12
    for row in rows:
        group = groups.get_group((row["task"][0], row["method"][0].split()[0]))
        mean = group["accuracy"].mean()
        low, high = interval(group["accuracy"])
        assert row["method"][0] == name_of(group.iloc[0])
        assert row["accuracy"][1] == pytest.approx(mean)
        assert row["accuracy"][0] == f"{100 * mean:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
        losses = [min(entry["eval_loss"] for entry in curve) for curve in group["curve"]]
        for key, expected, text in (
            ("auc", group["auc"].mean(), "{:.3f}"),
            ("majority", 0.55, None),
            ("accuracy_before", group["before"].mean(), None),
            ("best_dev_loss", np.mean(losses), "{:.4f}"),
            ("forward_equivalents", group["forward_equivalents"].mean(), "{:,.0f}"),
            ("train_s", group["seconds"].mean(), "{:,.1f}"),
            ("peak_memory_bytes", group["peak_memory_bytes"].mean(), None),
            ("artifact_bytes", group["artifact_bytes"].mean(), None),
            ("seeds", 3, "{:.0f}"),
        ):
            assert row[key][1] == pytest.approx(expected), key
            assert text is None or row[key][0] == text.format(expected), key
        assert row["majority"][0] == "55.0"
        assert row["peak_memory_bytes"][0] == f"{group['peak_memory_bytes'].mean() / 2**20:,.0f}"
        assert row["artifact_bytes"][0] == f"{group['artifact_bytes'].mean() / 1024:,.0f}"


def differences(raw):
    scores = raw.pivot(index=["task", "seed"], columns="method", values="accuracy")
    return (scores["hybrid"] - scores["fo-peft"]).groupby("task").apply(list).to_dict()


def test_pairs_and_the_verdict(page, raw):
    rows = page.table("The same in numbers")
    found = differences(raw)
    assert {row["task"][0] for row in rows} == found.keys()
    for row in rows:
        values = found[row["task"][0]]
        low, high = interval(values)
        assert row["difference"][1] == pytest.approx(np.mean(values))
        assert row["difference"][0] == (
            f"{100 * np.mean(values):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        )
        assert row["outcome"][0] == ("won" if low > 0 else "lost" if high < 0 else "tie")
        of_task = raw[raw["task"] == row["task"][0]].groupby("method").mean(numeric_only=True)
        for key, column in (
            ("forward_equivalents", "forward_equivalents"),
            ("train_s", "seconds"),
            ("peak_memory_bytes", "peak_memory_bytes"),
        ):
            ratio = of_task.loc["hybrid", column] / of_task.loc["fo-peft", column]
            assert row[key][1] == pytest.approx(ratio)
        for key, method in (("hybrid", "hybrid"), ("fo_peft", "fo-peft")):
            assert row[key][1] == pytest.approx(of_task.loc[method, "accuracy"])
    parts = [np.var(v, ddof=1) / len(v) for v in found.values()]
    freedom = sum(parts) ** 2 / sum(p**2 / 2 for p in parts)
    mean = np.mean([np.mean(v) for v in found.values()])
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts)) / len(found)
    ends = f"{100 * mean:+.2f} points of test accuracy, 95% interval [{100 * (mean - half):+.2f}, "
    assert ends + f"{100 * (mean + half):+.2f}]" in page.text
    assert ("Hybrid scored higher" in page.text) == (mean - half > 0)
    won = sum(interval(v)[0] > 0 for v in found.values())
    assert f"Pair by pair: {won} won, " in page.text


def test_what_it_took_to_reach_a_loss(page, raw):
    for row in page.table("What it took until"):
        of_task = raw[raw["task"] == row["task"][0]].set_index(["method", "seed"])["curve"]
        spent = []
        for seed in (0, 1, 2):
            best = min(entry["eval_loss"] for entry in of_task["fo-peft", seed])
            there = [e for e in of_task["hybrid", seed] if e["eval_loss"] <= best]
            spent.append(there[0] if there else None)
        assert row["reached"][0] == f"{sum(map(bool, spent))} of 3"
        for key in ("step", "forward_equivalents", "elapsed_s"):
            median = np.median([np.inf if e is None else e[key] for e in spent])
            assert row[f"hybrid_{key}"][1] == pytest.approx(median)


def test_ranks(page, raw):
    scores = raw.pivot_table(index="task", columns="method", values="accuracy")
    ranks = scores.rank(axis=1, ascending=False).mean()
    rows = page.table("Mean ranks by test accuracy")
    assert {r["method"][0].split()[0]: r["rank"][1] for r in rows} == pytest.approx(ranks.to_dict())
    statistic, p_value = stats.friedmanchisquare(*scores.to_numpy().T)
    assert f"χ² = {statistic:.2f}, p = {p_value:.3f}" in page.text
    assert f"{2.569 * np.sqrt(4 * 5 / (6 * 3)):.2f} apart" in " ".join(page.text.split())


def test_figures(page, raw):
    for theme in THEMES:
        figures = page.data["figures"][theme]
        tasks = sorted(raw["task"].unique())
        for i, task in enumerate(tasks):
            of_task = raw[raw["task"] == task].groupby("method")
            for trace in figures["pareto"][f"{i}|forward_equivalents"]["data"][1:]:
                group = of_task.get_group(trace["name"].split()[0])
                low, high = interval(group["accuracy"])
                assert trace["y"] == pytest.approx([100 * group["accuracy"].mean()])
                assert trace["x"] == [group["forward_equivalents"].mean()]
                assert trace["error_y"]["array"] == pytest.approx([50 * (high - low)])
            lines = figures["curves"][f"{i}|elapsed_s"]["data"]
            named = [t for t in lines if t.get("showlegend", True) and " (" not in t["name"]]
            assert len(named) == 4
            for trace in named:
                curves = of_task.get_group(trace["name"].split()[0])["curve"]
                losses = np.array([[entry["eval_loss"] for entry in curve] for curve in curves])
                seconds = np.array([[entry["elapsed_s"] for entry in curve] for curve in curves])
                assert trace["y"] == pytest.approx(losses.mean(axis=0).tolist())
                assert trace["x"] == pytest.approx(seconds.mean(axis=0).tolist())
                ends = [custom[:2] for custom in trace["customdata"]]
                assert [low for low, _ in ends] == pytest.approx(losses.min(axis=0).tolist())
                assert [high for _, high in ends] == pytest.approx(losses.max(axis=0).tolist())
        (figure,) = figures["differences"].values()
        found = differences(raw)
        assert figure["data"][0]["x"] == pytest.approx(
            [100 * value for task in tasks for value in found[task]]
        )
        assert figure["data"][1]["x"] == pytest.approx([100 * np.mean(found[t]) for t in tasks])


def test_rates_that_were_tried(page, folder):
    tried = {}
    for run in (folder / "runs").glob("search-boolq-*"):
        config = yaml.safe_load((run / "run.yaml").read_text())
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        tried[config["base_lr"], config["adapter_lr"]] = min(losses)
    heat = page.data["figures"]["light"]["rates"]["0"]["data"][0]
    found = {
        (float(y), float(x)): heat["z"][j][i]
        for i, x in enumerate(heat["x"])
        for j, y in enumerate(heat["y"])
    }
    assert found == pytest.approx(tried)
    starred = [(j, i) for j, row in enumerate(heat["text"]) for i, t in enumerate(row) if "★" in t]
    assert [(heat["y"][j], heat["x"][i]) for j, i in starred] == [("1e-05", "0.001")]
    ratios = page.data["figures"]["light"]["ratios"]["0"]["data"]
    points = sorted(x for trace in ratios for x in trace["x"])
    assert points == pytest.approx(sorted(base / adapter for base, adapter in tried))


def test_runs_that_did_not_end_well_are_listed(page):
    rows = {row["run"][0]: row for row in page.table("They failed, were stopped")}
    assert rows.keys() == {"rte-hybrid-9", "rte-fo-peft-9"}
    assert rows["rte-hybrid-9"]["status"][0] == "failed"
    assert rows["rte-hybrid-9"]["why"][0] == "RuntimeError: out of <memory>"
    assert rows["rte-fo-peft-9"]["status"][0] == "unfinished"
    assert rows["rte-fo-peft-9"]["steps"][0] == "20 of 20"


def test_every_run_is_linked_relative_to_the_page(page, folder):
    links = [given["href"] for tag, given in page.tags if tag == "a"]
    assert len({unquote(link) for link in links}) == 65
    for link in links:
        assert not Path(link).is_absolute()
        assert (folder / unquote(link) / "metrics.jsonl").exists()


def test_the_page_asks_for_nothing(page):
    loading = {"src", "srcset", "data", "action", "formaction", "poster", "background"}
    for tag, given in page.tags:
        assert not loading & given.keys()
        assert tag != "link" or given == {"rel": "icon", "href": "data:,"}
        assert not any(name.startswith("on") for name in given)
    policy = next(g["content"] for _, g in page.tags if "http-equiv" in g)
    assert policy.startswith("default-src 'none'")
    assert policy.count("'sha256-") == 2
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "unsafe-eval" not in policy


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def test_names_are_text_whatever_they_are(tmp_path):
    for method in ("hybrid", "fo-peft"):
        for seed in (0, 1):
            write_run(
                tmp_path / f"{method}{seed} <i>#?",
                method=method,
                model=HOSTILE,
                task=HOSTILE,
                seed=seed,
                base_lr=1e-5 * (1 + seed),
                study={"study": HOSTILE, "error": HOSTILE},
            )
    write_run(
        tmp_path / "bad", model=HOSTILE, result=False, study={"status": "failed", "error": HOSTILE}
    )
    write_report([tmp_path], tmp_path / "report.html")
    page = read_page(tmp_path / "report.html")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 3
    assert not {"img", "b", "i"} & set(tags)
    assert HOSTILE in page.text
    drawn = list(strings(page.data["figures"]))
    assert not any("<img" in text for text in drawn)
    assert html.escape(HOSTILE, quote=False) in drawn
    assert page.data["summary"]["groups"][0]["model"] == HOSTILE


@pytest.mark.parametrize("runs", [{}, {"result": False}, {"result": False, "dev": ()}])
def test_a_single_run_makes_a_page(tmp_path, runs):
    write_run(tmp_path / "run", **runs, steps=10)
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = read_page(tmp_path / "report.html")
    assert "Nothing to compare yet" in page.text
    assert "differences" not in page.data["figures"]["light"]
    assert ("curves" in page.data["figures"]["light"]) == ("dev" not in runs)


def test_a_page_replaces_a_page_and_nothing_else(tmp_path):
    folder, page = write_run(tmp_path / "run"), tmp_path / "report.html"
    write_report([folder], page)
    first = page.read_text()
    write_run(tmp_path / "more", seed=3)
    write_report([folder, tmp_path / "more"], page)
    assert page.read_text() != first
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(UserError, match="no report of zofo; choose another --to"):
        write_report([folder], tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "mine"
    with pytest.raises(UserError, match="is a folder; name a file"):
        write_report([folder], tmp_path)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_words_and_lines_stand_out_from_their_paper():
    css = (resources.files("zofo.pages") / "assets" / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 3  # The blocks are for light, dark and print.
    for block, theme in zip(blocks[:2], THEMES.values(), strict=True):
        colour = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for words in ("text", "faint", "link", "good", "bad", "wait"):
            for paper in ("card", "paper", "shade"):
                assert contrast(colour[words], colour[paper]) >= 4.5, (words, paper)
        for words in (theme.text, theme.faint):
            assert contrast(words, colour["card"]) >= 4.5
        assert all(contrast(theme.text, shade) >= 4.5 for shade in theme.scale)
        for line in (*theme.methods.values(), *theme.steps):
            assert contrast(line, colour["card"]) >= 3, line
