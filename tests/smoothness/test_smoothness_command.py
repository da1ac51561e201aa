"""Tests of `zofo smoothness` on a tiny model: its files, its options, and its report."""

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.pages import read_page
from tests.support.tiny_study import write_rows
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.disk.files import read_json
from zofo.run.train import train
from zofo.smoothness.options import load_smoothness, planned_forwards, point_steps

CONFIG = Path(__file__).parents[2] / "configs" / "smoothness.yaml"


def run(*arguments):
    return CliRunner().invoke(app, ["smoothness", *map(str, arguments)])


def values(folder, model, rows, *more):
    return [
        CONFIG,
        f"model={model}",
        "task.name=classification",
        f"task.train={rows}",
        "task.num_train=40",
        "task.num_dev=10",
        "task.num_test=10",
        "steps=4",
        "batch_size=4",
        "num_threads=1",
        "device=cpu",
        "measure_test=true",
        f"output_dir={folder}",
        "smoothness.rows=4",
        "smoothness.every=1",
        "smoothness.lanczos_steps=4",
        "smoothness.probes=3",
        "smoothness.directions=3",
        *more,
    ]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, decoder_folder):
    folder = tmp_path_factory.mktemp("smoothness")
    rows = write_rows(folder)
    done = run(*values(folder / "run", decoder_folder, rows))
    assert done.exit_code == 0, done.output
    return folder / "run", rows, done.output


def test_what_a_measured_run_leaves(measured):
    folder, _, output = measured
    found = read_json(folder / "smoothness.json")
    assert [p["step"] for p in found["path"]] == [0, 1, 2, 3]
    assert {(r["step"], r["block"]) for r in found["spectra"]} == {
        (step, block) for step in (0, 4) for block in ("base", "adapter")
    }
    # LoRA's B is 0 at the start, so the adapter's Hessian contains a block of zeros. Its other
    # blocks are not zero.
    for record in found["spectra"]:
        assert record["bottom"]["value"] <= record["top"]["value"]
        assert len(record["ritz"][0]["values"]) == 4
    for record in found["directional"]:
        spectrum = next(
            r
            for r in found["spectra"]
            if (r["step"], r["block"]) == (record["step"], record["block"])
        )
        assert record["num_parameters"] == spectrum["num_parameters"]
        assert len(record["curvatures"]) == 3
    assert [r["step"] for r in found["majoriser"]] == [0, 4]
    assert found["claims"]
    assert "what the theory assumes" in output
    assert "after 4 steps" in (folder / "smoothness.html").read_text()


def test_the_run_is_the_one_that_zofo_train_makes(measured, tmp_path, decoder_folder):
    folder, rows, _ = measured
    config, _ = load_smoothness(*_split(values(tmp_path / "plain", decoder_folder, rows)))
    train(config)
    ours, plain = (read_json(f / "result.json") for f in (folder, tmp_path / "plain"))
    for key in ("test", "dev", "best_dev"):
        assert ours[key] == plain[key]
    assert ours["cost"]["forward_equivalents"] == plain["cost"]["forward_equivalents"]


def test_the_page_and_the_report_show_the_fits(measured, tmp_path):
    folder, _, _ = measured
    found = read_json(folder / "smoothness.json")
    page = read_page(folder / "smoothness.html")
    rows = page.table("moving-block bootstrap")
    assert len(rows) == sum(len(blocks) for blocks in found["fits"].values()) > 0
    for row in rows:
        fit = found["fits"][row["kind"][0]][row["block"][0]]
        assert row["exponent"][1] == pytest.approx(fit["power"]["exponent"]["value"])
    assert len(page.table("An eigenvalue lies within")) == 4
    assert {"figure-one", "steps", "spectra"} <= page.data["figures"]["light"].keys()
    targets = ["--to", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]
    done = CliRunner().invoke(app, ["report", str(folder), *targets])
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "r.md").read_text().split("### Smoothness along the run")[1].splitlines()
    # The heading takes two more lines.
    assert sum(line.startswith("| ") for line in lines) == len(rows) + 2
    report = read_page(tmp_path / "r.html")
    assert len(report.table("Fits to the path of each run")) == len(rows)
    assert "0|gradient" in report.data["figures"]["dark"]["smoothness"]
    links = [a["href"] for tag, a in report.tags if tag == "a" and "smoothness.html" in a["href"]]
    assert links
    assert all((tmp_path / link).resolve() == folder / "smoothness.html" for link in links)


def test_what_is_there_is_not_measured_again(measured):
    folder, _, _ = measured
    before = (folder / "smoothness.jsonl").read_text()
    done = run("--resume", folder)
    assert done.exit_code == 0, done.output
    assert (folder / "smoothness.jsonl").read_text() == before


def test_an_interrupted_measurement_goes_on(tmp_path, decoder_folder, measured, monkeypatch):
    _, rows, _ = measured
    arguments = values(tmp_path / "run", decoder_folder, rows, "smoothness.train=false")
    import zofo.smoothness.measure as measure

    real = measure.check_majoriser

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "check_majoriser", interrupt)
    done = run(*arguments)
    assert done.exit_code == 130
    assert "--resume" in done.output
    lines = (tmp_path / "run" / "smoothness.jsonl").read_text()
    assert lines.count('"spectrum"') == 2
    monkeypatch.setattr(measure, "check_majoriser", real)
    done = run("--resume", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "smoothness.jsonl").read_text().startswith(lines)
    assert not read_json(tmp_path / "run" / "smoothness.json")["path"]


def test_parts_of_the_base_and_forwards_alone(tmp_path, decoder_folder, measured):
    _, rows, _ = measured
    common = ["smoothness.train=false", "smoothness.split=layer", "smoothness.majoriser=false"]
    done = run(*values(tmp_path / "a", decoder_folder, rows, *common))
    assert done.exit_code == 0, done.output
    found = read_json(tmp_path / "a" / "smoothness.json")
    sizes = {r["block"]: r["num_parameters"] for r in found["spectra"]}
    parts = ("embeddings", "layer 0", "layer 1", "rest")
    assert tuple(sizes) == ("base", "adapter", *parts)
    assert sum(sizes[part] for part in parts) == sizes["base"]
    half = ["model.dtype=bfloat16", "smoothness.lanczos_steps=0", "eps=1e-2"]
    done = run(*values(tmp_path / "b", decoder_folder, rows, *common, *half))
    assert done.exit_code == 0, done.output
    alone = read_json(tmp_path / "b" / "smoothness.json")
    assert not alone["spectra"]
    assert {r["block"] for r in alone["directional"]} == set(sizes)
    # bfloat16 rounds the losses. The records state this error, and it is larger than in float32.
    exact = {r["block"]: r["rounding"] for r in found["directional"]}
    for record in alone["directional"]:
        assert record["rounding"] > 100 * exact[record["block"]]


def test_the_plan_says_what_it_costs(measured, tmp_path, decoder_folder):
    _, rows, _ = measured
    arguments = values(tmp_path / "run", decoder_folder, rows, "smoothness.split=layer")
    done = run("--dry-run", *arguments)
    assert done.exit_code == 0, done.output
    assert "forward-equivalents" in done.output
    assert not (tmp_path / "run").exists()
    _, options = load_smoothness(*_split(arguments))
    assert point_steps(options, 4) == [0, 4]
    cost = planned_forwards(options, 4, num_moving=2, num_blocks=2, num_parts=4)
    assert cost["directions"] == 2 * 6 * (1 + 2 * 5)
    assert cost["path"] == 4 * (3 * (1 + 3) + 2 * 6) + 2 * 2 * 3


def test_planned_costs_are_those_measured(measured):
    folder, _, _ = measured
    lines = (folder / "smoothness.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    _, options = load_smoothness(
        overrides=[
            "smoothness.every=1",
            "smoothness.lanczos_steps=4",
            "smoothness.probes=3",
            "smoothness.directions=3",
        ]
    )
    planned = planned_forwards(options, 4, num_moving=2, num_blocks=2, num_parts=0)
    for what, kinds in (
        ("spectra", ["spectrum"]),
        ("directions", ["directional"]),
        ("majoriser", ["majoriser"]),
        ("path", ["path", "rounding"]),
    ):
        assert sum(r["forwards"] for r in records if r["kind"] in kinds) == planned[what]


def test_every_problem_is_said_at_once():
    done = run("steps=0", "smoothness.row=3", "smoothness.gammas=[2]", "batch_sze=4")
    assert done.exit_code == 2
    for word in ("steps", "smoothness.row; did you mean smoothness.rows", "batch_sze"):
        assert word in done.output
    half = run("model.dtype=bfloat16")
    assert "float32" in half.output
    assert half.exit_code == 2
    assert load_config(overrides=["steps=3"]).steps == 3


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("smoothness={rows: 3}", "smoothness.KEY=VALUE"),
        ("smoothness=3", "smoothness.KEY=VALUE"),
        ("smoothness.rows=true", "smoothness.rows is True"),
        ("smoothness.gammas=[true]", "smoothness.gammas"),
        ("smoothness.gammas=0.5", "a list, such as [0.5, 1]"),
        ("smoothness.gammas=[]", "at least one number"),
        ("smoothness.gammas=[2]", "(0, 1]"),
        ("base_lr=auto", "base_lr is auto"),
    ],
)
def test_a_wrong_option_is_named(argument, words):
    # The error also names a second wrong option.
    done = run("smoothness.probes=0", argument)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert "smoothness.probes" in done.output


def test_whole_numbers_are_points_on_a_step():
    assert load_smoothness(overrides=["smoothness.gammas=[1]"])[1].gammas == [1.0]


def test_a_damaged_folder_is_one_message(tmp_path):
    for text in ("smoothness: {rows: 0, foo: 1}", "smoothness: 3"):
        (tmp_path / "smoothness.yaml").write_text(text)
        done = run("--resume", tmp_path)
        assert done.exit_code == 2
        assert "smoothness" in done.output
        assert not isinstance(done.exception, ValueError)
    assert "does not exist" in run("--resume", tmp_path / "none").output


def test_a_plan_refuses_what_the_run_would_and_counts_the_rows_there_are(
    measured, tmp_path, decoder_folder
):
    _, rows, _ = measured
    (tmp_path / "file").touch()
    arguments = values(tmp_path / "file" / "run", decoder_folder, rows)
    done = run(*arguments, "--dry-run")
    assert done.exit_code == 2
    assert "is a file" in done.output
    done = run(
        *values(tmp_path / "new", decoder_folder, rows), "smoothness.rows=10000", "--dry-run"
    )
    assert done.exit_code == 0, done.output
    assert "10000 rows" not in done.output


def test_one_signal_stops_between_measurements(measured, tmp_path, decoder_folder, monkeypatch):
    """One signal stops the command between two measurements.

    The signal comes at the start. The resumed command gives the measurements of an undisturbed one.
    """
    whole, rows, _ = measured
    import zofo.smoothness.measure as measure

    real, calls = measure.measure_spectrum, []

    def signalled(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(measure, "measure_spectrum", signalled)
    done = run(*values(tmp_path / "run", decoder_folder, rows))
    assert done.exit_code == 130, done.output
    assert len(calls) == 1
    lines = (tmp_path / "run" / "smoothness.jsonl").read_text()
    assert lines.count('"spectrum"') == 1
    done = run("--resume", tmp_path / "run")
    assert done.exit_code == 0, done.output
    found, expected = (read_json(f / "smoothness.json") for f in (tmp_path / "run", whole))
    for kind in ("path", "spectra", "directional", "majoriser"):
        assert {(r["step"], r.get("block")) for r in found[kind]} == {
            (r["step"], r.get("block")) for r in expected[kind]
        }
        assert found[kind] == expected[kind]


def _split(arguments):
    return arguments[0], [str(a) for a in arguments[1:]]
