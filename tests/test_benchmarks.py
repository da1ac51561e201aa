"""The benchmarks' figure: well-formed, with every point in its place."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
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
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # halfway
    assert y1 > y2 > y0  # downwards: a lower loss stands lower
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
    assert max(heights) < svg.HEIGHT


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


def test_a_studys_figures(svg, monkeypatch, tmp_path):
    import study_figures

    from tests.study.folders import write_study

    study = write_study(tmp_path / "study")
    study_figures.main([str(study), "--to", str(tmp_path / "a")])
    texts = {path.name: path.read_text() for path in tmp_path.glob("a-*.svg")}
    assert "a-differences.svg" in texts
    assert any(name.startswith("a-curves-") for name in texts)
    assert all(ElementTree.fromstring(text) is not None for text in texts.values())
    study_figures.main([str(study), "--to", str(tmp_path / "b"), "--rates"])
    assert " and 0.001" in (tmp_path / "b.svg").read_text()
    sys.modules.pop("study_figures")
