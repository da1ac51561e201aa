"""What the end of a run with rewards shows on the terminal."""

import pytest

from tests.support.run_folders import add_rewards, write_run
from zofo.cli.train import _show
from zofo.run.result import Result

COST = {
    "steps": 3,
    "forward_equivalents": 9,
    "train_s": 1.0,
    "peak_memory_bytes": 1,
    "artifact_bytes": 1,
}


@pytest.mark.parametrize("width", [40, 100])
def test_a_run_ends_with_answers_before_and_after(tmp_path, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    prompts = [f"[red]ask {i}\x1b[2J " + "long " * 30 + f"end {i}" for i in range(5)]
    after = ["new\nanswer " * 20, "", "\u202ethird", "fourth", "fifth"]
    folder = add_rewards(write_run(tmp_path / "run"), prompts=prompts, after=after)
    figures = {"before": {"reward": 0.0}, "after": {"reward": None}}
    _show(Result(folder, None, None, COST, {"rewards": figures}))
    lines = capsys.readouterr().out.splitlines()
    assert "reward before training  0, on held-out prompts" in lines
    assert "reward after training  none, on held-out prompts" in lines
    first = next(i for i, line in enumerate(lines) if line.startswith("[red]ask 0\ufffd["))
    shown = lines[first : first + 9]
    assert max(map(len, shown)) <= width
    assert "…" in shown[0]
    assert shown[0].endswith("long end 0")
    assert shown[1].startswith("  before    0  old answer to")
    assert shown[2].startswith("  after   0.5  new answer new answer")
    assert shown[5] == "  after   0.5  (no text)"
    assert shown[8] == "  after   0.5  \ufffdthird"
    assert "ask 3" not in "\n".join(lines)
    assert f"all 5 held-out prompts are in {folder / 'held_out_answers.jsonl'}" in lines
