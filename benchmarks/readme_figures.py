"""Draw the two figures of README.md from the tables of measurements in docs/results.

    python benchmarks/readme_figures.py

The script writes docs/figures/step.svg (the parts of a hybrid step, drawn to time) and
docs/figures/studies.svg (hybrid − FO-PEFT in our studies). It reads the numbers from the documents,
so that a figure and a document cannot disagree.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from svg import STYLE, WIDTH, Interval, interval_chart

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results"
LEFT, END = 92, 620
"""Where the drawing of a step begins and ends, in pixels.

Its words stand to the right of the end.
"""
LANE = 38
"""Height of a lane, in pixels."""


def main() -> None:
    for name, text in (("step", step()), ("studies", studies())):
        (DOCS / "figures" / f"{name}.svg").write_text(text, encoding="utf-8")


def table(page: str, *header: str) -> list[dict[str, str]]:
    """Return the rows of the first table on a page of docs/results whose header begins as given."""
    lines = (RESULTS / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if _cells(line)[: len(header)] == list(header))
    names, rows = _cells(lines[start]), []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(names, _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


def _numbers(cell: str) -> list[float]:
    """Return the numbers in a cell: a mean and its interval, or a median and the smallest value."""
    return [float(x.replace("−", "-")) for x in re.findall(r"[−+]?\d+(?:\.\d+)?", cell)]


def studies() -> str:
    """Draw the mean with its interval for every pair of both studies, and for each study."""
    overall = [row["hybrid − FO-PEFT, points of test accuracy"] for row in table(
        "results.md", "study")]  # fmt: skip
    rows = []
    gain = "difference, points [95%]"
    for model, header, column, mean in (
        ("MiniLM", ("adapter", "task", "hybrid, %"), gain, overall[0]),
        ("SmolLM2", ("adapter", "task", gain), gain, overall[1]),
        ("fitted head", ("adapter", "optimizer"), "hybrid − FO-PEFT, points [95%]", overall[3]),
    ):
        pairs = table("results.md", *header)
        for pair in pairs:
            place = pair["adapter"], pair[header[1]]
            rows.append(Interval(", ".join((model, *place)), *_numbers(pair[column])))
        rows.append(Interval(f"{model}: mean of {len(pairs)} pairs", *_numbers(mean)))
    rows.append(Interval("fitted head, prefix, long runs", *_numbers(overall[2])))
    return interval_chart(
        "Hybrid against FO-PEFT at equal budgets, three seeds",
        "points of test accuracy that hybrid is ahead; lines are 95% intervals",
        rows,
    )


def step() -> str:
    """Draw a hybrid step as two lanes over time, for base and adapter, and FO-PEFT's step below."""
    cells = table("performance.md", "milliseconds, median (least)", "one thread")
    ms = {row["milliseconds, median (least)"]: _numbers(row["one thread"])[0] for row in cells}
    total, peft = ms["hybrid step"], ms["FO-PEFT step, for comparison"]
    scale = (END - LEFT) / total
    phases = (
        ("forward", ms["forward with graph"], "read x", "read y", "loss = f(x, y)"),
        ("backward", ms["backward into the adapter"], "read x", "gradient of y", ""),
        ("perturbed forward", ms["perturbed forward"], "read x + eps·v", "read y",
         "s = (f(x + eps·v, y) − loss) / eps"),
    )  # fmt: skip
    updates = (ms["update of 134.5 M weights"], ms["adapter's AdamW"])
    lanes = (96, 96 + LANE + 8)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 318" role="img">',
        f"<title>A hybrid step</title><style>{STYLE}</style>",
        _text(16, 22, "One hybrid step, drawn to time", 'class="title"'),
        _text(16, 44, "SmolLM2-135M, LoRA, batch 8 × 32 tokens, float32, one CPU thread"),
        *(_text(16, y + 23, name) for y, name in zip(lanes, ("base x", "adapter y"), strict=True)),
    ]
    at = float(LEFT)
    for name, length, *lane_words, result in phases:
        wide = scale * length
        parts.append(_middle(at + wide / 2, 68, name))
        parts.append(_middle(at + wide / 2, 86, f"{length:.0f} ms"))
        for colour, y, words in zip((1, 4), lanes, lane_words, strict=True):
            parts.append(_box(at, y, wide, f"f{colour} c{colour}"))
            parts.append(_middle(at + wide / 2, y + 23, words))
        parts.append(_middle(at + wide / 2, lanes[1] + LANE + 22, result))
        at += wide
    for colour, y, length, words in zip(
        (1, 4), lanes, updates, ("x − base_lr·s·v", "optimizer's step"), strict=True
    ):
        parts.append(_box(at, y, END - at, f"t{colour} c{colour}"))
        parts.append(_text(END + 10, y + 16, words))
        parts.append(_text(END + 10, y + 33, f"{length:.0f} ms"))
    parts.append(_middle((at + WIDTH) / 2, 68, "update"))
    for y, name, length in ((226, "FO-PEFT", peft), (258, "hybrid", total)):
        parts.append(_text(16, y + 16, name))
        parts.append(_box(LEFT, y, scale * length, "f0 c0", height=22))
        ratio = f" = {length / peft:.2f} × FO-PEFT" if length != peft else ""
        parts.append(_text(LEFT + 10, y + 16, f"{length:,.0f} ms{ratio}"))
    note = "v is noise of ±1, generated again where it is needed. Only the update writes x."
    parts.append(_text(16, 304, note))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" {more}>{escape(words)}</text>'


def _middle(x: float, y: float, words: str) -> str:
    return _text(x, y, words, 'text-anchor="middle"')


def _box(x: float, y: float, width: float, classes: str, height: float = LANE) -> str:
    size = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}"'
    return f'<rect class="{classes}" {size}/>'


if __name__ == "__main__":
    main()
