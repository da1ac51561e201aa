"""One run: prepare, evaluate, train, evaluate again, save.

run.yaml           the complete configuration, with numbers in place of auto
base.json          the base as it was before training, and the names of the classes
modules.json       the measurement by which adapter.budget chose the modules of the adapter
advise.json        the measurements behind the numbers that replaced auto
environment.json   versions, machine, device
metrics.jsonl      the log, one JSON object per line
checkpoint-N/      Trainer's layout: adapter, trajectory, optimizer state
stopped.json       the reason, if the run ended before its last step
result.json        scores before and after with intervals, cost
artifact/          the result to keep or publish
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback

from zofo.config.schema import AUTO, AUTO_KEYS, RunConfig
from zofo.console import new_progress, plain_console
from zofo.disk.files import json_digest, remove_file, write_json, write_text
from zofo.environment import environment, resolve_device
from zofo.errors import TrainingStoppedError, UserError
from zofo.models.fitting import notes_on_new
from zofo.models.loading import stored_weights
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS
from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.run.own_rows import own_rows
from zofo.run.peers import Peers, joined
from zofo.run.prepare import (
    Prepared,
    check_processes,
    num_steps,
    prepare,
    require_kept,
    run_folder,
)
from zofo.run.result import Result, run_cost, save_run_artifact, watch_scores, write_result
from zofo.run.resume import FREE, flat_options, newest_checkpoint
from zofo.run.resume import resumed_config as resumed_config
from zofo.run.stopping import Patience, StopEarly
from zofo.run.task_trainer import TaskTrainer, build_trainer, close_displays
from zofo.saved.checkpoint_folders import find_misfit, remove_leftovers
from zofo.saved.layout import (
    ADVICE_FILE,
    BASE_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    MODULES_FILE,
    STOPPED_FILE,
)
from zofo.saved.source import read_base, run_id_of, watched_rows_of, write_base
from zofo.scoring.evaluate import Metrics, evaluate
from zofo.scoring.generate import writer_for
from zofo.tasks.digests import RowDigests
from zofo.trainer.interrupt import StopOnSignal


def train(
    config: RunConfig,
    *,
    resume: Path | None = None,
    console: Console | None = None,
    on_start: Callable[[Path], None] | None = None,
    stop: StopOnSignal | None = None,
    watchers: Callable[[TaskTrainer], Sequence[TrainerCallback]] | None = None,
) -> Result:
    """Run a configuration.

    Of several processes that torchrun or accelerate launch started, all call it.

    Args:
        config: the configuration, as from `load_config`.
        resume: run folder to continue from its newest checkpoint, or else from the beginning.
        console: console for the progress; default: stderr.
        on_start: called with the run folder once everything is checked.
        stop: handler of signals during training.
        watchers: makes callbacks for the trainer, such as that of `zofo.smoothness.path`.

    Raises:
        TrainingInterrupt: after a signal to `stop`, once a checkpoint is written.
        UserError: before training, for anything wrong with the configuration, data or folders.
    """
    with joined() as peers, contextlib.ExitStack() as held, peers.naming_loss():
        with peers.together():
            check_processes(config, peers.size)
        options = flat_options(config.model_dump(exclude={"num_threads"}))
        peers.check_equal(options | {"--resume": resume and str(resume)})
        return train_in(
            peers.from_first(lambda: held.enter_context(run_folder(config, resume))),
            config,
            is_resumed=resume is not None,
            console=console,
            on_start=on_start,
            stop=stop,
            watchers=watchers,
            peers=peers,
        )


def train_in(
    folder: Path,
    config: RunConfig,
    *,
    is_resumed: bool,
    console: Console | None = None,
    on_start: Callable[[Path], None] | None = None,
    stop: StopOnSignal | None = None,
    watchers: Callable[[TaskTrainer], Sequence[TrainerCallback]] | None = None,
    peers: Peers | None = None,
) -> Result:
    """Run a configuration in a folder that `run_folder` has taken; otherwise as `train`."""
    peers = peers or Peers()
    console = console or plain_console(stderr=True)
    console.quiet |= not peers.is_first
    started = time.monotonic()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    checkpoint = None
    with peers.together():
        resolve_device(config.device)  # An absent device is reported before any work.
    if is_resumed:
        checkpoint = peers.from_first(lambda: _checkpoint(folder, config, console))
    with peers.together():
        prepared = prepare(config) if checkpoint is None else _prepared_again(config, checkpoint)
    peers.check_equal(_contents(prepared))
    for note in (*prepared.splits.notes, *notes_on_new(prepared.model)):
        _note(console, note)
    config = prepared.config
    _show_choice(console, prepared)
    if checkpoint is not None and peers.size > 1:
        _note_rebuilding(console, checkpoint, prepared, peers.size)
    config, advice = peers.from_first(lambda: _without_auto(config, prepared, console))
    run_id = _run_id(config, prepared) if checkpoint is None else run_id_of(folder)
    with peers.together():
        trainer = _trainer(folder, config, prepared, run_id, console, peers)
    own = trainer.own
    peers.from_first(lambda: _begin_folder(folder, config, prepared, run_id, advice))
    if on_start is not None:
        on_start(folder)

    def measured(what: str) -> Metrics:
        return peers.from_first(lambda: _measured(prepared, config, console, what))

    prepared.model.to(trainer.args.device)
    before = measured("test before") if config.measure_test else None
    own.measure(prepared.model, "before")
    dev_before = measured("dev before") if config.early_stopping is not None else None
    stop_early = StopEarly(
        trainer, folder, config.early_stopping, dev_before.loss if dev_before else None
    )
    trainer.add_callback(stop_early)
    if config.patience is not None:
        trainer.add_callback(Patience(trainer, config.patience, lambda text: _note(console, text)))
    for watcher in () if watchers is None else watchers(trainer):
        trainer.add_callback(watcher)
    trained_s = _fit(trainer, checkpoint, stop, stop_early)
    after = measured("test after") if config.measure_test else None
    own.measure(prepared.model, "after")

    def save() -> Result:
        require_kept(folder)
        artifact = save_run_artifact(folder, config, prepared, trainer)
        cost = run_cost(trainer, artifact, train_s=trained_s, total_s=time.monotonic() - started)
        watch = watch_scores(trainer.state, config.select_best)
        result = Result(folder, before, after, cost, own.figures(), watch)
        require_kept(folder)
        own.write(folder)
        write_result(artifact, config, prepared, trainer, result, dev_before)
        return result

    return peers.from_first(save)


def _trainer(
    folder: Path,
    config: RunConfig,
    prepared: Prepared,
    run_id: str | None,
    console: Console,
    peers: Peers,
) -> TaskTrainer:
    """The trainer of the run; notes what it did to the rows of the zeroth-order block's own."""
    own = own_rows(config, prepared.splits, prepared.tokenizer, prepared.base.head)
    own.check(prepared.model)
    for note in own.notes:
        _note(console, note)
    return build_trainer(
        config,
        prepared.model,
        prepared.rows,
        kind=prepared.splits.kind,
        collator=prepared.collator,
        writer=writer_for(prepared.tokenizer, config.task),
        original_base=_original_base(config, prepared),
        total_steps=num_steps(config, len(prepared.rows["train"])),
        folder=folder,
        console=console,
        digests=RowDigests.of(prepared.splits),
        run_id=run_id,
        peers=peers,
        own=own,
        watched=prepared.watched,
    )


def _prepared_again(config: RunConfig, checkpoint: Path) -> Prepared:
    """Prepare with the rows and the classes that the run began with."""
    run = checkpoint.parent
    # Runs of older versions may have neither file.
    labels = read_base(run)[1] if (run / BASE_FILE).exists() else ()
    prepared = prepare(config, known=RowDigests.load(checkpoint), labels=labels)
    if prepared.watched and prepared.watched.digest != watched_rows_of(run):
        raise UserError(
            "watch_task: its rows have changed since the run began; put the old rows back to "
            "continue it, or begin a new run with another output_dir"
        )
    return prepared


def _checkpoint(folder: Path, config: RunConfig, console: Console) -> Path | None:
    """The checkpoint to continue from; a note tells the user if there is none.

    Raises:
        UserError: if it belongs to another run.
    """
    checkpoint = newest_checkpoint(folder, lambda text: _note(console, text))
    misfit = checkpoint and find_misfit(checkpoint, config.method, run_id_of(folder))
    if misfit:
        raise UserError(misfit)
    if checkpoint is None:
        _note(console, f"{folder} holds no whole checkpoint, so the run starts from the beginning")
    return checkpoint


def _fit(
    trainer: TaskTrainer, checkpoint: Path | None, stop: StopOnSignal | None, stop_early: StopEarly
) -> float:
    """Train to the last step, and return the seconds that it took.

    Raises:
        TrainingStoppedError: if the run ended before the last step.
    """
    began = time.monotonic()
    if stop is not None:
        trainer.add_callback(stop)
    try:
        with stop or contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        close_displays(trainer)
    if stop_early.reason is not None:
        remedy = "on_non_finite=skip" if trainer.watch.stopped_at else "early_stopping=null"
        what = "Lower base_lr and adapter_lr"
        if trainer.lacks_rewards:
            what = "Correct the reward, or raise reward.time_limit_s"
        raise TrainingStoppedError(
            f"{stop_early.reason}. The last good step is in {newest_checkpoint(stop_early.folder)}."
            f" {what}, or set {remedy}"
        )
    return time.monotonic() - began


def _original_base(
    config: RunConfig, prepared: Prepared
) -> Callable[[], Mapping[str, Tensor]] | None:
    """A function that reads the original base, which the best step and an anchor need.

    None if nothing needs it, or if the model's files lack a weight. In the second case, the trainer
    keeps its own copy on disk.
    """
    if not (config.select_best or config.base_anchor) or METHODS[config.method].base != "zeroth":
        return None
    model, base = prepared.model, prepared.base
    moved = split_parameters(model).base
    stored = stored_weights(base.name, model, moved, revision=base.revision)
    return None if stored is None else lambda: stored


def _without_auto(
    config: RunConfig, prepared: Prepared, console: Console
) -> tuple[RunConfig, dict[str, Any] | None]:
    """The configuration with numbers in place of `auto`, and the advice as JSON."""
    if not any(getattr(config, key) == AUTO for key in AUTO_KEYS):
        return config, None
    from zofo.advice.present import as_json, lines_of
    from zofo.run.auto import resolve

    began = time.monotonic()
    with new_progress(console, "") as progress:
        task = progress.add_task("advice", total=None, text="")
        config, advice = resolve(
            config, prepared, report=lambda what, cost: progress.update(task, text=what)
        )
    if advice is None:
        return config, None
    for line in lines_of(advice):
        _note(console, line)
    return config, {**as_json(advice), "seconds": round(time.monotonic() - began, 3)}


def _measured(prepared: Prepared, config: RunConfig, console: Console, what: str) -> Metrics:
    rows = prepared.rows[what.partition(" ")[0]]
    with new_progress(console, "rows") as progress:
        task = progress.add_task(what, total=len(rows), text="")
        return evaluate(
            prepared.model,
            rows,
            prepared.collator,
            kind=prepared.splits.kind,
            batch_size=config.eval_batch_size,
            progress=lambda num: progress.advance(task, num),
            writer=writer_for(prepared.tokenizer, config.task),
        )


def _note(console: Console, text: str) -> None:
    console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def _show_choice(console: Console, prepared: Prepared) -> None:
    """Show the modules that hold the adapter, if `adapter.budget` has chosen them."""
    choice = prepared.choice
    if choice is None:
        return
    _note(
        console,
        f"adapter.budget {prepared.config.adapter.budget:,}: {choice.num_parameters:,} parameters "
        f"in {len(choice.modules)} of {len(choice.places)} modules, chosen by the gradient of "
        f"{choice.num_batches} batches ({choice.forward_equivalents:,} forward-equivalents)",
    )
    table = Table("module", "in layers", "parameters", "share of importance")
    for line in choice.lines():
        table.add_row(*line)
    console.print(table)


def _note_rebuilding(
    console: Console, checkpoint: Path, prepared: Prepared, num_processes: int
) -> None:
    """Tell what the processes read instead of receiving the base from one of them."""
    record = checkpoint / TRAJECTORY_FILE
    if record.exists():
        weights = sum(p.nbytes for p in split_parameters(prepared.model).base.values())
        _note(
            console,
            f"each of {num_processes} processes rebuilds its base from {record.stat().st_size:,} "
            f"bytes of scalars, where the weights would be {weights:,} bytes",
        )


def _run_id(config: RunConfig, prepared: Prepared) -> str:
    """A name for a new run that other options, other rows or another base would change."""
    rows = RowDigests.of(prepared.splits).parts
    options = config.model_dump(exclude=set(FREE))
    return json_digest([options, prepared.base_fingerprint, prepared.splits.labels, rows])


def _contents(prepared: Prepared) -> dict[str, str]:
    """Digests of what the processes have read."""
    rows = RowDigests.of(prepared.splits).parts
    return {
        "the base (fingerprint)": prepared.base_fingerprint,
        "the classes": str(prepared.splits.labels),
        "the modules of the adapter": str(prepared.config.adapter.modules),
        **{f"the rows of {part} (digest)": json_digest(rows[part]) for part in rows},
        "the rows of watch_task (digest)": prepared.watched.digest if prepared.watched else "",
    }


def _begin_folder(
    folder: Path,
    config: RunConfig,
    prepared: Prepared,
    run_id: str | None,
    advice: dict[str, Any] | None,
) -> None:
    remove_leftovers(folder)
    remove_file(folder / STOPPED_FILE)
    write_text(folder / CONFIG_FILE, config.to_yaml())
    watched = None if prepared.watched is None else prepared.watched.digest
    write_base(folder, prepared.base, prepared.splits.labels, run_id, watched)
    write_json(folder / ENVIRONMENT_FILE, environment())
    if prepared.choice is not None:
        write_json(folder / MODULES_FILE, prepared.choice.as_json())
    if advice is not None:
        write_json(folder / ADVICE_FILE, advice)
