"""Tests of reading run folders in every state."""

import json
import math

import pytest

from tests.support.run_folders import COST, write_run, write_study
from zofo.errors import UserError
from zofo.results.comparison import compare
from zofo.results.table import COLUMNS, CURVE_COLUMNS, find_runs, read_runs


def row_of(*paths):
    table = read_runs(paths).table
    assert len(table) == 1
    return table.iloc[0]


def test_a_finished_run_is_read_as_it_was_written(tmp_path):
    folder = write_run(tmp_path / "run", accuracy=0.75, dev=(0.7, 0.5, 0.6), seed=4)
    runs = read_runs([folder])
    assert list(runs.table.columns) == list(COLUMNS)
    row = runs.table.iloc[0]
    result = json.loads((folder / "result.json").read_text())
    assert (row.run, row.status, row.stage, row.error) == ("run", "done", "final", "")
    assert (row.model, row.task, row.method, row.adapter) == ("tiny", "rte", "hybrid", "lora")
    assert (row.base_lr, row.adapter_lr, row.seed) == (1e-5, 1e-3, 4)
    assert row.accuracy == result["test"]["after"]["accuracy"] == 0.75
    assert row.accuracy_before == result["test"]["before"]["accuracy"]
    assert (row.majority, row.num_test) == (0.55, 200)
    assert (row.best_dev_loss, row.last_dev_loss) == (0.5, 0.6)
    assert (row.steps, row.planned_steps) == (30, 30)
    for cost in ("forward_equivalents", "peak_memory_bytes", "artifact_bytes"):
        assert row[cost] == result["cost"][cost]
    # The seconds come from the log, which excludes evaluations.
    assert row.train_s == 15.0 != result["cost"]["train_s"]
    assert list(runs.curves.columns) == list(CURVE_COLUMNS)
    assert runs.curves["dev_loss"].tolist() == [0.7, 0.5, 0.6]
    assert runs.curves["forward_equivalents"].tolist() == [
        10 * COST["hybrid"] * k for k in (1, 2, 3)
    ]
    assert runs.configs["run"]["task.name"] == "rte"
    assert runs.environments["run"]["packages.torch"] == "2.6.0"


def test_a_search_run_has_no_test_score(tmp_path):
    row = row_of(write_run(tmp_path / "run", accuracy=None, study={"stage": "search"}))
    assert (row.status, row.stage, row.study) == ("done", "search", "mine")
    assert math.isnan(row.accuracy)
    assert row.best_dev_loss == 0.55


def test_a_run_that_goes_on_is_read_up_to_its_half_written_line(tmp_path):
    folder = write_run(tmp_path / "run", dev=(0.7, 0.6), result=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "eval_lo')
    runs = read_runs([folder])
    row = runs.table.iloc[0]
    assert (row.status, row.steps, row.best_dev_loss) == ("unfinished", 20, 0.6)
    assert row.forward_equivalents == 20 * COST["hybrid"]
    assert len(runs.curves) == 2


def test_logs_without_costs_at_evaluations_take_those_of_their_step(tmp_path):
    folder = write_run(tmp_path / "run", dev=(0.7, 0.6))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval_loss" in line:
            line.pop("forward_equivalents")
            line.pop("elapsed_s")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_runs([folder]).curves["forward_equivalents"].tolist() == [30, 60]


def test_a_diverged_run_is_no_best_run(tmp_path):
    folder = write_run(tmp_path / "run", dev=(0.7, "nan"), result=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": "nan", "non_finite": 1.0}\n')
    row = row_of(folder)
    assert (row.status, row.error) == ("stopped", "loss not finite at step 21")
    assert (row.best_dev_loss, row.last_dev_loss) == (0.7, 0.7)


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_the_studys_word_on_a_run_that_did_not_end_well(tmp_path, status):
    study = {"status": status, "error": "out of memory"}
    row = row_of(write_run(tmp_path / "run", result=False, study=study))
    assert (row.status, row.error) == (status, "out of memory")


def test_a_search_at_the_chosen_rates_is_the_run_of_its_seed(tmp_path):
    folder = write_run(tmp_path / "run", study={"stage": "search", "chosen": True})
    row = row_of(folder)
    assert (row["stage"], row["chosen"]) == ("final", True)
    others = [write_run(tmp_path / f"s{i}", seed=i, study={"chosen": True}) for i in (1, 2)]
    (group,) = compare(read_runs([folder, *others])).groups
    assert group.seeds == (0, 1, 2)


def test_a_studys_names_tell_apart_what_the_configuration_does_not(tmp_path):
    """The cell of a study gives the method and the adapter of its run.

    `hybrid-tied` runs the method hybrid, and two LoRA adapters differ only by their labels.
    """
    for name, cell in (
        ("tied", {"method": "hybrid-tied", "adapter": "lora"}),
        ("wide", {"method": "hybrid", "adapter": "lora64"}),
    ):
        folder = write_run(tmp_path / name, study={"stage": "final"})
        record = json.loads((folder / "study.json").read_text())
        record["cell"] |= cell
        (folder / "study.json").write_text(json.dumps(record))
        row = row_of(folder)
        assert (row["method"], row["adapter"]) == (cell["method"], cell["adapter"])
        assert (row["base_lr"], row["adapter_lr"]) == (1e-5, 1e-3)


def test_a_run_that_never_began_is_known_from_its_study(tmp_path):
    folder = write_run(tmp_path / "run", method="fo-peft", study={"status": "failed"}, result=False)
    for name in ("run.yaml", "metrics.jsonl", "environment.json"):
        (folder / name).unlink()
    row = row_of(folder)
    assert (row.status, row.model, row.task, row.method) == ("failed", "tiny", "rte", "fo-peft")
    assert (row.adapter, row.optimizer, row.adapter_lr, row.seed) == ("lora", "adamw", 1e-3, 0)


@pytest.mark.parametrize("name", ["run.yaml", "result.json"])
@pytest.mark.parametrize("content", [b"\xff\x00", b"{", b"[1]", b""])
def test_damaged_files_make_a_damaged_run(tmp_path, name, content):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    row = row_of(folder)
    assert row.status == "damaged"
    assert name in row.error


@pytest.mark.parametrize(
    "value", [None, "x", [1], {"accuracy": "high"}, {"after": {"accuracy": True}}]
)
def test_a_result_of_another_shape_is_blank(tmp_path, value):
    folder = write_run(tmp_path / "run")
    (folder / "result.json").write_text(json.dumps({"test": value, "cost": value}))
    assert math.isnan(row_of(folder).accuracy)


def test_rates_by_pattern_own_rows_and_adapter_files_have_names(tmp_path):
    folder = write_run(tmp_path / "run", base_lr={"*mlp*": 1e-6, "*attn*": 1e-5})
    text = (folder / "run.yaml").read_text()
    text = text.replace("name: rte\n  train: null", "name: classification\n  train: data/mine.csv")
    text = text.replace("config_file: null", "config_file: peft/dora.yaml")
    (folder / "run.yaml").write_text(text)
    row = row_of(folder)
    assert row.base_lr == "*mlp*: 1e-06, *attn*: 1e-05"
    assert row.task == "classification: mine.csv"
    assert row.adapter == "dora"


def test_a_setting_is_every_option_but_seed_rates_and_what_changes_nothing(tmp_path):
    first = row_of(write_run(tmp_path / "a"))
    same = write_run(tmp_path / "b", seed=5, base_lr=1e-3, log_every=3, device="cpu")
    other = write_run(tmp_path / "c", eps=1e-4)
    assert row_of(same).setting == first.setting != row_of(other).setting


def test_runs_are_found_in_a_study_in_a_folder_and_once(tmp_path):
    study = write_study(tmp_path / "study", tasks=("rte",), seeds=(0,))
    inside = sorted(f for f in (study / "runs").iterdir())
    assert find_runs([study]) == inside
    assert find_runs([study / "runs"]) == inside
    assert find_runs([inside[3], study, inside[0]]) == [inside[3], *inside[:3], *inside[4:]]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert read_runs(folders).table["run"].tolist() == ["a/run", "b/run"]


def test_a_folder_without_runs_is_one_error(tmp_path):
    (tmp_path / "notes").mkdir()
    for paths in ([tmp_path / "notes"], [tmp_path / "nowhere"], []):
        with pytest.raises(UserError, match="name run folders, or a study's folder"):
            read_runs(paths)
