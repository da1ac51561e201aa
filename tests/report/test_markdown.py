"""Tests of the report's tables as Markdown."""

import re

import pytest
from typer.testing import CliRunner

from tests.support.run_folders import write_run, write_study
from zofo.cli.app import app
from zofo.errors import UserError
from zofo.report.data import make_report
from zofo.report.markdown import MARK, escape, render_markdown, write_markdown
from zofo.report.tables import group_table


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def rows_under(text: str, title: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without the table's own heading."""
    block = text.split(f"### {title}\n")[1].split("\n### ")[0]
    lines = [line for line in block.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]


def test_the_command_writes_verdict_and_every_row(tmp_path):
    study = write_study(tmp_path / "study")
    to = tmp_path / "results.md"
    to.write_text(f"{MARK}\nWhat stood here before is replaced.")
    done = run("report", study, "--to", tmp_path / "page.html", "--markdown", to)
    assert done.exit_code == 0, done.output
    text = to.read_text()
    assert "What stood here before" not in text
    report = make_report([study])
    assert f"**{escape(report.verdict.sentence)}**" in text
    rows = rows_under(text, "Scores and costs")
    table = group_table(report.comparison)
    assert len(rows) == len(table.rows)
    for row, cells in zip(rows, table.rows, strict=True):
        assert [cell.strip() for cell in row] == [
            escape(f"{cell.text} {cell.aside}".strip()) for cell in cells
        ]
    assert len(rows_under(text, "Hybrid against fo-peft")) == len(report.comparison.pairs)
    assert "### Ranks over tasks" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0.71 [0.65, 0.77]", "0.71 [0.65, 0.77]"),
        ("[a](http://b)", r"\[a\](http://b)"),
        ("a | b\nc", r"a \| b c"),
        ("<script>", r"\<script\>"),
        ("x\x1b[2J", "x\ufffd\\[2J"),
    ],
)
def test_names_are_text(text, shown):
    assert escape(text) == shown


def test_a_single_run_makes_markdown(tmp_path):
    report = make_report([write_run(tmp_path / "run")])
    text = render_markdown(report)
    assert "Nothing to compare yet" in text
    assert len(rows_under(text, "Scores and costs")) == 1


def test_other_files_stay(tmp_path):
    report = make_report([write_run(tmp_path / "run")])
    (tmp_path / "notes.md").write_text("mine")
    for to in (tmp_path / "notes.md", tmp_path):
        with pytest.raises(UserError, match="--markdown"):
            write_markdown(report, to)
        done = run("report", tmp_path / "run", "--to", tmp_path / "page.html", "--markdown", to)
        assert done.exit_code == 2
    same = tmp_path / "same.html"
    done = run("report", tmp_path / "run", "--to", same, "--markdown", same)
    assert done.exit_code == 2
    assert "both" in done.stderr
    assert not same.exists()
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert not (tmp_path / "page.html").exists()
