"""Documents and configurations say what the code does."""

import re
from pathlib import Path

import pytest

from zofo.config.load import load_config
from zofo.config.schema import AdapterConfig, ModelConfig, RunConfig
from zofo.results.table import COLUMNS, CURVE_COLUMNS
from zofo.smoothness.options import SmoothnessOptions, load_smoothness
from zofo.tasks.families.table import BUILTIN
from zofo.tasks.load import task_names
from zofo.tasks.spec import TaskSpec

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configurations_are_valid_and_name_their_command(path):
    if path.name.startswith("smoothness"):
        load_smoothness(path)
        assert f"zofo smoothness configs/{path.name}" in path.read_text()
        return
    load_config(path)
    assert f"zofo train configs/{path.name}" in path.read_text()


def test_every_option_is_documented_with_its_default():
    text = (ROOT / "docs" / "commands.md").read_text()
    sections = ((RunConfig, ""), (ModelConfig, "model."), (AdapterConfig, "adapter."))
    for section, prefix in (*sections, (TaskSpec, "task.")):
        for name, field in section.model_fields.items():
            if prefix or name not in ("model", "adapter", "task"):
                assert f"| `{prefix}{name}` |" in text, f"{prefix}{name}"
                assert str(field.description) in text.replace("\\|", "|"), f"{prefix}{name}"


def test_every_option_of_smoothness_is_documented():
    text = (ROOT / "docs" / "theory-smoothness.md").read_text()
    for name, field in SmoothnessOptions.model_fields.items():
        assert f"| `smoothness.{name}` |" in text
        assert str(field.description) in text, name


def test_every_task_is_documented_with_its_prompt():
    text = (ROOT / "docs" / "tasks.md").read_text()
    assert all(f"| `{name}` |" in text for name in task_names())
    for task in BUILTIN.values():
        assert task.template.replace("\n", "\\n") in text


def test_every_column_of_the_tables_of_runs_is_documented():
    text = (ROOT / "docs" / "report.md").read_text()
    for name, meaning in (*COLUMNS.items(), *CURVE_COLUMNS.items()):
        assert f"| `{name}` | {meaning} |" in text


def test_links_between_documents_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\S+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_readme_commands_are_zofos():
    from typer.testing import CliRunner

    from zofo.cli.exits import app

    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "commands.md").read_text()
    commands = set(re.findall(r"^    zofo (\w+)", text, re.MULTILINE))
    assert commands >= {"train", "eval", "predict"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
