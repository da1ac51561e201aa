"""`zofo train`: start a run, continue one, or show its plan."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from zofo.cli.exits import (
    Overrides,
    app,
    code_of_problem,
    exit_code_of,
    reports_errors,
    split_arguments,
)
from zofo.cli.output import one_line, warn_of_idle_options
from zofo.console import plain_console, say
from zofo.errors import TrainingStoppedError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from zofo.config.schema import RunConfig
    from zofo.run.peers import Peers
    from zofo.run.result import Result
    from zofo.scoring.evaluate import Metrics

_NUM_PROMPTS = 3  # number of held-out prompts that the end of a run shows
_SHOWN = ("f1", "exact_match", "accuracy", "auc", "loss", "perplexity")


@app.command()
@reports_errors
def train(
    arguments: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the configuration, parameters, memory and cost.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Run folder to continue.", metavar="RUN")
    ] = None,
) -> None:
    """Fine-tune a model on a task, score it before and after training, and save it.

    zofo train configs/demo.yaml steps=100

    zofo train task=classification task.train=reviews.csv model=smollm2-135m
    """
    if "RANK" in os.environ:
        # Each process would warn that all parameters are used. torch reads this when it loads.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from zofo.run.peers import joined

    path, overrides = split_arguments(arguments)
    with joined() as peers, _speaking(peers):
        with peers.together():
            config, folder = _configured(path, overrides, resume)
        if config is None:
            return
        if dry_run and resume is None:
            with peers.together():
                _show_plan(config, peers.size)
        else:
            _run(config, folder)


@contextmanager
def _speaking(peers: Peers) -> Iterator[None]:
    """Let only the first process write on the terminal; the others end with the same code."""
    if peers.is_first:
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nothing:
        try:
            with redirect_stdout(nothing), redirect_stderr(nothing):
                yield
        except (UserError, TrainingStoppedError, OSError) as error:
            if not peers.knows(error):
                say(f"error: process {peers.rank}: {error}", stderr=True)
            raise typer.Exit(code_of_problem(error)) from None


def _configured(
    path: Path | None, overrides: Sequence[str], resume: Path | None
) -> tuple[RunConfig | None, Path | None]:
    """The configuration, None for a finished run, and the folder of a run to continue."""
    from zofo.config.load import load_config
    from zofo.run.peers import may_restart
    from zofo.saved.layout import CONFIG_FILE

    if resume is not None:
        return _resumed(resume, path, overrides), resume
    config = load_config(path, overrides)
    if config.output_dir is not None:
        folder = Path(config.output_dir).expanduser()
        # torchrun does not tell a process that it was started again for another number of machines.
        if may_restart() and (folder / CONFIG_FILE).exists():
            return _resumed(folder, path, overrides), folder
    elif may_restart():
        raise UserError(
            "torchrun has --max-restarts, and a new start would not find the folder of the first "
            "one; give output_dir=FOLDER"
        )
    warn_of_idle_options(config)
    return config, None


def _resumed(folder: Path, path: Path | None, overrides: Sequence[str]) -> RunConfig | None:
    """The configuration to continue a run folder with; None if the run is finished."""
    from zofo.run.resume import is_finished, resumed_config
    from zofo.saved.layout import RESULT_FILE

    config = resumed_config(folder, path, overrides)
    if is_finished(folder):
        say(f"{folder} is finished; its result is in {folder / RESULT_FILE}")
        return None
    if os.path.lexists(folder / RESULT_FILE):
        raise UserError(
            f"{folder / RESULT_FILE} is damaged, so the run's scores are lost; remove it, and the "
            "run continues from its newest checkpoint"
        )
    return config


def _show_plan(config: RunConfig, num_processes: int) -> None:
    from zofo.run.plan import make_plan
    from zofo.run.prepare import check_folder, check_processes

    check_folder(config)
    check_processes(config, num_processes)
    plan = make_plan(config)
    console = plain_console()
    console.print(config.to_yaml(), markup=False)
    table = Table("block", "order", "moves", "parameters", title="parameters")
    for block, (order, moved, total) in plan.num_parameters.items():
        if total:
            table.add_row(block, order, f"{moved:,}", f"{total:,}")
    console.print(table)
    memory = Table("what", "MiB", title="memory")
    for what, size in plan.memory_bytes.items():
        memory.add_row(what, f"{size / 2**20:,.1f}")
    memory.add_row("sum", f"{sum(plan.memory_bytes.values()) / 2**20:,.1f}")
    console.print(memory)
    rows = ", ".join(f"{num} {part}" for part, num in plan.num_rows.items())
    console.print(f"rows: {rows}; longest sequence {plan.max_tokens} tokens")
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"{plan.steps} steps, about {plan.forward_equivalents:,} forward-equivalents of "
        f"{config.batch_size} rows, without evaluations"
    )


def _run(config: RunConfig, folder: Path | None) -> None:
    from zofo.run.train import train as train_run
    from zofo.trainer.interrupt import StopOnSignal

    progress = plain_console(stderr=True)
    started: list[Path] = []
    try:
        result = train_run(
            config, resume=folder, console=progress, on_start=started.append, stop=StopOnSignal()
        )
    except KeyboardInterrupt as error:
        say(_how_to_continue(started[0] if started else folder), stderr=True)
        raise typer.Exit(exit_code_of(error)) from None
    _show(result)


def _how_to_continue(folder: Path | None) -> str:
    from zofo.run.resume import newest_checkpoint

    if folder is None:
        return "interrupted before anything was written"
    checkpoint = newest_checkpoint(folder)
    held = "no checkpoint yet" if checkpoint is None else f"{checkpoint} is whole"
    return f"interrupted; {held}. Continue with: zofo train --resume {shlex.quote(str(folder))}"


def _show(result: Result) -> None:
    from zofo.results.answers import reward_text

    console = plain_console()
    if result.before is not None and result.after is not None:
        console.print(_table(result.before, result.after))
    for when, figures in result.held_out.get("rewards", {}).items():
        reward = reward_text(figures["reward"])
        console.print(f"reward {when} training  {reward}, on held-out prompts", soft_wrap=True)
    for when, figures in result.held_out.get("preference", {}).items():
        console.print(
            f"pairs {when} training  margin {figures['preference_margin']:.4g} nats, "
            f"{figures['preference_ranked_right']:.1%} ranked right, held out"
        )
    _show_answers(result.folder, console)
    if result.watch:
        then, now = result.watch["before"], result.watch["after"]
        names = [name for name in _SHOWN if name in now]
        texts = (f"{name} {then[name]:.3f} -> {now[name]:.3f}" for name in names)
        console.print(f"watch_task  {', '.join(texts)}, on {now['num_rows']} dev rows")
    cost = result.cost
    console.print(
        f"{cost['steps']} steps, {cost['forward_equivalents']:,} forward-equivalents, "
        f"{cost['train_s']:.0f} s, peak memory {cost['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    console.print(f"run       {result.folder}", soft_wrap=True)
    console.print(
        f"artefact  {result.folder / 'artifact'} ({cost['artifact_bytes'] / 2**20:.1f} MiB)",
        soft_wrap=True,
    )
    console.print(f"in Python zofo.load({str(result.folder)!r}).model", soft_wrap=True)
    console.print(f"plain     zofo export {result.folder} --to DIR", soft_wrap=True)


def _show_answers(folder: Path, console: Console) -> None:
    """Print the first held-out prompts with their answers, each on one line of the console."""
    from zofo.results.answers import HELD_OUT_FILE, read_held_out, reward_text

    held_out = read_held_out(folder)
    for sample in held_out[:_NUM_PROMPTS]:
        prompt, start = " ".join(sample.prompt.split()), console.width // 3
        if len(prompt) > console.width:  # Prompts often begin alike, so their ends are shown too.
            prompt = f"{prompt[:start]}…{prompt[start + 1 - console.width :]}"
        console.print(one_line(prompt), no_wrap=True, overflow="ellipsis")
        rewards = [reward_text(answer.reward) for answer in sample.answers.values()]
        width = max(map(len, rewards), default=0)
        for when, answer in sample.answers.items():
            text = " ".join(answer.text.split()) or "(no text)"
            line = f"  {when:6}  {reward_text(answer.reward):>{width}}  {text}"
            console.print(one_line(line), no_wrap=True, overflow="ellipsis")
    if len(held_out) > _NUM_PROMPTS:
        console.print(
            f"all {len(held_out)} held-out prompts are in {folder / HELD_OUT_FILE}", soft_wrap=True
        )


def _table(before: Metrics, after: Metrics) -> Table:
    table = Table("test", "before", "after", title=f"{after.num_rows} held-out rows")
    titles = {"auc": "AUC", "f1": "F1", "exact_match": "exact match"}
    if after.perplexity is not None:  # Where a task generates text, accuracy counts tokens.
        titles["accuracy"] = "token accuracy"
    for name in _SHOWN:
        cells = _cell(before, name), _cell(after, name)
        if cells[1]:
            table.add_row(titles.get(name, name), *cells)
    if after.majority is not None:
        rate = f"{after.majority:.3f}"
        table.add_row("majority class", rate, rate)
    return table


def _cell(metrics: Metrics, name: str) -> str:
    values = dataclasses.asdict(metrics)
    if values[name] is None:
        return ""
    text = f"{values[name]:.3f}"
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    return text if low is None else f"{text}  [{low:.3f}, {high:.3f}]"
