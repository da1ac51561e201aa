"""Tests of every preset and every study file at tiny scale. Each cell runs once."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.support.forks import server
from tests.support.hub_rows import TEST_SPLIT, make_row, write_rows
from tests.support.tiny_study import complete, num_ended
from zofo.cli.app import app
from zofo.config.schema import RunConfig
from zofo.run.train import train
from zofo.study.entries import label_of
from zofo.study.grid import Grid, Run, expand
from zofo.study.spec import load_spec, presets

FILES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))
STUDIES = {**presets(), **{path.name: path for path in FILES}}
SMALL = {"num_train": 16, "num_dev": 8, "num_test": 8}


def shrink(name: str, folder: Path, decoder: str, encoder: str) -> Grid:
    """Return the study with tiny models, few rows, two steps and no network.

    Everything else stays as in the study.
    """
    spec = load_spec(str(STUDIES[name]) if STUDIES[name] in FILES else name)
    models, tasks = [], []
    for entry in spec.models:
        section = {"name": entry} if isinstance(entry, str) else dict(entry)
        model = encoder if label_of(entry, "name") == "minilm" else decoder
        models.append({**section, "label": label_of(entry, "name"), "name": model})
    for entry in spec.tasks:
        section = {"name": entry} if isinstance(entry, str) else dict(entry)
        data = folder / section["name"]
        data.mkdir(exist_ok=True)
        for split in ("train", TEST_SPLIT.get(section["name"], "validation")):
            first = 0 if split == "train" else 100
            rows = [make_row(section["name"], first + i) for i in range(60)]
            write_rows(data / f"{split}.jsonl", rows)
        tasks.append({**section, **SMALL, "data_dir": str(data)})
    # A gate compares at equal cost: two steps of hybrid, which costs 3.
    length = {"budget": 6, "steps": None} if spec.gate else {"budget": None, "steps": 2}
    changes = {"models": models, "tasks": tasks, "num_evaluations": 1, **length}
    base = {**spec.base, "device": "cpu"} if isinstance(spec.base, dict) else spec.base
    values = {**spec.model_dump(), **changes, "base": base, "output": str(folder / "study")}
    path = folder / "shrunk.yaml"
    path.write_text(json.dumps(values))
    return expand(load_spec(str(path)))


def one_run_of_each_cell(grid: Grid) -> list[Run]:
    """Return the first run of every cell with the first task, and one run with every other task."""
    first_task = next(iter(grid.rates)).task
    found: dict[object, Run] = {}
    for run in grid.search:
        found.setdefault(run.cell if run.cell.task == first_task else run.cell.task, run)
    return list(found.values())


def same_but_for_rates(config: RunConfig) -> str:
    """Return a key that is equal for runs that do the same work on the same tiny task."""
    task = config.task.model_copy(update={"data_dir": None})
    changes = {"output_dir": None, "base_lr": 0.0, "adapter_lr": 0.0, "task": task}
    return config.model_copy(update=changes).model_dump_json()


@pytest.fixture(scope="module")
def losses():
    """Collect the dev loss of every run so far.

    Studies share cells, and each cell runs once.
    """
    return {}


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_cell_of_a_study_runs(name, tmp_path, losses, decoder_folder, encoder_folder):
    grid = shrink(name, tmp_path, decoder_folder, encoder_folder)
    runs = one_run_of_each_cell(grid)
    assert {run.cell.method for run in runs} == {cell.method for cell in grid.rates}
    for run in runs:
        config = grid.config(run, tmp_path / run.id)
        key = same_but_for_rates(config)
        if key not in losses:
            train(config, console=Console(quiet=True))
            result = json.loads((tmp_path / run.id / "result.json").read_text())
            losses[key] = result["dev"]["after"]["loss"]
        assert losses[key] > 0, run.id


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_study_file_names_its_command(path):
    assert f"#     zofo study configs/studies/{path.name}" in path.read_text()


def test_a_preset_as_in_the_readme(tmp_path, encoder_folder):
    """`zofo study laptop --workers 2` and `zofo report` work as in the README.

    Only overrides make the study smaller. Its processes are forked from one that has imported
    everything.
    """
    rows = [make_row("rotten-tomatoes", i) for i in range(90)]
    write_rows(tmp_path / "train.jsonl", rows[:60])
    write_rows(tmp_path / "test.jsonl", rows[60:])
    task = {"name": "rotten-tomatoes", "data_dir": str(tmp_path), **SMALL}
    changes = {
        "output": str(tmp_path / "study"),
        "models": [{"name": encoder_folder, "label": "minilm"}],
        "tasks": [task],
        "methods": ["hybrid", "fo-peft"],
        "adapters": ["lora"],
        "seeds": [0],
        "rates": [{"base_lr": [1e-5], "adapter_lr": [1e-3]}],
        "budget": 12,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    with server(tmp_path) as program:
        complete("laptop", "--workers", "2", *overrides, program=program)
    assert num_ended(tmp_path) == 2
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "study"), "--to", str(page)])
    assert done.exit_code == 0, done.output
    assert "hybrid" in done.stdout
    assert page.exists()
