"""Measuring a run: spectra, directions and the majoriser at some steps, constants along the path.

    smoothness.yaml     the run's configuration and what is measured
    smoothness.jsonl    every measurement, as it was made
    smoothness.json     all of them with fits and verdicts
    smoothness.html     the page

in the run folder, or in a folder of their own where nothing is trained. A measurement that is there
is not made again: an interrupted run is continued from its newest checkpoint, and what lies before
and after that checkpoint stays, since the continued run is the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from rich.console import Console
from transformers import TrainerCallback

from zofo.config.schema import RunConfig
from zofo.disk.files import write_json, write_text
from zofo.errors import UserError
from zofo.optim.methods import apply_method
from zofo.run.prepare import Prepared, prepare
from zofo.run.resume import is_finished
from zofo.run.train import train
from zofo.smoothness.blocks import Block, blocks_of
from zofo.smoothness.directional import directional_curvature
from zofo.smoothness.majoriser import check_majoriser
from zofo.smoothness.objective import Objective, objective_of_trainer
from zofo.smoothness.options import SmoothnessOptions, load_smoothness, path_steps, point_steps
from zofo.smoothness.path import SmoothnessRecorder
from zofo.smoothness.records import Records, finite
from zofo.smoothness.spectrum import measure_spectrum
from zofo.smoothness.summary import FILE, summarise
from zofo.trainer.interrupt import StopOnSignal, TrainingInterrupt

OPTIONS_FILE: Final = "smoothness.yaml"
RECORDS_FILE: Final = "smoothness.jsonl"
PAGE_FILE: Final = "smoothness.html"


class Say:
    """Where progress goes: a line a measurement."""

    def __init__(self, console: Console) -> None:
        self.console, self._began = console, time.monotonic()

    def __call__(self, text: str) -> None:
        """Print, with the seconds since the start."""
        seconds = time.monotonic() - self._began
        self.console.print(
            f"{seconds:6.0f} s  {text}", highlight=False, markup=False, soft_wrap=True
        )


def measure_point(
    objective: Objective,
    blocks: Mapping[str, Block],
    options: SmoothnessOptions,
    records: Records,
    step: int,
    *,
    eps: float = 1e-3,
    seed: int = 0,
    distribution: Any = "rademacher",
    say: Callable[[str], Any] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Measure spectra, directional curvature and the majoriser at the present weights.

    Args:
        objective: f.
        blocks: as from `blocks_of`.
        options: what and how much.
        records: where to; what is there is left out.
        step: optimiser steps done; also the address of the directions.
        eps: radius of the directions.
        seed: of the run: with it the directions are those of the run's step.
        distribution: of the directions.
        say: told of each measurement.
        should_stop: asked before each measurement; those that are left out are made when the run
            is continued.
    """
    for name, block in blocks.items():
        if should_stop():
            return
        if options.lanczos_steps and not records.has("spectrum", step, name):
            from zofo.smoothness.hessian import BlockHessian

            before = objective.num_forwards
            operator = BlockHessian(objective, block.parameters)
            found = measure_spectrum(
                operator,
                _like(block),
                num_steps=options.lanczos_steps,
                num_probes=options.probes,
                method=options.trace,
                seed=options.seed,
                memory_bytes=options.memory_bytes,
            )
            del operator
            record = {
                "kind": "spectrum",
                "step": step,
                "block": name,
                "is_part": block.is_part,
                "num_parameters": found.num_parameters,
                "top": vars(found.top),
                "bottom": vars(found.bottom),
                "norm": found.norm,
                "trace": vars(found.trace),
                "squared_norm": vars(found.squared_norm),
                "effective_rank": None
                if found.effective_rank is None
                else vars(found.effective_rank),
                "stable_rank": None if found.stable_rank is None else vars(found.stable_rank),
                "ritz": [
                    {"values": r.values.tolist(), "weights": r.weights.tolist()} for r in found.ritz
                ],
                "kept_vectors": found.ritz[0].is_orthogonal,
                "forwards": objective.num_forwards - before,
            }
            records.add(record)
            say(
                f"step {step}, {name}: eigenvalues {found.bottom.value:.3g} to "
                f"{found.top.value:.3g}, trace {found.trace.mean:.3g}"
            )
        if options.directions and not should_stop() and not records.has("directional", step, name):
            _measure_directions(
                objective, name, block, options, records, step, eps, seed, distribution
            )
    mains = {name: block for name, block in blocks.items() if not block.is_part}
    tests = options.majoriser and options.lanczos_steps and len(mains) > 1 and not should_stop()
    if tests and not records.has("majoriser", step):
        _test_majoriser(objective, mains, options, records, step, say)


def _measure_directions(
    objective: Objective,
    name: str,
    block: Block,
    options: SmoothnessOptions,
    records: Records,
    step: int,
    eps: float,
    seed: int,
    distribution: Any,
) -> None:
    from zofo.perturb.view import Perturbation

    parameters = list(block.parameters.values())
    view = Perturbation(
        objective.model, parameters, block.tensors, seed=seed, distribution=distribution
    )
    found = directional_curvature(
        objective.value,
        view,
        parameters,
        eps=eps,
        step=step,
        num_directions=options.directions,
    )
    records.add(
        {
            "kind": "directional",
            "step": step,
            "block": name,
            "is_part": block.is_part,
            "num_parameters": found.num_parameters,
            "eps": found.eps,
            "curvatures": list(found.curvatures),
            "projections": list(found.projections),
            "trace": vars(found.trace),
            "squared_gradient": vars(found.squared_gradient),
            "loss": found.loss,
            "rounding": found.rounding,
            "truncation": found.truncation,
            "forwards": found.num_forwards,
        }
    )


def _test_majoriser(
    objective: Objective,
    mains: Mapping[str, Block],
    options: SmoothnessOptions,
    records: Records,
    step: int,
    say: Callable[[str], Any],
) -> None:
    from zofo.smoothness.hessian import BlockHessian

    spectra = {r["block"]: r for r in records.of("spectrum") if r["step"] == step}
    # Ritz values lie within the spectrum: with their errors the blocks' norms are not too small.
    constants = {
        name: spectra[name]["norm"]
        + max(spectra[name][end]["residual"] for end in ("top", "bottom"))
        for name in mains
    }
    if not all(constants.values()):
        records.add({"kind": "majoriser", "step": step, "constants": constants, "kappa": None})
        return
    before = objective.num_forwards
    parameters = {n: p for block in mains.values() for n, p in block.parameters.items()}
    operator = BlockHessian(objective, parameters)
    _, gradient = operator.graph.gradient()
    found = check_majoriser(
        operator,
        {name: block.num_parameters for name, block in mains.items()},
        constants,
        _like(next(iter(mains.values()))),
        num_steps=options.lanczos_steps,
        vectors=[operator.flat(gradient)],
        num_samples=3,
        seed=options.seed,
        memory_bytes=options.memory_bytes,
    )
    records.add(
        {
            "kind": "majoriser",
            "step": step,
            "constants": found.constants,
            "kappa": found.kappa,
            "residual": found.residual,
            "sampled": list(found.sampled),
            "verdict": found.verdict,
            "forwards": objective.num_forwards - before,
        }
    )
    say(f"step {step}, majoriser of the blocks' own norms: kappa {found.kappa:.3g}")


class PointRecorder(TrainerCallback):
    """Calls `measure_point` while a trainer trains, after chosen numbers of steps.

    Args:
        trainer: a `HybridMixin` trainer.
        objective: returns f, once training begins.
        steps: numbers of optimiser steps done.
        options: as for `measure_point`.
        records: likewise.
        say: likewise.
        stop: asked before each measurement.
    """

    def __init__(
        self,
        trainer: Any,
        objective: Callable[[], Objective],
        steps: list[int],
        options: SmoothnessOptions,
        records: Records,
        say: Callable[[str], Any],
        stop: StopOnSignal | None = None,
    ) -> None:
        self.trainer, self.objective, self.steps = trainer, objective, set(steps)
        self.options, self.records, self.say, self.stop = options, records, say, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start.

        Raises:
            TrainingInterrupt: if asked to stop: before a step there is nothing to save.
        """
        self._measure(state.global_step)
        if self.stop is not None and self.stop.signum is not None:
            raise TrainingInterrupt(self.stop.signum)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after a step."""
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        if step not in self.steps:
            return
        optimizer = self.trainer.hybrid_optimizer
        with self.trainer.clock.paused():
            measure_point(
                self.objective(),
                blocks_of(self.trainer.model, self.options.split),
                self.options,
                self.records,
                step,
                eps=optimizer.options.eps,
                seed=optimizer.seed,
                distribution=optimizer.options.distribution,
                say=self.say,
                should_stop=lambda: self.stop is not None and self.stop.signum is not None,
            )


def measure_run(
    config: RunConfig,
    options: SmoothnessOptions,
    *,
    resume: Path | None = None,
    console: Console | None = None,
    on_start: Callable[[Path], None] | None = None,
    stop: StopOnSignal | None = None,
) -> Path:
    """Train and measure, or only measure; write records, summary and page.

    Args:
        config: of the run.
        options: what is measured.
        resume: a folder to continue.
        console: for progress; default: stderr.
        on_start: called with the folder once something is written there.
        stop: what handles signals while training.

    Returns:
        The folder.

    Raises:
        UserError: as `zofo.run.train.train`, before any work.
    """
    from zofo.smoothness.page import write_page

    if options.points and options.lanczos_steps:
        import zofo.smoothness.hessian  # noqa: F401  what it needs is there, or is said now
    console = console or Console(stderr=True)
    folder = resume or new_folder(config)
    config = config.model_copy(update={"output_dir": str(folder)})
    records = Records(folder / RECORDS_FILE if resume else None)
    records.path = folder / RECORDS_FILE
    say = Say(console)
    if options.train:
        if resume is None or not is_finished(folder):
            _train(config, options, records, say, resume, console, on_start, stop)
    else:
        _measure_start(config, options, records, say, folder, on_start)
    found = summarise(records.all(), config.model_dump(), options.model_dump())
    write_json(folder / FILE, finite(found))
    write_page(folder / FILE, folder / PAGE_FILE)
    return folder


def _train(
    config: RunConfig,
    options: SmoothnessOptions,
    records: Records,
    say: Say,
    resume: Path | None,
    console: Console,
    on_start: Callable[[Path], None] | None,
    stop: StopOnSignal | None,
) -> None:
    def began(folder: Path) -> None:
        _write_options(folder, config, options)
        if on_start is not None:
            on_start(folder)

    def watch(trainer: Any) -> list[TrainerCallback]:
        steps = trainer.args.max_steps
        shared: list[Objective] = []

        def objective() -> Objective:
            if not shared:
                shared.append(
                    objective_of_trainer(
                        trainer,
                        num_rows=options.rows,
                        seed=options.seed,
                        batch_size=options.row_batch,
                    )
                )
            return shared[0]

        def told(point: dict[str, Any]) -> None:
            own = {b: r and r["norm"] for b, r in (point.get("gradient") or {}).items()}
            text = ", ".join(f"{b} {v:.3g}" for b, v in own.items() if v)
            say(f"step {point['step']}: ‖∇f‖ {point['grad_norm']['full']:.3g}; {text}")

        recorder = SmoothnessRecorder(
            trainer,
            every=path_steps(options, steps),
            gammas=options.gammas,
            along_gradient=options.along_gradient,
            split=options.split,
            objective=objective,
            records=records,
            on_point=told,
        )
        points = PointRecorder(
            trainer,
            objective,
            point_steps(options, steps),
            options,
            records,
            say,
            stop,
        )
        return [recorder, points]

    train(config, resume=resume, console=console, on_start=began, stop=stop, watchers=watch)


def _measure_start(
    config: RunConfig,
    options: SmoothnessOptions,
    records: Records,
    say: Say,
    folder: Path,
    on_start: Callable[[Path], None] | None,
) -> None:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    prepared = prepare(config)
    apply_method(prepared.model, config.method)
    _write_options(folder, config, options)
    if on_start is not None:
        on_start(folder)
    measure_point(
        objective_of_rows(prepared, config, options),
        blocks_of(prepared.model, options.split),
        options,
        records,
        0,
        eps=float(config.eps),
        seed=config.seed,
        distribution=config.distribution,
        say=say,
    )


def objective_of_rows(
    prepared: Prepared, config: RunConfig, options: SmoothnessOptions
) -> Objective:
    """The training loss of a prepared run on the rows that are measured."""
    import numpy as np

    from zofo.environment import resolve_device
    from zofo.tasks.losses import objective_loss

    model = prepared.model.to(resolve_device(config.device))
    train_rows = prepared.rows["train"]
    order = np.random.default_rng(options.seed).permutation(len(train_rows))[: options.rows]
    rows = [train_rows[int(i)] for i in sorted(order)]
    size = options.row_batch or len(rows)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    device = next(model.parameters()).device
    batches = [{k: v.to(device) for k, v in prepared.collator(p).items()} for p in parts]
    return Objective(
        model,
        lambda batch: objective_loss(model, batch, config.task.objective),
        batches,
        [len(p) / len(rows) for p in parts],
    )


def new_folder(config: RunConfig) -> Path:
    """The configured folder, which must be new or empty, or a numbered default.

    Raises:
        UserError: if it holds something.
    """
    from zofo.run.prepare import new_folder as configured

    if config.output_dir is not None:
        return configured(config)
    parts = [config.task.name, config.method, config.adapter.label, "smoothness"]
    name = "-".join(p for p in parts if p != "none")
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def saved_options(folder: Path) -> tuple[RunConfig, SmoothnessOptions]:
    """What a folder was begun with.

    Raises:
        UserError: if it is no folder of `zofo smoothness`.
    """
    path = folder / OPTIONS_FILE
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; name a folder of zofo smoothness to continue")
    if not path.is_file():
        raise UserError(f"{folder} holds no {OPTIONS_FILE}, so there is nothing to continue")
    return load_smoothness(path)


def _write_options(folder: Path, config: RunConfig, options: SmoothnessOptions) -> None:
    values = {**config.model_dump(), "smoothness": options.model_dump()}
    write_text(folder / OPTIONS_FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _like(block: Block) -> torch.Tensor:
    parameter = next(iter(block.parameters.values()))
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device)
