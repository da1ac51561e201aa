"""Every configuration runs at tiny scale with the command in its header."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.hub_rows import make_row, write_rows
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.smoothness.options import load_smoothness

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RUNS = [
    path
    for path in CONFIGS
    if re.search(r"^#     zofo (train|smoothness) ", path.read_text(), re.M)
]
SIZES = ["task.num_train=16", "task.num_dev=8", "task.num_test=8"]


def rows_of_users(folder: Path) -> None:
    """Write the files that the headers name, beside the folder with the configurations."""
    (folder / "configs").symlink_to(CONFIGS[0].parent)
    kinds = (("warm", "good"), ("dull", "bad"))
    texts = [(f"film {i} is {kinds[i % 2][0]}", kinds[i % 2][1]) for i in range(60)]
    lines = "\n".join(",".join(row) for row in texts)
    (folder / "reviews.csv").write_text(f"text,label\n{lines}\n")
    write_rows(folder / "pairs.jsonl", [{"prompt": t, "completion": f" {k}"} for t, k in texts])
    chats = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": k}]}
        for t, k in texts
    ]
    write_rows(folder / "chats.jsonl", chats)
    for name, split in (("rotten-tomatoes", "test"), ("sst2", "validation")):
        (folder / name).mkdir()
        for i, part in enumerate(("train", split)):
            rows = [make_row(name, 100 * i + j) for j in range(60)]
            write_rows(folder / name / f"{part}.jsonl", rows)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_the_command_in_the_header(path, tmp_path, monkeypatch, decoder_folder):
    rows_of_users(tmp_path)
    command = re.search(r"^#     zofo (.*)$", path.read_text(), re.MULTILINE)
    assert command is not None
    arguments = [str(path) if a.startswith("configs/") else a for a in shlex.split(command[1])]
    measures = command[1].startswith("smoothness")
    config = load_smoothness(path)[0] if measures else load_config(path)
    rows = tmp_path / config.task.name
    folder = [f"task.data_dir={rows}"] if rows.is_dir() else []
    small = [f"model.name={decoder_folder}", "steps=2", "eval_every=1", "batch_size=4"]
    if measures:
        small += ["smoothness.rows=4", "smoothness.lanczos_steps=3", "smoothness.directions=2"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app, [*arguments, *small, *SIZES, *folder, "device=cpu", "output_dir=run"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["cost"]["steps"] == 2
    part = "test" if config.measure_test else "dev"
    assert result[part]["after"]["num_rows"] == 8


def test_every_configuration_is_of_a_known_kind():
    assert {path.name for path in CONFIGS} == {path.name for path in RUNS}
