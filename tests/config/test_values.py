"""No section of a configuration takes a value that could only fail or mislead later."""

import pytest

from zofo.config.load import load_config
from zofo.disk.files import parse_json
from zofo.errors import UserError
from zofo.optim.options import StepOptions, checked_options
from zofo.run.prepare import num_steps
from zofo.smoothness.options import load_smoothness
from zofo.study.grid import expand
from zofo.study.spec import load_spec
from zofo.tasks.rows import read_table

LONG = "x" * 256
REFUSED = {
    "steps=yes": "steps is 'yes'; it must be a valid integer",
    "steps=true": "steps is True; it must be a number",
    "steps=1:30": "steps is '1:30'",
    "seed=false": "seed is False; it must be a number",
    "adapter.r=true": "adapter.r is True; it must be a number",
    "task.num_train=true": "task.num_train is True; it must be a number",
    "base_lr=on": "base_lr is 'on'; it must be a number",
    "base_lr=true": "base_lr is True; it must be a number",
    "base_lr={'*q*': true}": "it must be a number",
    "base_lr=1e308": "base_lr is 1e.308; it must be finite",
    "base_lr={'*q*': 1e308}": "1e.308}; it must be finite",
    "adapter_lr=1e39": "must be finite",
    "epochs=1e308": "epochs is 1e.308; it must be",
    "epochs=1e10": "epochs is 10000000000.0; it must be less",
    "base_batch_fraction=1e-300": "from 1.2e-38",
    "eps=1e-300": "eps is 1e-300; it must be finite, and 0 or from 1.2e-38",
    "adapter.alpha=.inf": "must be finite",
    "num_threads=1025": "num_threads is 1025; it must be less than or equal to 1024",
    "num_directions=16777216": "num_directions is 16777216; it must be less than 16777216",
    "steps=4294967296": "must be less than 2.32",
    "batch_size=99999999999999999999999": "must be less than 2.32",
    "model.revision=1e5": "model.revision is 100000.0; it must be a valid string; put it in quotes",
    'output_dir="a\\0b"': "must not hold a zero character",
    'model="a\\0b"': "model.name is .* must not hold a zero character",
    f"output_dir={LONG}": "output_dir: .*File name too long",
    f"model={LONG}": "model.name: .*File name too long",
    f"adapter.config_file={LONG}": "adapter.config_file: .*File name too long",
    "output_dir=" + "d/" * 3000: "output_dir: .*File name too long",
    "model=~nobody-of-this-name/x": "model.name: .*home",
    "task={name: sst2, name: cb}": "task: the key 'name' appears twice",
    "select_best=!!bool maybe": "select_best: 'maybe' is no bool",
}


@pytest.mark.parametrize(("override", "words"), REFUSED.items())
def test_what_could_only_fail_later_is_refused(override, words):
    with pytest.raises(UserError, match=words):
        load_config(overrides=[override])


def test_all_of_it_in_one_error():
    with pytest.raises(UserError, match="4 problems") as caught:
        load_config(
            overrides=["base_lr={'*q*': 1e308}", "steps=yes", "num_threads=9999", "epochs=on"]
        )
    assert "base_lr is" in str(caught.value)


def test_words_for_truth_values_are_understood_where_one_is_meant():
    asked = ["select_best=off", "measure_test=yes", "task.text=on", "task.label=no"]
    config = load_config(overrides=["task=classification", "task.train=a.csv", *asked])
    assert (config.select_best, config.measure_test) == (False, True)
    assert (config.task.text, config.task.label) == ("on", "no")


def test_other_sections_follow_the_same_rules(tmp_path):
    study = ["models=[m]", "tasks=[sst2]", "steps=1", "methods=[zo-ft]", "rates={base_lr: 1e-5}"]
    (tmp_path / "study.yaml").write_text("name: s\n")
    for override, words in {
        "num_threads=1025": "less than or equal to 1024",
        "seeds=[true]": "must be a number",
        "rates={base_lr: [true]}": "must be a number",
        "budget=1e39": "must be finite",
        f"models=[{{name: m, label: {LONG}}}]": "short label",
    }.items():
        with pytest.raises(UserError, match=words):
            expand(load_spec(tmp_path / "study.yaml", [*study, override]))
    with pytest.raises(UserError, match=r"smoothness\.rows is 4294967296"):
        load_smoothness(overrides=["smoothness.rows=4294967296"])
    with pytest.raises(UserError, match="num_directions is 16777216"):
        checked_options(StepOptions(num_directions=1 << 24))


def test_epochs_of_many_rows_are_counted_before_training():
    with pytest.raises(UserError, match=r"epochs is 1e\+09, which means 125000000000 steps"):
        num_steps(load_config(overrides=["epochs=1e9"]), num_rows=1000)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_a_column_that_appears_twice_is_refused(tmp_path, suffix):
    row = '{"text": "a", "label": 0, "label": 1}'
    with pytest.raises(ValueError, match="'label' appears twice"):
        parse_json(f"[{row}]")
    lines = {"jsonl": row, "json": f"[{row}]", "csv": "text,label,label\na,0,1"}
    path = tmp_path / f"rows.{suffix}"
    path.write_text(lines.get(suffix, lines["csv"].replace(",", "\t")))
    with pytest.raises(UserError, match=r"'label' (appears twice|names two columns)"):
        read_table(str(path))
