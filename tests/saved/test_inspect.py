"""Tests of the functions behind `zofo info`, `replay` and `verify`."""

import json
import shutil

import pytest
import torch
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.support.models import assert_same_bits
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.saved.export import export_model, replay_base
from zofo.saved.inspect import inspect
from zofo.saved.source import open_source
from zofo.saved.verify import verify

KINDS = ["run", "artefact", "checkpoint", "export"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, decoder_folder, encoder_folder):
    root = tmp_path_factory.mktemp("runs")
    lines = ["text,label"]
    lines += [f"film {i} is {('great', 'dull')[i % 2]},{('good', 'bad')[i % 2]}" for i in range(60)]
    (root / "reviews.csv").write_text("\n".join(lines) + "\n")

    def get(method="hybrid", adapter="lora", head="decoder"):
        folder = root / f"{method}-{adapter}-{head}"
        if not folder.exists():
            values = [
                f"model={decoder_folder if head == 'decoder' else encoder_folder}",
                f"method={method}",
                f"adapter={adapter if METHODS[method].needs_adapter else 'none'}",
                "task=classification",
                f"task.train={root / 'reviews.csv'}",
                "task.num_dev=8",
                "task.num_test=10",
                "steps=4",
                "eval_every=2",
                "batch_size=4",
                "base_lr=1e-4",
                "select_best=false",
                "seed=7",
                f"output_dir={folder}",
            ]
            train(load_config(overrides=values), console=Console(quiet=True))
        return folder

    return get


@pytest.fixture
def place(tmp_path, trained):
    """Return a function that copies a folder of one kind, so that a test may damage the copy."""

    def get(kind, **options):
        run = tmp_path / "run"
        shutil.copytree(trained(**options), run)
        if kind == "export":
            return export_model(run, tmp_path / "plain").path
        return run / {"run": "", "artefact": "artifact", "checkpoint": "checkpoint-4"}[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_info_of_each_kind(place, kind, decoder_folder):
    folder = place(kind)
    info = inspect(folder)
    assert (info.kind, info.is_whole, info.method) == (kind, True, "hybrid")
    assert info.task == "classification"
    assert info.size_bytes == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if kind != "export":
        assert (info.base, info.seed, info.num_recorded_steps) == (decoder_folder, 7, 4)
        assert info.adapter == "LORA"
        assert len(info.base_fingerprint) == 32
    if kind == "run":
        assert info.checkpoints == {2: True, 4: True}
        saved = json.loads((folder / "result.json").read_text())
        assert info.scores == saved["test"]
    if kind == "checkpoint":
        assert info.step == 4
    assert json.loads(json.dumps(info.as_dict()))["kind"] == kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_whatever_a_run_leaves_is_sound(place, method, kind):
    checks = list(verify(place(kind, method=method)))
    assert all(check.is_sound for check in checks), checks
    names = [check.name for check in checks]
    assert {"header", "files", "model"} <= set(names)
    if method == "hybrid" and kind != "export":
        assert {"history", "base", "adapter", "fingerprint", "replay"} <= set(names)


@pytest.mark.parametrize("adapter", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_encoders_with_adapters_apart_are_sound(place, adapter, kind):
    checks = list(verify(place(kind, adapter=adapter, head="encoder")))
    assert all(check.is_sound for check in checks), checks


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("kind", "file", "failing"),
    [
        ("run", "artifact/zofo.json", "header"),
        ("artefact", "adapter/adapter_model.safetensors", "files"),
        ("artefact", "base_trajectory.safetensors", "files"),
        ("checkpoint", "adapter_model.safetensors", "header"),
        ("export", "model.safetensors", "files"),
        ("export", "zofo_export.json", "header"),
    ],
)
def test_damage_is_told(place, kind, file, failing):
    folder = place(kind)
    damage(folder / file)
    info = inspect(folder)
    assert not info.is_whole
    assert info.problem
    checks = {check.name: check for check in verify(folder)}
    assert checks[failing].is_sound is False
    assert [c.is_sound for c in checks.values()].count(False) == 1
    assert checks["model"].is_sound is None


def test_another_base_is_told(tmp_path, place, decoder_folder):
    base = tmp_path / "base"
    shutil.copytree(decoder_folder, base)
    folder = place("artefact")
    from zofo.saved.manifest import write_header

    header = json.loads((folder / "zofo.json").read_text())
    values = {k: header[k] for k in ("method", "base", "base_fingerprint", "task", "labels")}
    values["base"]["name"] = str(base)
    write_header(folder, values)
    assert all(check.is_sound for check in verify(folder))
    other = hf.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(base)
    checks = {check.name: check.is_sound for check in verify(folder)}
    assert checks["adapter"] is True
    assert checks["fingerprint"] is False
    assert checks["replay"] is None


def test_loading_refuses_what_verify_finds(place):
    folder = place("artefact")
    from zofo.saved.manifest import write_header

    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = {name: t * float("nan") for name, t in load_file(file).items()}
    save_file(tensors, file)
    header = json.loads((folder / "zofo.json").read_text())
    keys = ("method", "base", "base_fingerprint", "task", "labels")
    write_header(folder, {key: header[key] for key in keys})
    with pytest.raises(UserError, match="is not finite") as caught:
        load(folder)
    checks = {check.name: check for check in verify(folder)}
    assert checks["finite"].is_sound is False
    assert checks["finite"].detail == str(caught.value)
    assert checks["model"].is_sound is None


@pytest.mark.parametrize(("method", "head"), [("hybrid", "encoder"), ("zo-ft", "decoder")])
def test_a_checkpoint_opens_without_the_data_of_its_run(place, monkeypatch, method, head):
    checkpoint = place("checkpoint", method=method, head=head)
    shutil.rmtree(checkpoint.parent / "artifact")
    before = open_source(checkpoint)
    monkeypatch.setattr("zofo.tasks.load.load_splits", lambda *_, **__: pytest.fail("data read"))
    assert open_source(checkpoint) == before
    assert before.labels == ("bad", "good")
    (checkpoint.parent / "base.json").unlink()
    monkeypatch.undo()
    assert open_source(checkpoint) == before


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"base": {"name": 3}, "labels": []}', '{"base": {"name": "x"}, "labels": [1]}'],
)
def test_a_damaged_record_of_the_base_is_told(place, text):
    checkpoint = place("checkpoint")
    (checkpoint.parent / "base.json").write_text(text)
    with pytest.raises(UserError, match=r"base\.json is damaged"):
        open_source(checkpoint)
    for folder in (checkpoint, checkpoint.parent):
        info = inspect(folder)
        assert not info.is_whole
        assert "base.json is damaged" in info.problem


def test_a_run_that_has_not_ended(place):
    run = place("run")
    shutil.rmtree(run / "artifact")
    (run / "result.json").unlink()
    info = inspect(run)
    assert not info.is_whole
    assert "--resume" in info.problem
    assert (info.method, info.scores, info.checkpoints) == ("hybrid", None, {2: True, 4: True})
    damage(run / "checkpoint-4" / "trainer_state.json")
    assert inspect(run).checkpoints == {2: True, 4: False}


@pytest.mark.parametrize(
    ("method", "adapter", "head"),
    [
        ("hybrid", "lora", "decoder"),
        ("hybrid", "prompt", "encoder"),
        ("zo-ft", "none", "decoder"),
    ],
)
def test_the_base_at_each_end_of_time(tmp_path, trained, method, adapter, head):
    run = trained(method, adapter, head)
    artifact = load(run)
    original = dict(artifact.base.load()[0].named_parameters())
    last = split_parameters(artifact.model).base
    kind = hf.AutoModelForCausalLM
    if head == "encoder":
        kind = hf.AutoModelForSequenceClassification
    found = []
    for step in (0, 2, 4):
        exported = replay_base(run, tmp_path / str(step), step)
        assert exported.max_logit_difference == 0
        assert inspect(exported.path).step == step
        found.append(dict(kind.from_pretrained(exported.path).named_parameters()))
    assert_same_bits(found[0], original)
    moved = {name: p for name, p in found[2].items() if name in last}
    assert_same_bits(moved, {name: last[name] for name in moved})
    assert any(not torch.equal(found[1][k], found[2][k]) for k in moved)
    earlier = replay_base(run / "checkpoint-2", tmp_path / "earlier", 2)
    assert_same_bits(dict(kind.from_pretrained(earlier.path).named_parameters()), found[1])


@pytest.mark.parametrize("step", [-1, 5])
def test_steps_that_are_not_recorded(tmp_path, trained, step):
    with pytest.raises(UserError, match="from 0 to 4"):
        replay_base(trained(), tmp_path / "to", step)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["fo-peft", "fo-ft", "zo-peft"])
def test_a_base_without_history_cannot_go_back(tmp_path, trained, method):
    with pytest.raises(UserError, match="records no steps"):
        replay_base(trained(method), tmp_path / "to", 0)


def test_other_folders_are_refused(tmp_path, decoder_folder):
    for look in (inspect, lambda path: list(verify(path))):
        with pytest.raises(UserError, match="does not exist"):
            look(tmp_path / "none")
        with pytest.raises(UserError, match="no run, artefact, checkpoint or export"):
            look(decoder_folder)
