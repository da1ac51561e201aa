"""The figures of the benchmarks are well-formed, and every point is in its place."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from zofo.disk.files import write_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def svg(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import svg

    yield svg
    sys.modules.pop("svg")


def test_curves_bands_and_labels_are_drawn_to_scale(svg):
    curve = [(0, 1.0), (50, 0.5), (100, 0.75)]
    band = [(0, 0.9, 1.1), (100, 0.7, 0.8)]
    text = svg.line_chart(
        "loss & <step>",
        "step",
        "loss",
        [svg.Series("a < b", [curve], band), svg.Series("c", [curve])],
    )
    root = ElementTree.fromstring(text)
    lines = root.findall(f"{SVG}polyline")
    assert len(lines) == 2
    points = [tuple(map(float, p.split(","))) for p in lines[0].get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # The second point lies halfway.
    assert y1 > y2 > y0  # A lower loss lies further down.
    assert (y2 - y0) / (y1 - y0) == pytest.approx(0.5, abs=0.01)
    assert len(root.find(f"{SVG}polygon").get("points").split()) == 4
    words = [node.text for node in root.iter(f"{SVG}text")]
    assert {"loss & <step>", "step", "loss", "a < b", "c", "0", "100", "0.6", "1"} <= set(words)


def test_labels_of_equal_heights_do_not_overlap(svg):
    curve = [(0, 1.0), (1, 0.5)]
    text = svg.line_chart("t", "x", "y", [svg.Series(name, [curve]) for name in "abc"])
    root = ElementTree.fromstring(text)
    heights = [float(n.get("y")) for n in root.iter(f"{SVG}text") if n.text in ("a", "b", "c")]
    assert min(b - a for a, b in pairwise(heights)) >= 13
    assert max(heights) < svg.HEIGHT - svg.BOTTOM  # The labels lie above the ticks of the axis.


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.6, 1.1, [0.6, 0.7, 0.8, 0.9, 1.0, 1.1])],
)
def test_ticks_are_round(svg, low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_intervals_are_drawn_to_scale(svg):
    rows = [svg.Interval("a", 1.0, -1.0, 3.0, [0.0, 2.0]), svg.Interval("b & c", -2.0)]
    root = ElementTree.fromstring(svg.interval_chart("t", "points", rows))
    a, b = (float(node.get("cx")) for node in root.iter(f"{SVG}circle"))
    (line,) = [n for n in root.iter(f"{SVG}line") if n.get("class") == "line c1"]
    low, high = float(line.get("x1")), float(line.get("x2"))
    assert a == pytest.approx((low + high) / 2, abs=0.2)
    assert a - b == pytest.approx(3 * (high - low) / 4, abs=0.2)
    seeds = [float(n.get("x1")) for n in root.iter(f"{SVG}line") if n.get("class") == "c0"]
    assert sum(seeds) / 2 == pytest.approx(a, abs=0.2)
    (zero,) = [float(n.get("x1")) for n in root.iter(f"{SVG}line") if n.get("class") == "axis"]
    assert zero == pytest.approx(seeds[0], abs=0.2)


def test_a_curve_leaves_the_chart_at_its_top(svg):
    series = [svg.Series("a", [[(0, 0.5), (1, 50.0)]]), svg.Series("b", [[(0, 0.5), (1, 1.0)]])]
    root = ElementTree.fromstring(svg.line_chart("t", "x", "y", series, y_max=1.0))
    ends = [line.get("points").split()[-1] for line in root.findall(f"{SVG}polyline")]
    assert ends[0] == ends[1]
    with pytest.raises(ValueError, match="7 series"):
        svg.line_chart("t", "x", "y", [series[0]] * 7)


def test_points_are_drawn_on_logarithmic_axes(svg):
    groups = {"base": [(0.01, 1.0), (0.1, 10.0), (1.0, 100.0)], "adapter": [(0.1, 1.0)]}
    panels = [svg.Panel("a & b", groups, {"base": [(0.01, 1.0), (1.0, 100.0)]})]
    narrow = svg.Panel("narrow", {"base": [(5.0, 3.0), (6.0, 4.0)]}, {})
    root = ElementTree.fromstring(svg.scatter_panels("t", "x", "y", [*panels, narrow]))
    circles = [n for n in root.iter(f"{SVG}circle") if n.get("class") == "t1"]
    (x0, y0), (x1, y1), (x2, y2) = [
        (float(n.get("cx")), float(n.get("cy"))) for n in circles[1:4]
    ]  # The first circle belongs to the legend.
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y1 < y0
    words = [node.text for node in root.iter(f"{SVG}text")]
    assert {"a & b", "narrow", "base", "adapter", "0.1", "100"} <= set(words)
    # These are ticks of the narrow panel.
    assert any(word.startswith(("5.", "6")) for word in words)


def test_figure_1_and_tables_of_smoothness(svg, monkeypatch, tmp_path, capsys):
    import smoothness_figures

    from zofo.smoothness.summary import summarise

    points = [
        {
            "kind": "path",
            "step": step,
            "grad_norm": {"full": 2.0**step},
            "step_norm": {"full": 1.0, "base": 0.5, "adapter": 0.5},
            "gradient": {"base": {"norm": 3.0 + 2**step}, "adapter": {"norm": 1.0 + step}},
            "alone": [{"gamma": 1.0, "base": 2.0, "adapter": 1.0}],
            "whole": [{"gamma": 1.0, "base": 1.0, "adapter": 0.5, "full": 1.0}],
            "floor": {"base": 0.0, "adapter": 0.0},
        }
        for step in range(12)
    ]
    config = {"model": {"name": "tiny"}, "adapter": {"type": "lora"}, "method": "hybrid"}
    write_json(tmp_path / "run" / "smoothness.json", summarise(points, config, {}))
    smoothness_figures.main([str(tmp_path / "run"), "--to", str(tmp_path / "f")])
    assert {p.name for p in tmp_path.glob("*.svg")} == {
        f"f-{kind}.svg" for kind in ("gradient", "alone", "whole")
    }
    root = ElementTree.fromstring((tmp_path / "f-gradient.svg").read_text())
    assert len([n for n in root.iter(f"{SVG}circle") if n.get("class") == "t1"]) == 12 + 1
    assert "| tiny, lora | gradient | base | × 2.05e+03 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        smoothness_figures.main([str(tmp_path), "--to", str(tmp_path / "g")])
    sys.modules.pop("smoothness_figures")


def test_a_studys_figures(svg, monkeypatch, tmp_path):
    import study_figures

    from tests.support.run_folders import write_run, write_study
    from zofo.report.data import make_report

    study = write_study(tmp_path / "study")
    study_figures.main([str(study), "--to", str(tmp_path / "a")])
    texts = {path.name: path.read_text() for path in tmp_path.glob("a-*.svg")}
    pairs = make_report([study]).comparison.pairs
    names = {f"a-curves-{pair.hybrid.task}-{pair.hybrid.adapter}.svg" for pair in pairs}
    assert set(texts) == {"a-differences.svg", *names}
    circles = list(ElementTree.fromstring(texts["a-differences.svg"]).iter(f"{SVG}circle"))
    assert len(circles) == len(pairs) + 1  # The last circle stands for all pairs.
    for name in names:
        words = [node.text for node in ElementTree.fromstring(texts[name]).iter(f"{SVG}text")]
        assert {"hybrid", "fo-peft"} <= set(words)
    # Two optimizers are two pairs; a curve ends where the first of its runs ended.
    for optimizer in ("adamw", "sgd"):
        for method in ("hybrid", "fo-peft"):
            for seed, dev in ((0, (0.7, 0.6, 0.5)), (1, (0.9, 0.8))):
                name = f"{optimizer}-{method}-{seed}"
                made = {"method": method, "optimizer": optimizer, "seed": seed, "steps": 30}
                write_run(tmp_path / "two" / name, dev=dev, **made)
    study_figures.main([str(tmp_path / "two"), "--to", str(tmp_path / "c")])
    curves = sorted(tmp_path.glob("c-curves-*.svg"))
    assert [path.stem for path in curves] == [f"c-curves-rte-lora-{o}" for o in ("adamw", "sgd")]
    for path in curves:
        lines = list(ElementTree.fromstring(path.read_text()).iter(f"{SVG}polyline"))
        assert [len(line.get("points").split()) for line in lines] == [2, 2]

    # The study has nine pairs of rates, more than there are colours.
    with pytest.raises(SystemExit):
        study_figures.main([str(study), "--to", str(tmp_path / "b"), "--rates"])

    for base_lr, dev in ((1e-5, 0.6), (1e-4, 0.5)):
        for seed in (0, 1):
            folder = tmp_path / "rates" / f"{base_lr}-{seed}"
            write_run(folder, base_lr=base_lr, seed=seed, dev=(0.7, dev + 0.1 * seed))
    study_figures.main([str(tmp_path / "rates"), "--to", str(tmp_path / "b"), "--rates"])
    root = ElementTree.fromstring((tmp_path / "b.svg").read_text())
    words = [node.text for node in root.iter(f"{SVG}text")]
    assert {"1e-05 and 0.001", "0.0001 and 0.001"} <= set(words)
    assert len(root.findall(f"{SVG}polyline")) == 2  # Each curve is a mean over the seeds.
    sys.modules.pop("study_figures")


@pytest.mark.parametrize("name", ["step", "studies"])
def test_the_figures_of_the_readme_are_what_the_measurements_give(svg, name):
    import readme_figures

    drawn = (BENCHMARKS.parent / "docs" / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == getattr(readme_figures, name)()
    sys.modules.pop("readme_figures")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "1"], "processes is 1; give at least 2"),
        (["--batch", "7"], "batch is 7; it must be a multiple of 2"),
        (["--device", "cuda", "--processes", "64", "--batch", "64"], "64 processes need as many"),
    ],
)
def test_several_processes_are_refused_before_they_start(svg, capsys, arguments, words):
    import processes

    with pytest.raises(SystemExit) as stopped:
        processes.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    sys.modules.pop("processes")


def test_a_studys_differences(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study_differences

    from tests.support.run_folders import write_run
    from zofo.report.data import make_report, write_report_json

    scores = {"adamw": (0.70, 0.72, 0.74), "sgd": (0.60, 0.62, 0.64)}
    for optimizer, accuracies in scores.items():
        for seed, accuracy in enumerate(accuracies):
            for method, gain in (("fo-peft", 0), ("hybrid", 0.01), ("fo-ft", 0.1)):
                if (method, optimizer) != ("fo-ft", "sgd"):
                    own = {"method": method, "optimizer": optimizer, "seed": seed}
                    folder = tmp_path / "runs" / f"{method}-{optimizer}-{seed}"
                    write_run(folder, accuracy=accuracy + gain, **own)
    write_report_json(make_report([tmp_path]), tmp_path / "found.json")
    monkeypatch.setattr(sys, "argv", ["study_differences.py", str(tmp_path / "found.json")])
    study_differences.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    found = {tuple(row[:3]): row[3] for row in rows if len(row) > 3}
    assert found["lora", "adamw", "hybrid − fo-peft"] == "+1.0 [+1.0, +1.0]"
    assert found["lora", "adamw", "fo-ft − fo-peft"] == "+10.0 [+10.0, +10.0]"
    assert found["lora", "sgd", "fo-ft − fo-peft"] == "+20.0 [+20.0, +20.0]"
    assert found["lora", "sgd", "hybrid − fo-ft"] == "-19.0 [-19.0, -19.0]"
    assert found["mean", "sgd − adamw", "of fo-peft"] == "-10.0 [-10.0, -10.0]"
    sys.modules.pop("study_differences")
