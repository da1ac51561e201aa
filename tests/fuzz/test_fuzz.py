"""Whatever the files and arguments hold, a command ends with a message.

There is no traceback, no hang and no flood of memory, and the exit code is one of those that the
documentation lists.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from tests.fuzz.explore import explore, run
from tests.support.damage import seal
from tests.support.mutations import BYTES, CONTENTS, DAMAGE, VALUE, VALUES, damage, restore
from zofo.config.schema import AdapterConfig, ModelConfig, RunConfig
from zofo.tasks.spec import TaskSpec

pytestmark = pytest.mark.filterwarnings("default")

RUNS = ("lora-float32", "lora-float32-interrupted", "fo-ft", "p-tuning")
INTERRUPTED = ("lora-float32-interrupted", "p-tuning-interrupted")
DRY = ("train", "plan.yaml", "--dry-run")
ADAPTERS = (
    {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
    {"peft_type": "LORA", "target_modules": r".*\.q_proj", "rank_pattern": {"q_proj": 3}},
    {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
    {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "prompt_tuning_init": "RANDOM"},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
    {"peft_type": "ADALORA", "target_modules": ["v_proj"], "total_step": 9, "init_r": 3},
    {"peft_type": "LOKR", "r": 2, "target_modules": ["v_proj"], "decompose_factor": -1},
)
ROWS = {
    "rows.csv": "text,label\n" + "a fine film,good\na dull film,bad\n" * 12,
    "rows.tsv": "text\tlabel\n" + "a fine film\tgood\na dull film\tbad\n" * 12,
    "rows.jsonl": '{"text": "a fine film", "label": 1}\n{"text": "dull", "label": 0}\n' * 12,
    "rows.json": json.dumps([{"text": f"film {i}", "label": "ab"[i % 2]} for i in range(24)]),
    "rows.txt": "a fine film\na dull film\n" * 12,
}
KEYS = (
    *RunConfig.model_fields,
    *(f"model.{key}" for key in ModelConfig.model_fields),
    *(f"adapter.{key}" for key in AdapterConfig.model_fields),
    *(f"task.{key}" for key in TaskSpec.model_fields),
    *("", ".", "task.", "evil", "task.name.evil"),
)


@pytest.fixture(autouse=True)
def plan(folder):
    """A configuration of a small run that has not begun."""
    config = yaml.safe_load(Path("lora-float32/run.yaml").read_text())
    Path("plan.yaml").write_text(yaml.safe_dump({**config, "output_dir": "new"}))


def files_of(*names: str) -> list[Path]:
    return sorted(p for name in names for p in Path(name).rglob("*") if p.is_file())


@contextlib.contextmanager
def damaged(path: Path, change: tuple[Any, ...]) -> Any:
    """The file is damaged while the block runs."""
    content = path.read_bytes()
    try:
        damage(path, change)
        yield
    finally:
        restore(path, content)


def some_file(*names: str) -> st.SearchStrategy[Path]:
    """A file of the folders; the records of a run, which are few, come up as often as all others.

    Each folder has its turn, however many files it has.
    """
    chosen = []
    for name in names:
        files = files_of(name)
        records = [p for p in files if p.suffix in (".json", ".jsonl", ".yaml")]
        chosen += [st.sampled_from(files), st.sampled_from(records)]
    return st.one_of(chosen)


def on_files(names: tuple[str, ...], commands: Callable[[Path], Any], *, quick: int) -> None:
    """Damage one file of the folders after another, and run commands on its folder."""

    def check(drawn: tuple[Path, tuple[Any, ...]]) -> None:
        path, change = drawn
        with damaged(path, change):
            commands(path)

    explore(st.tuples(some_file(*names), DAMAGE), check, quick=quick)


def test_info_on_damaged_folders():
    def commands(path):
        run("info", path.parts[0])
        if len(path.parts) > 2:
            run("info", str(path.parent), "--json")

    on_files(RUNS, commands, quick=100)


def test_report_on_damaged_runs():
    on_files(RUNS, lambda path: run("report", path.parts[0], "--to", "report.html"), quick=2)


def test_verify_and_predict_on_damaged_folders():
    def commands(path):
        is_checkpoint = path.parts[1].startswith("checkpoint")
        run("verify", str(Path(*path.parts[: 2 if is_checkpoint else 1])))
        run("predict", path.parts[0], "a film")

    on_files((*RUNS, "base"), commands, quick=10)


def test_damaged_runs_are_resumed_or_refused():
    """A resumed run writes into its folder, so each example gets a copy."""

    def check(drawn):
        path, change = drawn
        copy = Path("copies", path.parts[0])
        shutil.copytree(path.parts[0], copy)
        try:
            damage(Path("copies", path), change)
            run("train", "--resume", str(copy))
        finally:
            shutil.rmtree("copies")

    explore(st.tuples(some_file(*INTERRUPTED), DAMAGE), check, quick=2)


def test_artefacts_whose_digests_fit_the_damage():
    def check(drawn):
        path, change = drawn
        artefact = Path(*path.parts[:2])
        header = (artefact / "zofo.json").read_bytes()
        with damaged(path, change):
            with contextlib.suppress(Exception):
                seal(artefact)
            run("verify", str(artefact))
            run("info", str(artefact))
            run("eval", str(artefact), "task.train=rows.csv")
            run("export", str(artefact), "--to", "plain")
        shutil.rmtree("plain", ignore_errors=True)
        restore(artefact / "zofo.json", header)

    files = [p for p in files_of(*RUNS) if p.parts[1] == "artifact" and p.name != "README.md"]
    explore(st.tuples(st.sampled_from(files), st.one_of(BYTES, VALUE)), check, quick=5)


def test_configurations_and_overrides():
    values = st.one_of(
        st.sampled_from(VALUES).map(lambda value: yaml.safe_dump(value, width=10**6)),
        st.text(max_size=20),
        st.sampled_from(
            ("[" * 3000, "!!binary x", "*a", "&a [*a]", "{", "- a", "\0", "~", "1e999")
        ),
    )
    override = st.tuples(st.sampled_from(KEYS), values).map("=".join)

    def check(drawn):
        overrides, change = drawn
        with damaged(Path("plan.yaml"), change):
            run(*DRY, *overrides)

    changes = st.one_of(st.just(("nothing",)), DAMAGE)
    explore(st.tuples(st.lists(override, min_size=1, max_size=3), changes), check, quick=50)


def test_adapter_files():
    def check(drawn):
        values, changes, suffix = drawn
        path = Path(f"adapter{suffix}")
        text = json.dumps(values) if suffix == ".json" else yaml.safe_dump(values)
        path.write_text(text)
        try:
            with contextlib.suppress(ValueError):  # A second change may not parse the first.
                for change in changes:
                    damage(path, change)
            run(*DRY, f"adapter.config_file={path}")
        finally:
            restore(path, b"")

    changes = st.one_of(st.lists(VALUE, min_size=1, max_size=2), st.lists(DAMAGE, max_size=1))
    drawn = st.tuples(st.sampled_from(ADAPTERS), changes, st.sampled_from((".json", ".yaml")))
    explore(drawn, check, quick=30)


def test_data_files():
    def check(drawn):
        name, change, text = drawn
        path = Path("data") / name
        restore(path, ROWS[name].encode())
        damage(path, change)
        task = "completion" if text else "classification"
        columns = ("task.prompt=text", "task.completion=label") if text else ()
        run(*DRY, f"task={task}", f"task.train={path}", *columns)
        restore(path, b"")

    changes = st.one_of(BYTES, DAMAGE, st.tuples(st.just("replace"), st.sampled_from(CONTENTS)))
    explore(st.tuples(st.sampled_from(tuple(ROWS)), changes, st.booleans()), check, quick=30)
