"""Tests of the commands as a user runs them.

Tests of exit codes and imports start their own processes.
"""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zofo import environment
from zofo.cli import doctor
from zofo.cli.app import app
from zofo.noise import backends, cpu

runner = CliRunner()


def run(*arguments, input=None):
    return runner.invoke(app, [str(a) for a in arguments], input=input)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, decoder_folder):
    """Train a tiny model on a csv file; return the folder and the output."""
    # Brackets and colons must be printed as they are, and not as markup of rich.
    folder = tmp_path_factory.mktemp("cli") / "[/a]:smile:[lr=1e-5]"
    folder.mkdir(parents=True)
    lines = ["text,label"]
    lines += [f"film {i} is {('great', 'dull')[i % 2]},{('good', 'bad')[i % 2]}" for i in range(60)]
    (folder / "reviews.csv").write_text("\n".join(lines) + "\n")
    done = run(
        "train",
        f"model={decoder_folder}",
        "task=classification",
        f"task.train={folder / 'reviews.csv'}",
        "task.num_dev=10",
        "task.num_test=20",
        "steps=2",
        "batch_size=4",
        f"output_dir={folder / 'run'}",
    )
    assert done.exit_code == 0, done.output
    return folder, done.output


@pytest.mark.parametrize("text", ["-5 stars", "-", "--- a film ---", "-x"])
def test_a_text_that_begins_with_a_minus(trained, text):
    folder = trained[0] / "run"
    if text != "-":  # which is no option
        done = run("predict", folder, text)
        assert done.exit_code == 2
        assert "stands after --: predict RUN -- " in re.sub(r"[\s│]+", " ", done.output)
    done = run("predict", folder, "--", text)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["prediction"] in ("good", "bad")


def test_train_ends_with_a_table_and_where_the_result_lies(trained):
    folder, output = trained
    assert "20 held-out rows" in output
    assert "before" in output
    assert "AUC" in output
    assert str(folder / "run") in output
    assert f"zofo.load('{folder / 'run'}').model" in output
    assert f"zofo export {folder / 'run'} --to DIR" in output
    for name in ("run.yaml", "environment.json", "metrics.jsonl", "result.json", "artifact"):
        assert (folder / "run" / name).exists()


def test_eval_repeats_the_runs_score(trained):
    folder, _ = trained
    done = run("eval", folder / "run", "--json")
    assert done.exit_code == 0, done.output
    saved = json.loads((folder / "run" / "result.json").read_text())["test"]["after"]
    found = json.loads(done.stdout)
    assert {key: found[key] for key in saved} == saved


def test_eval_on_other_rows_and_splits(trained):
    folder, _ = trained
    done = run("eval", folder / "run", "--split", "dev", "eval_batch_size=3")
    assert done.exit_code == 0
    assert "dev, 10 rows" in done.stdout


def test_predict_texts_and_files(trained):
    folder, _ = trained
    done = run("predict", folder / "run", "film 1 is great", "film 2 is dull")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["row"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line["probabilities"]) == {"good", "bad"}
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)
    (folder / "new.jsonl").write_text('{"text": "film 1 is great"}\n{"text": "film 2 is dull"}\n')
    output = folder / "out.jsonl"
    done = run("predict", folder / "run", "--file", folder / "new.jsonl", "--output", output)
    assert done.exit_code == 0
    assert [json.loads(x) for x in output.read_text().splitlines()] == lines


def test_completions_are_written(tmp_path, decoder_folder):
    rows = [{"prompt": f"film {i} is", "completion": " great"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        "train",
        f"model={decoder_folder}",
        "task=completion",
        f"task.train={tmp_path / 'a.jsonl'}",
        "steps=40",
        "batch_size=4",
        "adapter_lr=0.05",
        "eval_every=20",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.output
    done = run("predict", tmp_path / "run", "film 3 is", "--max-new-tokens", "4")
    assert json.loads(done.stdout)["prediction"] == " great"


def test_chat_messages(tmp_path, decoder_folder):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is film {i}?"},
                {"role": "assistant", "content": "great"},
            ]
        }
        for i in range(20)
    ]
    # A conversation that is too long loses turns, and an answer that is too long is left out.
    rows.append({"messages": rows[0]["messages"] * 9})
    rows.append({"messages": [rows[0]["messages"][0], {"role": "assistant", "content": "a " * 99}]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        "train",
        f"model={decoder_folder}",
        "task=chat",
        "task.max_length=32",
        f"task.train={tmp_path / 'a.jsonl'}",
        "steps=40",
        "batch_size=4",
        "adapter_lr=0.05",
        "eval_every=20",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.exit_code == 0, done.output
    assert "note: rows left out: 1. The first: " in done.output
    assert "row 22: its completion is longer than max_length 32" in done.output
    assert "note: 1 of 21 conversations are longer than task.max_length (32 tokens)" in done.output
    assert len(json.loads((tmp_path / "run" / "result.json").read_text())["notes"]) == 2
    done = run("predict", tmp_path / "run", "What is film 3?", "--max-new-tokens", "4")
    assert json.loads(done.stdout)["prediction"] == "great"


def test_export_prints_where_and_how_to_use_it(trained, tmp_path):
    folder, _ = trained
    done = run("export", folder / "run", "--to", tmp_path / "plain", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert f"export    {tmp_path / 'plain'}" in done.stdout
    assert "bfloat16" in done.stdout
    line = next(x for x in done.stdout.splitlines() if x.startswith("in Python "))
    exec(line.removeprefix("in Python "), found := {})
    assert next(found["model"].parameters()).element_size() == 2
    again = run("export", folder / "run", "--to", tmp_path / "plain")
    assert again.exit_code == 2
    assert "not empty" in again.stderr


def test_info_replay_and_verify(trained, tmp_path):
    run_folder = trained[0] / "run"
    done = run("info", run_folder)
    assert done.exit_code == 0, done.output
    for part in (": run, whole", "hybrid", "2 updates of the base", "test rows"):
        assert part in done.stdout
    found = json.loads(run("info", run_folder / "artifact", "--json").stdout)
    assert (found["kind"], found["is_whole"], found["num_recorded_steps"]) == ("artefact", True, 2)
    done = run("replay", run_folder, "--step", "1", "--to", tmp_path / "base")
    assert done.exit_code == 0, done.output
    assert "after 1 updates, without adapter" in done.stdout
    assert (tmp_path / "base" / "config.json").exists()
    assert run("replay", run_folder, "--step", "3", "--to", tmp_path / "more").exit_code == 2
    for folder in (run_folder, tmp_path / "base"):
        done = run("verify", folder)
        assert done.exit_code == 0, done.output
        assert done.stdout.rstrip().endswith("is sound")
    (tmp_path / "base" / "model.safetensors").unlink()
    done = run("verify", tmp_path / "base")
    assert done.exit_code == 2
    assert "FAILED" in done.stdout
    assert "lacks model.safetensors" in done.stdout
    assert "NOT whole" in run("info", tmp_path / "base").stdout


def test_dry_run_writes_nothing(trained, tmp_path, decoder_folder):
    folder, _ = trained
    done = run(
        "train",
        "--dry-run",
        f"model={decoder_folder}",
        "task=classification",
        f"task.train={folder / 'reviews.csv'}",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.exit_code == 0
    for part in ("forward-equivalents", "parameters", "memory", "zeroth", "method: hybrid"):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "stepss=3"], "did you mean steps?"),
        (["train", "nowhere.yaml"], "does not exist"),
        (["train", "model=./nowhere", "task=boolq"], "does not exist"),
        (["train", "task=classification", "task.train=none.csv"], "does not exist"),
        (["train", "--resume", "nowhere"], "no run folder"),
        (["train", "device=tpu"], "choose one of"),
        (["eval", "./nowhere"], "does not exist"),
        (["eval", "smollm2-135m", "--split", "all"], "choose train, dev or test"),
        (["eval", "minilm"], "untrained"),
        (["predict", "smollm2-135m"], "either texts to predict or --file"),
        (["predict", "smollm2-135m", "task.text=review", "a"], "write --set task.text=review."),
        (["predict", "smollm2-135m", "device=cpu"], "is an option, not a text"),
        (["predict", "smollm2-135m", "a", "--set", "steps=3"], "does not use the option steps"),
        (["predict", "smollm2-135m", "--file", "rows.txt"], "--file is 'rows.txt'; give a file"),
        (["tasks", "rotten-tomato"], "did you mean"),
        (["export", "nowhere", "--to", "there"], "does not exist"),
        (["info", "nowhere"], "does not exist"),
        (["verify", "tests"], "no run, artefact, checkpoint or export"),
        (["replay", "nowhere", "--step", "1", "--to", "there"], "does not exist"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.output


def test_tasks_and_doctor():
    done = run("tasks")
    assert all(name in done.stdout for name in ("rotten-tomatoes", "sst2", "boolq", "piqa", "chat"))
    assert "It was" in run("tasks", "rotten-tomatoes").stdout
    assert "task.template" in run("tasks", "classification").stdout
    done = run("doctor")
    assert done.exit_code == 0
    assert "torch" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("directions on cpu")]
    assert "compiled kernels" in line
    assert re.search(r"\b\d+ threads? ", line)
    assert line.endswith("as the reference")


@pytest.fixture
def two_more_devices(monkeypatch):
    """Pretend that cuda and mps are present.

    Return a dict from each device to the function that draws its signs. Each device draws the right
    signs until a test replaces its function.
    """
    right = doctor.signs_on("cpu")
    drawn = {"cpu": lambda: right, "cuda": lambda: right, "mps": lambda: right}
    monkeypatch.setattr(environment, "present_devices", lambda: list(drawn))
    monkeypatch.setattr(doctor, "signs_on", lambda device: drawn[device]())
    return drawn


def directions(output):
    lines = [line for line in output.splitlines() if line.startswith("directions on ")]
    return {line.split()[2].rstrip(":"): line for line in lines}


def test_doctor_says_what_computes_on_each_device(two_more_devices, monkeypatch):
    monkeypatch.setattr(backends, "triton_launch", lambda: None)
    done = run("doctor")
    lines = directions(done.stdout)
    assert done.exit_code == 0, done.output
    assert list(lines) == list(two_more_devices)
    assert "Triton" in lines["cuda"]
    assert "slower" not in lines["cuda"]
    assert "slower: there are kernels for CPU and CUDA only" in lines["mps"]
    assert all(line.endswith("as the reference") for line in lines.values())
    assert "everything runs on the CPU" not in done.stdout


def test_doctor_says_why_directions_are_drawn_the_slow_way(two_more_devices, monkeypatch):
    def no_triton():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(backends, "triton_launch", no_triton)
    assert (
        "slower: triton cannot be imported; install it" in directions(run("doctor").stdout)["cuda"]
    )


@pytest.mark.parametrize("fault", ["wrong", "fails"])
def test_doctor_finds_a_device_that_draws_other_directions(two_more_devices, fault):
    one_wrong = two_more_devices["cpu"]().clone()
    one_wrong[700] *= -1

    def no_compiler():
        raise RuntimeError("Failed to find C compiler [cc]\nmore")

    two_more_devices["cuda"] = {"wrong": lambda: one_wrong, "fails": no_compiler}[fault]
    done = run("doctor")
    words = {"wrong": "WRONG", "fails": "RuntimeError: Failed to find C compiler [cc]"}
    assert done.exit_code == 1
    assert directions(done.stdout)["cuda"].endswith(words[fault])
    assert directions(done.stdout)["mps"].endswith("as the reference")


def test_doctor_names_the_pool_where_torchs_runtime_cannot_be_told(monkeypatch):
    monkeypatch.setattr(cpu, "_openmp_of_torch", lambda: None)
    assert "pool" in directions(run("doctor").stdout)["cpu"]
    monkeypatch.setattr(cpu, "_openmp_of_torch", lambda: "/somewhere/libgomp-1.so.1")
    assert "libgomp-1.so.1" in directions(run("doctor").stdout)["cpu"]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from zofo.cli.app import app\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'numba', 'numpy') if m in sys.modules])\n"
    )
    assert python(code).strip() == "[]"


def test_importing_zofo_loads_nothing_heavy():
    code = (
        "import sys, zofo\n"
        "print([m for m in ('torch', 'transformers', 'numba', 'peft', 'datasets') "
        "if m in sys.modules])\n"
    )
    assert python(code).strip() == "[]"


def test_the_installed_command_reports_errors_without_a_traceback(tmp_path):
    command = Path(sys.executable).parent / "zofo"
    done = subprocess.run(
        [command, "train", "steps=none"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_packages_that_peft_imports_do_not_speak_on_stderr(tmp_path, decoder_folder):
    pytest.importorskip("bitsandbytes")
    rows = [f"film {i},{('good', 'bad')[i % 2]}" for i in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    task = ["task=classification", "task.train=rows.csv"]
    done = subprocess.run(
        [sys.executable, "-m", "zofo", "train", f"model={decoder_folder}", *task, "--dry-run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_command_leaves_the_loggers_of_a_script_alone():
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.INFO)
    try:
        run("tasks")
        run("eval", "./nowhere")
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(logging.NOTSET)
