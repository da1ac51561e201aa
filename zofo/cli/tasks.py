"""`zofo tasks`: list the tasks, or show one with its prompt and its first row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from zofo.cli.exits import app, reports_errors
from zofo.console import plain_console
from zofo.errors import UserError


@app.command()
@reports_errors
def tasks(
    name: Annotated[str | None, typer.Argument(help="Task to show. Default: all.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options such as task.data_dir=rte seed=1."),
    ] = None,
) -> None:
    """List the tasks, or show one with its prompt, its candidates and its first row."""
    from zofo.tasks.families.table import BUILTIN
    from zofo.tasks.load import OWN_TASKS

    console = plain_console(soft_wrap=True)
    if name is not None:
        _show_task(console, name, overrides or [])
        return
    header = ("task", "what", "rows from", "train/dev/test")
    table = Table(*header, box=None, pad_edge=False)
    for key, task in BUILTIN.items():
        table.add_row(key, task.description, task.origin, "/".join(map(str, task.sizes)))
    for key, description in OWN_TASKS.items():
        table.add_row(key, description, "task.train: a file or hub id", "split off, or your files")
    console.print(table)
    console.print("Sizes are upper limits. task.data_dir replaces the rows of a built-in task.")


def _show_task(console: Console, name: str, overrides: Sequence[str]) -> None:
    from zofo.config.load import load_config
    from zofo.tasks.families.table import BUILTIN
    from zofo.tasks.load import OWN_TASKS, check_spec, load_splits, task_names
    from zofo.tasks.spec import TaskSpec

    if name not in task_names():
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
