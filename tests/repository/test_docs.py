"""The documents and configurations agree with the code."""

import inspect
import re
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

import zofo
from docs import hooks
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.config.schema import (
    AdapterConfig,
    ModelConfig,
    PreferenceConfig,
    RewardConfig,
    RunConfig,
)
from zofo.results.table import COLUMNS, CURVE_COLUMNS, REWARD_COLUMNS
from zofo.smoothness.options import SmoothnessOptions, load_smoothness
from zofo.study.spec import StudySpec, load_spec
from zofo.tasks.families.table import BUILTIN
from zofo.tasks.load import task_names
from zofo.tasks.spec import TaskSpec

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def built(name):
    """Return a page of the reference as the site shows it."""
    return hooks.fill((ROOT / "docs" / "reference" / name).read_text()).replace("\\|", "|")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configurations_are_valid_and_name_their_command(path):
    if path.name.startswith("smoothness"):
        load_smoothness(path)
        assert f"zofo smoothness configs/{path.name}" in path.read_text()
        return
    load_config(path)
    assert f"zofo train configs/{path.name}" in path.read_text()


def test_every_option_is_documented_with_its_default():
    text = built("options.md")
    sections = (
        (RunConfig, ""),
        (ModelConfig, "model."),
        (AdapterConfig, "adapter."),
        (TaskSpec, "task."),
        (RewardConfig, "reward."),
        (PreferenceConfig, "preference."),
        (SmoothnessOptions, "smoothness."),
        (StudySpec, ""),
    )
    sections_of_a_run = {prefix.rstrip(".") for _, prefix in sections[1:6]}
    for section, prefix in sections:
        for name, field in section.model_fields.items():
            if prefix or name not in sections_of_a_run:
                is_set = not field.is_required() and field.default is not None
                default = field.default if is_set else ""
                default = str(default).lower() if isinstance(default, bool) else default
                default = f"`{default}`" if is_set else ""
                line = rf"^\| `{prefix}{name}` \| .* \| {re.escape(default)} \| (.*) \|$"
                found = re.findall(line, text, re.MULTILINE)
                assert str(field.description) in found, f"{prefix}{name}"


def test_every_command_is_documented_with_its_help():
    text = built("commands.md")
    for name, command in hooks.commands().items():
        assert f"## zofo {name}\n\n{command.help.split(chr(10))[0]}" in text
        for parameter in command.params:
            if not getattr(parameter, "hidden", False) and parameter.name != "help":
                assert (parameter.help or "") in text, f"{name} {parameter.name}"
                assert parameter.opts[0][:2] != "--" or f"`{parameter.opts[0]}" in text


def test_every_task_is_documented_with_its_prompt():
    text = (ROOT / "docs" / "guide" / "tasks.md").read_text()
    assert all(f"| `{name}` |" in text for name in task_names())
    for task in BUILTIN.values():
        assert task.template.replace("\n", "\\n") in text


def test_every_column_of_the_tables_of_runs_is_documented():
    text = built("files.md")
    for name, meaning in (*COLUMNS.items(), *CURVE_COLUMNS.items(), *REWARD_COLUMNS.items()):
        assert f"| `{name}` | {meaning} |" in text


def test_the_reference_shows_everything_public():
    assert hooks.missing() == []


def test_the_reference_notices_what_is_missing(monkeypatch):
    monkeypatch.setattr(zofo, "__all__", [*zofo.__all__, "inspect"])
    monkeypatch.setattr(zofo, "inspect", inspect, raising=False)
    assert hooks.missing() == ["zofo.inspect"]


def test_every_example_of_the_reference_runs(tmp_path, monkeypatch):
    """The examples run on a tiny model in the order of the page. Nothing is uploaded."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    examples = hooks.api_examples(page)
    assert set(examples) == set(zofo.__all__)
    names = {"__name__": "example"}
    for name, code in {"the start": hooks._python(page.partition("###")[0]), **examples}.items():
        exec(compile(code, f"the example of {name}", "exec"), names)


def test_links_between_documents_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *PAGES):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\S+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_commands_in_documents_are_zofos():
    text = "\n".join(page.read_text() for page in (ROOT / "README.md", *PAGES))
    commands = set(re.findall(r"^    zofo (\w+)", text, re.MULTILINE))
    assert commands >= {"train", "eval", "predict"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_study_and_the_commands_of_the_cluster_guide(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "guide" / "cluster.md").read_text()
    study, job = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S))
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(study))
    assert load_spec("mine.yaml").storage.startswith("postgresql://")
    (worker,) = job["spec"]["template"]["spec"]["containers"]
    scripts = [line.removeprefix("exec ") for line in text.splitlines() if "exec zofo" in line]
    commands = re.findall(r"^ +(?:CUDA_\S+ )?(zofo .*)$", text, re.MULTILINE)
    commands += [" ".join(worker["command"]), *scripts]
    trainings = re.findall(r" -m (zofo train .*)$", text, re.MULTILINE)
    parsers = typer.main.get_command(app).commands
    for _, name, *words in map(str.split, [*trainings, *commands]):
        parsers[name].make_context(name, [*words])
        # Each study names the file of the page, or the folder that it writes.
        assert name == "train" or words[0] in ("/shared/me/mine.yaml", study["output"])
    assert len(commands) >= 8
    assert len(trainings) >= 3
