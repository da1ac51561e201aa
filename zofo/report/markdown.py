"""What a report found, as Markdown: the verdict and the tables, for a README, a paper or an issue.

Names in run folders are anyone's, so what Markdown or HTML would read as a sign is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from zofo.disk.files import write_text
from zofo.pages.document import check_target
from zofo.pages.tables import Table
from zofo.report.page import Report, smoothness_of
from zofo.report.tables import group_table, pair_table, rank_table, reach_table

MARK: Final = "<!-- written by zofo report -->"
_SIGNS: Final = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_PLAIN_BRACKETS: Final = re.compile(r"\\\[([-+.,\d\s]+)\\\]")
"""An interval is no link."""


def write_markdown(report: Report, to: str | Path) -> None:
    """Write the Markdown; it takes the place of an earlier one.

    Args:
        report: what was found.
        to: the file.

    Raises:
        UserError: if `to` is a folder, or another file than one of ours.
    """
    check_markdown_target(to)
    write_text(Path(to).expanduser(), render_markdown(report))


def check_markdown_target(to: str | Path) -> None:
    """Refuse what is not ours to replace.

    Raises:
        UserError: if `to` is a folder, or another file than one of ours.
    """
    check_target(Path(to).expanduser(), MARK, "--markdown", "report.md")


def render_markdown(report: Report) -> str:
    """The Markdown as text."""
    from zofo.smoothness.tables import smoothness_table

    comparison, verdict = report.comparison, report.verdict
    parts = [MARK, f"**{escape(verdict.sentence)}**"]
    if verdict.notes:
        parts.append("\n".join(f"- {escape(note)}" for note in verdict.notes))
    sections = [
        ("Scores and costs", group_table(comparison)),
        ("Hybrid against fo-peft", pair_table(comparison.pairs)),
        ("What it took to reach fo-peft's best dev loss", reach_table(comparison.pairs)),
    ]
    if comparison.ranks is not None:
        sections.append(("Ranks over tasks", rank_table(comparison.ranks)))
    smoothness = smoothness_of(report.runs)
    paths = smoothness_table(smoothness, dict.fromkeys(smoothness, ""))
    if paths is not None:
        sections.append(("Smoothness along the run", paths))
    for title, table in sections:
        if table.rows:
            parts += [f"### {title}", _markdown(table)]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    lines = []
    if table.common:
        common = ", ".join(f"{title} {text}" for title, text in table.common.items())
        lines += [escape(f"All of {common}."), ""]
    lines.append(_line([escape(column.title) for column in table.columns]))
    lines.append(_line(["---:" if column.is_number else "---" for column in table.columns]))
    for row in table.rows:
        lines.append(_line([escape(f"{cell.text} {cell.aside}".strip()) for cell in row]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """Text that Markdown shows as it stands, on one line."""
    line = " ".join("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text).split())
    return _PLAIN_BRACKETS.sub(r"[\1]", _SIGNS.sub(r"\\\1", line))
