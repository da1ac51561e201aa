"""No command runs code that a folder asks for, unless an option of this very call allows it.

Every file of the folders below asks for code. The code writes a file, which must not appear.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.support.damage import edit
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.disk.files import read_json, write_json
from zofo.errors import UserError
from zofo.models.loading import empty_model, head_of, load_model
from zofo.models.trust import check_kernels
from zofo.run.resume import resumed_config
from zofo.saved.source import open_source, read_base
from zofo.saved.verify import verify
from zofo.smoothness.measure import saved_options
from zofo.study.grid import expand
from zofo.study.jobs import all_tasks
from zofo.study.measure import measure_run, measure_start
from zofo.study.spec import load_spec
from zofo.study.worker import Worker

KERNEL = "kernels-community/flash-attn2"
CODE = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModelForSequenceClassification": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def change_yaml(path, change):
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that the code of a base writes, and so does a kernel that is loaded."""
    from transformers import dynamic_module_utils, modeling_utils

    marker = tmp_path / "ran"
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)

    def load_kernel(name, *args, **kwargs):
        marker.write_text(str(name))
        raise ValueError("the kernel was loaded")

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", load_kernel)
    monkeypatch.chdir(tmp_path)
    return marker


def plant(folder, marker, wish):
    """Make a model's folder ask for code of its own, or for a kernel."""
    config = read_json(folder / "config.json")
    if wish == "code":
        (folder / "evil.py").write_text(
            f"open({str(marker)!r}, 'w').close()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
            "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
            "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n"
            "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )
        config |= {"model_type": "evil", "auto_map": CODE}
    if wish == "kernel":
        config |= {"attn_implementation": KERNEL}
    write_json(folder / "config.json", config)


class Folders:
    """A run, its parts and what else a command can be handed, which all ask for code.

    Args:
        made: folders of short runs.
        root: where the copies go.
        marker: the file that the code writes.
        wish: "code": the base brings code, and every record says that it may run; "kernel": the
            records name a repository of kernels; "base's kernel": config.json of the base does.
    """

    def __init__(self, made, root, marker, wish):
        self.root, self.wish = root, wish
        self.base = Path(shutil.copytree(made / "base", root / "base"))
        plant(self.base, marker, {"kernel": "nothing", "base's kernel": "kernel"}.get(wish, wish))
        self.run = Path(shutil.copytree(made / "a", root / "run"))
        self.config, self.artefact = self.run / "run.yaml", self.run / "artifact"
        change_yaml(self.config, self._ask)
        edit(self.artefact, lambda header: header["base"].update(self._records()))
        recorded = read_json(self.run / "base.json")
        recorded["base"].update(self._records())
        write_json(self.run / "base.json", recorded)
        # Its digests would show that the files were changed, which has tests of its own.
        result = read_json(self.run / "result.json")
        write_json(self.run / "result.json", {k: v for k, v in result.items() if k != "files"})
        self.unfinished = self._copy("unfinished", "result.json")
        # The head is then looked up in the base, because neither a file nor an artefact names it.
        self.bare = self._copy("bare", "result.json", "base.json", "artifact")
        self.curves = self._copy("curves")
        values = yaml.safe_load(self.config.read_text())
        (self.curves / "smoothness.yaml").write_text(
            yaml.safe_dump({**values, "smoothness": {"train": False}})
        )
        self.study = self._study()
        self.export = self._export(marker, {"base's kernel": "kernel"}.get(wish, wish))

    def _records(self):
        values = {"name": str(self.base)}
        if self.wish == "code":
            values["trust_remote_code"] = True
        if self.wish == "kernel":
            values["attn_implementation"] = KERNEL
        return values

    def _ask(self, values):
        values["model"].update(self._records())
        values["output_dir"] = None

    def _copy(self, name, *without):
        folder = Path(shutil.copytree(self.run, self.root / name))
        for part in without:
            if (folder / part).is_dir():
                shutil.rmtree(folder / part)
            else:
                (folder / part).unlink()
        return folder

    def _study(self):
        folder = self.root / "study"
        (folder / "runs").mkdir(parents=True)
        values = yaml.safe_load(self.config.read_text())
        study = {
            "output": str(folder),
            "base": {"task": {k: v for k, v in values["task"].items() if k != "name"}},
            "models": [values["model"]],
            "tasks": [values["task"]["name"]],
            "methods": ["hybrid"],
            "rates": [{"base_lr": 1e-4, "adapter_lr": 1e-3}],
            "steps": 2,
        }
        (folder / "study.yaml").write_text(yaml.safe_dump(study))
        return folder

    def _export(self, marker, wish):
        folder = Path(shutil.copytree(self.base, self.root / "export"))
        plant(folder, marker, wish)
        write_json(
            folder / "zofo_export.json",
            {
                "format": 1,
                "zofo_version": "0.1.0",
                "method": "hybrid",
                "base": str(self.base),
                "task": None,
                "step": None,
                "dtype": "float32",
                "head": "causal-lm",
                "is_merged": True,
            },
        )
        return folder

    @property
    def paths(self):
        return vars(self) | {"checkpoint": next(self.bare.glob("checkpoint-*"))}


WISHES = ("code", "kernel", "base's kernel")
LOADING = {
    "train": ("{config}", "--dry-run {config}", "--resume {bare}", "--resume {unfinished}"),
    "advise": ("{config}",),
    "smoothness": ("{config}", "--dry-run {config}", "--resume {curves}"),
    "bench": ("--whole-run {config}",),
    "eval": ("{run}", "{artefact}", "{base}"),
    "predict": ("{run} film", "{artefact} film", "{base} film"),
    "verify": ("{run}", "{artefact}", "{checkpoint}", "{export}"),
    "export": ("{run} --to plain", "{artefact} --to plain", "{checkpoint} --to plain"),
    "replay": ("{run} --step 1 --to plain", "{checkpoint} --step 1 --to plain"),
    "study": ("{study}", "{study} --retry-failed", "{study} --join"),
}
"""Command -> what it is handed in each attack. It ends with one error."""
READING = {
    "info": ("{run}", "{bare}", "{artefact}", "{checkpoint}", "{export}"),
    "report": ("{run}",),
    "study": ("{study} --status", "{study} --dry-run"),
}
"""The same for commands that only read, and need no permission."""
OPENING_NO_FOLDER = {"convergence", "doctor", "tasks"}


def attacks_of(wish):
    """Command and arguments of each attack.

    All attacks with kernels in config.json meet the same check when the base loads, so there is one
    for each command. `bench` and `study` would load it in other processes.
    """
    for command, lines in LOADING.items():
        if wish == "base's kernel":
            lines = [] if command in ("bench", "study") else lines[:1]
        if wish == "kernel":
            lines = [line for line in lines if "{base}" not in line]
        yield from ((command, line) for line in lines)


def test_every_command_is_attacked():
    names = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert names == {*LOADING, *READING, *OPENING_NO_FOLDER}


@pytest.mark.parametrize("wish", WISHES)
def test_no_command_runs_code_that_a_folder_asks_for(made, tmp_path, marker, wish):
    folders = Folders(made, tmp_path, marker, wish)
    for command, line in attacks_of(wish):
        done = invoke(command, *line.format_map(folders.paths).split())
        where = f"{command} {line}: {done.output}"
        assert done.exit_code == 2, where
        assert "trust_remote_code" in done.output, where
        assert not marker.exists(), where
        assert not (tmp_path / "plain").exists()
    assert not list(tmp_path.glob("runs/*"))
    assert not list(tmp_path.glob("study/runs/*"))
    for command, lines in READING.items():
        for line in lines if wish == "code" else []:
            done = invoke(command, *line.format_map(folders.paths).split())
            assert done.exit_code == 0, f"{command} {line}: {done.output}"
            assert not marker.exists(), f"{command} {line}"


@pytest.mark.parametrize("wish", ["code", "kernel"])
def test_no_function_takes_the_permission_from_a_file(made, tmp_path, marker, wish):
    folders = Folders(made, tmp_path, marker, wish)
    paths = folders.paths
    start = tmp_path / "start.json"
    values = yaml.safe_load(paths["config"].read_text())
    for action in (
        lambda: load_config(paths["config"]),
        lambda: load_config(values=values),
        lambda: open_source(paths["checkpoint"]),
        lambda: open_source(paths["run"]),
        lambda: read_base(paths["bare"]),
        lambda: measure_start(paths["config"], start),
        lambda: measure_run(paths["run"], start),
        lambda: Worker(expand(load_spec(paths["study"]))).run(),
    ):
        with pytest.raises(UserError, match="trust_remote_code"):
            action()
        assert not marker.exists()


def test_a_base_with_code_or_kernels_does_not_load_unasked(made, tmp_path, marker):
    folders = {wish: Folders(made, tmp_path / wish[:4], marker, wish).base for wish in WISHES}
    code, kernel = str(folders["code"]), str(folders["base's kernel"])
    for load in (head_of, load_model, empty_model):
        with pytest.raises(UserError, match="trust_remote_code"):
            load(code)
    with pytest.raises(UserError, match=f"'{KERNEL}'.*trust_remote_code.*sdpa"):
        load_model(kernel)
    nested = read_json(folders["base's kernel"] / "config.json")
    nested = {"text_config": nested, "vision_config": {"_attn_implementation": {"": "paged|a/b"}}}
    with pytest.raises(UserError, match="trust_remote_code"):
        check_kernels(nested, "x")
    assert not marker.exists()
    load_model(kernel, attn_implementation="sdpa")
    check_kernels({"attn_implementation": "sdpa", "architectures": ["a/b"]}, "x")
    assert not marker.exists()
    with pytest.raises(UserError):
        load_model(kernel, attn_implementation=KERNEL)
    assert marker.exists()


def test_the_permission_of_this_very_call_counts(made, tmp_path, marker):
    """Otherwise the attacks above would prove nothing."""
    paths = Folders(made, tmp_path, marker, "code").paths
    load_config(paths["config"], ["model.trust_remote_code=true"])
    load_config(paths["config"], trust_remote_code=True)
    plain = load_config(paths["config"], ["model.trust_remote_code=false"])
    assert not plain.model.trust_remote_code
    open_source(paths["run"], trust_remote_code=True)
    resumed = resumed_config(paths["bare"], overrides=["model.trust_remote_code=true"])
    assert resumed.model.trust_remote_code
    config, _ = saved_options(paths["curves"], ["model.trust_remote_code=true"])
    assert config.model.trust_remote_code
    assert not marker.exists()
    assert next(verify(paths["checkpoint"], trust_remote_code=True)).is_sound
    assert marker.exists()  # The head was looked up in the base.


def test_a_study_passes_its_permission_to_its_processes(made, tmp_path, marker):
    grid = expand(load_spec(Folders(made, tmp_path, marker, "code").paths["study"]))
    worker = Worker(grid, trust_remote_code=True)
    worker._check_trust()
    tasks = all_tasks(grid).values()
    search = next(task for task in tasks if task.kind == "search")
    start = next(task for task in tasks if task.kind == "start")
    run = grid.search[0]
    assert "model.trust_remote_code=true" in worker._command(search, run)[0]
    worker.folder.run_folder(run).mkdir(parents=True)
    (worker.folder.run_folder(run) / "run.yaml").write_text("seed: 7")
    # A run.yaml of another run is compared with the configuration of the study.
    resuming = worker._command(search, run)[0]
    assert {"--resume", str(worker.folder.config_file(run))} <= set(resuming)
    assert "model.trust_remote_code=true" in resuming
    assert "--trust-remote-code" in worker._command(start, None)[0]
    assert not Worker(grid)._permission(run)
