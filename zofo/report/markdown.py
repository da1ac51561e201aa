"""A report as Markdown: the verdict and the tables, for a README, a paper or an issue.

Anyone may have chosen the names in a run folder, so characters with a meaning in Markdown or HTML
are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from zofo.disk.files import write_text
from zofo.pages.document import check_target
from zofo.pages.tables import Table
from zofo.report.answers import held_out_tables
from zofo.report.data import Report
from zofo.report.page import smoothness_of
from zofo.report.tables import gate_table, group_table, pair_table, rank_table, reach_table

MARK: Final = "<!-- written by zofo report -->"
_NUM_PROMPTS: Final = 4  # held-out prompts with answers, for each table of runs
_SIGNS: Final = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
# Brackets around numbers are an interval and not a link, so they need no escape.
_PLAIN_BRACKETS: Final = re.compile(r"\\\[([-+.,\d\s]+)\\\]")


def write_markdown(report: Report, to: str | Path) -> None:
    """Write the Markdown, or replace an earlier one.

    Raises:
        UserError: as `check_markdown_target`.
    """
    check_markdown_target(to)
    write_text(Path(to).expanduser(), render_markdown(report))


def check_markdown_target(to: str | Path) -> None:
    """Refuse to replace a file that is not an earlier report.

    Raises:
        UserError: if `to` is a folder, or a file that this module did not write.
    """
    check_target(Path(to).expanduser(), MARK, "--markdown", "report.md")


def render_markdown(report: Report) -> str:
    """The text of the Markdown."""
    from zofo.smoothness.tables import smoothness_table

    comparison, verdict = report.comparison, report.verdict
    parts = [MARK, f"**{escape(verdict.sentence)}**"]
    if verdict.notes:
        parts.append("\n".join(f"- {escape(note)}" for note in verdict.notes))
    sections = [
        ("Scores and costs", group_table(comparison)),
        ("Room for the base: fo-ft against fo-peft", gate_table(report.gates)),
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
    answers = held_out_tables(report.runs, _NUM_PROMPTS)
    if answers:
        parts.append("### Held-out prompts before and after training")
    for found in answers:
        where = f"{found.file} in the folder of {', '.join(found.runs)}"
        parts.append(escape(f"{len(found.table.rows)} of {found.num_all:,} prompts of {where}."))
        parts.append(_markdown(found.table))
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
    """Text on one line, escaped so that Markdown shows it unchanged."""
    line = " ".join("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text).split())
    return _PLAIN_BRACKETS.sub(r"[\1]", _SIGNS.sub(r"\\\1", line))
