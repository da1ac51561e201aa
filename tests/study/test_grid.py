"""Tests of the expansion of a study: its cells, rates, names, and costs."""

import json
from pathlib import Path

import pytest

from tests.support.tiny_study import values
from zofo.config.load import load_config
from zofo.disk.yaml import parse_yaml
from zofo.errors import UserError
from zofo.run.cost import forward_equivalents
from zofo.study.grid import Cell, Pair, expand, rate_text, steps_within
from zofo.study.spec import StudySpec, differences, load_spec, presets
from zofo.tasks.load import task_names

FIVE = ["hybrid", "fo-peft", "zo-peft", "fo-ft", "zo-ft"]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a study of models that need not exist."""

    def study(**changes):
        rows = tmp_path / "rows.csv"
        rows.write_text("text,label\na,b\n")
        given = values(tmp_path, "some/model", rows, **changes)
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
        return path

    return study


def test_cells_are_combinations_that_make_sense(write):
    grid = expand(
        load_spec(
            write(
                methods=FIVE,
                adapters=["lora", "prompt"],
                optimizers=["adamw", "sgd"],
                models=["a/one", "b/two"],
            )
        )
    )
    # Methods without an adapter have one cell for all adapters. Methods without a gradient have one
    # for all optimizers.
    of_model = {"hybrid": 4, "fo-peft": 4, "zo-peft": 2, "fo-ft": 2, "zo-ft": 1}
    counts = {method: sum(c.method == method for c in grid.rates) for method in FIVE}
    assert counts == {method: 2 * num for method, num in of_model.items()}
    assert Cell("one", "reviews", "zo-ft", "none", "none") in grid.rates
    assert grid.rates[Cell("one", "reviews", "fo-ft", "none", "sgd")] == (Pair(1e-4, None),)
    assert len({run.id for run in grid.search}) == len(grid.search)


@pytest.mark.parametrize("rate", [1e-4, "1e-4", [1e-4], ["1e-4"]])
def test_one_rate_is_a_grid(write, rate):
    # YAML reads 1e-4 as text, because it has no dot.
    grid = expand(load_spec(write(methods=["fo-peft"], rates=[{"adapter_lr": rate}])))
    assert list(grid.rates.values()) == [(Pair(None, 1e-4),)]


@pytest.mark.parametrize(
    ("rate", "message"),
    [("auto", "auto"), ("fast", "valid number"), (-1, "at least 0"), (True, "must be a number")],
)
def test_rates_that_are_none(write, rate, message):
    with pytest.raises(UserError, match=message):
        load_spec(write(methods=["fo-peft"], rates=[{"adapter_lr": rate}]))


def test_names_say_what_runs(write):
    grid = expand(load_spec(write(methods=["hybrid", "zo-ft"])))
    assert [run.id for run in grid.search] == [
        "tiny_reviews_hybrid_lora-adamw_b1e-4_a1e-3_s0",
        "tiny_reviews_hybrid_lora-adamw_b1e-4_a1e-2_s0",
        "tiny_reviews_zo-ft_b1e-4_s0",
    ]


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1e-6, "1e-6"), (2.5e-4, "2.5e-4"), (0.1, "1e-1"), (3.0, "3e0"), (0.0, "0"), (20, "2e1")],
)
def test_rates_as_text(rate, text):
    assert rate_text(rate) == text
    assert float(text) == rate


def test_expansion_is_the_same_every_time(write):
    path = write(methods=FIVE, rates=[{"base_lr": [3e-4, 1e-4], "adapter_lr": [1e-2, 1e-3]}])
    first, second = (expand(load_spec(path)) for _ in range(2))
    assert [r.id for r in first.search] == [r.id for r in second.search]
    assert [first.config(r) for r in first.search] == [second.config(r) for r in second.search]


def test_the_last_rates_that_match_count(write):
    grid = expand(
        load_spec(
            write(
                methods=["hybrid", "zo-peft"],
                adapters=["lora", "prefix"],
                rates=[
                    {"base_lr": [1e-5, 1e-6], "adapter_lr": [1e-3]},
                    {"methods": "zo-*", "adapter_lr": [1e-4]},
                    {"methods": "zo-peft", "adapters": ["prefix"], "adapter_lr": [1e-2, 1e-1]},
                ],
            )
        )
    )
    found = {(c.method, c.adapter): pairs for c, pairs in grid.rates.items()}
    assert found["hybrid", "prefix"] == (Pair(1e-6, 1e-3), Pair(1e-5, 1e-3))
    assert found["zo-peft", "lora"] == (Pair(None, 1e-4),)
    assert found["zo-peft", "prefix"] == (Pair(None, 1e-2), Pair(None, 1e-1))


def test_one_rate_for_both_blocks(write):
    rates = [{"base_lr": [1e-6, 1e-3], "adapter_lr": [1e-3, 1e-2]}]
    grid = expand(load_spec(write(methods=["hybrid", "hybrid-tied"], rates=rates)))
    both, one = grid.rates.values()
    assert len(both) == 4
    assert one == tuple(Pair(rate, rate) for rate in (1e-6, 1e-3, 1e-2))
    tied = [run for run in grid.search if run.cell.method == "hybrid-tied"]
    config = grid.config(tied[0])
    assert (config.method, config.base_lr, config.adapter_lr) == ("hybrid", 1e-6, 1e-6)
    rates[0]["tied"] = [1e-5]
    grid = expand(load_spec(write(methods=["hybrid-tied"], rates=rates)))
    assert list(grid.rates.values()) == [(Pair(1e-5, 1e-5),)]


@pytest.mark.parametrize("budget", [240, 1001])
def test_every_method_has_the_same_budget(write, budget):
    grid = expand(load_spec(write(methods=FIVE, steps=None, budget=budget)))
    for run in grid.search:
        config = grid.config(run)
        assert forward_equivalents(config, config.steps) <= budget
        assert forward_equivalents(config, config.steps + 1) > budget
        assert config.eval_every == config.steps // 4


def test_a_budget_with_a_base_that_moves_every_third_step():
    config = load_config(overrides=["base_every=3"])
    for budget in range(3, 30):
        steps = steps_within(config, budget)
        assert forward_equivalents(config, steps) <= budget < forward_equivalents(config, steps + 1)


def test_the_study_decides_about_seeds_and_test_rows(write):
    grid = expand(load_spec(write(seeds=[3, 1, 2], select_seeds=[1, 2])))
    assert {run.seed for run in grid.search} == {1, 2}
    assert grid.other_seeds == (3,)
    assert grid.num_runs == 4 * 2 + 2
    configs = [grid.config(run) for run in grid.search]
    assert not any(config.measure_test for config in configs)
    assert {config.early_stopping for config in configs} == {1.0}


def test_excluded_cells_and_encoders_without_classes(write):
    path = write(
        models=["a/one", {"name": "minilm"}],
        tasks=["piqa", "boolq"],
        methods=["hybrid", "fo-ft"],
        exclude=[{"methods": "fo-ft", "models": "one"}],
    )
    grid = expand(load_spec(path))
    left = {(c.model, c.task, c.method) for c in grid.rates}
    assert left == {("one", "piqa", "hybrid"), ("one", "boolq", "hybrid")} | {
        ("minilm", "boolq", method) for method in ("hybrid", "fo-ft")
    }
    assert sum(grid.dropped.values()) == 4


def test_base_stands_for_axes_that_are_left_out(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "model: {name: some/model, dtype: bfloat16}\nmethod: zo-ft\n"
        "task: {name: boolq, num_dev: 50}\nbase_lr: 1.0e-6\nsteps: 7\nseed: 5\neval_every: null\n"
    )
    (tmp_path / "s.yaml").write_text(f"output: {tmp_path / 'out'}\nbase: base.yaml\n")
    (run,) = expand(load_spec(tmp_path / "s.yaml")).search
    assert run.id == "model_boolq_zo-ft_b1e-6_s5"
    grid = expand(load_spec(tmp_path / "s.yaml", ["tasks=[boolq, piqa]", "budget=100"]))
    configs = [grid.config(run) for run in grid.search]
    assert [config.task.num_dev for config in configs] == [50, 50]
    assert [config.steps for config in configs] == [50, 50]
    assert {config.model.dtype for config in configs} == {"bfloat16"}


def test_all_problems_at_once(write):
    with pytest.raises(UserError) as error:
        load_spec(write(stepss=3, seeds=[0, 0], methods=["hibrid"], rates=[{"base_rl": [1]}]))
    for words in ("did you mean steps?", "twice", "did you mean hybrid?", "did you mean base_lr?"):
        assert words in str(error.value)
    assert "has 4 problems" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": None}, "give budget"),
        ({"budget": 3}, "give budget"),
        ({"select_seeds": [7]}, "not among the seeds"),
        ({"rates": [{"base_lr": [1e-4, 1e-4]}]}, "twice"),
        ({"rates": [{"base_lr": [-1.0]}]}, "at least 0"),
        ({"rates": None}, "rates is missing"),
        ({"adapters": ["lora", "lora"]}, "label of its own"),
        ({"adapters": [{"type": "lora", "rank": 3}]}, "unknown key rank"),
        ({"num_evaluations": 3, "base": {"eval_every": 2}}, "keep one"),
    ],
)
def test_wrong_studies(write, changes, words):
    with pytest.raises(UserError, match=words):
        load_spec(write(**changes))


@pytest.mark.parametrize(
    "storage",
    [
        "postgresql://me:hush@db/x",
        "postgresql://me:hu%2Fsh@db/x",
        "postgresql://me:hu/sh@db/x",
        "postgresql://me%3Ahush@db/x",
        "postgresql://me%253Ahush@db/x",
        "postgresql://me%3Ahush%40db/x",
        "postgresql+psycopg://:hush@/x",
        "postgresql://me@db/x?password=hush",
        "postgresql://me@db/x?PASSWORD=hush",
        "postgresql://me@db/x?p%61ssword=hush",
        "postgresql://me@db/x?sslmode=require&passwd=hush",
        "mysql://me@db/x?pwd=hush",
        "postgresql://me@db/x?sslpassword=hush",
        "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dhush",
        "host=db user=me password=hush",
        "postgresql:/me:hush@db/x",
    ],
)
def test_a_password_in_any_spelling_is_refused_and_not_repeated(write, storage):
    with pytest.raises(UserError, match="storage") as caught:
        load_spec(write(storage=storage))
    assert "hush" not in str(caught.value)


def test_storages_without_a_password(write):
    for storage in (
        "postgresql://me@db.example.org:5432/x?sslmode=require&options=-csearch_path%3Dzofo",
        "postgresql:///x?host=/var/run/postgresql&user=me",
        "sqlite:////data/a:b@c/study.db?timeout=60",
    ):
        assert load_spec(write(storage=storage)).storage == storage


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["boolk"]}, "did you mean 'boolq'"),
        ({"rates": [{"adapter_lr": [1e-3]}]}, "no base_lr for tiny_reviews_hybrid"),
        ({"exclude": [{"methods": "fo-ft"}]}, "matches no cell"),
        ({"exclude": [{}]}, "no cell is left"),
        ({"steps": None, "budget": 2}, "raise it"),
        ({"base": {"batch_sice": 3}}, "did you mean batch_size"),
    ],
)
def test_studies_that_cannot_be_expanded(write, changes, words):
    with pytest.raises(UserError, match=words):
        expand(load_spec(write(**changes)))


def test_a_saved_study_reads_back(write, tmp_path):
    spec = load_spec(write(exclude=[{"methods": "fo-peft"}], storage="postgresql://me@db/x"))
    (tmp_path / "again.yaml").write_text(spec.to_yaml())
    assert load_spec(tmp_path / "again.yaml") == spec
    assert differences(spec, load_spec(tmp_path / "again.yaml")) == []


def test_files_of_a_study_do_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "prompts.jsonl", "schema.json", "own.py"):
        (tmp_path / name).write_text("{}")
    reward = {"data": "prompts.jsonl"}
    functions = ["json:schema.json", "json:absent.json", "regex:rows.csv", "own.py:f"]
    wanted = [f"json:{tmp_path}/schema.json", *functions[1:3], f"{tmp_path}/own.py:f"]
    base = {"model": "some/model", "task": {"name": "completion", "train": "rows.csv"}}
    for given, made in (
        (functions, wanted),
        (functions[0], wanted[0]),
        (dict.fromkeys(functions, 1.0), dict.fromkeys(wanted, 1.0)),
    ):
        study = {"output": "out", "steps": 1, "rates": {"base_lr": 1e-6, "adapter_lr": 1e-3}}
        study["base"] = {**base, "reward": {**reward, "functions": given}}
        (tmp_path / "s.yaml").write_text(json.dumps(study))
        spec = load_spec("s.yaml")
        assert spec.base["task"]["train"] == f"{tmp_path}/rows.csv"
        assert spec.base["reward"] == {"data": f"{tmp_path}/prompts.jsonl", "functions": made}
    study["base"]["reward"] = functions[0]
    (tmp_path / "s.yaml").write_text(json.dumps(study))
    assert load_spec("s.yaml").base["reward"] == wanted[0]


def test_a_study_may_grow_by_seeds_only(write):
    spec = load_spec(write())
    assert differences(spec, load_spec(write(seeds=[0, 1, 2]))) == []
    assert differences(spec, load_spec(write(storage="sqlite:///other.db"))) == []
    assert differences(spec, load_spec(write(seeds=[1, 0]))) != []
    (line,) = differences(spec, load_spec(write(steps=9)))
    assert line == "steps: 4 -> 9"


def test_every_preset_names_its_command():
    assert set(presets()) == {"laptop", "paper"}
    for name, path in presets().items():
        assert f"#     zofo study {name}" in path.read_text()
        assert isinstance(load_spec(name), StudySpec)


def test_presets_expand():
    grid = expand(load_spec("laptop"))
    assert (len(grid.rates), grid.num_runs) == (16, 72)
    known = [task for task in load_spec("paper").tasks if task in task_names()]
    grid = expand(load_spec("paper", [f"tasks={json.dumps(known)}"]))
    # Each model and task has 75 hybrid, 15 fo-peft, 11 zo-peft, 5 fo-ft and 5 zo-ft runs.
    assert len(grid.search) == 3 * len(known) * (75 + 15 + 11 + 5 + 5)
    (steps,) = {grid.config(r).steps for r in grid.search[::40] if r.cell.method == "hybrid"}
    assert steps == 20_000


def test_the_study_that_does_not_exist():
    with pytest.raises(UserError, match="did you mean laptop"):
        load_spec("latop")
    with pytest.raises(UserError, match="no study folder"):
        load_spec(Path(__file__).parent)


def test_an_adapter_in_the_last_layers_makes_more_steps_with_a_budget(write, decoder_folder):
    adapters = ["lora", {"type": "lora", "layers": "last 1", "label": "top"}]
    changes = {"models": [decoder_folder], "adapters": adapters, "steps": None, "budget": 60}
    rates = [{"base_lr": 1e-4, "adapter_lr": 1e-3}]
    grid = expand(load_spec(write(methods=["fo-peft", "hybrid"], rates=rates, **changes)))
    steps = {(r.cell.method, r.cell.adapter): grid.config(r).steps for r in grid.search}
    # A first-order pass costs 2, or 1.5 if the backward pass ends at the last of two layers.
    assert steps == {
        ("fo-peft", "lora"): 30,
        ("fo-peft", "top"): 40,
        ("hybrid", "lora"): 20,
        ("hybrid", "top"): 24,
    }


def test_each_combination_of_places_is_an_entry_with_a_label(write):
    each = {"layers": ["all", "last 1", [0, 2]], "targets": [["q_proj"], ["q_proj", "v_proj"]]}
    adapters = [{"type": "lora", "r": 4, "each": each}, "prompt"]
    spec = load_spec(write(adapters=adapters, methods=["fo-peft"]))
    grid = expand(spec)
    found = {r.cell.adapter: grid.config(r).adapter for r in grid.search}
    assert {label: (a.layers, a.targets) for label, a in found.items() if label != "prompt"} == {
        "lora-layers-all-targets-q-proj": ("all", ["q_proj"]),
        "lora-layers-all-targets-q-proj-v-proj": ("all", ["q_proj", "v_proj"]),
        "lora-layers-last-1-targets-q-proj": ("last 1", ["q_proj"]),
        "lora-layers-last-1-targets-q-proj-v-proj": ("last 1", ["q_proj", "v_proj"]),
        "lora-layers-0-2-targets-q-proj": ([0, 2], ["q_proj"]),
        "lora-layers-0-2-targets-q-proj-v-proj": ([0, 2], ["q_proj", "v_proj"]),
    }
    assert {a.r for a in found.values() if a.type == "lora"} == {4}
    # The saved study has the entries themselves, so it reads back to the same.
    (Path(spec.output)).mkdir(parents=True)
    (Path(spec.output) / "study.yaml").write_text(spec.to_yaml())
    assert differences(spec, load_spec(spec.output)) == []


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"type": "lora", "each": "layers"}, "takes options with a list of values"),
        ({"type": "lora", "each": {"r": 4}}, "takes options with a list of values"),
        ({"type": "lora", "each": {"layers": []}}, "takes options with a list of values"),
        ({"type": "lora", "r": 8, "each": {"r": [4]}}, "give every option once"),
        ({"type": "lora", "each": {"label": ["a"]}}, "give every option once"),
        ({"type": "lora", "each": {"layer": ["all"]}}, "unknown key layer .* did you mean layers"),
        ({"type": "lora", "each": {"layers": ["lots"]}}, "adapter.layers is 'lots'"),
        ({"type": "lora", "each": {"r": [4, 4]}}, "holds lora-r-4 twice"),
    ],
)
def test_a_wrong_each_is_refused_in_one_message(write, entry, problem):
    with pytest.raises(UserError, match=problem):
        expand(load_spec(write(adapters=[entry], methods=["fo-peft"])))


def test_choosing_the_modules_of_an_adapter_is_part_of_the_budget(write):
    each = {"budget": [500, 5000], "budget_batches": [5]}
    adapters = ["lora", {"type": "lora", "label": "at-most", "each": each}]
    spec = load_spec(write(adapters=adapters, methods=["fo-peft"], steps=None, budget=60))
    grid = expand(spec)
    steps = {r.cell.adapter: grid.config(r).steps for r in grid.search}
    # A step costs 2, and the gradient of 5 batches 10 before the first.
    assert steps == {
        "lora": 30,
        "at-most-budget-500-budget-batches-5": 25,
        "at-most-budget-5000-budget-batches-5": 25,
    }


def test_layers_that_the_model_of_a_study_lacks(write, decoder_folder):
    adapters = [{"type": "lora", "layers": "last 3"}]
    spec = load_spec(
        write(models=[decoder_folder], adapters=adapters, steps=None, budget=60, methods=["hybrid"])
    )
    with pytest.raises(UserError, match="has 2 layers; choose at most 2, or all"):
        expand(spec)


@pytest.mark.parametrize("methods", [["hybrid", "fo-peft"], ["hybrid", "fo-ft", "fo-peft"]])
def test_a_gate_runs_full_fine_tuning_with_adamw_first_and_at_the_same_cost(write, methods):
    changes = {"gate": True, "optimizers": ["sgd"], "steps": None, "budget": 60}
    grid = expand(load_spec(write(methods=methods, **changes)))
    order = list(dict.fromkeys((c.method, c.optimizer) for c in grid.rates))
    extra = [("fo-ft", "sgd")] if "fo-ft" in methods else []
    assert order == [("fo-ft", "adamw"), *extra, ("fo-peft", "sgd"), ("hybrid", "sgd")]
    steps = {run.cell.method: grid.config(run).steps for run in grid.search}
    assert steps == {"fo-ft": 20, "fo-peft": 30, "hybrid": 20}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 4}, "gate is true and compares at equal cost; give budget in place of steps"),
        ({"budget": 60, "methods": ["hybrid"]}, "add fo-peft to methods"),
        ({"budget": 60, "rates": [{"adapter_lr": 1e-3}]}, "no base_lr for .*fo-ft.*; add them"),
    ],
)
def test_a_gate_that_cannot_compare(write, changes, message):
    given = {"gate": True, "steps": None, "methods": ["fo-peft"], **changes}
    with pytest.raises(UserError, match=message):
        expand(load_spec(write(**given)))


def test_a_map_of_rates_is_a_point_of_the_grid_after_the_single_rates(write):
    maps = [{"*mlp*": 1e-3}, {"*q_proj*": 2e-4, "*mlp*": 1e-5}]
    rates = [{"base_lr": [maps[0], 1e-5, maps[1]], "adapter_lr": 1e-3}]
    spec = load_spec(write(methods=["hybrid"], rates=rates))
    grid = expand(spec)
    (pairs,) = grid.rates.values()
    assert [pair.base_lr for pair in pairs] == [1e-5, maps[1], maps[0]]
    assert [pair.name for pair in pairs] == [
        "b1e-5_a1e-3",
        "b-q-proj-2e-4-mlp-1e-5_a1e-3",
        "b-mlp-1e-3_a1e-3",
    ]
    assert [grid.config(run).base_lr for run in grid.search] == [1e-5, maps[1], maps[0]]
    # A study writes itself into its folder, and is read from there when it is continued.
    again = StudySpec.model_validate(parse_yaml(spec.to_yaml()))
    assert list(expand(again).rates.values()) == [pairs]


@pytest.mark.parametrize(
    ("maps", "problem"),
    [
        ([{}], "empty map"),
        ([], r"is \[\]; it must have at least 1 item$"),
        ([{"*mlp*": -1.0}], "finite numbers of at least 0"),
        ([{"*mlp*": "auto"}], "number"),
        ([{"*mlp*": 1e-3}, {"*mlp*": 1e-3}], "twice"),
        ([{"*mlp*": 1e-3}, {"mlp": 1e-3}], "name of a folder"),
    ],
)
def test_maps_of_rates_that_are_refused(write, maps, problem):
    rates = [{"base_lr": maps, "adapter_lr": 1e-3}]
    with pytest.raises(UserError, match=problem) as caught:
        expand(load_spec(write(methods=["hybrid"], rates=rates)))
    assert "problems" not in str(caught.value)
