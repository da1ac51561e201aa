"""Draw charts as plain SVG: labelled curves with bands, means with intervals, and points.

The module has no dependency. The colours and the background follow the reader's light or dark
scheme. The chart has a background of its own, because a page may be dark although the reader's
system is light.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 40, 52
NUM_COLOURS = 6
STYLE = """
  svg { background: #ffffff; }
  text { font: 13px system-ui, sans-serif; fill: #24292f; }
  .title { font-size: 15px; font-weight: 600; }
  .grid { stroke: #8c959f; stroke-opacity: 0.3; }
  .axis { stroke: #57606a; }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
  .c0 { stroke: #57606a; } .f0 { fill: #8c959f; fill-opacity: 0.3; } .t0 { fill: #57606a; }
  .c1 { stroke: #0969da; } .f1 { fill: #0969da; fill-opacity: 0.2; } .t1 { fill: #0969da; }
  .c2 { stroke: #cf222e; } .f2 { fill: #cf222e; fill-opacity: 0.2; } .t2 { fill: #cf222e; }
  .c3 { stroke: #bf8700; } .f3 { fill: #bf8700; fill-opacity: 0.2; } .t3 { fill: #9a6700; }
  .c4 { stroke: #1a7f37; } .f4 { fill: #1a7f37; fill-opacity: 0.2; } .t4 { fill: #1a7f37; }
  .c5 { stroke: #8250df; } .f5 { fill: #8250df; fill-opacity: 0.2; } .t5 { fill: #8250df; }
  @media (prefers-color-scheme: dark) {
    svg { background: #0d1117; }
    text { fill: #e6edf3; } .axis { stroke: #9198a1; }
    .c0 { stroke: #9198a1; } .t0 { fill: #9198a1; }
    .c1 { stroke: #4493f8; } .t1 { fill: #4493f8; }
    .c2 { stroke: #f85149; } .t2 { fill: #f85149; }
    .t3 { fill: #d29922; } .t4 { fill: #3fb950; } .t5 { fill: #ab7df8; }
  }
"""


@dataclass(frozen=True)
class Series:
    """Curves of one kind.

    Attributes:
        label: text at the end of the curves.
        curves: lists of (x, y), each drawn as its own curve.
        band: (x, low, high) of an area behind the curves.
    """

    label: str
    curves: Sequence[Points] = ()
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Interval:
    """A row of an interval chart.

    Attributes:
        label: text on the left.
        mean: drawn as a circle.
        low, high: ends of the line, or None for no line.
        values: the single values of the mean, drawn as small marks.
    """

    label: str
    mean: float
    low: float | None = None
    high: float | None = None
    values: Sequence[float] = ()


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], y_max: float | None = None
) -> str:
    """Draw a chart of at most six series, one colour each. Higher values are drawn at y_max."""
    if len(series) > NUM_COLOURS:
        raise ValueError(f"{len(series)} series and {NUM_COLOURS} colours; draw several charts")
    if y_max is not None:
        series = [
            Series(
                s.label,
                [[(x, min(y, y_max)) for x, y in c] for c in s.curves],
                [(x, min(low, y_max), min(high, y_max)) for x, low, high in s.band],
            )
            for s in series
        ]
    xs = [p[0] for s in series for c in (*s.curves, s.band) for p in c]
    ys = [v for s in series for c in (*s.curves, s.band) for p in c for v in p[1:]]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def x_at(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y_at(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(points: Points) -> str:
        return " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{escape(words)}</text>'

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        text(LEFT, 22, title, 'class="title"'),
    ]
    for y in y_ticks:
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y_at(y)}" y2="{y_at(y)}"/>',
            text(LEFT - 8, y_at(y) + 4, f"{y:g}", 'text-anchor="end"'),
        ]
    for x in x_ticks:
        parts.append(text(x_at(x), bottom + 20, f"{x:g}", 'text-anchor="middle"'))
    parts += [
        f'<path class="axis line" d="M{LEFT},{TOP} V{bottom} H{right}" stroke-width="1"/>',
        text((LEFT + right) / 2, HEIGHT - 10, x_label, 'text-anchor="middle"'),
        text(0, 0, y_label, f'text-anchor="middle" transform="translate(16 {HEIGHT / 2 - 8}) '
             'rotate(-90)"'),
    ]  # fmt: skip
    for colour, one in enumerate(series):
        if one.band:
            edge = [(x, low) for x, low, _ in one.band]
            edge += [(x, high) for x, _, high in reversed(one.band)]
            parts.append(f'<polygon class="f{colour}" points="{path(edge)}"/>')
        for curve in one.curves:
            parts.append(f'<polyline class="line c{colour}" points="{path(curve)}"/>')
    ends = [_end(one) for one in series]
    heights = _apart([y_at(y) for y in ends], lowest=bottom - 6)
    for colour, y in zip(range(len(series)), heights, strict=True):
        parts.append(text(right + 10, y + 4, series[colour].label, f'class="t{colour}"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def interval_chart(title: str, x_label: str, rows: Sequence[Interval]) -> str:
    """Draw means with intervals, one below the other, and a line at 0."""
    left, step, top = 250, 26, 44
    height = top + step * len(rows) + 56
    all_values = [v for r in rows for v in (r.mean, r.low, r.high, *r.values, 0.0) if v is not None]
    low, high = min(all_values), max(all_values)
    margin = 0.03 * (high - low or 1.0)
    low, high = low - margin, high + margin
    bottom = top + step * len(rows)

    def x_at(x: float) -> float:
        return round(left + (x - low) / (high - low) * (WIDTH - left - 24), 1)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        text(16, 22, title, 'class="title"'),
    ]
    for x in ticks(low, high):
        kind = "axis" if x == 0 else "grid"
        parts += [
            f'<line class="{kind}" x1="{x_at(x)}" x2="{x_at(x)}" y1="{top}" y2="{bottom}"/>',
            text(x_at(x), bottom + 18, f"{x:g}", 'text-anchor="middle"'),
        ]
    parts.append(text((left + WIDTH) / 2, bottom + 42, x_label, 'text-anchor="middle"'))
    for i, row in enumerate(rows):
        y = top + step * (i + 0.5)
        parts.append(text(left - 12, y + 4, row.label, 'text-anchor="end"'))
        for value in row.values:
            x = x_at(value)
            parts.append(f'<line class="c0" x1="{x}" x2="{x}" y1="{y - 6}" y2="{y + 6}"/>')
        if row.low is not None and row.high is not None:
            ends = f'x1="{x_at(row.low)}" x2="{x_at(row.high)}" y1="{y}" y2="{y}"'
            parts.append(f'<line class="line c1" {ends}/>')
        parts.append(f'<circle class="t1" cx="{x_at(row.mean)}" cy="{y}" r="4.5"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Panel:
    """Points on logarithmic axes.

    Attributes:
        title: text above the panel.
        groups: label -> points. The first group has the second colour.
        lines: label -> a curve through the points.
    """

    title: str
    groups: Mapping[str, Points]
    lines: Mapping[str, Points]


def scatter_panels(title: str, x_label: str, y_label: str, panels: Sequence[Panel]) -> str:
    """Draw panels side by side on logarithmic axes. The panels share their y axis."""
    side, left, top, height = 250, 70, 76, 420
    width, bottom = left + side * len(panels) + 20, height - 52
    ys = [y for panel in panels for points in panel.groups.values() for _, y in points]
    y_low, y_high = _decades(ys)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.groups))

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{round(x, 1)}" y="{round(y, 1)}" {more}>{escape(words)}</text>'

    def y_at(y: float) -> float:
        share = (math.log10(y) - y_low) / (y_high - y_low)
        return round(bottom - share * (bottom - top), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        text(16, 22, title, 'class="title"'),
    ]
    for i, label in enumerate(labels):
        x = 22 + 110 * i
        parts += [_mark(x, 42, i + 1), text(x + 10, 46, label, f'class="t{i + 1}"')]
    powers = range(y_low, y_high + 1)
    for power in powers:
        parts += [
            f'<line class="grid" x1="{left}" x2="{left + side * len(panels) - 16}" '
            f'y1="{y_at(10.0**power)}" y2="{y_at(10.0**power)}"/>',
            text(left - 8, y_at(10.0**power) + 4, f"{10.0**power:g}", 'text-anchor="end"'),
        ]
    for place, panel in enumerate(panels):
        begin, end = left + side * place, left + side * (place + 1) - 16
        xs = [math.log10(x) for points in panel.groups.values() for x, _ in points]
        x_low, x_high = min(xs), max(xs)
        margin = 0.06 * (x_high - x_low or 1.0)
        x_low, x_high = x_low - margin, x_high + margin

        def x_at(x: float, a: float = begin, b: float = end, c: float = x_low, d: float = x_high):
            return round(a + (math.log10(x) - c) / (d - c) * (b - a), 1)

        parts.append(text((begin + end) / 2, top - 8, panel.title, 'text-anchor="middle"'))
        for x in _log_ticks(10**x_low, 10**x_high):
            parts.append(text(x_at(x), bottom + 18, f"{x:g}", 'text-anchor="middle"'))
        frame = f"M{begin},{top} V{bottom} H{end}"
        parts.append(f'<path class="axis line" d="{frame}" stroke-width="1"/>')
        for label, curve in panel.lines.items():
            path = " ".join(
                f"{x_at(x)},{min(max(y_at(y), top), bottom)}" for x, y in curve if y > 0
            )
            colour = labels.index(label) + 1
            parts.append(f'<polyline class="line c{colour}" points="{path}"/>')
        for label, points in panel.groups.items():
            colour = labels.index(label) + 1
            parts += [_mark(x_at(x), y_at(y), colour) for x, y in points]
    parts += [
        text((left + width) / 2, height - 10, x_label, 'text-anchor="middle"'),
        text(0, 0, y_label, f'text-anchor="middle" transform="translate(16 {(top + bottom) / 2}) '
             'rotate(-90)"'),
    ]  # fmt: skip
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mark(x: float, y: float, colour: int) -> str:
    """Draw a circle, or a square for every second colour, for readers who do not see colours."""
    if colour % 2:
        return f'<circle class="t{colour}" cx="{x}" cy="{y}" r="3.6" fill-opacity="0.8"/>'
    corner = f'x="{round(x - 3.4, 1)}" y="{round(y - 3.4, 1)}"'
    return f'<rect class="t{colour}" {corner} width="6.8" height="6.8" fill-opacity="0.8"/>'


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Return the powers of 10 around the values, at least one apart."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return at least three ticks for a logarithmic axis if possible.

    The ticks are powers of 10, with their multiples by 3, or by 2 and 5, if there are few. If these
    are too few as well, the ticks are evenly spaced numbers.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**k for k in decades for f in factors if low <= f * 10.0**k <= high]
        if len(found) >= 3:
            return found
    return ticks(low, high)[::2]


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers that span [low, high], except for less than a step at either end."""
    raw = (high - low or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _end(series: Series) -> float:
    """Return the height of the label.

    It is the mean end of the curves, or the middle of the band's end without curves.
    """
    if series.curves:
        return sum(curve[-1][1] for curve in series.curves) / len(series.curves)
    return (series.band[-1][1] + series.band[-1][2]) / 2


def _apart(heights: Sequence[float], gap: float = 17, lowest: float = math.inf) -> list[float]:
    """Return the label heights in their order, moved so that labels do not overlap.

    Labels move down where they would overlap, and up from below `lowest`.
    """
    placed = list(heights)
    order = sorted(range(len(placed)), key=lambda i: placed[i])
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    for i in reversed(order):
        placed[i] = min(placed[i], lowest)
        lowest = placed[i] - gap
    return placed
