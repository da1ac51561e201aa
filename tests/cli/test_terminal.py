"""No name or value from a file moves the cursor, reorders a line or forges one."""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.support.damage import edit
from tests.support.run_folders import write_run
from zofo.cli.app import app
from zofo.console import new_progress, plain_console, printable, printable_json

pytestmark = pytest.mark.filterwarnings("default")
FILES = Path(__file__).parents[1] / "fixtures" / "written_by_50fe18a"
EVIL = "x\x1b[2J\x1b]0;t\x07\x9b1A\r\u202ey\nFORGED"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run, its artefact with another base and task, a checkpoint and rows, all with the name."""
    monkeypatch.chdir(tmp_path)
    for name in ("lora-float32", "lora-float32-interrupted", "base"):
        shutil.copytree(FILES / name, name)
    run, stopped = Path("lora-float32"), Path("lora-float32-interrupted")

    def change(header):
        header["base"]["name"] = header["task"]["text"] = EVIL

    edit(run / "artifact", change)
    for place in (run, stopped):
        values = yaml.safe_load((place / "run.yaml").read_text())
        values["model"]["name"] = values["task"]["label"] = EVIL
        (place / "run.yaml").write_text(yaml.safe_dump(values))
        (place / "base.json").write_text(json.dumps({"name": EVIL}))
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, EVIL: EVIL, "status": EVIL}))
    Path("rows.csv").write_text(f'text,"{EVIL}"\n' + "a,b\n" * 20)
    write_run(tmp_path / "made" / "a", task=EVIL, model=EVIL)
    write_run(tmp_path / "made" / "b", task=EVIL, result=False, study={"error": EVIL})
    return tmp_path


COMMANDS = {
    "info": ["info", "lora-float32/artifact"],
    "info of a run": ["info", "lora-float32"],
    "info of a checkpoint": ["info", "lora-float32-interrupted/checkpoint-4"],
    "verify": ["verify", "lora-float32"],
    "verify of a checkpoint": ["verify", "lora-float32-interrupted/checkpoint-4"],
    "eval": ["eval", "lora-float32"],
    "predict": ["predict", "lora-float32/artifact", "text"],
    "export": ["export", "lora-float32", "--to", "plain"],
    "replay": ["replay", "lora-float32", "--step", "1", "--to", "plain"],
    "train": ["train", "lora-float32/run.yaml", "output_dir=new"],
    "plan": ["train", "lora-float32/run.yaml", "--dry-run", "output_dir=new"],
    "resume": ["train", "--resume", "lora-float32-interrupted"],
    "rows": ["train", "task=classification", "task.train=rows.csv", "model=base"],
    "report": ["report", "made", "lora-float32", "--to", "page.html"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_a_command_prints_moves_nothing(folder, command):
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert done.output
    kinds = {c: unicodedata.category(c) for c in done.output}
    assert not [c for c, kind in kinds.items() if kind in ("Cc", "Cf", "Zl", "Zp") and c != "\n"]
    assert not any(line.startswith("FORGED") for line in done.stdout.splitlines())
    if "info" in command or "report" in command:
        assert "x\ufffd[2J" in done.output


def test_no_module_prints_by_itself():
    for path in (Path(__file__).parents[2] / "zofo").rglob("*.py"):
        if path.name != "console.py":
            text = path.read_text()
            assert " print(" not in text, path
            assert " Console(" not in text, path


def test_rich_styles_its_own_text_only():
    console = plain_console()
    console.file, console._force_terminal, console._color_system = io.StringIO(), True, None
    console.print(f"[red]{EVIL}", style="bold")
    with new_progress(console, EVIL) as progress:
        progress.add_task(EVIL, total=2, text=EVIL)
    written = console.file.getvalue()
    assert "[red]x\ufffd[2J" in written
    for sign in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\u202e"):
        assert sign not in written


def test_text_of_people_stays():
    for text in ("né 日本 👩\u200d👩 \u05d0\u05d1 a\tb\n", "10\u00a0000", "می\u200cخواهم"):
        assert printable(text) == printable_json(text) == text


def test_json_keeps_its_value():
    value = {EVIL: ["\x7f\x9b\u2028\U000e0041", "é\u200d"]}
    text = printable_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert text == printable(text)
